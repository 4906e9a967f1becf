"""Find the part of a graph that is one attention, from its first product to its output."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.graph.aliasing import storage_of, written_by
from lychee_compile.passes.graph.dataflow import operator_key
from lychee_compile.passes.reasons import Reason


class Order:
    """The nodes of a graph in order, with the place of each."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.place = {node: place for place, node in enumerate(self.nodes)}


def region_between(
    first: torch.fx.Node, last: torch.fx.Node, order: Order
) -> frozenset[torch.fx.Node]:
    """Return every node on a path from `first` to `last`, both included: a convex region."""
    flow = nx.DiGraph()
    flow.add_nodes_from((first, last))
    end = order.place[last]
    waiting = [first]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if order.place[user] <= end:
                if user not in flow:
                    waiting.append(user)
                flow.add_edge(node, user)
    return frozenset(nx.ancestors(flow, last)) | {last}


def used_elsewhere(
    region: frozenset[torch.fx.Node], last: torch.fx.Node, weights: torch.fx.Node
) -> Reason | None:
    """Return who else uses an interior value of the region; None if nobody does."""
    for node in sorted(region - {last}):
        for user in node.users:
            if user in region:
                continue
            what = "weights" if _is_behind(node, weights, region) else "scores"
            if user.op == "output" or _only_returned(user):
                return reasons.WEIGHTS_RETURNED(what=what)
            return reasons.WEIGHTS_USED(what=what, user=operator_key(user) or user.name)
    return None


def _only_returned(node: torch.fx.Node) -> bool:
    """True if an output of the graph is near behind `node`."""
    seen = 0
    waiting = [node]
    while waiting and seen < 8:
        seen += 1
        each = waiting.pop()
        if each.op == "output":
            return True
        waiting.extend(each.users)
    return False


def _is_behind(
    node: torch.fx.Node, weights: torch.fx.Node, region: frozenset[torch.fx.Node]
) -> bool:
    """True if `node` is computed from `weights`."""
    waiting, seen = [node], set()
    while waiting:
        each = waiting.pop()
        if each is weights:
            return True
        fresh = [
            source for source in each.all_input_nodes if source in region and source not in seen
        ]
        seen.update(fresh)
        waiting.extend(fresh)
    return False


def overwritten_before(
    last: torch.fx.Node, reads: Iterable[tuple[torch.fx.Node, torch.fx.Node]], order: Order
) -> bool:
    """True if memory is written between a read and `last`, where a rewritten graph would read it.

    `reads` are tensors, each with the node that reads it now.
    """
    earliest: dict[torch.fx.Node, int] = {}
    for tensor, reader in reads:
        memory, place = storage_of(tensor), order.place[reader]
        earliest[memory] = min(place, earliest.get(memory, place))
    for node in order.nodes[min(earliest.values(), default=0) : order.place[last]]:
        for target in written_by(node):
            read_at = earliest.get(storage_of(target))
            if read_at is not None and read_at < order.place[node]:
                return True
    return False
