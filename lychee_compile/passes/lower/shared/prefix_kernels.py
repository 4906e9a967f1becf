"""Emit generated kernels for a decoding step whose rows share a prefix, and join both parts.

Before:

    own = index_copy_(cache, 2, positions, k_new)                           [B, H, slots, D]
    keys = cat((expand(prefix, [B, -1, -1, -1]), own), 2)                   [1, H, n, D] in front
    out = scaled_dot_product_attention(q, keys, values, mask)

After; rows are positions of one row, each of which chooses among the keys of the prefix:

    q_0 = q.transpose(0, 1).reshape(1, Hq, B * T, D)
    part = sparse_prefix(q_0, prefix, prefix_values, [length], index_0, "decode_lychee_..._part")
    mean, log_sum = part[..., :-1], part[..., -1]                           as rows again
    out = sparse_decode(q, own, own_values, [length], log_sum, positions, index_1, ..., mean)

If all rows together would choose as many tokens as the prefix has, all of it is read. Rows are then
heads of one group: the scores of all rows are one product with each tile of keys.

    q_0 = q.view(B, Hkv, G, T, D).permute(1, 0, 2, 3, 4).reshape(1, Hkv * B * G, T, D)
    part = exact_prefix(q_0, prefix, prefix_values, [length], "decode_exact_..._part")
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.fx

from lychee_compile.codegen.specification import KV_LEN
from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.kernels.gpu.methods import layout_for
from lychee_compile.kernels.operators import prefix_decode  # noqa: F401  registers the operators
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.graph.dataflow import aten, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.canonical import Canonical, Canonicaliser
from lychee_compile.passes.lower.context import LoweringContext
from lychee_compile.passes.lower.decode_site import (
    emit_exact,
    emit_selecting,
    selection_of,
    shown_keys,
)
from lychee_compile.passes.lower.kernel_expressions import KernelExpressions, kernel_expressions
from lychee_compile.passes.lower.kernel_modules import compile_kernels
from lychee_compile.passes.lower.kernel_operands import KernelOperands, kernel_specification
from lychee_compile.passes.lower.kernel_support import check_in_place, static
from lychee_compile.passes.lower.kernel_symbols import captured_as
from lychee_compile.passes.lower.shared.prefix_site import (
    Prefix,
    chooses_in_prefix,
    emit_behind_prefix,
    first_row,
    reads_own_whole,
    site_of,
    with_extra,
)
from lychee_compile.passes.symbolic.elements import symbol_of

MOST_COLUMNS = 64
"""Largest number of query heads of all rows that one program multiplies with a tile of keys."""
_PREFIX_LEN = "given_prefix_len"
"""Name of the number of shared keys in kernels over others, if it is known at a call only."""


def emit_shared_decode(
    attention: Attention,
    binding: CacheBinding,
    context: LoweringContext,
    selects: bool = True,
) -> tuple[torch.fx.Node, str]:
    """Emit kernels over a shared prefix and each row's own cache.

    Without `selects` they read all keys. Returns the output and the name of the kernel over each
    row's own keys. Raises `NoKernel` and `RewriteError`.
    """
    emit = context.emit
    expressions = kernel_expressions(attention, Canonicaliser(attention, emit))
    shared = binding.shared if selects and chooses_in_prefix(attention, context.config) else None
    prefix = _emit_prefix(attention, shared, expressions, context)
    tensors = replace(emit_behind_prefix(attention, prefix, emit), mask=None)
    own = attention.parts[1]
    check_in_place("keys", own.key_forms[-1].node, tensors.key)
    check_in_place("values", own.value.node, tensors.value)
    operands = KernelOperands(_behind(expressions, attention, emit), tensors)
    if selects and not reads_own_whole(attention, binding, context.config):
        return emit_selecting(attention, binding, operands, context)
    return emit_exact(attention, operands, context)


@dataclass(frozen=True)
class _Fold:
    """Rows of the batch as heads of one group, `rows` of them, and the others as positions."""

    rows: int
    kv_heads: int
    group: int
    query_len: int

    def query(self, node: torch.fx.Node, emit: Emitter) -> torch.fx.Node:
        """Emit a query [B, Hq, T, D] as one row."""
        channels = value_of(node).shape[3]
        node = emit(aten.unflatten.int, node, 0, [-1, self.rows])
        node = emit(aten.unflatten.int, node, 2, [self.kv_heads, self.group])
        node = emit(aten.permute.default, node, [2, 1, 3, 0, 4, 5])
        heads = self.kv_heads * self.rows * self.group
        return emit(aten.reshape.default, node, [1, heads, -1, channels])

    def output(self, node: torch.fx.Node, emit: Emitter) -> torch.fx.Node:
        """Emit an output of one row as [B, Hq, T, Dv]."""
        channels = value_of(node).shape[3]
        sizes = [self.kv_heads, self.rows, self.group, -1, self.query_len, channels]
        node = emit(aten.reshape.default, node, sizes)
        node = emit(aten.permute.default, node, [3, 1, 0, 2, 4, 5])
        sizes = [-1, self.kv_heads * self.group, self.query_len, channels]
        return emit(aten.reshape.default, node, sizes)


def _fold(attention: Attention, chooses: bool) -> _Fold:
    """Return the way to make one row of all, which is another if each row chooses."""
    sizes = attention.roles
    kv_heads = static(attention.size(sizes.kv_heads), "the number of KV heads")
    group = static(attention.size(sizes.group), "the number of query heads")
    query_len = static(attention.size(sizes.query), "the number of queries")
    batch, rows = attention.size(sizes.batch), 1
    if not chooses and isinstance(batch, int):
        most = max(MOST_COLUMNS // group, 1)
        rows = max(each for each in range(1, min(batch, most) + 1) if batch % each == 0)
    return _Fold(rows, kv_heads, group, query_len)


def _emit_prefix(
    attention: Attention,
    binding: CacheBinding | None,
    expressions: KernelExpressions,
    context: LoweringContext,
) -> Prefix:
    """Emit attention to the prefix that `binding` binds; None: to all of its keys."""
    emit, front = context.emit, attention.over(attention.parts[0])
    fold = _fold(attention, binding is not None)
    operands = Canonicaliser(front, emit).operands(masked=False)
    key, value = (first_row(each, emit) for each in (operands.key, operands.value))
    check_in_place("keys", front.key.node, key)
    check_in_place("values", front.value.node, value)
    tensors = Canonical(fold.query(operands.query, emit), key, value, mask=None, extra=None)
    folded = _with_length(expressions, attention)
    folded = folded.of_rows_as_heads(fold.rows, fold.group, fold.query_len)
    own = KernelOperands(folded, tensors)
    spec = kernel_specification(front, own, context.autotune)
    spec = replace(spec, group=fold.rows * fold.group, part=True)
    given = tensors.query, key, value, list(folded.nodes)
    if binding is not None:
        spec = replace(spec, sparse=selection_of(context.config, front.kv_len))
        kernel = compile_kernels(spec, own)
        use = _use_of(kernel, front, binding, context)
        index = context.index_inputs.node_for(binding, use)
        site = site_of(attention)
        ops = torch.ops.lychee
        target = ops.growing_sparse_prefix if use.layout is None else ops.sparse_prefix
        part = emit(target.default, *given, index, kernel, site)
    else:
        part = emit(torch.ops.lychee.exact_prefix.default, *given, compile_kernels(spec, own))
    part = fold.output(part, emit)
    mean = emit(aten.slice.Tensor, part, -1, 0, -1)
    log_sum = emit(aten.select.int, part, -1, -1)
    return with_extra(Prefix(log_sum, mean), operands.extra, emit)


def _with_length(expressions: KernelExpressions, attention: Attention) -> KernelExpressions:
    """Return expressions of a kernel that has the first keys alone. Raises `NoKernel`."""
    terms = expressions.score, expressions.visible
    if not any(each.has(KV_LEN) for each in terms):
        return expressions
    own = static(attention.over(attention.parts[1]).kv_len, "the number of keys")
    score, visible = (each.xreplace({KV_LEN: KV_LEN + own}) for each in terms)
    return replace(expressions, score=score, visible=visible)


def _behind(
    expressions: KernelExpressions, attention: Attention, emit: Emitter
) -> KernelExpressions:
    """Return expressions of a kernel for each row's own keys; it reads the number of the others.

    A number that is known is printed into the kernel.
    """
    front = attention.over(attention.parts[0])
    if isinstance(front.kv_len, int):
        return expressions.behind(front.kv_len)
    count = symbol_of(_PREFIX_LEN, torch.int64)
    found = expressions.behind(count)
    if not (found.score.has(count) or found.visible.has(count)):
        return found
    device = value_of(front.key.node).device
    number = Canonicaliser(front, emit).extent(front.roles.key)
    node = emit(aten.full.default, [], number, dtype=torch.int64, device=device)
    captured = (*found.captured, captured_as(_PREFIX_LEN, node))
    return replace(found, captured=captured, nodes=(*found.nodes, node))


def _use_of(
    kernel: str, front: Attention, binding: CacheBinding, context: LoweringContext
) -> CacheUse:
    """Return the use that a kernel makes of a prefix. Raises `NoKernel`."""
    one_row = replace(front, roles=replace(front.roles, batch=()))
    keys_of, keys = shown_keys(one_row, binding, context.emit)
    layout = layout_for(kernel, keys) if isinstance(front.kv_len, int) else None
    return CacheUse(kernel, keys_of, 0, layout, context.config.policy)
