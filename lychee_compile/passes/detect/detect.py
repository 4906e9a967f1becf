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
from dataclasses import dataclass, replace
from functools import partial

import sympy
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.assemble import GraphContext, MatchedParts, settle
from lychee_compile.passes.detect.attention import Attention, Rejected, Stage, Unread
from lychee_compile.passes.detect.attention_operators import find_fused
from lychee_compile.passes.detect.mixing import MIXERS
from lychee_compile.passes.detect.operands import Place
from lychee_compile.passes.detect.score_trace import ScoreTracer, Trace
from lychee_compile.passes.detect.softmax.denominators import divisor_place
from lychee_compile.passes.detect.softmax.joined_sums import find_joined
from lychee_compile.passes.detect.softmax.softmaxes import Softmax, find_softmaxes
from lychee_compile.passes.detect.softmax.written_softmax import with_exponentials
from lychee_compile.passes.detect.weight_walk import WeightWalk
from lychee_compile.passes.graph.aliasing import is_view_of_part
from lychee_compile.passes.graph.dataflow import (
    first_input,
    operator_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.graph.operator_facts import StepKind
from lychee_compile.passes.graph.region import Order
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.axes import (
    Axes,
    Axis,
    Indices,
    free_axes,
    size_expression,
    with_finer_axes,
)
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.products import Product, product_of
from lychee_compile.passes.symbolic.views import is_shape_operator, source_of

logger = logging.getLogger(__name__)

Found = Attention | Unread | Rejected
FARTHEST = 64
"""Largest number of operators that weights are followed through."""


def find_attention(gm: torch.fx.GraphModule, written: frozenset[torch.fx.Node]) -> list[Found]:
    """Return all attentions of `gm`, and all softmaxes that belong to none, in order.

    `written` holds the nodes to which `normalise` could not give values of their own.
    """
    context = GraphContext(gm, Order(gm.graph), Names(gm), written)
    results: list[Found] = list(find_fused(context))
    softmaxes = list(find_softmaxes(gm.graph))
    results.extend(_from_softmax(softmax, context) for softmax in softmaxes)
    known = frozenset(softmax.node for softmax in softmaxes)
    results.extend(find_joined(gm.graph, known, partial(_over_chunk, context), context.order))
    return sorted(results, key=lambda each: context.order.place[each.node])


def _from_softmax(softmax: Softmax, context: GraphContext) -> Attention | Unread | Rejected:
    """Return the attention that a softmax belongs to, or why it belongs to none."""
    try:
        return _attention_of(softmax, context)
    except Exception as error:
        logger.debug("%s could not be analysed", softmax.node, exc_info=True)
        why = reasons.NOT_ANALYSED(error=reasons.brief(error))
        return Rejected(softmax.node, why, Stage.OPERANDS)


def _over_chunk(
    context: GraphContext, softmax: Softmax
) -> Iterator[tuple[torch.fx.Node, Attention]]:
    """Yield each product of exponentials with values, and the attention that it is a part of."""
    for product in _products_with(softmax.weights, mixes=False):
        result = with_finer_axes(partial(_match, softmax, product, context, False))
        if isinstance(result, Attention):
            yield product.node, result


def _attention_of(softmax: Softmax, context: GraphContext) -> Attention | Unread | Rejected:
    """Return the attention, or the miss that came nearest to one: the first at the last stage."""
    if all(size_expression(shape_of(softmax.scores)[dim]) == 1 for dim in softmax.dims):
        return Rejected(softmax.node, reasons.ONE_KEY(), Stage.WEIGHTS)
    misses = [Rejected(softmax.node, reasons.WEIGHTS_WITHOUT_VALUES(), Stage.WEIGHTS)]
    for mixes in (False, True):
        for product in _products_with(softmax.weights, mixes):
            result: Attention | Unread | Rejected | None = with_finer_axes(
                partial(_match, softmax, product, context, mixes)
            )
            if isinstance(result, Attention | Unread):
                return result
            if result is not None and not mixes:
                misses.append(result)
    return replace(max(misses, key=lambda miss: miss.stage), node=softmax.node)


def _products_with(weights: torch.fx.Node, mixes: bool) -> Iterator[Product]:
    """Yield the products that read the weights, through views, casts and elementwise operators.

    With `mixes`, those after other products, convolutions and normalisations follow too.
    """
    waiting, reached = [weights], {weights}
    while waiting and len(reached) < FARTHEST:
        node = waiting.pop(0)
        for user in node.users:
            product = product_of(user)
            if product is not None and {product.left, product.right} & reached:
                if all(map(_holds_floats, (product.left, product.right))):
                    yield product
                follow = mixes
            else:
                follow = _carries(user) or (mixes and operator_of(user).family in MIXERS)
            if follow and user not in reached:
                reached.add(user)
                waiting.append(user)


def _holds_floats(node: torch.fx.Node) -> bool:
    return bool(value_of(node).dtype.is_floating_point)


def _carries(node: torch.fx.Node) -> bool:
    return operator_of(node).carries_weights or is_view_of_part(node)


@dataclass(frozen=True)
class _WeightedSum:
    """A softmax, and a product that may sum up values with its weights."""

    softmax: Softmax
    product: Product
    node: torch.fx.Node
    """The node that computes the output: the product, or a division after it."""
    out: Indices
    keys: frozenset[Axis]
    """Axes that the product sums over."""


def _match(
    softmax: Softmax, product: Product, context: GraphContext, mixes: bool, axes: Axes
) -> Attention | Unread | Rejected | None:
    """Return the attention whose values `product` sums up.

    With `mixes`, weights may be mixed over heads before the product. None if the softmax is no
    operand of the product.
    """
    elements = Elements(axes, context.names, context.written)
    quotient = _quotient(softmax, product.node)
    node = quotient or product.node
    out = tuple(axes.index(f"o{dim}", size) for dim, size in enumerate(shape_of(node)))
    summed = out if quotient is None else _behind_views(quotient, out, product.node, axes)
    inner = [axes.index(f"kv{dim}", size) for dim, size in enumerate(product.inner_sizes())]
    attention = _WeightedSum(softmax, product, node, out, free_axes(inner))
    left, right = product.operand_indices(summed, inner)
    sides = [Place(product.left, left, sympy.S.One), Place(product.right, right, sympy.S.One)]
    for weights, value in (sides, reversed(sides)):
        walk = WeightWalk(softmax, elements, mixes)
        at = walk.back(weights.node, weights.indices)
        if at is None:
            continue
        misfit = _misfit(softmax, at, attention.keys)
        if misfit:
            return Rejected(softmax.node, misfit, Stage.PRODUCT)
        return _from_weights(attention, at, walk, value, context)
    return None


def _misfit(softmax: Softmax, at: Indices, keys: frozenset[Axis]) -> Reason | None:
    """Return a reason if the softmax, read at `at`, runs over anything but the keys."""
    along = free_axes(at[dim] for dim in softmax.dims)
    across = free_axes((index for dim, index in enumerate(at) if dim not in softmax.dims))
    if not keys or along != keys or across & keys:
        return reasons.OTHER_AXIS_SUMMED()
    return None


def _from_weights(
    attention: _WeightedSum,
    at: Indices,
    walk: WeightWalk,
    value: Place,
    context: GraphContext,
) -> Attention | Unread | Rejected:
    """Return the attention whose weights are read at `at`, or why it is none."""
    softmax, elements = attention.softmax, walk.elements
    axes = elements.axes
    positions = free_axes(at) & free_axes(attention.out) - free_axes(value.indices)
    tracer = ScoreTracer(elements, attention.keys, context.is_parameter, positions, walk.mixes)
    trace = tracer.trace(softmax.scores, at)
    if trace is None:
        return Rejected(softmax.node, tracer.why_not, Stage.SCORES)
    if context.is_parameter(value.node):
        return Rejected(softmax.node, reasons.VALUES_LINEAR(), Stage.OPERANDS)
    mixed = free_axes(at) - attention.keys - free_axes(attention.out)
    if mixed and not walk.mixes_heads(mixed, at, trace, context.is_parameter):
        return Rejected(softmax.node, reasons.WEIGHTS_SUMMED(), Stage.OPERANDS)
    refused = walk.refused or trace.mixing
    if softmax.deferred and attention.node is attention.product.node:
        refused = refused or reasons.SUM_MISPLACED()
    dropped = _dropped_keys(softmax, attention.keys, axes, trace)
    trace, changed = with_exponentials(softmax, at, trace, attention.out, elements)
    total_misfit = _total_misfit(softmax, at, attention.out, axes)
    parts = MatchedParts(
        node=attention.node,
        form="eager",
        weights=softmax.weights,
        out=attention.out,
        score_dims=tuple(index for dim, index in enumerate(at) if dim not in softmax.dims),
        trace=trace,
        value=value,
        reader=attention.product.node,
        keys=attention.keys,
        base_two=softmax.base_two,
        dropout=walk.dropout,
        refused=refused or changed or dropped or total_misfit or walk.unknown_mask(trace),
        mixed=mixed,
    )
    return settle(parts, elements, context)


def _dropped_keys(
    softmax: Softmax, keys: frozenset[Axis], axes: Axes, trace: Trace
) -> Reason | None:
    """Return why the softmax must not be taken over the summed axes alone; None if it may."""
    sizes = [axes.index(f"whole{dim}", shape_of(softmax.scores)[dim]) for dim in softmax.dims]
    there = axes.product(axis for size in sizes for axis in free_axes([size]))
    extra = sum(step.kind is StepKind.EXTRA for step in trace.steps)
    if extra > 1 or sympy.expand(there - axes.product(keys) - extra) != 0:
        return reasons.WEIGHTS_PARTLY_USED()
    return None


def _total_misfit(softmax: Softmax, at: Indices, out: Indices, axes: Axes) -> Reason | None:
    """Return a reason if the weights are not divided by the sum over the keys of their own row."""
    if softmax.total is None:
        return None
    goal = None if softmax.extra is None else softmax.sums
    place = divisor_place(out if softmax.deferred else at, softmax, axes, goal)
    rows = tuple(index for dim, index in enumerate(at) if dim not in softmax.dims)
    if place is not None and len(place) == len(at):  # keepdim
        place = tuple(index for dim, index in enumerate(place) if dim not in softmax.dims)
    return None if place == rows else reasons.WEIGHTS_WRONG_ROW()


def _quotient(softmax: Softmax, product: torch.fx.Node) -> torch.fx.Node | None:
    """Return the division by the sum if views of `product` lead to it and to nothing else."""
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
    """Return the indices of `product` that `quotient` reads at its own `indices`."""
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
