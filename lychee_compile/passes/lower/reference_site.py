"""Emit an index and sparse attention, both by the reference, in the place of one attention.

Before, one decoding step over a static cache:

    k = index_copy_(k_cache, 2, positions, k_new)
    k_wide = reshape(expand(unsqueeze(k, 2), ...), ...)
    out = scaled_dot_product_attention(q, k_wide, v_wide, mask)

After; `index` is a new input of the graph, which stands for the index of `k_cache`:

    k = index_copy_(k_cache, 2, positions, k_new)
    update_index(k, mask, positions, token_ids, index, 1)
    out = sparse_attention(q, k, v, mask, None, index, scale, None, "layers.0.self_attn")

Keys or values may be computed as they are read. Before, over a cache of 8-bit numbers:

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

from collections.abc import Sequence
from dataclasses import replace

import sympy
import torch
import torch.fx

from lychee_compile.kernels.operators import reference  # noqa: F401  registers the operators
from lychee_compile.kernels.operators.loaded import described
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.detect.caching.call_numbers import emit_number
from lychee_compile.passes.detect.caching.load_text import load_text, page_text
from lychee_compile.passes.detect.caching.loads import Load
from lychee_compile.passes.detect.token_ids import covers
from lychee_compile.passes.graph.dataflow import aten, module_path, static_size
from lychee_compile.passes.lower.canonical import Canonical, Canonicaliser, emit_behind_front
from lychee_compile.passes.lower.context import LoweringContext
from lychee_compile.passes.lower.shared.prefix_site import (
    emit_behind_prefix,
    emit_own_whole,
    emit_prefix,
    reads_own_whole,
)
from lychee_compile.passes.lower.written_slots import named_slots

OPERATOR = "lychee::sparse_attention (reference)"


def emit_reference_sparse(
    attention: Attention, binding: CacheBinding, context: LoweringContext
) -> torch.fx.Node:
    """Emit sparse attention and return its output. Raises `RewriteError`.

    The first attention over a cache also updates the index.
    """
    if binding.load is not None or binding.values is not None:
        return _emit_loaded(attention, binding, context)
    canonical = Canonicaliser(attention, context.emit)
    operands, score = _operands(attention, binding, context), attention.score
    if reads_own_whole(attention, binding, context.config):
        return canonical.replacement(emit_own_whole(attention, operands, context.emit))
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
    if binding.shared is None:
        operands = _operands(attention, binding, context)
    else:
        operands = emit_behind_prefix(attention, None, context.emit)
    mask = operands.mask
    last = None if mask is None else context.emit(aten.slice.Tensor, mask, 2, -1)
    _update(attention, binding, replace(operands, mask=last), context)


def _operands(attention: Attention, binding: CacheBinding, context: LoweringContext) -> Canonical:
    """Emit the operands of the attention over the keys of a cache."""
    if binding.shared is not None:
        prefix = emit_prefix(attention, binding.shared, context)
        return emit_behind_prefix(attention, prefix, context.emit)
    if binding.in_front:
        return emit_behind_front(attention, context.emit)
    return Canonicaliser(attention, context.emit).operands()


def _update(
    attention: Attention, binding: CacheBinding, operands: Canonical, context: LoweringContext
) -> None:
    """Let the index follow what this call writes to the cache."""
    emit = context.emit
    positions, ids, index, written = _write_of(attention, binding, context)
    update = torch.ops.lychee.update_index.default
    emit(update, operands.key, operands.mask, positions, ids, index, written)


def _emit_loaded(
    attention: Attention, binding: CacheBinding, context: LoweringContext
) -> torch.fx.Node:
    """Emit sparse attention and return its output. Raises `RewriteError`.

    The first attention over a cache also updates the index.
    """
    emit, score = context.emit, attention.score
    canonical = Canonicaliser(attention, emit)
    query, mask, extra = canonical.question()
    symbols = binding.numbers
    key, key_load = _operand(binding.load, symbols) or ([canonical.key()], "")
    value, value_load = _operand(binding.values, symbols) or ([canonical.value()], "")
    roles = attention.roles
    axes = (roles.batch, roles.kv_heads, roles.key, roles.head_dim, roles.value_dim)
    sizes = [canonical.extent(each) for each in axes]
    numbers = [emit_number(each, emit) for each in symbols]
    index = context.index_inputs.node_for(binding)
    ops = torch.ops.lychee
    if context.is_first_use(index):
        positions, ids, _, written = _write_of(attention, binding, context)
        emit(
            ops.update_loaded_index.default,
            key, key_load, [*sizes[:4], *numbers], mask, positions, ids, index, written,
        )  # fmt: skip
    attended = emit(
        ops.loaded_attention.default,
        query, key, key_load, value, value_load, [*sizes, *numbers],
        mask, extra, index, score.scale, score.softcap, module_path(attention.node),
    )  # fmt: skip
    return canonical.replacement(attended)


def _operand(
    load: Load | None, numbers: Sequence[sympy.Symbol]
) -> tuple[list[torch.fx.Node], str] | None:
    """Return the tensors that keys or values are computed from, and how; None if they are not."""
    text = None if load is None else load_text(load, numbers)
    if load is None or text is None:
        return None
    size = 0 if load.pages is None else load.pages.size
    return [leaf for _, leaf in load.leaves], described(
        text, load.dtype, page_text(load, numbers), size
    )


def knows_tokens(attention: Attention, binding: CacheBinding, context: LoweringContext) -> bool:
    """True if the token ids of the graph are those of the tokens written to the cache."""
    if binding.reads_only:
        return False
    batch = attention.axes.product(attention.roles.batch)
    return covers(context.token_ids, batch, binding.tokens_written)


def _write_of(
    attention: Attention, binding: CacheBinding, context: LoweringContext
) -> tuple[torch.fx.Node | None, torch.fx.Node | None, torch.fx.Node, torch.fx.Node | int]:
    """Emit the slots that a call writes, and return them, token ids, index and number of tokens.

    Slots are None if the graph does not name them, and token ids if it does not know them.
    """
    emit = context.emit
    index = context.index_inputs.node_for(binding)
    positions = named_slots(binding, emit)
    ids = context.token_ids if knows_tokens(attention, binding, context) else None
    count = static_size(binding.tokens_written)
    written = emit(aten.sym_size.int, *binding.tokens) if count is None else count  # type: ignore[misc]
    return positions, ids, index, written
