"""Tell an index what a call writes to a cache: slots, token ids, and how many there are."""

from __future__ import annotations

import torch.fx

from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.detect.token_ids import covers
from lychee_compile.passes.graph.dataflow import aten, static_size
from lychee_compile.passes.lower.context import LoweringContext
from lychee_compile.passes.lower.written_slots import named_slots


def knows_tokens(attention: Attention, binding: CacheBinding, context: LoweringContext) -> bool:
    """True if the token ids of the graph are those of the tokens written to the cache."""
    if binding.reads_only:
        return False
    batch = attention.axes.product(attention.roles.batch)
    return covers(context.token_ids, batch, binding.tokens_written)


def write_of(
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
