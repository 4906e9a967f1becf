"""Sum up the steps between the product of queries and keys and the softmax.

The steps that `score_trace` notes, taken from the product outwards, become a scale, a soft-cap,
biases, masks and an extra logit. A number that is the same for all keys cancels in the softmax. Any
other step is a reason to keep the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import assert_never

import sympy
from sympy.logic.boolalg import Boolean

from lychee_compile.codegen.specification import S
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.masks.hiding_levels import HidingLevels, every_row_sees_a_key
from lychee_compile.passes.detect.operands import Operand, Place
from lychee_compile.passes.detect.score import Bias, Mask, Score, exclusive, hides, without_hiding
from lychee_compile.passes.detect.score_trace import Step, Trace
from lychee_compile.passes.graph.dataflow import (
    is_symbolic_number,
    is_tensor,
    operator_key,
    shape_of,
)
from lychee_compile.passes.graph.operator_facts import StepKind
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.axes import Axis, free_axes
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.elementwise import (
    Element,
    TooLarge,
    choose,
    number,
    truth,
)


@dataclass
class _Sum:
    """The sum of the steps so far."""

    elements: Elements
    keys: frozenset[Axis]
    expression: Element = S
    scale: sympy.Expr = sympy.S.One
    outer: sympy.Expr = sympy.S.One
    """Factor of the soft-cap's tanh."""
    capped: bool = False
    shifted: bool = False
    """True if a number was added that is the same for all keys; it cancels only at the end."""
    factors: list[tuple[Operand, bool]] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    hidden: list[Boolean] = field(default_factory=list)
    levels: HidingLevels = field(default_factory=HidingLevels)
    zeroed: list[Boolean] = field(default_factory=list)
    """Conditions under which scores are multiplied by zero; they must be hidden then."""
    extra: Operand | None = None
    extra_times: sympy.Expr = sympy.S.One
    own_key_hidden: bool = False
    """True if a finite number hides the key at a query's own position."""
    unsupported: Reason | None = None

    def refuse(self, why: Reason) -> None:
        self.unsupported = self.unsupported or why

    def apply(self, step: Step) -> None:
        """Take one more step into account."""
        match step.kind:
            case StepKind.TIMES | StepKind.OVER:
                self._times(step, inverse=step.kind is StepKind.OVER)
            case StepKind.PLUS | StepKind.MINUS:
                self._plus(step, sign=-1 if step.kind is StepKind.MINUS else 1)
            case StepKind.FROM:
                self._from(step)
            case StepKind.TANH:
                self._tanh()
            case StepKind.FLOOR:
                self._floor(step)
            case StepKind.FILL:
                self._fill(step)
            case StepKind.EXTRA:
                self._extra(step)
            case StepKind.OTHER:
                self._other(step)
            case _:
                assert_never(step.kind)

    def _express(self, function: Callable[..., Element], *others: Element) -> None:
        """Apply a step to the expression, unless it becomes too large to read."""
        try:
            self.expression = choose(function, self.expression, *others)
        except TooLarge:
            self.expression = sympy.Function("score")(S)

    def _value(self, step: Step) -> Element:
        return self.elements.of(step.other, step.indices)

    def _amount(self, step: Step) -> Element:
        """Return the other operand as a number; truth values count as 1 and 0."""
        return choose(number, self._value(step))

    def _operand(self, step: Step) -> Operand | None:
        if not is_tensor(step.other):
            return None
        return Place(step.other, step.indices, sympy.S.One).operand(self.elements.axes)

    def _differs_by_key(self, step: Step, value: Element) -> bool:
        """True unless the other operand is known to be the same for all keys."""
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
            operand = self._operand(step) or _run_time_number(step)
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

    def _plus(self, step: Step, sign: int = 1) -> None:
        times = sign * (1 if step.fill is None else step.fill)
        value = choose(lambda a: a * times, self._amount(step))
        if value.is_number and hides(value):
            self.hidden.append(sympy.true)
            self.refuse(reasons.SCORES_HIDDEN())
        if not self._differs_by_key(step, value):
            self.shifted = self.shifted or not value.is_zero
            return
        shown = without_hiding(value) if isinstance(value, sympy.Piecewise) else value
        self._express(lambda a, b: a + b, shown)
        operand = self._operand(step)
        if operand is None or self.extra:
            self.refuse(
                reasons.BIAS_LAYOUT() if not self.extra else reasons.BIAS_AFTER_EXTRA_LOGIT()
            )
            return
        self.biases.append(Bias(operand, float(times), self._amount(step)))
        self.hidden += self.biases[-1].hidden
        self.levels.add(self.biases[-1].levels)

    def _from(self, step: Step) -> None:
        self._express(lambda a: -a)
        self._times_number(sympy.S.NegativeOne)
        self._plus(step)

    def _tanh(self) -> None:
        self._express(sympy.tanh)
        if self.capped or self.biases or self.masks or self.extra or self.shifted:
            self.refuse(reasons.SOFTCAP_AFTER_BIAS())
        self.capped = True

    def _floor(self, step: Step) -> None:
        if not hides(self._value(step)):
            self._other(step)

    def _fill(self, step: Step) -> None:
        fill = self.elements.of(step.fill, ()) if not is_tensor(step.fill) else self._filled(step)
        value = self._value(step)
        if not hides(fill):
            self.refuse(reasons.SCORES_REPLACED())
            return
        operand = self._operand(step)
        if operand is None:
            self.refuse(reasons.MASK_LAYOUT())
            return
        self.masks.append(Mask(operand, step.when, float(fill)))
        condition = truth(value) if step.when else sympy.Not(truth(value))
        if fill != -sympy.oo and any(map(_compares_positions, condition.atoms(sympy.Eq))):
            self.own_key_hidden = True
        self.hidden.append(condition)
        self.levels.fill(condition, fill)

    def _filled(self, step: Step) -> Element:
        node = step.fill
        return self.elements.of(
            node, tuple(sympy.Symbol(f"any{d}") for d in range(len(shape_of(node))))
        )

    def _extra(self, step: Step) -> None:
        self.extra_times = sympy.S.One
        self.extra = self._operand(step)
        if not is_tensor(step.other):
            self.refuse(reasons.EXTRA_LOGIT_NUMBER())
        elif self.extra is None:
            self.refuse(reasons.EXTRA_LOGIT_LAYOUT())
        elif self.shifted:
            self.refuse(reasons.EXTRA_LOGIT_UNSHIFTED())

    def _other(self, step: Step) -> None:
        what = step.other if step.kind is StepKind.OTHER else operator_key(step.node)
        self.refuse(reasons.SCORES_OTHER(step=what))


