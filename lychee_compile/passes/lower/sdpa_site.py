"""Emit one scaled dot-product attention for products and a softmax that are written out.

scores = q @ k.mT * scale + mask                    before
out = softmax(scores, -1) @ v

out = scaled_dot_product_attention(q, k, v, mask, scale=scale)      after
"""

from __future__ import annotations

import torch.fx

from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.masks.reading import Reading
from lychee_compile.passes.graph.dataflow import aten
from lychee_compile.passes.lower.canonical import Canonicaliser
from lychee_compile.passes.lower.context import LoweringContext

OPERATOR = "aten.scaled_dot_product_attention"


def emit_one_sdpa(attention: Attention, context: LoweringContext) -> torch.fx.Node:
    """Emit PyTorch's operator and return its output. Raises `RewriteError`."""
    canonical = Canonicaliser(attention, context.emit)
    causal = Reading(attention).is_plainly_causal
    operands = canonical.operands(repeated=True, masked=not causal)
    attended = context.emit(
        aten.scaled_dot_product_attention.default,
        operands.query, operands.key, operands.value, operands.mask, 0.0, causal,
        scale=attention.score.scale,
    )  # fmt: skip
    return canonical.replacement(attended)
