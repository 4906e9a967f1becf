"""Read a recovered mask: its class in words, the range of keys it shows, and how it prints.

kv <= q + cumulative_length, kv > q + cumulative_length - 32
"causal, offset = cumulative_length, window 32"      keys [q + cumulative_length - 31, q + ... + 1)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from lychee_compile.codegen.bounds import KeyBound, key_bound
from lychee_compile.codegen.specification import KV, B, H, Q
from lychee_compile.kernels.reference.hidden import HIDDEN
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.formula import formula
from lychee_compile.passes.detect.operands import Operand
from lychee_compile.passes.detect.score import Bias
from lychee_compile.passes.graph.dataflow import shape_of, value_of
from lychee_compile.passes.symbolic.elementwise import Flag


class Reading:
    """The mask and the score of one attention, in batch b, head h, query q and key kv."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._axes = _readable_axes(attention)
        visible = attention.score.visible
        self._names = _short_names(attention, visible, attention.score.expression)
        self.visible: Boolean = self._readable(visible)
        if attention.is_causal:
            self.visible = sympy.And(self.visible, sympy.Le(KV, Q))
        self.score = self._readable(attention.score.expression)

    def _readable(self, expression: sympy.Basic) -> sympy.Basic:
        roles = self._attention.roles
        named = expression.xreplace(self._names).xreplace(self._axes)
        heads = [
            sympy.Symbol(axis.name, **axis.assumptions0) for axis in roles.kv_heads + roles.group
        ]
        if len(heads) != 2 or not named.has(*heads):
            return named
        outer, inner = heads
        whole = named.xreplace({outer: (H - inner) / self._attention.axes.sizes[inner]})
        whole = whole.replace(lambda each: isinstance(each, sympy.Indexed), _expanded)
        return (
            named.xreplace({outer: sympy.Symbol("h_kv"), inner: sympy.Symbol("g")})
            if whole.has(inner)
            else whole
        )

    @cached_property
    def conditions(self) -> tuple[Boolean, ...]:
        """Conditions that must all hold for a key to be visible."""
        if self.visible == sympy.true:
            return ()
        return tuple(sorted(sympy.And.make_args(self.visible), key=_bounds_first))

    @cached_property
    def bounds(self) -> tuple[list[sympy.Expr], list[sympy.Expr]]:
        """Lower and upper bounds of the visible keys, both inclusive."""
        first: list[sympy.Expr] = []
        last: list[sympy.Expr] = []
        for condition in self.conditions:
            bound = key_bound(condition)
            if bound is not None:
                (last if bound.upper else first).append(bound.key)
        return first, last

    @property
    def predicate(self) -> str:
        """Condition of the visible keys, "(kv <= q) & (kv >= q - 15)"; empty if all are visible."""
        parts = []
        for condition in self.conditions:
            bound = key_bound(condition)
            parts.append(formula(condition) if bound is None else str(bound))
        return parts[0] if len(parts) == 1 else " & ".join(f"({part})" for part in parts)

    @property
    def key_range(self) -> tuple[sympy.Expr, sympy.Expr]:
        """Range [start, end) outside of which no key is visible; it may have holes."""
        first, last = self.bounds
        ends = [each + 1 for each in last] + [sympy.sympify(self._attention.kv_len)]
        return sympy.Max(*first, 0), ends[0] if len(ends) == 2 else sympy.Min(*ends)

    @property
    def is_plainly_causal(self) -> bool:
        """True if query i sees keys 0 to i, there are as many keys as queries, and no bias."""
        attention = self._attention
        square = attention.query_len == attention.kv_len
        bare = all(bias.hides for bias in attention.score.biases)
        bounds = [key_bound(condition) for condition in self.conditions]
        return square and bare and bounds == [KeyBound(Q, upper=True)]

    def words(self) -> str:
        """Return the class of the mask: "none", "causal, window 32", or its tensor."""
        said = list(dict.fromkeys(filter(None, (self._say(each) for each in self.conditions))))
        if self.conditions:
            order = {"causal": 0, "window": 1, "prefix": 2}
            said.sort(key=lambda each: order.get(each.split(maxsplit=1)[0].rstrip(","), 3))
        return ", ".join(dict.fromkeys([*said, *self._biases()])) or "none"

    def _say(self, condition: Boolean) -> str:
        bound = key_bound(condition)
        if bound is not None:
            return self._say_bound(bound)
        if condition == sympy.false:
            return "nothing visible"
        if isinstance(condition, sympy.Or) and any(_is_causal(each) for each in condition.args):
            return self._say_either(condition)
        if isinstance(condition, sympy.Eq) and condition.free_symbols >= {Q, KV}:
            return "same document" if _is_document(condition) else formula(condition)
        if isinstance(condition, (Flag, sympy.Not, sympy.Ne, sympy.Eq)):
            return self._say_tensor(condition)
        return formula(condition)

    def _say_bound(self, bound: KeyBound) -> str:
        offset = sympy.expand(bound.key - Q)
        if Q in offset.free_symbols and self._attention.query_len != 1:
            name = "keys to" if bound.upper else "keys from"
            return f"{name} {bound.key}"
        if self._attention.query_len == 1:
            offset = bound.key
        if bound.upper:
            return "causal" if offset == 0 else f"causal, offset = {offset}"
        _, last = self.bounds
        width = next((sympy.expand(each - bound.key + 1) for each in last), None)
        if width is not None and width.is_number:
            return f"window {width}"
        return f"window from q - {-offset}" if (-offset).is_number else f"keys from {bound.key}"

    def _say_either(self, condition: Boolean) -> str:
        others = [each for each in condition.args if not _is_causal(each)]
        causal = next(each for each in condition.args if _is_causal(each))
        bounds = [key_bound(each) for each in others]
        if all(bound and bound.upper and Q not in bound.key.free_symbols for bound in bounds):
            lengths = ", ".join(str(bound.key + 1) for bound in bounds if bound)
            return f"{self._say(causal)}, prefix {lengths}"
        return f"{self._say(causal)}, or {', or '.join(map(formula, others))}"

    def _say_tensor(self, condition: Boolean) -> str:
        flag = next(iter(condition.atoms(sympy.Indexed, Flag)), None)
        inside = flag.args[0] if isinstance(flag, Flag) else flag
        if not isinstance(inside, sympy.Indexed):
            return formula(condition)
        if (
            KV in inside.free_symbols
            and Q not in inside.free_symbols
            and self._attention.query_len != 1
        ):
            return f"padding {inside.base}"
        operand = self._operand_named(condition)
        return operand or f"by {formula(condition)}"

    def _operand_named(self, condition: Boolean) -> str:
        """Describe the mask tensor if the condition is nothing but an element of it."""
        masks = self._attention.score.masks
        if len(masks) == 1 and isinstance(condition, (Flag, sympy.Not)):
            return _tensor_words(masks[0].operand, "bool")
        return ""

    def _padding(self, bias: Bias) -> str:
        """Return the name of a tensor that, times a large number, hides keys from all queries."""
        element = sympy.expand(self._readable(bias.element) * bias.times)
        for term in sympy.Add.make_args(element):
            times, tensor = term.as_coeff_Mul()
            by_key = isinstance(tensor, sympy.Indexed) and tensor.has(KV) and not tensor.has(Q)
            if by_key and abs(times) >= -HIDDEN:
                return str(tensor.base)
        return ""

    def _biases(self) -> Iterable[str]:
        for bias in self._attention.score.biases:
            if bias.hides:
                continue
            plain = isinstance(bias.element, sympy.Indexed)
            padding = self._padding(bias)
            if padding:
                yield f"padding {padding}"
                continue
            kind = str(value_of(bias.operand.node).dtype).removeprefix("torch.")
            yield _tensor_words(bias.operand, f"additive {kind}") if plain else "a bias by position"


