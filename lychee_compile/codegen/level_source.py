"""Triton source of summaries and estimates: the algebra of text of `kernels/levels/expressions.py`.

A value is a piece of source with the axes of its tile, in order. Axes are "row" (query heads of a
group), "group" (groups of keys), "member" (keys of one group) and "channel".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lychee_compile.codegen.forms import Unprintable
from lychee_compile.kernels.levels.declaration import Level
from lychee_compile.kernels.levels.expressions import count, evaluate

ORDER = ("row", "group", "member", "channel")
_INDEX = {0: "[:, None]", 1: "[None, :]"}


@dataclass(frozen=True)
class Source:
    """A Triton expression, safe as an operand of any other."""

    text: str
    axes: tuple[str, ...] = ()
    """Axes of its tile, in the order of `ORDER`; none: a scalar."""
    whole: bool = False
    """True if the tile has the dtype of the keys, and nothing was computed yet."""


class _Elementwise:
    """Operations that broadcast: an axis that one operand lacks is added."""

    def number(self, value: float) -> Source:
        return Source(repr(value))

    def add(self, left: Source, right: Source) -> Source:
        return self._binary("({} + {})", left, right)

    def multiply(self, left: Source, right: Source) -> Source:
        return self._binary("({} * {})", left, right)

    def maximum(self, left: Source, right: Source) -> Source:
        return self._binary("tl.maximum({}, {})", left, right)

    def minimum(self, left: Source, right: Source) -> Source:
        return self._binary("tl.minimum({}, {})", left, right)

    def power(self, base: Source, exponent: float) -> Source:
        base = _computed(base)
        if exponent == 0.5:
            return Source(f"tl.sqrt({base.text})", base.axes)
        if exponent < 0:
            inverse = self.power(base, -exponent) if exponent != -1 else base
            return Source(f"(1.0 / {inverse.text})", base.axes)
        if exponent in range(2, 9):
            return Source("(" + " * ".join([base.text] * int(exponent)) + ")", base.axes)
        raise Unprintable(f"no Triton form of the power {exponent}")

    def exp(self, value: Source) -> Source:
        return self._unary("tl.exp({})", value)

    def log(self, value: Source) -> Source:
        return self._unary("tl.log({})", value)

    def absolute(self, value: Source) -> Source:
        return self._unary("tl.abs({})", value)

    def _unary(self, form: str, value: Source) -> Source:
        value = _computed(value)
        return Source(form.format(value.text), value.axes)

    def _binary(self, form: str, left: Source, right: Source) -> Source:
        axes = tuple(axis for axis in ORDER if axis in left.axes + right.axes)
        if len(axes) > 2:
            raise Unprintable(f"no Triton form of a value with the axes {', '.join(axes)}")
        left, right = (_computed(each) for each in (left, right))
        return Source(form.format(_spread(left, axes), _spread(right, axes)), axes)

    def mean(self, value: Source) -> Source:
        raise Unprintable(f"an estimate has no keys to take {value.text} over: only a field has")

    least = greatest = mean


class _OfGroup(_Elementwise):
    """Values over the `size` keys of one group [size, DIM]; padded channels do not count."""

    def __init__(self, size: int) -> None:
        self.size = size

    def dot(self, left: Source, right: Source) -> Source:
        product = self.multiply(left, right)
        if "channel" not in product.axes:
            raise Unprintable("a dot product needs a value with channels")
        inside = "inside" + (_INDEX[1] if len(product.axes) == 2 else "")
        axis = product.axes.index("channel")
        text = f"tl.sum(tl.where({inside}, {product.text}, 0.0), {axis})"
        return Source(text, tuple(each for each in product.axes if each != "channel"))

    def mean(self, value: Source) -> Source:
        total = self._over_keys("tl.sum", value)
        return Source(f"({total.text} / {self.size})", total.axes)

    def least(self, value: Source) -> Source:
        return self._over_keys("tl.min", value)

    def greatest(self, value: Source) -> Source:
        return self._over_keys("tl.max", value)

    def _over_keys(self, function: str, value: Source) -> Source:
        if "member" not in value.axes:
            return value
        value = _computed(value)
        axis = value.axes.index("member")
        axes = tuple(each for each in value.axes if each != "member")
        return Source(f"{function}({value.text}, {axis})", axes)


class _OfChunk(_OfGroup):
    """Values over the first `length` keys of [MEMBERS, DIM], those where `member` bool [MEMBERS]."""

    def __init__(self) -> None:
        super().__init__(0)

    def mean(self, value: Source) -> Source:
        total = self._over_keys("tl.sum", value)
        return Source(f"({total.text} / length)", total.axes)

    def _over_keys(self, function: str, value: Source) -> Source:
        if "member" not in value.axes:
            return value
        idle = {"tl.sum": "0.0", "tl.min": 'float("inf")', "tl.max": 'float("-inf")'}[function]
        value = _computed(value)
        inside = "member" + (_INDEX[0] if len(value.axes) == 2 else "")
        counted = Source(f"tl.where({inside}, {value.text}, {idle})", value.axes)
        return super()._over_keys(function, counted)


class _OfPairs(_Elementwise):
    """Values over queries [ROWS, DIM] and groups [N, DIM]: tensor cores multiply these."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def dot(self, left: Source, right: Source) -> Source:
        left, right = sorted((left, right), key=lambda each: each.axes)[::-1]
        if (left.axes, right.axes) == (("row", "channel"), ("group", "channel")):
            rows, groups = _in_key_dtype(left), _in_key_dtype(right)
            return Source(f"tl.dot({rows}, tl.trans({groups}){self.precision})", ("row", "group"))
        product = self.multiply(left, right)
        if "channel" not in product.axes:
            raise Unprintable("a dot product needs a value with channels")
        axis = product.axes.index("channel")
        axes = tuple(each for each in product.axes if each != "channel")
        return Source(f"tl.sum({product.text}, {axis})", axes)


