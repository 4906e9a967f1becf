"""Walk from the argument of a softmax down to the product of queries and keys, noting each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.mixing import mixtures_of
from lychee_compile.passes.detect.operands import Place, widens
from lychee_compile.passes.graph.dataflow import (
    argument,
    is_operator,
    is_tensor,
    operator_key,
    operator_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.operator_facts import Family, StepKind
from lychee_compile.passes.graph.operators import OPERATORS, UNKNOWN
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.axes import Axis, Indices, free_axes, size_expression
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.products import Product, product_of
from lychee_compile.passes.symbolic.views import broadcast, source_of

DEEPEST = 60
"""Largest number of operators between the product and the softmax."""


@dataclass(frozen=True)
class Step:
    """One operator on the way from the product to the softmax."""

    kind: StepKind
    node: torch.fx.Node
    other: Any = None
    """The other operand: a tensor node or a number."""
    indices: Indices = ()
    """Indices of the other operand."""
    fill: Any = None
    """Value that is filled in under the condition of `other`, a bool tensor."""
    when: bool = True
    """Truth value of `other` at which the value is filled in."""


@dataclass(frozen=True)
class Trace:
    """The product of queries and keys that scores come from, with the steps after it."""

    product: Product
    query: Place
    key: Place
    inner: frozenset[Axis]
    """The axes of head_dim."""
    steps: tuple[Step, ...]
    mixed: frozenset[Axis] = frozenset()
    """Axes of heads that are summed over between the product and the softmax."""
    mixer: torch.fx.Node | None = None
    """The operator that does so; the last of several."""

    @property
    def mixing(self) -> Reason | None:
        """Reason that scores of several heads are mixed; None if each head has its own."""
        if self.mixer is None:
            return None
        return reasons.SCORES_MIXED(operator=operator_key(self.mixer))


class ScoreTracer:
    """A walk from the argument of a softmax down to the product of queries and keys."""

    def __init__(
        self,
        elements: Elements,
        keys: frozenset[Axis],
        is_parameter: Callable[[torch.fx.Node], bool],
        positions: frozenset[Axis],
        mixes: bool,
    ) -> None:
        """Begin a walk over `keys`; `positions` are the axes of queries that values lack.

        Mixtures of heads are followed if they keep a position, and with `mixes` all of them are.
        """
        self.elements, self.keys = elements, keys
        self.why_not = reasons.SCORES_NO_PRODUCT()
        self._is_parameter, self._positions, self._mixes = is_parameter, positions, mixes
        self._failed: set[torch.fx.Node] = set()
        self._visited = 0

    def trace(self, node: torch.fx.Node, indices: Indices) -> Trace | None:
        """Return the product behind `node`, read at `indices`; None if there is none."""
        self._visited += 1
        if node.op != "call_function" or node in self._failed or self._visited > DEEPEST:
            return None
        trace = (
            self._mixture(node, indices)
            or self._product(node, indices)
            or self._view(node, indices)
            or self._step(node, indices)
        )
        if trace is None:
            self._failed.add(node)
        elif self.elements.is_opaque(node):
            return _after(trace, Step(StepKind.OTHER, node, "a write through a view"))
        return trace

    def _mixture(self, node: torch.fx.Node, indices: Indices) -> Trace | None:
        """Follow scores whose heads are mixed, if the maps extend over queries and keys both."""
        if not self._positions and not self._mixes:
            return None
        for mixture in mixtures_of(node, indices, self.elements.axes):
            held = free_axes(mixture.indices)
            if free_axes(mixture.factor_indices) & self.keys or not self.keys <= held:
                continue
            if self._positions and not self._positions & held:
                continue
            trace = self.trace(mixture.maps, mixture.indices)
            mixed = mixture.summed | trace.mixed if trace else frozenset()
            if trace and mixed and mixed <= _heads(trace, self._positions & held - mixed):
                return replace(trace, mixed=mixed, mixer=node)
        return None

    def _product(self, node: torch.fx.Node, indices: Indices) -> Trace | None:
        product = product_of(node)
        if product is None:
            return None
        axes = self.elements.axes
        sizes = enumerate(product.inner_sizes())
        inner = [axes.index(f"{node.name}.d{place}", size) for place, size in sizes]
        left, right = product.operand_indices(indices, inner)
        sides = [Place(product.left, left, sympy.S.One), Place(product.right, right, sympy.S.One)]
        holds = [free_axes(side.indices) & self.keys for side in sides]
        if bool(holds[0]) == bool(holds[1]):
            return None
        query, key = sides if holds[1] else reversed(sides)
        if self._is_parameter(query.node) or self._is_parameter(key.node):
            self.why_not = reasons.SCORES_LINEAR()
            return None
        steps: list[Step] = []
        if product.alpha != 1:
            steps.append(Step(StepKind.TIMES, node, product.alpha))
        if product.added is not None:
            wide = broadcast(indices, shape_of(product.added), shape_of(node))
            steps.append(Step(StepKind.PLUS, node, product.added, wide, fill=product.beta))
        return Trace(product, query, key, free_axes(inner), tuple(steps))

    def _view(self, node: torch.fx.Node, indices: Indices) -> Trace | None:
        viewed = source_of(node, indices, self.elements.axes)
        if viewed is None:
            return None
        trace = self.trace(*viewed)
        before, after = value_of(viewed[0]).dtype, value_of(node).dtype
        if trace is None or widens(before, after) or widens(after, before):
            return trace
        return _after(
            trace, Step(StepKind.OTHER, node, f"a cast to {str(after).removeprefix('torch.')}")
        )

    def _step(self, node: torch.fx.Node, indices: Indices) -> Trace | None:
        described = operator_of(node)
        if described.family is Family.DROPOUT:
            trace = self.trace(node.args[0], indices)  # type: ignore[arg-type]
            active = argument(node, "train") and argument(node, "p")
            return (
                _after(trace, Step(StepKind.OTHER, node, "dropout")) if trace and active else trace
            )
        if is_operator(node, "cat"):
            return self._extra_logit(node, indices)
        if not described.steps and not _writes_scores(node):
            return None
        for place, operand in enumerate(node.args):
            if not isinstance(operand, torch.fx.Node) or not isinstance(
                value_of(operand), torch.Tensor
            ):
                continue
            if not value_of(operand).dtype.is_floating_point:
                continue
            inside = broadcast(indices, shape_of(operand), shape_of(node))
            trace = self.trace(operand, inside) if len(inside) == len(shape_of(operand)) else None
            if trace is not None:
                return _after(trace, _step_of(node, place, indices))
        return None

    def _extra_logit(self, node: torch.fx.Node, indices: Indices) -> Trace | None:
        """Follow scores that have more logits beside them along the keys."""
        dim = argument(node, "dim", 0) % len(indices)
        parts = argument(node, "tensors")
        start = sympy.S.Zero
        at = indices[dim]
        if not free_axes([at]) & self.keys:
            return None
        offset = at.subs(dict.fromkeys(self.keys, 0))
        for place, part in enumerate(parts):
            size = size_expression(shape_of(part)[dim])
            if offset == start:
                trace = self.trace(part, (*indices[:dim], at - start, *indices[dim + 1 :]))
                others = [each for each in parts if each is not part]
                if trace is None or len(others) != 1 or place not in (0, 1):
                    return trace and _after(trace, Step(StepKind.OTHER, node, "cat"))
                (other,) = others
                zero = (*indices[:dim], sympy.S.Zero, *indices[dim + 1 :])
                single = size_expression(shape_of(other)[dim]) == 1
                kind = (
                    Step(StepKind.EXTRA, node, other, zero)
                    if single
                    else Step(StepKind.OTHER, node, "cat")
                )
                return _after(trace, kind)
            start += size
        return None


def _heads(trace: Trace, positions: frozenset[Axis]) -> frozenset[Axis]:
    """Return axes of queries that keys share; with `positions`, those that are none of them too."""
    query, key = free_axes(trace.query.indices), free_axes(trace.key.indices)
    return query - trace.inner - positions if positions else query & key - trace.inner


def _after(trace: Trace, step: Step) -> Trace:
    return replace(trace, steps=(*trace.steps, step))


def _writes_scores(node: torch.fx.Node) -> bool:
    """True for a write to scores that `normalise` left in the graph."""
    key = operator_key(node)
    return key.endswith("_") and bool(OPERATORS.get(key[:-1], UNKNOWN).steps)


def _step_of(node: torch.fx.Node, place: int, indices: Indices) -> Step:
    """Return the step that `node` is if operand number `place` carries the scores."""
    kind = operator_of(node).step(place)
    plain = argument(node, "alpha", 1) == 1 and not argument(node, "rounding_mode")
    clamps = is_operator(node, "clamp")
    if kind is StepKind.OTHER or not plain or (clamps and argument(node, "max") is not None):
        return Step(StepKind.OTHER, node, operator_key(node))
    if is_operator(node, "index_put"):
        return _filled_by_index(node, indices)
    if kind is StepKind.FILL:
        hidden, fill = (1, 2) if is_operator(node, "masked_fill") else (0, 3 - place)
        step = Step(kind, node, node.args[hidden], fill=node.args[fill], when=place != 1)
    elif is_operator(node, "neg"):
        step = Step(kind, node, -1)
    elif clamps:
        step = Step(kind, node, argument(node, "min"))
    else:
        step = Step(kind, node, None if kind is StepKind.TANH else node.args[1 - place])
    if not is_tensor(step.other):
        return step
    return replace(step, indices=broadcast(indices, shape_of(step.other), shape_of(node)))


def _filled_by_index(node: torch.fx.Node, indices: Indices) -> Step:
    """Return `scores[mask] = number` as a fill."""
    chosen, value = argument(node, "indices"), argument(node, "values")
    whole = len(chosen) == 1 and len(shape_of(chosen[0])) == len(indices)
    whole = whole and not argument(node, "accumulate", False)
    if not whole or value_of(chosen[0]).dtype != torch.bool or shape_of(value):
        return Step(StepKind.OTHER, node, "index_put")
    return Step(StepKind.FILL, node, chosen[0], indices, fill=value)
