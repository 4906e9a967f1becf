"""Keys and values that are an expression of what is stored, evaluated for the rows that are read.

    at(0, b, h, kv, d) * at(1, b, h, kv, 0)       numbers of 8 bits, with a scale for each token

Names in an expression: `b`, `h`, `kv` and `d` are row, KV head, token and channel. `at(n, ...)` is
a number of the n-th tensor, in float32 at least. `entry(n, ...)` is an integer as it is, as a table
of pages holds them. `bits(n, ...)` is one in 64 bits, of which a part is taken. `size(n)` is the
n-th number of a load. `where` and the operators of Python are those of PyTorch.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Load:
    """Keys or values [B, Hkv, L, D] as an expression of tensors."""

    expression: str
    dtype: torch.dtype
    """Dtype of the keys or values."""
    tensors: tuple[Tensor, ...]
    """Tensors that the expression reads, of any shapes."""
    shape: tuple[int, int, int, int]
    """Batch, KV heads, tokens and channels."""
    numbers: tuple[int, ...] = ()
    """Sizes that the expression has besides, as that of a past before a tail."""
    first_row: int = 0
    """Number of the first row of the batch, in the expression."""

    @property
    def device(self) -> torch.device:
        """Device of the keys or values."""
        return self.tensors[0].device

    def span(self, begin: int, end: int) -> Tensor:
        """Return the tokens [begin, end) of all rows and heads: [B, Hkv, end - begin, D]."""
        batch, heads, _, channels = self.shape
        slot = torch.arange(begin, end, device=self.device)[:, None]
        found = _Reading(self, *self._all_rows(), slot, (begin, end)).result()
        return found.expand(batch, heads, end - begin, channels)

    def shared(self, slot: Tensor) -> Tensor:
        """Return the tokens `slot`, int64 [N], of all rows and heads: [B, Hkv, N, D]."""
        batch, heads, _, channels = self.shape
        found = _Reading(self, *self._all_rows(), slot[:, None]).result()
        return found.expand(batch, heads, len(slot), channels)

    def own(self, slot: Tensor) -> Tensor:
        """Return tokens of each row and head, `slot` int64 [B, Hkv, N]: [B, Hkv, N, D]."""
        found = _Reading(self, *self._all_rows(), slot[..., None]).result()
        return found.expand(*slot.shape, self.shape[3])

    def single(self, row: Tensor, slot: Tensor) -> Tensor:
        """Return tokens of all heads, `row` and `slot` int64 [N]: [N, Hkv, D]."""
        heads, channels = self.shape[1], self.shape[3]
        wide = (-1, 1, 1, 1)
        head = torch.arange(heads, device=self.device)[:, None, None]
        row = row + self.first_row
        found = _Reading(self, row.reshape(wide), head, slot.reshape(wide)).result()
        return found.expand(len(slot), heads, 1, channels)[:, :, 0]

    def _all_rows(self) -> tuple[Tensor, Tensor]:
        batch, heads, _, _ = self.shape
        row = torch.arange(self.first_row, self.first_row + batch, device=self.device)
        return row[:, None, None, None], torch.arange(heads, device=self.device)[:, None, None]


class _Reading:
    """One evaluation of a load, at indices that are broadcast to [B, Hkv, N, D]."""

    def __init__(
        self,
        load: Load,
        row: Tensor,
        head: Tensor,
        slot: Tensor,
        span: tuple[int, int] | None = None,
    ) -> None:
        self._load, self._span = load, span
        self._work = torch.promote_types(load.dtype, torch.float32)
        channel = torch.arange(load.shape[3], device=load.device)
        self._places = {"b": row, "h": head, "kv": slot, "d": channel}
        self._rows: dict[tuple[int | str | None, ...], Tensor] = {}
        self._inside: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Indices that are inside, by those that they come from and a size."""

    def result(self) -> Tensor:
        """Return the numbers, in the dtype of the load; sizes that they do not depend on are 1."""
        readers = {"at": self._at, "entry": self._entry, "bits": self._bits}
        sizes = self._load.numbers.__getitem__
        names = {**self._places, **readers, "where": _where, "size": sizes}
        found = eval(_compiled(self._load.expression), {"__builtins__": {}}, names)
        return found[(None,) * (4 - found.dim())].to(self._load.dtype)

    def _at(self, number: int, *places: Any) -> Tensor:
        """Return numbers of a tensor in float32 at least."""
        return self._entry(number, *places).to(self._work)

    def _bits(self, number: int, *places: Any) -> Tensor:
        """Return integers of a tensor in 64 bits."""
        return self._entry(number, *places).long()

    def _entry(self, number: int, *places: Any) -> Tensor:
        """Return entries of a tensor at places, each an int or a tensor."""
        tensor = self._load.tensors[number]
        if not places:
            return tensor
        *outer, last = places
        if any(self._runs_over_channels(each) for each in outer):
            return tensor[tuple(map(self._within, places, tensor.shape))]
        rows = self._known_rows(number, outer)
        if isinstance(last, int):
            return rows[..., last, None]
        if last is self._places["d"] and rows.shape[-1] == len(last):
            return rows
        last = _inside(last, rows.shape[-1])
        if last.dim() == 1:
            return rows.index_select(-1, last)
        shape = torch.broadcast_shapes((*rows.shape[:-1], 1), last.shape)
        wide = rows.expand(*shape[:-1], rows.shape[-1])
        return wide.gather(-1, last.expand(shape))

    def _known_rows(self, number: int, outer: Sequence[Any]) -> Tensor:
        """Return `_rows_of` a tensor, which several parts of the expression may read."""
        names = {id(place): name for name, place in self._places.items()}
        key = (number, *(each if isinstance(each, int) else names.get(id(each)) for each in outer))
        if None in key:
            return self._rows_of(self._load.tensors[number], outer)
        if key not in self._rows:
            self._rows[key] = self._rows_of(self._load.tensors[number], outer)
        return self._rows[key]

    def _rows_of(self, tensor: Tensor, outer: Sequence[Any]) -> Tensor:
        """Return vectors along the last dimension of a tensor: [..., S]."""
        if not outer:
            return tensor
        whole = self._whole_rows(tensor, outer)
        if whole is not None:
            return whole
        flat = [
            each if isinstance(each, int) else self._within(each, size).squeeze(-1)
            for each, size in zip(outer, tensor.shape[:-1], strict=True)
        ]
        return _select(tensor, flat)

    def _whole_rows(self, tensor: Tensor, outer: Sequence[Any]) -> Tensor | None:
        """Return a view if the tokens are side by side and each place is an index by itself."""
        order = [name for name, place in self._places.items() for each in outer if each is place]
        batch, heads, _, _ = self._load.shape
        if self._span is None or len(order) != len(outer) or len(set(order)) != len(order):
            return None
        begin, end = self._span
        dims = []
        for name, size in (("b", batch), ("h", heads), ("kv", end - begin)):
            at = next((n for n, each in enumerate(outer) if each is self._places[name]), None)
            dims.append(at)
            if name == "kv" and at is not None:
                if tensor.shape[at] < end:
                    return None
                tensor = tensor.narrow(at, begin, size)
            elif name == "b" and at is not None:
                if tensor.shape[at] < self._load.first_row + size:
                    return None
                tensor = tensor.narrow(at, self._load.first_row, size)
            elif at is not None and tensor.shape[at] != size:
                return None
        view = tensor.permute([*(at for at in dims if at is not None), tensor.dim() - 1])
        for dim, at in enumerate(dims):
            view = view.unsqueeze(dim) if at is None else view
        return view

    def _runs_over_channels(self, place: Any) -> bool:
        return isinstance(place, Tensor) and place.shape[-1] > 1

    def _within(self, place: Any, size: int) -> Any:
        """Return an index that is inside; rows and heads are so by themselves."""
        alone = isinstance(place, int) or any(place is each for each in self._places.values())
        if alone and (place is not self._places["kv"] or size >= self._load.shape[2]):
            return place
        if (id(place), size) not in self._inside:
            self._inside[id(place), size] = place, _inside(place, size)
        return self._inside[id(place), size][1]