def field_sources(level: Level) -> dict[str, str]:
    """Return Triton source of each field of a full group of keys, from the fields before it.

    `keys` float32 [size, DIM] are the keys, `inside` bool [DIM] the channels that they have, and
    `field_<name>` the fields. Raises Unprintable for what has no Triton form.
    """
    size = level.groups.size
    return _field_sources(level, _OfGroup(size), size)


def chunk_field_sources(level: Level) -> dict[str, str]:
    """Return `field_sources` for a chunk, whose keys are the first `length` of [MEMBERS, DIM].

    `member`, bool [MEMBERS], says which these are.
    """
    return _field_sources(level, _OfChunk(), None)


def _field_sources(level: Level, algebra: _OfGroup, size: int | None) -> dict[str, str]:
    """Return the source of each field; `size` is the number of keys, None if kernels count them."""
    values = {"key": Source("keys", ("member", "channel"))}
    values["count"] = Source("length.to(tl.float32)")
    found = {}
    for name, summary in level.fields.items():
        counted = summary if size is None else summary.subs(count, size)
        found[name] = evaluate(counted, algebra, values).text
        axes = ("channel",) if level.channels[name] else ()
        values[name] = Source(f"field_{name}", axes)
    return found


def estimate_source(level: Level, precision: str, scale: float) -> str:
    """Return Triton source of the estimates [ROWS, N] of a level, from `queries` [ROWS, DIM].

    Fields are `field_<name>`, [N, DIM] or [N]; the keys of tokens are `keys` [N, DIM]. `precision`
    ends the arguments of a product, `scale` is that of the softmax. Raises Unprintable for what has
    no Triton form.
    """
    values = _group_values(level.channels) | {
        "query": Source("queries", ("row", "channel"), whole=True),
        "key": Source("keys", ("group", "channel"), whole=True),
        "softmax_scale": Source(repr(scale)),
    }
    found = evaluate(level.estimate, _OfPairs(precision), values)
    if set(found.axes) != {"row", "group"}:
        raise Unprintable(f"the estimate {level.estimate} does not depend on query and group")
    return found.text


def _group_values(channels: Mapping[str, bool]) -> dict[str, Source]:
    return {
        name: Source(f"field_{name}", ("group", "channel") if wide else ("group",), whole=wide)
        for name, wide in channels.items()
    }


def _computed(value: Source) -> Source:
    """Return a value in float32."""
    return Source(f"{value.text}.to(tl.float32)", value.axes) if value.whole else value


def _in_key_dtype(value: Source) -> str:
    return value.text if value.whole else f"{value.text}.to(queries.dtype)"


def _spread(value: Source, axes: tuple[str, ...]) -> str:
    """Return the text of a value with `axes` of size 1 where it has none."""
    if not value.axes or len(value.axes) == len(axes):
        return value.text
    return value.text + _INDEX[axes.index(value.axes[0])]
