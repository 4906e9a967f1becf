"""Emit sparse attention over keys or values that are computed as they are read.

Before, one decoding step over a cache of 8-bit numbers:

    stored = index_copy_(cache, 2, positions, quantised)
    scales = index_copy_(scale, 2, positions, new_scale)
    out = scaled_dot_product_attention(q, stored.to(float32) * scales, v, mask)

After; nothing is left of the product over all tokens:

    stored = index_copy_(cache, 2, positions, quantised)
    scales = index_copy_(scale, 2, positions, new_scale)
    load = "float32: at(0, b, h, kv, d)*at(1, b, h, kv, 0)"
    update_loaded_index([stored, scales], load, sizes, mask, positions, token_ids, index, 1)
    out = loaded_attention(q, [stored, scales], load, [v], "", sizes, mask, None, index, ...)
"""

from __future__ import annotations

import torch
import torch.fx

from lychee_compile.kernels.operators import loaded  # noqa: F401  registers the operators
from lychee_compile.kernels.operators.loaded import described
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.detect.caching.load_text import load_text, page_text
from lychee_compile.passes.detect.caching.loads import Load
from lychee_compile.passes.graph.dataflow import module_path
from lychee_compile.passes.lower.canonical import Canonicaliser
from lychee_compile.passes.lower.context import LoweringContext
from lychee_compile.passes.lower.written_tokens import write_of


def emit_loaded_sparse(
    attention: Attention, binding: CacheBinding, context: LoweringContext
) -> torch.fx.Node:
    """Emit sparse attention and return its output. Raises `RewriteError`.

    The first attention over a cache also updates the index.
    """
    emit, score = context.emit, attention.score
    canonical = Canonicaliser(attention, emit)
    query, mask, extra = canonical.question()
    key, key_load = _operand(binding.load) or ([canonical.key()], "")
    value, value_load = _operand(binding.values) or ([canonical.value()], "")
    roles = attention.roles
    axes = (roles.batch, roles.kv_heads, roles.key, roles.head_dim, roles.value_dim)
    sizes = [canonical.extent(each) for each in axes]
    index = context.index_inputs.node_for(binding)
    ops = torch.ops.lychee
    if context.is_first_use(index):
        positions, ids, _, written = write_of(attention, binding, context)
        emit(
            ops.update_loaded_index.default,
            key, key_load, sizes[:4], mask, positions, ids, index, written,
        )  # fmt: skip
    attended = emit(
        ops.loaded_attention.default, query, key, key_load, value, value_load, sizes,
        mask, extra, index, score.scale, score.softcap, module_path(attention.node),
    )  # fmt: skip
    return canonical.replacement(attended)


def _operand(load: Load | None) -> tuple[list[torch.fx.Node], str] | None:
    """Return the tensors that keys or values are computed from, and how; None if they are not."""
    text = None if load is None else load_text(load)
    if load is None or text is None:
        return None
    size = 0 if load.pages is None else load.pages.size
    return [leaf for _, leaf in load.leaves], described(text, load.dtype, page_text(load), size)
