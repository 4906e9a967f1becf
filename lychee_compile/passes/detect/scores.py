"""Sum up what stands between the product of queries and keys and the softmax.

A scale, a soft-cap, biases, masks, an extra logit: from the steps that `score_trace` notes, taken
from the product outwards. What depends on no key cancels in the softmax. Whatever else there is, is
named and left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import sympy
from sympy.logic.boolalg import Boolean

from lychee_compile.codegen.specification import S
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.operands import Operand, Place, free_axes
from lychee_compile.passes.detect.score_trace import Step, Trace
from lychee_compile.passes.graph.dataflow import is_tensor, operator_key, shape_of
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.axes import Axis
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.elementwise import (
    Element,
    TooLarge,
    choose,
    number,
    piecewise,
    truth,
)

HIDDEN_BELOW = -1e4
"""A score filled in at or below this hides its key."""


@dataclass(frozen=True)
class Mask:
    """Keys hidden by a bool tensor."""

    operand: Operand
    hidden_when: bool
    fill: float
    """What takes the place of the score: -inf, or a low number."""


@dataclass(frozen=True)
class Bias:
    """A tensor added to the scores, times a number."""

    operand: Operand
    times: float
    element: Element
    """What one element of it is."""

    @property
    def hides(self) -> bool:
        """Whether all it does is to hide keys, by low numbers."""
        if not isinstance(self.element, sympy.Piecewise):
            return False
        return all(value.is_zero or _hides(value * self.times) for value, _ in self.element.args)

    @property
    def added(self) -> Element:
        """What one element adds to the score of a key that it does not hide."""
        value = self._value
        return _shown(value) if isinstance(value, sympy.Piecewise) else value

    @property
    def hidden(self) -> list[Boolean]:
        """The conditions under which it hides a key."""
        value = self._value
        branches = _exclusive(value) if isinstance(value, sympy.Piecewise) else []
        return [condition for low, condition in branches if _hides(low)]

    @property
    def _value(self) -> Element:
        times = self.times
        return self.element if times == 1 else choose(lambda each: each * times, self.element)


@dataclass(frozen=True)
class Score:
    """scores = softcap tanh(scale s / softcap) + biases, where no mask hides the key.

    `factors` are tensors that multiply s too, one number for each query.
    """

    expression: sympy.Expr = S
    """All of it, in s and the axes."""
    scale: float = 1.0
    softcap: float | None = None
    factors: tuple[tuple[Operand, bool], ...] = ()
    """Each with whether s is divided by it."""
    biases: tuple[Bias, ...] = ()
    masks: tuple[Mask, ...] = ()
    visible: Boolean = sympy.true
    """Which keys are visible, a predicate over the axes."""
    extra: Operand | None = None
    """Logits that take part in the softmax and have no value: attention sinks."""
    extra_times: float = 1.0
    """What they are multiplied by."""
    unsupported: Reason | None = None
    """Why the score could not be expressed; None if it could."""

    @property
    def monotone(self) -> bool:
        """Whether it is proved that a larger s gives a larger score, so that bounds survive it."""
        return increases(self.expression)


@dataclass
class _Sum:
    """The steps so far, summed up."""

    elements: Elements
    keys: frozenset[Axis]
    expression: Element = S
    scale: sympy.Expr = sympy.S.One
    outer: sympy.Expr = sympy.S.One
    """Multiplies the soft-cap's tanh."""
    capped: bool = False
    shifted: bool = False
    """Whether something was added that is the same for all keys, which only cancels at the end."""
    factors: list[tuple[Operand, bool]] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    hidden: list[Boolean] = field(default_factory=list)
    zeroed: list[Boolean] = field(default_factory=list)
    """Where scores were multiplied by zero: right only where they are hidden, too."""
    extra: Operand | None = None
    extra_times: sympy.Expr = sympy.S.One
    unsupported: Reason | None = None

    def refuse(self, why: Reason) -> None:
        self.unsupported = self.unsupported or why

    def apply(self, step: Step) -> None:
        getattr(self, f"_{step.kind}")(step)

    def _express(self, function: Callable[..., Element], *others: Element) -> None:
        """Apply a step to the expression, as long as anybody could read it."""
        try:
            self.expression = choose(function, self.expression, *others)
        except TooLarge:
            self.expression = sympy.Function("score")(S)

    def _value(self, step: Step) -> Element:
        return self.elements.of(step.other, step.indices)

    def _amount(self, step: Step) -> Element:
        """The other operand as a number; truth values count as 1 and 0."""
        return choose(number, self._value(step))

    def _operand(self, step: Step) -> Operand | None:
        if not is_tensor(step.other):
            return None
        return Place(step.other, step.indices, sympy.S.One).operand(self.elements.axes)

    def _differs_by_key(self, step: Step, value: Element) -> bool:
        """Whether the other operand is not the same for all keys, as far as is known."""
        by_key = bool(free_axes(step.indices) & self.keys)
        return by_key and not value.is_number

    def _times(self, step: Step, inverse: bool = False) -> None:
        value = self._amount(step)
        self._express(lambda a, b: a / b if inverse else a * b, value)
        if value.is_number:
            self._times_number(1 / value if inverse else value)
        elif not inverse and _zero_conditions(value) is not None:
            self.zeroed += _zero_conditions(value) or []
        elif self._differs_by_key(step, value):
            self.refuse(reasons.SCORES_TIMES_PER_KEY())
        elif self.capped or self.biases or self.masks or self.extra:
            self.refuse(reasons.SCORES_TIMES_LATE())
        else:
            operand = self._operand(step)
            if operand is None:
                self.refuse(reasons.SCORES_TIMES_UNKNOWN())
            else:
                self.factors.append((operand, inverse))

    def _times_number(self, value: sympy.Expr) -> None:
        if not value.is_positive and (self.masks or self.biases or self.extra or self.capped):
            self.refuse(reasons.SCORES_REVERSED(value=value))
        self.extra_times *= value
        if self.capped:
            self.outer *= value
        else:
            self.scale *= value
        self.biases = [replace(each, times=each.times * float(value)) for each in self.biases]

    def _over(self, step: Step) -> None:
        self._times(step, inverse=True)

    def _plus(self, step: Step, sign: int = 1) -> None:
        times = sign * (1 if step.fill is None else step.fill)
        value = choose(lambda a: a * times, self._amount(step))
        if not self._differs_by_key(step, value):
            self.shifted = self.shifted or not value.is_zero
            return
        shown = _shown(value) if isinstance(value, sympy.Piecewise) else value
        self._express(lambda a, b: a + b, shown)
        operand = self._operand(step)
        if operand is None or self.extra:
            self.refuse(
                reasons.BIAS_LAYOUT() if not self.extra else reasons.BIAS_AFTER_EXTRA_LOGIT()
            )
            return
        self.biases.append(Bias(operand, float(times), self._amount(step)))
        self.hidden += self.biases[-1].hidden

    def _minus(self, step: Step) -> None:
        self._plus(step, sign=-1)

    def _from(self, step: Step) -> None:
        self._express(lambda a: -a)
        self._times_number(sympy.S.NegativeOne)
        self._plus(step)

    def _tanh(self, _: Step) -> None:
        self._express(sympy.tanh)
        if self.capped or self.biases or self.masks or self.extra or self.shifted:
            self.refuse(reasons.SOFTCAP_AFTER_BIAS())
        self.capped = True

    def _floor(self, step: Step) -> None:
        if not _hides(self._value(step)):
            self._other(step)

    def _fill(self, step: Step) -> None:
        fill = self.elements.of(step.fill, ()) if not is_tensor(step.fill) else self._filled(step)
        value = self._value(step)
        if not _hides(fill):
            self.refuse(reasons.SCORES_REPLACED())
            return
        operand = self._operand(step)
        if operand is None:
            self.refuse(reasons.MASK_LAYOUT())
            return
        self.masks.append(Mask(operand, step.when, float(fill)))
        condition = truth(value)
        self.hidden.append(condition if step.when else sympy.Not(condition))

    def _filled(self, step: Step) -> Element:
        node = step.fill
        return self.elements.of(
            node, tuple(sympy.Symbol(f"any{d}") for d in range(len(shape_of(node))))
        )

    def _extra(self, step: Step) -> None:
        self.extra_times = sympy.S.One
        self.extra = self._operand(step)
        if self.extra is None or self.shifted:
            self.refuse(reasons.EXTRA_LOGIT_LAYOUT())

    def _other(self, step: Step) -> None:
        what = step.other if step.kind == "other" else operator_key(step.node)
        self.refuse(reasons.SCORES_OTHER(step=what))


