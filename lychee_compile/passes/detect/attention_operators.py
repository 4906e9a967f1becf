"""Find attentions that are one operator: SDPA, FlexAttention, whole modules."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.assemble import GraphContext, MatchedParts, settle
from lychee_compile.passes.detect.attention import Attention, Rejected, Stage, Unread
from lychee_compile.passes.detect.flex import flex_score
from lychee_compile.passes.detect.operands import Place
from lychee_compile.passes.detect.score_trace import Step, Trace
from lychee_compile.passes.graph.dataflow import (
    argument,
    is_operator,
    operator_key,
    operator_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.operator_facts import Family, StepKind
from lychee_compile.passes.symbolic.axes import (
    Axes,
    free_axes,
    plain,
    size_expression,
    with_finer_axes,
)
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.products import Product
from lychee_compile.passes.symbolic.views import broadcast

logger = logging.getLogger(__name__)


def find_fused(context: GraphContext) -> Iterator[Attention | Unread]:
    """Yield every attention that is one operator, in order."""
    for node in context.order.nodes:
        if is_operator(node, "scaled_dot_product_attention"):
            yield _read(node, "sdpa", lambda axes, node=node: _from_sdpa(node, axes, context))  # type: ignore[misc]
        elif node.target is torch.ops.higher_order.flex_attention:
            yield _read(node, "flex", lambda axes, node=node: _from_flex(node, axes, context))  # type: ignore[misc]
        elif operator_of(node).family is Family.ATTENTION_MODULE:
            yield _from_module(node)


def _read(
    node: torch.fx.Node, form: str, match: Callable[[Axes], Attention | Unread | Rejected | None]
) -> Attention | Unread:
    """Return what `match` finds, or else what the shapes of the operands tell."""
    found: Attention | Unread | Rejected | None
    try:
        found = with_finer_axes(match)
    except Exception as error:
        logger.debug("%s could not be analysed", node, exc_info=True)
        found = Rejected(node, reasons.NOT_ANALYSED(error=reasons.brief(error)), Stage.OPERANDS)
    if isinstance(found, Attention | Unread):
        return found
    query, key = (
        [plain(size_expression(size)) for size in shape_of(each)]
        for each in node.all_input_nodes[:2]
    )
    reason = found.reason if found else reasons.OPERANDS_LAYOUT()
    return Unread(
        node=node,
        form=form,
        query_heads=query[-3] if len(query) > 2 else 1,
        kv_heads=key[-3] if len(key) > 2 else 1,
        head_dim=query[-1],
        query_len=query[-2],
        kv_len=key[-2],
        mask="not read",
        reason=reason,
        by_design=False,
    )


def _from_sdpa(
    node: torch.fx.Node, axes: Axes, context: GraphContext
) -> Attention | Unread | Rejected:
    mask = argument(node, "attn_mask")
    scale = argument(node, "scale")
    if scale is None:
        scale = float(shape_of(argument(node, "query"))[-1]) ** -0.5
    gqa = bool(argument(node, "enable_gqa", False))
    trace, operands = _operands(node, node, gqa, axes)
    steps = [Step(StepKind.TIMES, node, scale)]
    if mask is not None:
        wide = (*operands["out"][:-1], operands["kv"])
        at = wide[len(wide) - len(shape_of(mask)) :]
        at = tuple(
            sympy.S.Zero if size_expression(size) == 1 else index
            for index, size in zip(at, shape_of(mask), strict=True)
        )
        hides = value_of(mask).dtype == torch.bool
        step = (
            Step(StepKind.FILL, node, mask, at, -torch.inf, when=False)
            if hides
            else Step(StepKind.PLUS, node, mask, at)
        )
        steps.append(step)
    elements = Elements(axes, context.names, context.written)
    parts = MatchedParts(
        node=node,
        form="sdpa",
        weights=node,
        out=operands["out"],
        score_dims=operands["out"][:-1],
        trace=Trace(trace.product, trace.query, trace.key, trace.inner, tuple(steps)),
        value=operands["value"],
        reader=node,
        keys=free_axes([operands["kv"]]),
        is_causal=bool(argument(node, "is_causal", False)),
        dropout=float(argument(node, "dropout_p", 0.0)),
        heads_first=len(operands["out"]) > 3,
    )
    return settle(parts, elements, context)


def _operands(
    node: torch.fx.Node, output: torch.fx.Node, gqa: bool, axes: Axes
) -> tuple[Trace, dict[str, Any]]:
    """Return query, key and value [..., H, T, D] of an operator, with the indices of `output`."""
    query, key, value = (
        node.args[:3]
        if len(node.args) > 2
        else (argument(node, name) for name in ("query", "key", "value"))
    )
    assert isinstance(query, torch.fx.Node)
    assert isinstance(key, torch.fx.Node)
    assert isinstance(value, torch.fx.Node)
    axes.assume_equal(shape_of(key)[-2], shape_of(value)[-2])
    mask = argument(node, "attn_mask") if operator_key(node) else None
    if mask is not None and size_expression(shape_of(mask)[-1]) != 1:
        axes.assume_equal(shape_of(key)[-2], shape_of(mask)[-1])
    out = tuple(axes.index(f"o{place}", size) for place, size in enumerate(shape_of(output)))
    kv = axes.index("kv", shape_of(key)[-2])
    inner = axes.index("d", shape_of(query)[-1])

    def place(tensor: torch.fx.Node, token: sympy.Expr, feature: sympy.Expr) -> Place:
        sizes = shape_of(tensor)
        wide = (*out[:-2], token, feature)
        outer = broadcast(wide, sizes, (*shape_of(output)[:-2], *sizes[-2:]))
        if gqa and len(sizes) > 2:
            heads, all_heads = size_expression(sizes[-3]), size_expression(shape_of(output)[-3])
            if heads != all_heads:
                shared = axes.divide(out[-3], sympy.cancel(all_heads / heads))[0]
                outer = (*outer[:-3], shared, *outer[-2:])
        return Place(tensor, outer, sympy.S.One)

    product = Product(node, query, key, (), (), (), ())
    trace = Trace(
        product, place(query, out[-2], inner), place(key, kv, inner), free_axes([inner]), ()
    )
    return trace, {"out": out, "kv": kv, "value": place(value, kv, out[-1])}


def _from_flex(
    node: torch.fx.Node, axes: Axes, context: GraphContext
) -> Attention | Unread | Rejected | None:
    output = next(
        (user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None
    )
    if output is None:
        return None
    trace, operands = _operands(node, output, True, axes)
    elements = Elements(axes, context.names, context.written)
    more = any(user is not output and user.users for user in node.users)
    parts = MatchedParts(
        node=output,
        form="flex",
        weights=node,
        out=operands["out"],
        score_dims=operands["out"][:-1],
        trace=trace,
        value=operands["value"],
        reader=node,
        keys=free_axes([operands["kv"]]),
        refused=reasons.LSE_USED() if more else None,
        heads_first=True,
    )
    settled = settle(parts, elements, context)
    if not isinstance(settled, Attention):
        return settled
    return flex_score(node, settled, (*operands["out"][:-1], operands["kv"]), context)


def _from_module(node: torch.fx.Node) -> Unread:
    """Return a whole self-attention, or an encoder layer, with packed weights."""
    width, heads = (
        argument(node, "embed_dim"),
        argument(node, "num_heads", argument(node, "num_head")),
    )
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    tokens = plain(size_expression(shape_of(source)[-2]))
    masked = any(argument(node, name) is not None for name in ("mask", "src_mask"))
    return Unread(
        node=node,
        form="fused",
        query_heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        query_len=tokens,
        kv_len=tokens,
        mask="a mask inside" if masked else "none",
        reason=reasons.FUSED_MODULE(),
        by_design=True,
    )