def _compares_positions(equality: sympy.Eq) -> bool:
    """True for an equality of two positions, as of a query and of a key: no tensor is read."""
    return len(equality.free_symbols) > 1 and not equality.has(sympy.Indexed, sympy.Function)


def sum_up(trace: Trace, elements: Elements, keys: frozenset[Axis], base_two: bool) -> Score:
    """Return all steps of `trace` as one score."""
    total = _Sum(elements, keys)
    number = trace.query.factor * trace.key.factor
    if number != 1:
        total.apply(Step(StepKind.TIMES, trace.product.node, number))
    for step in trace.steps:
        total.apply(step)
    if base_two:
        total.apply(Step(StepKind.TIMES, trace.product.node, sympy.log(2)))
    cap = total.outer if total.capped else None
    scale = total.scale * (total.outer if total.capped else 1)
    if not scale.is_positive:
        total.refuse(reasons.SCORES_REVERSED(value=scale))
    if total.own_key_hidden and len(total.hidden) > 1:
        total.refuse(reasons.SCORES_OWN_KEY())
    levels = total.levels.differ
    if levels and not every_row_sees_a_key(total.hidden, keys, elements.axes):
        total.refuse(reasons.SCORES_LEVELS(levels=" and ".join(f"{each:.3g}" for each in levels)))
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


def _run_time_number(step: Step) -> Operand | None:
    """Return the other operand of a step if it is a number that a run of the graph tells."""
    return Operand(step.other, ()) if is_symbolic_number(step.other) else None


def _zero_conditions(value: Element) -> list[Boolean] | None:
    """Return the conditions under which a choice between 0 and 1 is 0; None for anything else."""
    if not isinstance(value, sympy.Piecewise):
        return None
    if not all(each.is_zero or (each - 1).is_zero for each, _ in value.args):
        return None
    return [condition for each, condition in exclusive(value) if each.is_zero]