def sum_up(trace: Trace, elements: Elements, keys: frozenset[Axis], base_two: bool) -> Score:
    """All steps of `trace` as one score."""
    total = _Sum(elements, keys)
    number = trace.query.factor * trace.key.factor
    if number != 1:
        total.apply(Step("times", trace.product.node, number))
    for step in trace.steps:
        total.apply(step)
    if base_two:
        total.apply(Step("times", trace.product.node, sympy.log(2)))
    cap = total.outer if total.capped else None
    scale = total.scale * (total.outer if total.capped else 1)
    if not scale.is_positive:
        total.refuse(reasons.SCORES_REVERSED(value=scale))
    if any(each not in total.hidden for each in total.zeroed):
        total.refuse(reasons.SCORES_ZEROED())
    return Score(
        expression=total.expression,
        scale=float(scale) if scale.is_number else 1.0,
        extra_times=float(total.extra_times) if total.extra_times.is_number else 1.0,
        softcap=None if cap is None else float(cap),
        factors=tuple(total.factors),
        biases=tuple(total.biases),
        masks=tuple(total.masks),
        visible=sympy.And(*(sympy.Not(each) for each in total.hidden)),
        extra=total.extra,
        unsupported=total.unsupported,
    )


def increases(expression: sympy.Basic) -> bool:
    """Whether an expression is proved to grow with s, all else equal."""
    if expression == S:
        return True
    parts = [each for each in expression.args if S in each.free_symbols]
    others = [each for each in expression.args if S not in each.free_symbols]
    if isinstance(expression, sympy.Piecewise):
        values = [value for value, _ in expression.args if S in value.free_symbols]
        return bool(values) and all(map(increases, values))
    if isinstance(expression, (sympy.Add, sympy.Max, sympy.Min, sympy.tanh, sympy.exp)):
        return bool(parts) and all(map(increases, parts))
    if isinstance(expression, sympy.Mul) and len(parts) == 1:
        return bool(sympy.Mul(*others).is_positive) and increases(parts[0])
    return False


