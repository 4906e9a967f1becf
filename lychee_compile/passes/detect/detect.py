"""Find the attentions of a graph by what they compute, however they are written.

An attention is a product whose one factor is a softmax, over the axes that are summed, of scores
that come from a product of queries and keys:

    s[b, h, q, kv]  = sum over d of Q[b, h, q, d] K[b, g, kv, d]
    out[b, h, q, e] = sum over kv of softmax over kv (score(s[b, h, q, kv])) V[b, g, kv, e]

Indices are carried back from the output: every view, transposition, split and repetition on the way
is a fact about indices, and the axes that the operands turn out to have are those of the attention.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.assemble import GraphContext, MatchedParts, settle
from lychee_compile.passes.detect.attention import Attention, Rejected, Stage, Unread
from lychee_compile.passes.detect.attention_operators import find_fused, with_finer_axes
from lychee_compile.passes.detect.operands import Place, free_axes
from lychee_compile.passes.detect.products import Product, product_of
from lychee_compile.passes.detect.score_trace import ScoreTracer, Trace
from lychee_compile.passes.detect.softmaxes import Softmax, divisor_place, find_softmaxes
from lychee_compile.passes.graph.dataflow import (
    argument,
    first_input,
    operator_key,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.graph.region import Order
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.axes import Axes, Axis, Indices
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.views import (
    CARRIERS,
    broadcast,
    is_shape_operator,
    is_view_of_part,
    source_of,
)

logger = logging.getLogger(__name__)

Found = Attention | Unread | Rejected


def find_attention(gm: torch.fx.GraphModule, written: frozenset[torch.fx.Node]) -> list[Found]:
    """All attentions of `gm`, and all softmaxes that belong to none, in order.

    `written` is what `normalise` could not give values of their own.
    """
    scene = GraphContext(gm, Order(gm.graph), Names(gm), written)
    found: list[Found] = list(find_fused(scene))
    found.extend(_from_softmax(softmax, scene) for softmax in find_softmaxes(gm.graph))
    return sorted(found, key=lambda each: scene.order.place[each.node])


def _from_softmax(softmax: Softmax, scene: GraphContext) -> Attention | Rejected:
    """The attention that a softmax belongs to, or why it belongs to none."""
    try:
        return _attention_of(softmax, scene)
    except Exception as error:
        logger.debug("%s could not be analysed", softmax.node, exc_info=True)
        why = reasons.NOT_ANALYSED(error=reasons.brief(error))
        return Rejected(softmax.node, why, Stage.OPERANDS)


def _attention_of(softmax: Softmax, scene: GraphContext) -> Attention | Rejected:
    """Return the attention, or the miss that came nearest to one: the first at the last stage."""
    misses = [Rejected(softmax.node, reasons.WEIGHTS_WITHOUT_VALUES(), Stage.WEIGHTS)]
    for product in _products_with(softmax.weights):
        result = with_finer_axes(lambda axes, p=product: _match(softmax, p, axes, scene))  # type: ignore[misc]
        if isinstance(result, Attention):
            return result
        if result is not None:
            misses.append(result)
    return replace(max(misses, key=lambda miss: miss.stage), node=softmax.node)


def _products_with(weights: torch.fx.Node) -> Iterator[Product]:
    """Products that the weights go into, through shapes, casts and elementwise operators."""
    waiting, reached = [weights], {weights}
    while waiting and len(reached) < 64:
        node = waiting.pop(0)
        for user in node.users:
            product = product_of(user)
            if product is not None and {product.left, product.right} & reached:
                if all(map(_holds_floats, (product.left, product.right))):
                    yield product
            elif user not in reached and _carries(user):
                reached.add(user)
                waiting.append(user)


def _holds_floats(node: torch.fx.Node) -> bool:
    return bool(value_of(node).dtype.is_floating_point)


def _carries(node: torch.fx.Node) -> bool:
    return operator_key(node) in CARRIERS or is_view_of_part(node)


def _match(
    softmax: Softmax, product: Product, axes: Axes, scene: GraphContext
) -> Attention | Rejected | None:
    """The attention whose values `product` sums up; None where the softmax is not summed over."""
    elements = Elements(axes, scene.names, scene.written)
    quotient = _quotient(softmax, product.node)
    node = quotient or product.node
    out = tuple(axes.index(f"o{place}", size) for place, size in enumerate(shape_of(node)))
    made = out if quotient is None else _behind_views(quotient, out, product.node, axes)
    inner = [axes.index(f"kv{place}", size) for place, size in enumerate(product.inner_sizes())]
    keys = free_axes(inner)
    left, right = product.operand_indices(made, inner)
    sides = [Place(product.left, left, sympy.S.One), Place(product.right, right, sympy.S.One)]
    for weights, value in (sides, reversed(sides)):
        walk = _WeightWalk(softmax, elements)
        at = walk.back(weights.node, weights.indices)
        if at is None:
            continue
        misfit = _misfit(softmax, at, keys)
        if misfit:
            return Rejected(softmax.node, misfit, Stage.PRODUCT)
        return _from_weights(softmax, product, node, at, walk, value, out, keys, elements, scene)
    return None


def _misfit(softmax: Softmax, at: Indices, keys: frozenset[Axis]) -> Reason | None:
    along = free_axes(at[dim] for dim in softmax.dims)
    across = free_axes((index for dim, index in enumerate(at) if dim not in softmax.dims))
    if not keys or along != keys or across & keys:
        return reasons.OTHER_AXIS_SUMMED()
    return None


def _from_weights(
    softmax: Softmax, product: Product, node: torch.fx.Node, at: Indices, walk: _WeightWalk,
    value: Place, out: Indices, keys: frozenset[Axis], elements: Elements, scene: GraphContext,
) -> Attention | Rejected:  # fmt: skip
    tracer = ScoreTracer(elements, keys, scene.is_parameter)
    trace = tracer.trace(softmax.scores, at)
    if trace is None:
        return Rejected(softmax.node, tracer.why_not, Stage.SCORES)
    if scene.is_parameter(value.node):
        return Rejected(softmax.node, reasons.VALUES_LINEAR(), Stage.OPERANDS)
    refused = walk.refused
    if softmax.deferred and node is product.node:
        refused = refused or reasons.SUM_MISPLACED()
    dropped = _dropped_keys(softmax, keys, elements.axes, trace)
    total_misfit = _total_misfit(softmax, at, out, elements.axes)
    pieces = MatchedParts(
        node=node,
        form="eager",
        weights=softmax.weights,
        out=out,
        score_dims=tuple(index for dim, index in enumerate(at) if dim not in softmax.dims),
        trace=trace,
        value=value,
        reader=product.node,
        keys=keys,
        base_two=softmax.base_two,
        dropout=walk.dropout,
        refused=refused or dropped or total_misfit or walk.unknown_mask(trace),
    )
    return settle(pieces, elements, scene)


def _dropped_keys(
    softmax: Softmax, keys: frozenset[Axis], axes: Axes, trace: Trace
) -> Reason | None:
    """Return why the softmax must not be taken over the summed axes alone; None if it may."""
    sizes = [axes.index(f"whole{dim}", shape_of(softmax.scores)[dim]) for dim in softmax.dims]
    there = axes.product(axis for size in sizes for axis in free_axes([size]))
    extra = sum(step.kind == "extra" for step in trace.steps)
    if extra > 1 or sympy.expand(there - axes.product(keys) - extra) != 0:
        return reasons.WEIGHTS_PARTLY_USED()
    return None


def _total_misfit(softmax: Softmax, at: Indices, out: Indices, axes: Axes) -> Reason | None:
    """Return a reason if the weights are not divided by the sum over the keys of their own row."""
    if softmax.total is None:
        return None
    place = divisor_place(out if softmax.deferred else at, softmax, axes)
    rows = tuple(index for dim, index in enumerate(at) if dim not in softmax.dims)
    if place is not None and len(place) == len(at):  # keepdim
        place = tuple(index for dim, index in enumerate(place) if dim not in softmax.dims)
    return None if place == rows else reasons.WEIGHTS_WRONG_ROW()


def _quotient(softmax: Softmax, product: torch.fx.Node) -> torch.fx.Node | None:
    """The division by the sum, where it follows `product`, shaped anyhow, and nothing else does."""
    node = product
    while softmax.deferred and len(node.users) == 1:
        (user,) = node.users
        if user is softmax.reader:
            return user if shape_of(user) == shape_of(node) else None
        if not is_shape_operator(user):
            return None
        node = user
    return None


def _behind_views(
    quotient: torch.fx.Node, indices: Indices, product: torch.fx.Node, axes: Axes
) -> Indices:
    """Indices of `product` that `quotient` reads, at its own `indices`."""
    node = next(each for each in quotient.all_input_nodes if _comes_from(each, product))
    while node is not product:
        viewed = source_of(node, indices, axes)
        assert viewed is not None
        node, indices = viewed
    return indices


def _comes_from(node: torch.fx.Node, product: torch.fx.Node) -> bool:
    while node is not product and is_shape_operator(node):
        node = first_input(node)
    return node is product


class _WeightWalk:
    """Walks from the product with the values back to the softmax, and notes what is in between."""

    def __init__(self, softmax: Softmax, elements: Elements) -> None:
        self.dropout = 0.0
        self.refused: Reason | None = None
        self._softmax, self._elements = softmax, elements
        self._zeroed: list[torch.fx.Node] = []
        self._dead: set[torch.fx.Node] = set()

    def back(self, node: torch.fx.Node, indices: Indices) -> Indices | None:
        """Indices into the weights; None where `node` does not come from them."""
        if node is self._softmax.weights:
            return indices
        if node.op != "call_function" or node in self._dead or len(self._dead) > 64:
            return None
        viewed = source_of(node, indices, self._elements.axes)
        if viewed is not None:
            found = self.back(*viewed)
        elif operator_key(node) in CARRIERS:
            found = self._through(node, indices)
        else:
            found = None
        if found is None:
            self._dead.add(node)
        return found

    def _through(self, node: torch.fx.Node, indices: Indices) -> Indices | None:
        for place, operand in enumerate(node.args):
            if not isinstance(operand, torch.fx.Node) or not shape_of(operand):
                continue
            found = self.back(operand, broadcast(indices, shape_of(operand), shape_of(node)))
            if found is not None:
                self._note(node, place)
                return found
        return None

    def _note(self, node: torch.fx.Node, place: int) -> None:
        key = operator_key(node)
        if key in ("dropout", "native_dropout"):
            if argument(node, "train"):
                self.dropout = max(self.dropout, float(argument(node, "p")))
            return
        if key == "nan_to_num":
            return
        condition, zero = self._zeroes(node, place)
        if zero is not None and zero.is_zero:
            if operator_key(condition) != "isnan":
                self._zeroed.append(condition)
            return
        self.refused = self.refused or reasons.WEIGHTS_CHANGED(operator=key)

    def _zeroes(self, node: torch.fx.Node, place: int) -> tuple[Any, Any]:
        """Condition under which a weight is replaced, and by what; None where it is not."""
        if operator_key(node) == "masked_fill" and place == 0:
            return node.args[1], self._elements.of(node.args[2])
        if operator_key(node) == "where" and place > 0:
            return node.args[0], self._elements.of(node.args[3 - place])
        return None, None

    def unknown_mask(self, trace: Trace) -> Reason | None:
        """Return a reason if weights are set to zero by a mask that the scores lack."""
        masks = {step.other for step in trace.steps if step.kind == "fill"}
        return None if masks.issuperset(self._zeroed) else reasons.WEIGHTS_MASKED()
