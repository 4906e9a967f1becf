"""Emit attention to keys that all rows of a batch share, and join it with that to their own.

Before, one decoding step:

    own = index_copy_(cache, 2, positions, k_new)                           [B, H, slots, D]
    keys = cat((expand(prefix, [B, -1, -1, -1]), own), 2)                   [1, H, n, D] in front
    out = scaled_dot_product_attention(q, keys, values, mask)

After; `index_0` is the index of the prefix, one for all rows, and `index_1` that of `cache`:

    update_index(prefix, None, None, None, index_0, 0)
    mean, log_sum = prefix_attention(q, prefix, prefix_values, mask[..., :n], index_0, ...)
    update_index(own, mask[..., n:], positions, token_ids, index_1, 1)
    out = sparse_attention(q, own, own_values, mask[..., n:], log_sum, index_1, ..., mean)

The prefix thus becomes one key more of each query: `log_sum` is its logit and `mean` its value.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
import torch.fx

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators import shared_prefix  # noqa: F401  registers the operator
from lychee_compile.kernels.reference.shared_prefix import reads_whole
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.graph.dataflow import aten, module_path, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.canonical import Canonical, Canonicaliser, emit_attention
from lychee_compile.passes.lower.context import LoweringContext


@dataclass(frozen=True)
class Prefix:
    """Attention of all rows to their prefix, as one key more of each query."""

    log_sum: torch.fx.Node
    """Logit of that key, float32 [B, Hq, Tq]; an extra logit of the attention takes part."""
    mean: torch.fx.Node
    """Value of that key, float32 [B, Hq, Tq, Dv]."""


def words_of_prefix(attention: Attention, config: IndexConfig) -> str:
    """Return how much of the prefix a step reads, in words."""
    count = attention.over(attention.parts[0]).kv_len
    if chooses_in_prefix(attention, config):
        return f"as many of a prefix of {count} tokens that all rows share"
    return f"a prefix of {count} tokens that all rows share, whole and once"


def chooses_in_prefix(attention: Attention, config: IndexConfig) -> bool:
    """True if queries may choose among the keys of the prefix: as far as sizes are known."""
    count = attention.over(attention.parts[0]).kv_len
    queries = attention.size(attention.roles.batch + attention.roles.query)
    if not isinstance(queries, int) or not isinstance(count, int):
        return config.budget is not None
    return not reads_whole(queries, count, config.budget)


def reads_own_whole(attention: Attention, binding: CacheBinding, config: IndexConfig) -> bool:
    """True if the keys of each row behind a shared prefix are no more than the budget."""
    if binding.shared is None or config.budget is None:
        return False
    count = attention.over(attention.parts[1]).kv_len
    return isinstance(count, int) and count <= config.budget


def emit_prefix(attention: Attention, binding: CacheBinding, context: LoweringContext) -> Prefix:
    """Emit attention by the reference to the prefix that `binding` binds. Raises `RewriteError`."""
    emit, score = context.emit, attention.score
    front = attention.over(attention.parts[0])
    canonical = Canonicaliser(front, emit)
    operands = canonical.operands()
    key, value = (first_row(each, emit) for each in (operands.key, operands.value))
    mask = Canonicaliser(attention, emit).mask()
    if mask is not None:
        mask = emit(aten.slice.Tensor, mask, -1, 0, canonical.extent(front.roles.key))
    index = None
    if chooses_in_prefix(attention, context.config):
        index = context.index_inputs.node_for(binding)
        if context.is_first_use(index):
            update = torch.ops.lychee.update_index.default
            emit(update, key, None, None, None, index, 0)
    both = emit(
        torch.ops.lychee.prefix_attention.default,
        operands.query, key, value, mask, index, score.scale, score.softcap, site_of(attention),
    )  # fmt: skip
    mean, log_sum = (emit(operator.getitem, both, number) for number in range(2))
    return with_extra(Prefix(log_sum, mean), operands.extra, emit)


def site_of(attention: Attention) -> str:
    """Return the name under which those who record see what is read of the prefix."""
    return f"{module_path(attention.node)} (shared prefix)"


def first_row(node: torch.fx.Node, emit: Emitter) -> torch.fx.Node:
    """Emit keys or values [1, H, n, D] of a tensor [B, H, n, D] whose rows share their memory."""
    return emit(aten.slice.Tensor, node, 0, 0, 1)


def with_extra(prefix: Prefix, extra: torch.fx.Node | None, emit: Emitter) -> Prefix:
    """Let the extra logit of an attention take part, which has no value."""
    if extra is None:
        return prefix
    logit = emit(aten.to.dtype, extra, torch.float32)
    log_sum = emit(aten.logaddexp.default, prefix.log_sum, logit)
    share = _share(prefix.log_sum, log_sum, emit)
    return Prefix(log_sum, emit(aten.mul.Tensor, prefix.mean, share))


def emit_behind_prefix(attention: Attention, prefix: Prefix | None, emit: Emitter) -> Canonical:
    """Emit the operands of attention to each row's own keys. Raises `RewriteError`.

    Without a `prefix` they are for what does not attend.
    """
    front, behind = map(attention.over, attention.parts)
    mask = Canonicaliser(attention, emit).mask()
    rest = Canonicaliser(behind, emit).operands()
    if mask is not None:
        count = Canonicaliser(front, emit).extent(front.roles.key)
        rest = replace(rest, mask=emit(aten.slice.Tensor, mask, -1, count))
    if prefix is None:
        return rest
    return replace(rest, extra=prefix.log_sum, extra_value=prefix.mean)


def emit_own_whole(attention: Attention, operands: Canonical, emit: Emitter) -> torch.fx.Node:
    """Emit attention to all of each row's own keys, and to the prefix: [B, Hq, Tq, Dv]."""
    behind = attention.over(attention.parts[1])
    repeated = Canonicaliser(behind, emit).operands(repeated=True)
    given = replace(operands, key=repeated.key, value=repeated.value)
    log_sum, mean = emit_attention(behind, given, emit)
    assert operands.extra is not None
    assert operands.extra_value is not None
    share = _share(operands.extra, log_sum, emit)
    weighted = emit(aten.mul.Tensor, operands.extra_value, share)
    output = emit(aten.add.Tensor, mean, weighted)
    return emit(aten.to.dtype, output, value_of(operands.query).dtype)


def _share(part: torch.fx.Node, whole: torch.fx.Node, emit: Emitter) -> torch.fx.Node:
    """Emit exp(part - whole) [B, Hq, Tq, 1], and 0 for a query that sees nothing."""
    less = emit(aten.sub.Tensor, part, whole)
    share = emit(aten.nan_to_num.default, emit(aten.exp.default, less), 0.0)
    return emit(aten.unsqueeze.default, share, -1)
