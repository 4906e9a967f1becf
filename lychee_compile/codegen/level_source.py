"""Triton source of summaries and estimates: the algebra of text of `kernels/levels/expressions.py`.

A value is a piece of source with the axes of its tile, in order. Axes are "row" (query heads of a
group), "group" (groups of keys), "member" (keys of one group) and "channel".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lychee_compile.codegen.forms import Unprintable
from lychee_compile.kernels.levels.declaration import Level
from lychee_compile.kernels.levels.expressions import count, evaluate, head_dim
from lychee_compile.kernels.levels.groups import Chunks

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
    passes: int = 0
    """Number of passes over the keys of a group that come before it."""


@dataclass(frozen=True)
class Reduction:
    """A running result over the keys of a group, which are read tile by tile."""

    name: str
    begin: str
    """Triton source of its value before the first tile."""
    step: str
    """Triton source of its value after another tile."""


@dataclass(frozen=True)
class Summary:
    """Triton source of the fields of a level."""

    passes: list[list[Reduction]]
    """Results of each pass over the keys of a group, from those of the passes before it."""
    fields: dict[str, str]
    """Each field, from these results."""


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
            return replace(base, text=f"tl.sqrt({base.text})")
        if exponent < 0:
            inverse = self.power(base, -exponent) if exponent != -1 else base
            return replace(base, text=f"(1.0 / {inverse.text})")
        if exponent in range(2, 9):
            return replace(base, text="(" + " * ".join([base.text] * int(exponent)) + ")")
        raise Unprintable(f"no Triton form of the power {exponent}")

    def exp(self, value: Source) -> Source:
        return self._unary("tl.exp({})", value)

    def log(self, value: Source) -> Source:
        return self._unary("tl.log({})", value)

    def absolute(self, value: Source) -> Source:
        return self._unary("tl.abs({})", value)

    def _unary(self, form: str, value: Source) -> Source:
        value = _computed(value)
        return replace(value, text=form.format(value.text))

    def _binary(self, form: str, left: Source, right: Source) -> Source:
        axes = tuple(axis for axis in ORDER if axis in left.axes + right.axes)
        if len(axes) > 2:
            raise Unprintable(f"no Triton form of a value with the axes {', '.join(axes)}")
        left, right = (_computed(each) for each in (left, right))
        text = form.format(_spread(left, axes), _spread(right, axes))
        return Source(text, axes, passes=max(left.passes, right.passes))

    def mean(self, value: Source) -> Source:
        raise Unprintable(f"an estimate has no keys to take {value.text} over: only a field has")

    least = greatest = mean


class _OfGroup(_Elementwise):
    """Values over keys of one group of `size` [tile, DIM]; padded channels do not count."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.passes: list[list[Reduction]] = []

    def dot(self, left: Source, right: Source) -> Source:
        product = self.multiply(left, right)
        if "channel" not in product.axes:
            raise Unprintable("a dot product needs a value with channels")
        inside = "inside" + (_INDEX[1] if len(product.axes) == 2 else "")
        axis = product.axes.index("channel")
        text = f"tl.sum(tl.where({inside}, {product.text}, 0.0), {axis})"
        axes = tuple(each for each in product.axes if each != "channel")
        return replace(product, text=text, axes=axes)

    def mean(self, value: Source) -> Source:
        total = self._over_keys("{} + tl.sum({}, {})", "0.0", value)
        return total if total is value else replace(total, text=f"({total.text} / {self.size})")

    def least(self, value: Source) -> Source:
        return self._over_keys("tl.minimum({}, tl.min({}, {}))", 'float("inf")', value)

    def greatest(self, value: Source) -> Source:
        return self._over_keys("tl.maximum({}, tl.max({}, {}))", 'float("-inf")', value)

    def _over_keys(self, step: str, begin: str, value: Source) -> Source:
        """Return a result over all keys, for the source of a step; equal ones share a name."""
        if "member" not in value.axes:
            return value
        axes = tuple(each for each in value.axes if each != "member")
        shape = "[DIM]" if axes else "[]"
        begin = f"tl.full({shape}, {begin}, tl.float32)"
        while len(self.passes) <= value.passes:
            self.passes.append([])
        own = self.passes[value.passes]
        axis = value.axes.index("member")
        for name in (f"over_{value.passes}_{number}" for number in range(len(own) + 1)):
            found = Reduction(name, begin, step.format(name, value.text, axis))
            if found in own:
                break
        else:
            own.append(found)
        return Source(name, axes, passes=value.passes + 1)


