"""A tensor of keys or values that are evaluated when they are read.

Policies and attention take it for a tensor: they slice it and pick tokens from it by their slots,
and only these are evaluated. Every other operator gets all numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lychee_compile.kernels.reference.loads import Load


class LoadedTensor(Tensor):
    """Keys or values [B, Hkv, N, D], some tokens of a load or all of them."""

    load: Load
    begin: int
    """First token of the load that is shown."""
    facts: Tensor
    """A plain tensor of the same shape, dtype and device, of no memory and no meaning."""

    @staticmethod
    def of(load: Load, begin: int = 0, end: int | None = None) -> LoadedTensor:
        """Return the tokens [begin, end) of a load, or all of them."""
        batch, heads, tokens, channels = load.shape
        count = (tokens if end is None else end) - begin
        one = torch.zeros((1, 1, 1, 1), dtype=load.dtype, device=load.device)
        facts = one.expand(batch, heads, count, channels)
        shown = facts.as_subclass(LoadedTensor)
        shown.load, shown.begin, shown.facts = load, begin, facts
        return shown

    @property
    def tokens(self) -> int:
        """Number of tokens shown."""
        return self.facts.shape[2]

    def whole(self) -> Tensor:
        """Return all numbers as a plain tensor."""
        return self.load.span(self.begin, self.begin + self.tokens)

    def part(self, begin: int, end: int) -> LoadedTensor:
        """Return the tokens [begin, end) of those shown."""
        return LoadedTensor.of(self.load, self.begin + begin, self.begin + end)

    def row(self, number: int) -> LoadedTensor:
        """Return one row of the batch."""
        load = self.load
        one = replace(load, shape=(1, *load.shape[1:]), first_row=load.first_row + number)
        return LoadedTensor.of(one, self.begin, self.begin + self.tokens)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a function of PyTorch on a tensor of this kind, or on several."""
        kwargs = kwargs or {}
        if func in _FACTS:
            return func(*(each.facts if isinstance(each, LoadedTensor) else each for each in args))
        reader = _READERS.get(getattr(func, "__name__", ""))
        found = None
        if reader is not None and isinstance(args[0], LoadedTensor):
            found = reader(*args, **kwargs)
        return func(*_evaluated(args), **_evaluated(kwargs)) if found is None else found


def row_of(key: Tensor, number: int) -> Tensor:
    """Return a row of keys [B, Hkv, L, D], stored or computed: [1, Hkv, L, D]."""
    return key.row(number) if isinstance(key, LoadedTensor) else key[number : number + 1]


_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_contiguous,
}  # fmt: skip
"""Functions that ask for no number. The answer to `is_contiguous` is no, as a rule."""


def _evaluated(value: Any) -> Any:
    """Return arguments with all numbers of what is evaluated when it is read."""
    if isinstance(value, LoadedTensor):
        return value.whole()
    if isinstance(value, dict):
        return {name: _evaluated(each) for name, each in value.items()}
    return type(value)(map(_evaluated, value)) if type(value) in (list, tuple) else value


def _index_select(key: LoadedTensor, dim: int, index: Tensor) -> Tensor | None:
    return key.load.shared(index + key.begin) if dim % 4 == 2 else None


def _gather(key: LoadedTensor, dim: int, index: Tensor) -> Tensor | None:
    """Return whole tokens: each slot is repeated for all channels."""
    batch, heads, _, channels = key.facts.shape
    whole = (*index.shape[:2], index.shape[3]) == (batch, heads, channels)
    if dim % 4 != 2 or not whole or index.stride(3) != 0:
        return None
    return key.load.own(index[..., 0] + key.begin)


def _split(key: LoadedTensor, size: int, dim: int = 0) -> tuple[LoadedTensor, ...] | None:
    if dim % 4 != 2 or not isinstance(size, int):
        return None
    begins = range(0, key.tokens, size)
    return tuple(key.part(begin, min(begin + size, key.tokens)) for begin in begins)


def _getitem(key: LoadedTensor, places: Any) -> Tensor | None:
    """Return a part of the tokens, or tokens at slots of their own; None for other indices."""
    if not isinstance(places, tuple) or len(places) != 3:
        return None
    row, head, slot = places
    if isinstance(head, Tensor) or head != _ALL:
        return _at_heads(key, places)
    if (
        not isinstance(row, Tensor)
        and row == _ALL
        and isinstance(slot, slice)
        and slot.step in (None, 1)
    ):
        begin, end, _ = slot.indices(key.tokens)
        return key.part(begin, max(begin, end))
    if isinstance(row, Tensor) and isinstance(slot, Tensor) and row.dtype == slot.dtype:
        row, slot = torch.broadcast_tensors(row, slot)
        slot = torch.where(slot < 0, slot + key.tokens, slot)
        found = key.load.single(row.flatten(), slot.flatten() + key.begin)
        return found.unflatten(0, row.shape)
    return None


def _at_heads(key: LoadedTensor, places: tuple[Any, ...]) -> Tensor | None:
    """Return the tokens `slot` of each row and head, [B, Hkv, Tq, S, D], else None.

    key[arange(B)[:, None, None, None], arange(Hkv)[:, None, None], slot]
    """
    batch, heads = key.facts.shape[:2]
    if not all(isinstance(each, Tensor) for each in places):
        return None
    row, head, slot = places
    fits = slot.dim() == 4 and slot.shape[:2] == (batch, heads)
    ordered = tuple(row.shape) == (batch, 1, 1, 1) and tuple(head.shape) == (heads, 1, 1)
    if not fits or not ordered:
        return None
    order = torch.arange(batch, device=row.device), torch.arange(heads, device=row.device)
    if not (torch.equal(row.flatten(), order[0]) and torch.equal(head.flatten(), order[1])):
        return None
    slot = torch.where(slot < 0, slot + key.tokens, slot)
    return key.load.own(slot.flatten(2) + key.begin).unflatten(2, slot.shape[2:])


_ALL = slice(None)
_READERS: dict[str, Callable[..., Any]] = {
    "index_select": _index_select,
    "gather": _gather,
    "split": _split,
    "__getitem__": _getitem,
}
"""Functions that read some tokens, by the names of PyTorch's; they give None to be given all."""
