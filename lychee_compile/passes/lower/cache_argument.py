"""Places of key caches, and of what keys are computed from, among inputs and outputs of a graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.passes.detect.caching.call_numbers import NumberPlace


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
