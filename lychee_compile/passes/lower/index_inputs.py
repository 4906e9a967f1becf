"""Graph inputs that stand for the indexes of key caches.

graph(keys, values, query)                      before
graph(keys, values, query, lychee_index_0)      after, the index of `keys`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx
from torch import Tensor

from lychee_compile import torch_private
from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.passes.detect.caching.caches import CacheBinding, Watched
from lychee_compile.passes.detect.caching.call_numbers import number_place
from lychee_compile.passes.detect.caching.load_text import load_text
from lychee_compile.passes.detect.caching.parts import input_of, view_of_part
from lychee_compile.passes.graph.aliasing import is_part
from lychee_compile.passes.graph.dataflow import value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.cache_argument import CacheArgument, TensorPlace


@dataclass(frozen=True)
class IndexInput:
    """A graph input that stands for the index of one key cache."""

    node: torch.fx.Node
    fake: Tensor
    """uint8 [size], the memory of a GPU index; or int64 [2] on the CPU, a handle to an index."""
    cache: CacheArgument
    """Places of the cache among inputs and outputs."""


class IndexInputs:
    """Adds one input per key cache to a graph, in the order in which they are asked for."""

    def __init__(self, gm: torch.fx.GraphModule, emit: Emitter) -> None:
        self._gm, self._emit = gm, emit
        self._own = gm.graph.find_nodes(op="placeholder")
        self._added: dict[object, IndexInput] = {}

    @property
    def added(self) -> list[IndexInput]:
        """All inputs that were added."""
        return list(self._added.values())

    def node_for(self, binding: CacheBinding, use: CacheUse | None = None) -> torch.fx.Node:
        """Return the input for the index of a cache, and add it for the first to ask.

        Attentions share an input if they read the same cache through indexes of the same layout.
        """
        key = binding if use is None else _identity(binding, use)
        if key not in self._added:
            self._added[key] = self._new(binding, use)
            self._emit.on_undo(lambda: self._remove(key))
        return self._added[key].node

    def _new(self, binding: CacheBinding, use: CacheUse | None) -> IndexInput:
        name = f"lychee_index_{len(self._added)}"
        if use is None or use.layout is None:
            size, dtype, device = 2, torch.int64, torch.device("cpu")
        else:
            size, dtype, device = use.layout.size, torch.uint8, value_of(binding.key).device
        mode = self._emit.mode
        node, fake = torch_private.add_state_input(self._gm, name, size, dtype, device, mode)
        place = self._place(binding)
        outside = binding.outside_dim
        token_dim = binding.token_dim if outside is None else outside
        beside = tuple(map(self._place, binding.watched))
        of_keys = () if binding.load is None else binding.load.numbers
        argument = CacheArgument(
            place.source, place.output, token_dim, use, binding.reads_only, place.part, beside,
            _text_of_keys(binding),
            tuple(number_place(each, self._own, each in of_keys) for each in binding.numbers),
        )  # fmt: skip
        return IndexInput(node, fake, argument)

    def _place(self, tensor: CacheBinding | Watched) -> TensorPlace:
        if tensor.source is None:
            return TensorPlace(None, tensor.output, None)
        source = self._own.index(input_of(tensor.source))
        part = view_of_part(tensor.source) if is_part(tensor.source) else None
        page = tensor.page if isinstance(tensor, Watched) else 0
        return TensorPlace(source, tensor.output, part, page)

    def _remove(self, key: object) -> None:
        self._gm.graph.erase_node(self._added.pop(key).node)


def _identity(binding: CacheBinding, use: CacheUse) -> object:
    """Return what attentions have in common that share a GPU index."""
    text = _text_of_keys(binding)
    leaves = () if binding.load is None else tuple(leaf for _, leaf in binding.load.leaves)
    return binding.source, binding.output, use.layout, text, leaves


def _text_of_keys(binding: CacheBinding) -> str | None:
    """Return the expression of the keys of a cache; None if they are what it holds."""
    return None if binding.load is None else load_text(binding.load, binding.numbers)
