"""Graph inputs that stand for the indexes of key caches.

graph(keys, values, query)                      before
graph(keys, values, query, lychee_index_0)      after, the index of `keys`
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.fx
from torch import Tensor

from lychee_compile import torch_private
from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.passes.detect.caching.caches import CacheBinding, Watched
from lychee_compile.passes.detect.caching.call_numbers import NumberPlace, number_place
from lychee_compile.passes.detect.caching.load_text import load_text
from lychee_compile.passes.detect.caching.parts import input_of, view_of_part
from lychee_compile.passes.graph.aliasing import is_part
from lychee_compile.passes.graph.dataflow import value_of
from lychee_compile.passes.graph.emitter import Emitter


@dataclass(frozen=True)
class TensorPlace:
    """Place of a tensor among the inputs and outputs of a graph."""

    source: int | None
    """Number of the input that is the tensor before a call, or holds it; None if it begins here."""
    output: int | None
    """Number of the output that is the tensor after a call; None if it is written in place."""
    part: Callable[[Tensor], Tensor] | None
    """Shows the tensor in the input if it is a part of that; None if it is all of it."""
    page: int = 0
    """Number of tokens of a page if the tensor is a table [B, P] of pages, else 0."""

    def before(self, inputs: Sequence[object]) -> Tensor:
        """Return the tensor as a call begins with it."""
        assert self.source is not None
        return _tensor(inputs[self.source], self.part)

    def after(self, inputs: Sequence[object], outputs: Sequence[object]) -> Tensor:
        """Return the tensor as a call leaves it."""
        return self.before(inputs) if self.output is None else _tensor(outputs[self.output], None)


def _tensor(value: object, part: Callable[[Tensor], Tensor] | None) -> Tensor:
    assert isinstance(value, Tensor)
    return value if part is None else part(value)


@dataclass(frozen=True)
class CacheArgument:
    """Position of one key cache among the inputs and outputs of a compiled graph."""

    source: int | None
    """Number of the input that is the cache before the call; None if a growing cache begins."""
    output: int | None
    """Number of the output that is the grown cache; None if the cache is written in place."""
    token_dim: int = 2
    """Dimension of the cache that runs over tokens."""
    use: CacheUse | None = None
    """Use of the cache by generated kernels; None: the index is the reference's."""
    reads_only: bool = False
    """True if the graph does not write the cache."""
    part: Callable[[Tensor], Tensor] | None = None
    """Shows the cache in the input if it is a part of that; None if it is all of it."""
    beside: tuple[TensorPlace, ...] = ()
    """Other tensors that the keys are computed from."""
    keys: Hashable = None
    """Expression of keys of what the cache holds; None if they are what it holds."""
    numbers: tuple[NumberPlace, ...] = ()
    """Sizes that the expressions of keys and values take from a call."""

    @property
    def pages(self) -> list[int]:
        """Sizes of the pages that the other tensors list, each 0 if it is no table."""
        return [each.page for each in self.beside]

    @property
    def stays(self) -> bool:
        """True if a call leaves all tensors in place."""
        return self.output is None and all(each.output is None for each in self.beside)

    def given(self, inputs: Sequence[object]) -> Tensor | None:
        """Return the input that holds the cache; None if a growing cache begins."""
        if self.source is None:
            return None
        given = inputs[self.source]
        assert isinstance(given, Tensor)
        return given

    def shown(self, given: Tensor | None) -> Tensor | None:
        """Return the cache in the input `given`, as a call begins with it."""
        return given if given is None or self.part is None else self.part(given)

    def numbers_of(self, inputs: Sequence[object]) -> list[int]:
        """Return the sizes that the expressions of keys and values take from a call."""
        return [each.of(inputs) for each in self.numbers]

    def key_numbers_of(self, inputs: Sequence[object]) -> list[int]:
        """Return those of these sizes that keys depend on."""
        return [each.of(inputs) for each in self.numbers if each.of_keys]

    def beside_before(self, inputs: Sequence[object]) -> list[Tensor]:
        """Return the other tensors as a call begins with them."""
        return [each.before(inputs) for each in self.beside]

    def beside_after(self, inputs: Sequence[object], outputs: Sequence[object]) -> list[Tensor]:
        """Return the other tensors as a call leaves them."""
        return [each.after(inputs, outputs) for each in self.beside]

    def after(self, cache: Tensor | None, outputs: Sequence[object]) -> Tensor:
        """Return the cache as a call leaves it: an output, or `cache`, which it began with."""
        after = cache if self.output is None else outputs[self.output]
        assert isinstance(after, Tensor)
        return after


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
