"""Triton source of keys and values that are an expression of what is stored.

    key_0[b, h, kv, d] * key_1[b, h, kv, 0]

    number_0 = tl.load(key_0 + ..., mask=there & (d < HEAD_DIM), other=0).to(tl.float32)
    number_1 = tl.load(key_1 + ..., mask=there, other=0).to(tl.float32)
    found = number_0 * number_1

Each element is read once, be it in several places of an expression. Numbers are float32, and
indices that a tensor holds, as a table of pages does, are integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import sympy
from sympy.logic.boolalg import Boolean

from lychee_compile.codegen.expressions import indices_of
from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.printer import print_expression
from lychee_compile.codegen.specification import KV, KV_HEAD, B, D, LoadSpec, Stored

Element = sympy.Symbol | sympy.Indexed
"""An element of a tensor; one without dimensions is a symbol."""
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
    reads: dict[tuple[Element, bool], tuple[sympy.Symbol, Read]] = field(default_factory=dict)
    """Variables of the elements that were read so far, as numbers or as indices."""
    depends: dict[sympy.Symbol, frozenset[sympy.Symbol]] = field(default_factory=dict)
    """Places that each variable depends on."""
    bytes_read: int = 0

    def source(self) -> LoadSource:
        element = sympy.sympify(self.load.element)
        names: dict[sympy.Basic, sympy.Symbol] = {}
        for each, others, where in self._together(self._conditions(element)):
            names |= dict.fromkeys(others, self._read(each, where, index=False))
        reads = [read for _, read in self.reads.values()]
        return LoadSource(reads, self._print(element.xreplace(names)), self.bytes_read)

    def _conditions(self, element: sympy.Basic) -> dict[Element, Boolean]:
        """Return the elements of tensors that are numbers of an expression, and when they count."""
        found: dict[Element, Boolean] = {}
        waiting: list[tuple[sympy.Basic, Boolean]] = [(element, sympy.true)]
        while waiting:
            value, when = waiting.pop(0)
            if self._tensor(value) is not None:
                found[value] = sympy.Or(found.get(value, sympy.false), when)
            elif isinstance(value, sympy.Piecewise):
                before: Boolean = sympy.false
                for each, condition in value.args:
                    waiting.append((each, sympy.And(when, condition, sympy.Not(before))))
                    waiting.append((condition, when))
                    before = sympy.Or(before, condition)
            else:
                waiting += [(each, when) for each in value.args]
        return found

    def _together(
        self, conditions: dict[Element, Boolean]
    ) -> list[tuple[Element, list[Element], Boolean]]:
        """Return what to read, the elements that it stands for, and when it counts.

        Two elements of a tensor of which always one counts are read at once: as x[d + 8] for d < 8
        and x[d - 8] for other channels, in a rotation.
        """
        found: list[tuple[Element, list[Element], Boolean]] = []
        waiting = dict(conditions)
        while waiting:
            element, when = next(iter(waiting.items()))
            del waiting[element]
            other = next((each for each in waiting if self._completes(element, when, each, waiting)), None)
            if other is None:
                found.append((element, [element], when))
                continue
            del waiting[other]
            places = [
                mine if mine == theirs else sympy.Piecewise((mine, when), (theirs, sympy.true))
                for mine, theirs in zip(element.indices, other.indices, strict=True)
            ]
            whole = sympy.Indexed(element.base, *places)
            found.append((whole, [element, other], sympy.true))
        return found

    def _completes(
        self, element: Element, when: Boolean, other: Element, conditions: dict[Element, Boolean]
    ) -> bool:
        """True if always one of two elements of a tensor counts, which depends on the channel."""
        both = isinstance(element, sympy.Indexed) and isinstance(other, sympy.Indexed)
        if not both or element.base != other.base or self._needless(element, when):
            return False
        channels = when.free_symbols | conditions[other].free_symbols == {D}
        return channels and sympy.Equivalent(when, sympy.Not(conditions[other])) == sympy.true

    def _needless(self, element: Element, when: Boolean) -> bool:
        """True if an element may be read although it does not count."""
        tensor = self._tensor(element)
        assert tensor is not None
        return self._in_range(tensor, list(indices_of(element)))

    def _tensor(self, value: sympy.Basic) -> Stored | None:
        name = value.name if isinstance(value, sympy.Symbol) else None
        name = str(value.base) if isinstance(value, sympy.Indexed) else name
        return next((each for each in self.load.tensors if each.name == name), None)

    def _read(self, element: Element, when: Boolean, index: bool) -> sympy.Symbol:
        """Return the variable of an element that counts under a condition."""
        if (element, index) in self.reads:
            return self.reads[element, index][0]
        tensor, indices = self._tensor(element), indices_of(element)
        assert tensor is not None
        if tensor.dtype not in (INDICES if index else ITEM_BYTES):
            raise Unprintable(f"{tensor.dtype} is no dtype of {'indices' if index else 'numbers'}")
        inner = {
            each: self._read(each, when, index=True)
            for place in indices
            for each in place.atoms(sympy.Indexed)
        }
        places = [place.xreplace(inner) for place in indices]
        name = f"{'index' if index else 'number'}_{len(self.reads)}"
        symbol = sympy.Symbol(name, integer=True) if index else sympy.Symbol(name, real=True)
        self.depends[symbol] = self._depends(places)
        address = " + ".join([tensor.name, *self._offsets(tensor.name, places)])
        mask = self._mask(self.depends[symbol], self._needed(tensor, places, when))
        cast = "" if index else "" if tensor.dtype == "float32" else ".to(tl.float32)"
        size = ITEM_BYTES[tensor.dtype]
        self.bytes_read += size * (self.count if D in self.depends[symbol] else 1)
        other = "0.0" if "float" in tensor.dtype else "0"  # no integer is cast to 8 bits
        self.reads[element, index] = symbol, Read(name, address, mask, other, cast)
        return symbol

    def _depends(self, places: Iterable[sympy.Basic]) -> frozenset[sympy.Symbol]:
        free = set().union(*(place.free_symbols for place in places), ())
        inner = set().union(*(self.depends.get(each, frozenset()) for each in free), ())
        return frozenset((free | inner) & set(_PLACES))

    def _offsets(self, name: str, places: list[sympy.Expr]) -> list[str]:
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

    def _needed(self, tensor: Stored, places: list[sympy.Expr], when: Boolean) -> Boolean:
        """Return the part of a condition without which an index might be out of range."""
        when = sympy.simplify(when) if when.atoms(sympy.Not) else when
        free, depends = self._depends([when]), self._depends(places)
        if not free & depends or (free == {D} and self._in_range(tensor, places)):
            return sympy.true
        if not free <= depends:
            raise Unprintable(f"{tensor.name} is read where {when}")
        return when

    def _in_range(self, tensor: Stored, places: list[sympy.Expr]) -> bool:
        """True if indices that depend on the channel are in range for all channels."""
        for place, size in zip(places, tensor.sizes, strict=True):
            if D not in place.free_symbols:
                continue
            if place.free_symbols != {D} or size is None:
                return False
            values = [place.subs(D, channel) for channel in range(self.count)]
            if not all(value.is_Integer and 0 <= value < size for value in values):
                return False
        return True

    def _mask(self, depends: frozenset[sympy.Symbol], when: Boolean) -> str:
        masks = ["there"] if KV in depends else []
        masks += [f"(d < {self.channels})"] if D in depends else []
        masks += [f"({self._print(when)})"] if when != sympy.true else []
        return " & ".join(masks)

    def _print(self, value: sympy.Basic) -> str:
        return print_expression(value, {}, variables=(*_PLACES, *self.depends))
