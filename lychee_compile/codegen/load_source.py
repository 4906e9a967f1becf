"""Triton source of keys and values that are an expression of what is stored.

    key_0[b, h, kv, d] * key_1[b, h, kv, 0]

    number_0 = tl.load(key_0 + ..., mask=there & (d < HEAD_DIM), other=0).to(tl.float32)
    number_1 = tl.load(key_1 + ..., mask=there, other=0).to(tl.float32)
    found = number_0 * number_1

Each element is read once, be it in several places of an expression. Numbers are float32. Integers
are indices that a tensor holds, as a table of pages does, and numbers that bits are taken from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from lychee_compile.codegen.expressions import indices_of
from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.load_reads import Element, Wanted, in_range, tensor_of, wanted_by
from lychee_compile.codegen.printer import print_expression
from lychee_compile.codegen.specification import KV, KV_HEAD, B, D, LoadSpec, Stored

ITEM_BYTES = {
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float16": 2, "bfloat16": 2, "float32": 4,
    "int8": 1, "uint8": 1, "int16": 2, "int32": 4, "int64": 8,
}  # fmt: skip
"""Dtypes of which numbers may be, and their bytes."""
INDICES = frozenset(("int32", "int64"))
"""Dtypes of which indices may be."""
_PLACES = (B, KV_HEAD, KV, D)


@dataclass(frozen=True)
class Read:
    """One element that is read into a variable."""

    name: str
    """Name of the variable."""
    address: str
    mask: str
    """Slots and channels that are read; "": it is one number, or the same for all."""
    other: str
    """Zero, for slots and channels that are not read."""
    cast: str
    """Text after the load."""


@dataclass(frozen=True)
class LoadSource:
    """Triton source of keys or values."""

    reads: list[Read]
    """Elements that are read, in an order in which each knows its indices."""
    result: str
    bytes_read: int
    """Bytes of what is read for one key or value."""


@lru_cache(maxsize=256)
def load_source(load: LoadSpec, channels: str, count: int) -> LoadSource:
    """Return the source of `load`, over `b`, `h`, `kv`, `d`, `there` and the names of tensors.

    `channels` is the constant that is the number of channels, `count`. Raises Unprintable.
    """
    return _Writer(load, channels, count).source()


@dataclass
class _Writer:
    load: LoadSpec
    channels: str
    count: int
    reads: dict[tuple[Element, bool, Boolean], tuple[sympy.Symbol, Read]] = field(
        default_factory=dict
    )
    """Variables of the elements that were read so far, as indices or not, and when they count."""
    depends: dict[sympy.Symbol, frozenset[sympy.Symbol]] = field(default_factory=dict)
    """Places that each variable depends on."""
    bytes_read: int = 0

    def source(self) -> LoadSource:
        names: dict[sympy.Basic, sympy.Symbol] = {}
        for each in wanted_by(self.load, self.count):
            symbol = self._read(each.element, each.when, index=False, whole=self._is_cut(each))
            names |= dict.fromkeys(each.stands_for, symbol)
        reads = [read for _, read in self.reads.values()]
        result = self._print(sympy.sympify(self.load.element).xreplace(names))
        return LoadSource(reads, result, self.bytes_read)

    def _is_cut(self, wanted: Wanted) -> bool:
        """True if bits of an element are a number: a quotient or remainder of an integer."""
        cuts = sympy.sympify(self.load.element).atoms(sympy.Mod, sympy.floor)
        tensor = tensor_of(wanted.element, self.load)
        whole = tensor is not None and "int" in tensor.dtype
        return whole and any(cut.has(each) for cut in cuts for each in wanted.stands_for)

    def _read(
        self, element: Element, when: Boolean, index: bool, whole: bool = False
    ) -> sympy.Symbol:
        """Return the variable of an element that counts under a condition.

        It is an integer if the element is an index, or a number that is `whole`.
        """
        if (element, index, when) in self.reads:
            return self.reads[element, index, when][0]
        tensor, indices = tensor_of(element, self.load), indices_of(element)
        if tensor is None or tensor.dtype not in (INDICES if index else ITEM_BYTES):
            kind = "indices" if index else "numbers"
            raise Unprintable(f"{element}: {tensor and tensor.dtype} is no dtype of {kind}")
        places = [self._place(each, when) for each in indices]
        name = f"{'index' if index else 'number'}_{len(self.reads)}"
        unsigned = {"nonnegative": True} if whole and tensor.dtype == "uint8" else {}
        facts = {"integer": True, **unsigned} if index or whole else {"real": True}
        symbol = sympy.Symbol(name, **facts)
        depends = self.depends[symbol] = self._depends(places)
        self.bytes_read += ITEM_BYTES[tensor.dtype] * (self.count if D in depends else 1)
        address = " + ".join([tensor.name, *self._offsets(tensor.name, places)])
        mask = self._mask(depends, self._needed(tensor, places, when))
        other = "0.0" if "float" in tensor.dtype else "0"  # no integer is cast to 8 bits
        cast = ".to(tl.int32)" if whole else ".to(tl.float32)"
        cast = "" if index or tensor.dtype == ("int64" if whole else "float32") else cast
        self.reads[element, index, when] = symbol, Read(name, address, mask, other, cast)
        return symbol

    def _place(self, index: sympy.Expr, when: Boolean) -> sympy.Expr:
        """Return an index in which variables stand for what tensors hold."""
        held = sorted(index.atoms(sympy.Indexed), key=sympy.default_sort_key)
        return index.xreplace({each: self._read(each, when, index=True) for each in held})

    def _depends(self, places: Iterable[sympy.Basic]) -> frozenset[sympy.Symbol]:
        free = set().union(*(place.free_symbols for place in places), ())
        inner = set().union(*(self.depends.get(each, frozenset()) for each in free), ())
        return frozenset((free | inner) & set(_PLACES))

    def _offsets(self, name: str, places: Sequence[sympy.Expr]) -> list[str]:
        """Print the products of indices and strides, in 64 bits but for channels."""
        offsets = []
        for dim, place in enumerate(places):
            text = self._print(place)
            if place.free_symbols - {D}:
                text = f"tl.cast({text}, tl.int64)"
            elif not place.is_Atom:
                text = f"({text})"
            if place != 0:
                offsets.append(f"{text} * {name}_stride_{dim}")
        return offsets

    def _needed(self, tensor: Stored, places: Sequence[sympy.Expr], when: Boolean) -> Boolean:
        """Return the part of a condition without which an index might be out of range."""
        depends = self._depends(places)
        if KV in when.free_symbols:  # keys of a past and of a tail
            when = _for_any(when, {KV, D} - depends)
        free = self._depends([when])
        safe = free == {D} and in_range(tensor, places, self.count)
        if safe or not free & depends:
            return sympy.true
        if not free <= depends:
            raise Unprintable(f"{tensor.name} is read where {when}")
        return when

    def _mask(self, depends: frozenset[sympy.Symbol], when: Boolean) -> str:
        masks = ["there"] if KV in depends else []
        masks += [f"(d < {self.channels})"] if D in depends else []
        masks += [f"({self._print(when)})"] if when != sympy.true else []
        return " & ".join(masks)

    def _print(self, value: sympy.Basic) -> str:
        variables = *_PLACES, *self.load.numbers, *self.depends
        return print_expression(value, {}, variables=variables)


def _for_any(when: Boolean, places: Collection[sympy.Symbol]) -> Boolean:
    """Return a condition that holds if `when` does for some values of `places`, in short form."""
    positive = sympy.to_nnf(when)
    loose = [each for each in positive.atoms(Relational) if each.has(*places)] if places else []
    return sympy.simplify_logic(positive.xreplace(dict.fromkeys(loose, sympy.true)))
