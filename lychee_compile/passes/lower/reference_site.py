"""Emit an index and sparse attention, both by the reference, in the place of one attention.

Before, one decoding step over a static cache:

    k = index_copy_(k_cache, 2, positions, k_new)
    k_wide = reshape(expand(unsqueeze(k, 2), ...), ...)
    out = scaled_dot_product_attention(q, k_wide, v_wide, mask)

After; `index` is a new input of the graph, which stands for the index of `k_cache`:

    k = index_copy_(k_cache, 2, positions, k_new)
    update_index(k, mask, positions, token_ids, index, 1)
    out = sparse_attention(q, k, v, mask, None, index, scale, None, "layers.0.self_attn")
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.fx

from lychee_compile.kernels.operators import reference  # noqa: F401  registers the operators
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.graph.dataflow import aten, module_path
from lychee_compile.passes.lower.canonical import Canonical, Canonicaliser, emit_behind_front
from lychee_compile.passes.lower.context import LoweringContext
from lychee_compile.passes.lower.loaded_site import emit_loaded_sparse
from lychee_compile.passes.lower.written_tokens import write_of

OPERATOR = "lychee::sparse_attention (reference)"


def emit_reference_sparse(
    attention: Attention, binding: CacheBinding, context: LoweringContext
) -> torch.fx.Node:
    """Emit sparse attention and return its output. Raises `RewriteError`.

    The first attention over a cache also updates the index.
    """
    if binding.load is not None or binding.values is not None:
        return emit_loaded_sparse(attention, binding, context)
    canonical = Canonicaliser(attention, context.emit)
    operands, score = _operands(attention, binding, context), attention.score
    index = context.index_inputs.node_for(binding)
    if context.is_first_use(index):
        _update(attention, binding, operands, context)
    attended = context.emit(
        torch.ops.lychee.sparse_attention.default,
        operands.query, operands.key, operands.value, operands.mask, operands.extra, index,
        score.scale, score.softcap, module_path(attention.node), operands.extra_value,
    )  # fmt: skip
    return canonical.replacement(attended)


def emit_token_note(attention: Attention, binding: CacheBinding, context: LoweringContext) -> None:
    """Let an index note the tokens that a prefill writes, which reads no index itself.

    All that the index needs of the mask is the row of the last query: the mask of a prefill is
    large. Raises `RewriteError`.
    """
    operands = _operands(attention, binding, context)
    mask = operands.mask
    last = None if mask is None else context.emit(aten.slice.Tensor, mask, 2, -1)
    _update(attention, binding, replace(operands, mask=last), context)


def _operands(attention: Attention, binding: CacheBinding, context: LoweringContext) -> Canonical:
    """Emit the operands of the attention over the keys of a cache."""
    if binding.in_front:
        return emit_behind_front(attention, context.emit)
    return Canonicaliser(attention, context.emit).operands()


def _update(
    attention: Attention, binding: CacheBinding, operands: Canonical, context: LoweringContext
) -> None:
    """Let the index follow what this call writes to the cache."""
    emit = context.emit
    positions, ids, index, written = write_of(attention, binding, context)
    update = torch.ops.lychee.update_index.default
    emit(update, operands.key, operands.mask, positions, ids, index, written)
