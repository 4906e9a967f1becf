"""Erase from a graph everything that nobody reads, writes included.

FX keeps every operator that writes. A rewritten attention may leave such operators behind, as those
that make the blocks of FlexAttention:

    blocks = new_zeros(...)
    index_put_(blocks, where, ones)
"""

from __future__ import annotations

import torch.fx

from lychee_compile.passes.graph.aliasing import is_part, storage_of, written_by
from lychee_compile.passes.graph.dataflow import operator_key
from lychee_compile.passes.graph.operators import PURE_CALLS
from lychee_compile.torch_private import is_foreign


def erase_dead_code(gm: torch.fx.GraphModule) -> None:
    """Keep only inputs, everything that outputs come from, and what has an effect outside.

    A write stays if anything reads the memory that it writes to, before or after. Constants that
    no node reads go too: compilers take every one that a module holds as an input.
    """
    graph = gm.graph
    writes: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        for target in written_by(node):
            writes.setdefault(storage_of(target), []).append(node)
    waiting = [node for node in graph.nodes if _has_effect(node)]
    live = set(waiting)
    while waiting:
        node = waiting.pop()
        storages = map(storage_of, node.all_input_nodes)
        written = [write for storage in storages for write in writes.get(storage, ())]
        fresh = {*node.all_input_nodes, *written} - live
        live |= fresh
        waiting += fresh
    for node in reversed(list(graph.nodes)):
        if node not in live:
            graph.erase_node(node)
    gm.delete_all_unused_submodules()
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in gm.named_buffers(recurse=False) if name not in read]:
        delattr(gm, name)


def _has_effect(node: torch.fx.Node) -> bool:
    """True if a node must stay though nobody reads it, as operators of others than PyTorch do."""
    if is_foreign(node):
        return True
    targets = [storage_of(each) for each in written_by(node)]
    if targets and all(map(_is_made_here, targets)):
        return False
    known = operator_key(node) or node.target in PURE_CALLS
    return bool(node.is_impure()) or (node.op == "call_function" and not known)


def _is_made_here(memory: torch.fx.Node) -> bool:
    """True if an operator of the graph made some memory."""
    return memory.op == "call_function" and not is_foreign(memory) and not is_part(memory)