def _bounds_first(condition: Boolean) -> tuple[int, str]:
    """Return a sort key: upper bounds, lower bounds, then the rest, the same in every run."""
    bound = key_bound(condition)
    return (2 if bound is None else int(not bound.upper), str(condition))


def _is_causal(condition: Boolean) -> bool:
    bound = key_bound(condition)
    return bound is not None and bound.upper and Q not in sympy.expand(bound.key - Q).free_symbols


def _is_document(condition: Relational) -> bool:
    """True if both sides are the same function of a tensor, one at the query, one at the key."""
    left, right = condition.args
    alike = left.xreplace({Q: KV}) == right or right.xreplace({Q: KV}) == left
    return bool(alike and left.has(sympy.Indexed))


def _short_names(attention: Attention, *expressions: sympy.Basic) -> dict[sympy.Basic, sympy.Basic]:
    """Return the names of symbolic numbers, and shorter ones for tensors if they stay unique."""
    leaves = {
        str(leaf): leaf
        for expression in expressions
        for leaf in expression.atoms(sympy.Symbol)
        if leaf not in attention.axes.sizes
    }
    short = attention.names.shortened(sorted(leaves))
    tensors = {
        leaves[name]: sympy.Symbol(base, **leaves[name].assumptions0)
        for name, base in short.items()
        if name != base
    }
    return attention.names.numbers() | tensors


def _expanded(element: sympy.Indexed) -> sympy.Indexed:
    return sympy.Indexed(element.base, *(sympy.expand(index) for index in element.indices))


def _readable_axes(attention: Attention) -> dict[sympy.Symbol, sympy.Expr]:
    roles = attention.roles
    names: dict[sympy.Symbol, sympy.Expr] = {}
    for symbol, axes in ((B, roles.batch), (Q, roles.query), (KV, roles.key)):
        for place, axis in enumerate(axes):
            names[axis] = symbol if len(axes) == 1 else sympy.Symbol(f"{symbol}{place}")
    heads = roles.kv_heads + roles.group
    if len(heads) == 1:
        names[heads[0]] = H
    return names


def _tensor_words(operand: Operand, kind: str) -> str:
    sizes = ", ".join(str(size) for size in shape_of(operand.node))
    return f"{kind} tensor [{sizes}]"
