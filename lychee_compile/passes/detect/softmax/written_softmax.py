"""Read what a softmax that is written out does between its exponentials and its weights.

exp(s - m) * seen / (exp(s - m) * seen).sum(-1)         keys that are hidden
exp(s - m) / (exp(s - m).sum(-1) + exp(sink - m))       an extra logit, an attention sink
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.score_trace import Step, Trace
from lychee_compile.passes.detect.softmax.denominators import divisor_place
from lychee_compile.passes.detect.softmax.softmaxes import Softmax
from lychee_compile.passes.graph.dataflow import (
    first_input,
    is_operator,
    is_tensor,
    operator_key,
    operator_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.operator_facts import StepKind, View
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.axes import Axes, Indices
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.views import broadcast, source_of


def with_exponentials(
    softmax: Softmax, at: Indices, trace: Trace, out: Indices, elements: Elements
) -> tuple[Trace, Reason | None]:
    """Return `trace` with the steps that are taken on exponentials, as steps on scores.

    `at` are indices of the scores, and `out` those of the output. The reason is that of a step that
    is not understood.
    """
    reason = None
    if softmax.extra is not None:
        rows = out if softmax.deferred else at
        steps = _with_extra(softmax, rows, trace.steps, elements.axes)
        reason = None if steps else reasons.EXTRA_LOGIT_LAYOUT()
        trace = replace(trace, steps=steps or trace.steps)
    if softmax.masked is not None:
        hiding = _hiding(softmax.masked, at)
        if hiding is None:
            return trace, reasons.WEIGHTS_CHANGED(operator=operator_key(softmax.masked))
        trace = replace(trace, steps=(*trace.steps, hiding))
    return trace, reason


def _hiding(masked: torch.fx.Node, at: Indices) -> Step | None:
    """Return the step that hides the keys whose exponentials are set to zero.

    None if exponentials are multiplied by anything but truth values, as dropout does.
    """
    if is_operator(masked, "mul"):
        masks = [each for each in map(_behind_casts, masked.all_input_nodes) if _is_bool(each)]
        mask, when = (masks[0] if masks else None), False
    elif is_operator(masked, "dropout"):
        return None
    else:
        fills = is_operator(masked, "masked_fill")
        mask, when = masked.args[1 if fills else 0], fills  # type: ignore[assignment]
    if not isinstance(mask, torch.fx.Node) or not is_tensor(mask):
        return None
    inside = broadcast(at, shape_of(mask), shape_of(masked))
    return Step(StepKind.FILL, masked, mask, inside, fill=-torch.inf, when=when)


def _is_bool(node: torch.fx.Node) -> bool:
    return bool(value_of(node).dtype == torch.bool)


def _behind_casts(node: torch.fx.Node) -> torch.fx.Node:
    while operator_of(node).view is View.COPY:
        node = first_input(node)
    return node


def _with_extra(
    softmax: Softmax, rows: Indices, steps: tuple[Step, ...], axes: Axes
) -> tuple[Step, ...] | None:
    """Return the steps with an extra logit in the end; None if its layout is not understood.

    The number that is subtracted from all scores of a row, to keep them small, is subtracted from
    the logit too, so that it cancels.
    """
    if not isinstance(softmax.extra, torch.fx.Node):
        assert softmax.total is not None
        return (*steps, Step(StepKind.EXTRA, softmax.total, sympy.S.Zero))
    place = divisor_place(rows, softmax, axes, softmax.extra)
    if place is None:
        return None
    node = softmax.extra
    logit = first_input(node) if not is_operator(node, "pow") else node.all_input_nodes[0]
    shift = steps[-1] if steps and steps[-1].kind is StepKind.MINUS else None
    if shift is None:
        return (*steps, Step(StepKind.EXTRA, node, logit, place))
    if is_operator(logit, "neg") and _same(shift, first_input(logit), place, axes):
        return (*steps[:-1], Step(StepKind.EXTRA, node, sympy.S.Zero))
    if is_operator(logit, "sub") and is_tensor(logit.args[1]):
        raw, subtracted = logit.args[:2]
        inside = broadcast(place, shape_of(subtracted), shape_of(logit))  # type: ignore[arg-type]
        if _same(shift, subtracted, inside, axes):  # type: ignore[arg-type]
            tensor = is_tensor(raw)
            inner = broadcast(place, shape_of(raw), shape_of(logit)) if tensor else ()  # type: ignore[arg-type]
            return (*steps[:-1], Step(StepKind.EXTRA, node, raw, inner))
    return (*steps, Step(StepKind.EXTRA, node, logit, place))


def _same(shift: Step, node: torch.fx.Node, at: Indices, axes: Axes) -> bool:
    """True if a step subtracts the element `at` of `node`."""
    if not is_tensor(shift.other):
        return False
    return _source(shift.other, shift.indices, axes) == _source(node, at, axes)


def _source(node: torch.fx.Node, at: Indices, axes: Axes) -> tuple[torch.fx.Node, Indices]:
    while (behind := source_of(node, at, axes)) is not None:
        node, at = behind
    return node, at