def _select(tensor: Tensor, places: Sequence[int | Tensor]) -> Tensor:
    """Return the vectors along the last dimension of a tensor at places that are inside.

    Where memory allows it, whole vectors are copied, which is faster than number by number.
    """
    if not tensor.is_contiguous() or tensor.dtype not in _COPIED:
        return tensor[tuple(places)]
    row: int | Tensor = 0
    for place, size in zip(places, tensor.shape[:-1], strict=True):
        row = row * size + (place % size if isinstance(place, int) else place.long())
    if isinstance(row, int):
        return tensor[tuple(places)]
    vectors = tensor.view(-1, tensor.shape[-1]).index_select(0, row.flatten())
    return vectors.view(*row.shape, tensor.shape[-1])


_COPIED = (
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
)  # fmt: skip
"""Dtypes of which whole vectors are copied."""


def _inside(place: Tensor, size: int) -> Tensor:
    """Return an index counted from the front, and inside.

    It may be outside in the part of a choice that is not taken.
    """
    return torch.where(place < 0, place + size, place).clamp(0, size - 1)


@lru_cache(maxsize=256)
def _compiled(expression: str) -> Any:
    """Return the code of an expression, in which a part that comes again is evaluated once."""
    tree = ast.parse(expression, mode="eval")
    met = Counter(ast.dump(node) for node in ast.walk(tree) if isinstance(node, _PARTS))
    return compile(ast.fix_missing_locations(_Once(met).visit(tree)), "<load>", "eval")


_PARTS = (ast.Call, ast.BinOp)
"""Kinds of parts of an expression that take time."""


class _Once(ast.NodeTransformer):
    """Gives a name to each part that comes again, where it comes first."""

    def __init__(self, met: Counter[str]) -> None:
        self._met = met
        self._names: dict[str, str] = {}

    def visit(self, node: ast.AST) -> Any:
        """Return what stands for a part."""
        text = ast.dump(node)
        if not isinstance(node, _PARTS) or self._met[text] == 1:
            return self.generic_visit(node)
        if text in self._names:
            return ast.Name(self._names[text], ast.Load())
        first = self.generic_visit(node)
        assert isinstance(first, ast.expr)
        name = self._names[text] = f"part_{len(self._names)}"
        return ast.NamedExpr(ast.Name(name, ast.Store()), first)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, bool):
        return yes if condition else no
    return torch.where(condition, yes, no)
