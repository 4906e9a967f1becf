"""Emit attention over a few keys in front of a cache as one more key for the attention behind them.

The softmax over both is that over the keys behind and one key whose logit is the log-sum-exp of the
scores in front, and whose value is their weighted mean:

    scores = matmul(query, memory_keys.mT) * scale + mask[..., :4]
    log_sum = logsumexp(scores, -1)                                         [B, Hq, Tq]
    mean = matmul(exp(scores - log_sum), memory_values)                     [B, Hq, Tq, Dv]
    out = sparse_attention(query, k, v, mask[..., 4:], log_sum, index, ..., mean)

The parts are combined as in FlashAttention-2 (Dao, 2023) and FlashDecoding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.fx

from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.dataflow import aten, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.canonical import Canonical, Canonicaliser


def emit_behind_front(attention: Attention, emit: Emitter) -> Canonical:
    """Emit the operands of `attention` over all keys but the first.

    The first keys, `attention.parts[0]`, become an extra logit with a value, both float32. Raises
    `RewriteError`.
    """
    front, behind = map(attention.over, attention.parts)
    mask, count = Canonicaliser(attention, emit).mask(), front.kv_len
    shown = None if mask is None else emit(aten.slice.Tensor, mask, -1, 0, count)
    first = replace(Canonicaliser(front, emit).operands(repeated=True), mask=shown)
    log_sum, mean = _emit_attention(front, first, emit)
    rest = Canonicaliser(behind, emit).operands()
    if mask is not None:
        rest = replace(rest, mask=emit(aten.slice.Tensor, mask, -1, count))
    return replace(rest, extra=log_sum, extra_value=mean)


def _emit_attention(
    attention: Attention, operands: Canonical, emit: Emitter
) -> tuple[torch.fx.Node, torch.fx.Node]:
    """Emit log-sum-exp [B, Hq, Tq] and output [B, Hq, Tq, Dv] of dense attention, both float32.

    The extra logit of `operands` takes part. Without any visible key they are -inf and zeros.
    """
    scores = _emit_scores(attention, operands, emit)
    every = scores
    if operands.extra is not None:
        column = emit(aten.unsqueeze.default, _as_float(operands.extra, emit), -1)
        column = emit(aten.expand_as.default, column, emit(aten.slice.Tensor, scores, -1, 0, 1))
        every = emit(aten.cat.default, [scores, column], -1)
    log_sum = emit(aten.logsumexp.default, every, [-1])
    nothing = emit(aten.eq.Scalar, log_sum, -torch.inf)
    shift = emit(aten.masked_fill.Scalar, log_sum, nothing, 0.0)
    shifted = emit(aten.sub.Tensor, scores, emit(aten.unsqueeze.default, shift, -1))
    weights = emit(aten.exp.default, shifted)
    return log_sum, emit(aten.matmul.default, weights, _as_float(operands.value, emit))


def _emit_scores(attention: Attention, operands: Canonical, emit: Emitter) -> torch.fx.Node:
    """Emit softcap tanh(scale q.k / softcap) + mask, float32 [B, Hq, Tq, M]."""
    score, mask = attention.score, operands.mask
    query, key = _as_float(operands.query, emit), _as_float(operands.key, emit)
    node = emit(aten.matmul.default, query, emit(aten.transpose.int, key, -1, -2))
    node = emit(aten.mul.Scalar, node, score.scale)
    if score.softcap is not None:
        node = emit(aten.tanh.default, emit(aten.div.Scalar, node, score.softcap))
        node = emit(aten.mul.Scalar, node, score.softcap)
    if mask is None:
        return node
    if value_of(mask).dtype == torch.bool:
        hidden = emit(aten.logical_not.default, mask)
        return emit(aten.masked_fill.Scalar, node, hidden, -torch.inf)
    return emit(aten.add.Tensor, node, _as_float(mask, emit))


def _as_float(node: torch.fx.Node, emit: Emitter) -> torch.fx.Node:
    if value_of(node).dtype == torch.float32:
        return node
    return emit(aten.to.dtype, node, torch.float32)
