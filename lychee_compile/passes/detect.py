"""Find the attentions of a pre-dispatch ATen graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from lychee_compile.passes.dataflow import (
    SAME_VALUES,
    VIEWS,
    argument,
    aten,
    calls,
    same,
    same_shape,
    shape_of,
    through_copies,
    value_of,
)


@dataclass(frozen=True)
class Attention:
    """One attention of the graph: softmax(scale Q K^T + mask) V."""

    node: torch.fx.Node
    """What computes the output, [B, Hq, Tq, Dv]."""
    query: torch.fx.Node
    """[B, Hq, Tq, D]."""
    key: torch.fx.Node
    """[B, Hkv, L, D], before it was repeated for the query heads."""
    value: torch.fx.Node
    """[B, Hkv, L, Dv], likewise."""
    mask: torch.fx.Node | None
    """Bool or additive float, broadcastable to [B, Hq, Tq, L]."""
    scale: float
    """Multiplies Q K^T."""
    is_causal: bool
    """Whether PyTorch's own causal mask applies: query i sees keys 0 to i."""
    dropout: float
    """Probability with which weights are dropped."""
    form: str
    """How it was written: "sdpa"."""


def find_attention(graph: torch.fx.Graph) -> list[Attention]:
    """All attentions of `graph`, in order."""
    found = (_from_sdpa(node) for node in graph.nodes)
    return [attention for attention in found if attention is not None]


def _from_sdpa(node: torch.fx.Node) -> Attention | None:
    if not calls(node, aten.scaled_dot_product_attention.default):
        return None
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    key, value = _undo_repeat(key, value)
    scale = argument(node, "scale")
    head_dim = shape_of(query)[-1]
    return Attention(
        node=node,
        query=query,
        key=key,
        value=value,
        mask=argument(node, "attn_mask"),
        scale=float(scale) if scale is not None else float(head_dim) ** -0.5,
        is_causal=bool(argument(node, "is_causal", False)),
        dropout=float(argument(node, "dropout_p", 0.0)),
        form="sdpa",
    )


def _undo_repeat(key: torch.fx.Node, value: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node]:
    """Key and value before each KV head was repeated for its query heads, both or neither."""
    base_key, base_value = _before_repeat(key), _before_repeat(value)
    if same(shape_of(base_key)[1], shape_of(base_value)[1]):
        return base_key, base_value
    return through_copies(key), through_copies(value)


def _before_repeat(node: torch.fx.Node) -> torch.fx.Node:
    """Undo [B, H, L, D] -> [B, H, G, L, D] -> [B, H * G, L, D], the copies of a head side by side.

    Also undoes `repeat_interleave` over the heads. Anything else, such as copies of all heads one
    after the other, gives the node back: query head h must read KV head h // G.
    """
    node = through_copies(node)
    if calls(node, aten.repeat_interleave.self_int):
        source, dim = argument(node, "self"), argument(node, "dim")
        return through_copies(source) if dim in (1, -3) and len(shape_of(source)) == 4 else node
    wide = shape_of(node)
    expanded = _skip(node, {aten.reshape.default, aten.view.default, aten._unsafe_view.default})
    if expanded is node or not calls(expanded, aten.expand.default):
        return node
    five = shape_of(expanded)
    inner = through_copies(expanded.args[0])  # type: ignore[arg-type]
    base = through_copies(_skip(inner, VIEWS - {aten.expand.default}))
    four = shape_of(base)
    if len(wide) != 4 or len(five) != 5 or len(four) != 4:
        return node
    one_per_head = same_shape(shape_of(inner), (four[0], four[1], 1, four[2], four[3]))
    side_by_side = same_shape(wide, (four[0], four[1] * five[2], four[2], four[3]))
    return base if one_per_head and side_by_side else node


def _skip(node: torch.fx.Node, targets: set[Any]) -> torch.fx.Node:
    while calls(node, *targets, *SAME_VALUES):
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        if value_of(source).dtype != value_of(node).dtype:  # a cast may round
            break
        node = source
    return node
