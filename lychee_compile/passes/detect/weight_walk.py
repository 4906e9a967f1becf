"""Walk from the product with the values back to the weights, noting what is done to them.

softmax(scores) -> dropout -> product with the values            the usual way
softmax(scores) -> sum over heads -> product with the values     talking heads
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.mixing import mixtures_of
from lychee_compile.passes.detect.score_trace import Trace
from lychee_compile.passes.detect.softmax.softmaxes import Softmax
from lychee_compile.passes.graph.dataflow import (
    argument,
    is_operator,
    operator_key,
    operator_of,
    shape_of,
)
from lychee_compile.passes.graph.operator_facts import Family, StepKind
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.axes import Axis, Indices, free_axes
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.views import broadcast, source_of


class WeightWalk:
    """A walk from the product with the values back to the softmax, noting what is in between."""

    def __init__(self, softmax: Softmax, elements: Elements, mixes: bool = False) -> None:
        """Begin a walk; with `mixes`, through operators that mix the weights of heads too."""
        self.dropout = 0.0
        self.refused: Reason | None = None
        self.mixed: list[tuple[frozenset[Axis], torch.fx.Node]] = []
        """Axes of the weights that are summed up on the way, each with the factor of that sum."""
        self.elements, self.mixes = elements, mixes
        self._softmax = softmax
        self._zeroed: list[torch.fx.Node] = []
        self._dead: set[torch.fx.Node] = set()

    def back(self, node: torch.fx.Node, indices: Indices) -> Indices | None:
        """Return the indices into the weights; None if `node` does not come from them."""
        if node is self._softmax.weights:
            return indices
        if node.op != "call_function" or node in self._dead or len(self._dead) > 64:
            return None
        viewed = source_of(node, indices, self.elements.axes)
        at = None
        if viewed is not None:
            at = self.back(*viewed)
        elif operator_of(node).carries_weights:
            at = self._through(node, indices)
        elif self.mixes:
            at = self._mixture(node, indices)
        if at is None:
            self._dead.add(node)
        return at

    def _through(self, node: torch.fx.Node, indices: Indices) -> Indices | None:
        for place, operand in enumerate(node.args):
            if not isinstance(operand, torch.fx.Node) or not shape_of(operand):
                continue
            at = self.back(operand, broadcast(indices, shape_of(operand), shape_of(node)))
            if at is not None:
                self._note(node, place)
                return at
        return None

    def _mixture(self, node: torch.fx.Node, indices: Indices) -> Indices | None:
        """Go back through an operator that mixes heads, as a sum over them does."""
        for mixture in mixtures_of(node, indices, self.elements.axes):
            at = self.back(mixture.maps, mixture.indices)
            if at is not None:
                if mixture.factor is not None:
                    self.mixed.append((mixture.summed, mixture.factor))
                self.refused = reasons.WEIGHTS_CHANGED(operator=operator_key(node))
                return at
        return None

    def mixes_heads(
        self,
        mixed: frozenset[Axis],
        at: Indices,
        trace: Trace,
        is_parameter: Callable[[torch.fx.Node], bool],
    ) -> bool:
        """True if the axes `mixed` of weights that are read at `at` are heads, not tokens."""
        query, key = free_axes(trace.query.indices), free_axes(trace.key.indices)
        heads = query & key
        if trace.mixed:  # a mixture of scores makes new heads
            heads |= free_axes(at) - query - key
        return all(
            axes <= heads or is_parameter(factor) for axes, factor in self.mixed if axes & mixed
        )

    def _note(self, node: torch.fx.Node, place: int) -> None:
        if operator_of(node).family is Family.DROPOUT:
            if argument(node, "train"):
                self.dropout = max(self.dropout, float(argument(node, "p")))
            return
        if is_operator(node, "nan_to_num"):
            return
        condition, zero = self._zeroes(node, place)
        if zero is not None and zero.is_zero:
            if not is_operator(condition, "isnan"):
                self._zeroed.append(condition)
            return
        self.refused = self.refused or reasons.WEIGHTS_CHANGED(operator=operator_key(node))

    def _zeroes(self, node: torch.fx.Node, place: int) -> tuple[Any, Any]:
        """Return the condition under which a weight is replaced, and by what; None if it is not."""
        if is_operator(node, "masked_fill") and place == 0:
            return node.args[1], self.elements.of(node.args[2])
        if is_operator(node, "where") and place > 0:
            return node.args[0], self.elements.of(node.args[3 - place])
        return None, None

    def unknown_mask(self, trace: Trace) -> Reason | None:
        """Return a reason if weights are set to zero by a mask that the scores lack."""
        masks = {step.other for step in trace.steps if step.kind is StepKind.FILL}
        return None if masks.issuperset(self._zeroed) else reasons.WEIGHTS_MASKED()
