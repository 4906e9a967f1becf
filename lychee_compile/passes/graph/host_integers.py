"""Let the host count the numbers that a graph only counts up, such as the length of a cache.

A window layer of transformers' static cache keeps a Python int besides its tensors:

    self.cumulative_length_int += key_states.shape[-2]

Dynamo hands it to the graph as a symbolic input, and the sum back as an output. CUDA graphs are
recorded for each value of an integer input: at every step anew, though no tensor depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from lychee_compile.torch_private import symbols_of


@dataclass(frozen=True)
class HostIntegers:
    """Integer inputs, and outputs made of them alone, that were taken out of a graph."""

    kept: list[int]
    """Positions of the inputs that the graph still takes."""
    outputs: list[int]
    """Positions, among the former outputs, of those that the host computes."""
    count: torch.fx.GraphModule
    """A graph from all former inputs to the outputs that the host computes."""

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function with the former inputs and outputs that calls `compiled`."""

        def run(*args: Any) -> Any:
            results = list(compiled(*(args[place] for place in self.kept)))
            for place, value in zip(self.outputs, self.count(*args), strict=True):
                results.insert(place, value)
            return results

        return run


def take_out_integers(gm: torch.fx.GraphModule) -> HostIntegers | None:
    """Take integers that no tensor of `gm` depends on out of it; None if there are none."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    results = output.args[0]
    if not isinstance(results, (tuple, list)):
        return None
    tensors = [each.meta.get("val") for each in placeholders if not _int(each)]
    shaping = set().union(*map(symbols_of, tensors))
    counted = {
        node
        for node in placeholders
        if _int(node) and not symbols_of(node.meta["val"]) & shaping and _counts_only(node)
    }
    places = [
        place
        for place, result in enumerate(results)
        if isinstance(result, torch.fx.Node) and _inputs_of(result) & counted
    ]
    if not places:
        return None
    count = _counting(placeholders, [results[place] for place in places])
    output.args = (type(results)(each for n, each in enumerate(results) if n not in set(places)),)
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and (node in counted or (_int(node) and node.op == "call_function")):
            gm.graph.erase_node(node)
    gm.recompile()
    kept = [n for n, node in enumerate(placeholders) if node not in counted]
    return HostIntegers(kept, places, count)


def _int(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _counts_only(placeholder: torch.fx.Node) -> bool:
    """True if nothing but integers is made of a placeholder."""
    waiting, seen = [placeholder], set()
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.op == "output" or user in seen:
                continue
            others = user.all_input_nodes
            if not _int(user) or not all(_int(each) for each in others):
                return False
            seen.add(user)
            waiting.append(user)
    return True


def _inputs_of(node: torch.fx.Node) -> set[torch.fx.Node]:
    """Return the placeholders that an integer is made of; none if `node` is no integer."""
    if not _int(node):
        return set()
    if node.op == "placeholder":
        return {node}
    return set().union(*(_inputs_of(each) for each in node.all_input_nodes))


def _counting(
    placeholders: Sequence[torch.fx.Node], results: Sequence[torch.fx.Node]
) -> torch.fx.GraphModule:
    """Return a graph that computes nothing but the integers `results`."""
    graph = torch.fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in placeholders}

    def copied(node: torch.fx.Node) -> torch.fx.Node:
        if node not in copies:
            for each in node.all_input_nodes:
                copied(each)
            copies[node] = graph.node_copy(node, lambda each: copies[each])
        return copies[node]

    graph.output([copied(each) for each in results])
    return torch.fx.GraphModule(torch.nn.Module(), graph)