class _OfChunk(_OfGroup):
    """Values over keys [tile, DIM] of a chunk of `length`: those where `member`, bool [tile]."""

    def mean(self, value: Source) -> Source:
        total = super().mean(value)
        return total if total is value else replace(total, text=f"({total.text} / length)")

    def _over_keys(self, step: str, begin: str, value: Source) -> Source:
        if "member" in value.axes:
            inside = "member" + (_INDEX[0] if len(value.axes) == 2 else "")
            value = replace(value, text=f"tl.where({inside}, {value.text}, {begin})")
        return super()._over_keys(step, begin, value)


class PairSource(_Elementwise):
    """Values over queries [ROWS, DIM] and groups [N, DIM]: tensor cores multiply these."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def dot(self, left: Source, right: Source) -> Source:
        """Return a sum of products over channels."""
        left, right = sorted((left, right), key=lambda each: each.axes)[::-1]
        if not (left.whole or right.whole):
            left = _without_padding(left)
        if (left.axes, right.axes) == (("row", "channel"), ("group", "channel")):
            return Source(self.product(left, right), ("row", "group"))
        product = self.multiply(left, right)
        if "channel" not in product.axes:
            raise Unprintable("a dot product needs a value with channels")
        axis = product.axes.index("channel")
        axes = tuple(each for each in product.axes if each != "channel")
        return Source(f"tl.sum({product.text}, {axis})", axes)

    def product(self, rows: Source, groups: Source) -> str:
        """Return the product of queries [ROWS, DIM] and groups [N, DIM], in the keys' dtype."""
        left, right = _in_key_dtype(rows), _in_key_dtype(groups)
        return f"tl.dot({left}, tl.trans({right}){self.precision})"


def summary_source(level: Level, channels: int, stored: str | None) -> Summary:
    """Return Triton source of the fields of a group, whose keys have so many channels.

    `keys` float32 [tile, DIM] are some of its keys, `inside` bool [DIM] the channels that they
    have. A chunk has `length` keys, and `member`, bool [tile], says which of a tile are; a page is
    full. Fields with channels are rounded to the dtype in which they are `stored`, as Triton calls
    it; None: float32; before others are made of them. Raises Unprintable for what has no Triton
    form.
    """
    even = not isinstance(level.groups, Chunks)
    algebra = _OfGroup(level.groups.size) if even else _OfChunk(1)
    values = {"key": Source("keys", ("member", "channel"))}
    values["count"] = Source("length.to(tl.float32)")
    known = {head_dim: channels} | ({count: level.groups.size} if even else {})
    found = {}
    for name, summary in level.fields.items():
        value = evaluate(summary.subs(known), algebra, values)
        if "member" in value.axes:
            raise Unprintable(f"the field {name} = {summary} is not taken over the keys of a group")
        if stored is not None and level.channels[name]:
            value = replace(value, text=f"{value.text}.to({stored}).to(tl.float32)")
        found[name], values[name] = value.text, value
    return Summary(algebra.passes, found)


def estimate_source(level: Level, precision: str, scale: float, channels: int) -> str:
    """Return Triton source of the estimates [ROWS, N] of a level, from `queries` [ROWS, DIM].

    Fields are `field_<name>`, [N, DIM] or [N]; the keys of tokens are `keys` [N, DIM]. `precision`
    ends the arguments of a product, `scale` is that of the softmax, `channels` is `head_dim`.
    Raises Unprintable for what has no Triton form.
    """
    values = group_values(level.channels) | {
        "query": Source("queries", ("row", "channel"), whole=True),
        "key": Source("keys", ("group", "channel"), whole=True),
        "softmax_scale": Source(repr(scale)),
    }
    estimate = level.estimate.subs(head_dim, channels)
    found = evaluate(estimate, PairSource(precision), values)
    if set(found.axes) != {"row", "group"}:
        raise Unprintable(f"the estimate {level.estimate} does not depend on query and group")
    return found.text


def group_values(channels: Mapping[str, bool]) -> dict[str, Source]:
    """Return the fields of a level, which have `channels` or not, by name."""
    return {
        name: Source(f"field_{name}", ("group", "channel") if wide else ("group",), whole=wide)
        for name, wide in channels.items()
    }


def _without_padding(value: Source) -> Source:
    """Return a computed value that is 0 in channels that keys do not have."""
    if "channel" not in value.axes:
        return value
    inside = "inside" if "group" in value.axes else "(tl.max(inside.to(tl.int32), 0) > 0)[None, :]"
    return Source(f"tl.where({inside}, {value.text}, 0.0)", value.axes)


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