def _zero_conditions(value: Element) -> list[Boolean] | None:
    """Where a choice between 0 and 1 is 0; None for anything else."""
    if not isinstance(value, sympy.Piecewise):
        return None
    if not all(each.is_zero or (each - 1).is_zero for each, _ in value.args):
        return None
    return [condition for each, condition in _exclusive(value) if each.is_zero]


def _exclusive(choice: sympy.Piecewise) -> list[tuple[sympy.Expr, Boolean]]:
    """The branches of a choice, each with the condition under which it is taken."""
    taken, branches = sympy.false, []
    for value, condition in choice.args:
        branches.append((value, sympy.And(condition, sympy.Not(taken))))
        taken = sympy.Or(taken, condition)
    return branches


def _shown(choice: sympy.Piecewise) -> Element:
    """A choice without the branches that hide."""
    pairs = [(value, condition) for value, condition in choice.args if not _hides(value)]
    if len(pairs) == len(choice.args):
        return choice
    return piecewise([*pairs[:-1], (pairs[-1][0], sympy.true)]) if pairs else sympy.S.Zero


def _hides(value: Element) -> bool:
    """Whether a score of this, or of this and something, is that of a hidden key."""
    low = value.as_coeff_Add()[0] if isinstance(value, sympy.Add) else value
    return bool(low.is_number and low.is_extended_real and low <= HIDDEN_BELOW)
