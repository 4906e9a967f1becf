"""CompactAttention (arXiv 2605.16839) for prefill: a union of blocks that heads choose."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.policies.prefill.positions import places
from lychee_compile.kernels.reference.key_groups import KeyGroups, keys_before
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.reference.tiles import summarise
from lychee_compile.kernels.sizes import PAGE, QUERY_TILE

BLOCK = PAGE
"""Number of keys of a block; larger blocks did worse on keys of Gemma-3-270M."""
QUERY_BLOCKS_PER_TILE = 4
"""Number of blocks of queries in a tile, each of which chooses for itself."""


def choose_block_union(question: PrefillQuestion) -> Tensor:
    """Return the union of the blocks of keys that the query heads of a KV head choose.

    As in the paper: a mask over blocks says which blocks of keys each block of queries of each
    query head wants. The union over blocks of queries, and over the query heads that share a KV
    head, is read: one table of blocks for the group.

    Not as in the paper: the paper takes its masks from another sparse method; here they come from
    the means of both blocks. The paper keeps all of the union; here every mask has equally many
    keys, so many that their union fits the budget. The queries are those of one tile, not of a
    whole chunk of a prefill. Biases that a mask adds to scores are not looked at.
    """
    parts = question.parts(QUERY_TILE // QUERY_BLOCKS_PER_TILE)
    blocks = question.once(summarise, BLOCK)
    score = question.scale * question.products(parts.mean, blocks.mean)
    rank = score.masked_fill((parts.tokens == 0)[..., None], -torch.inf)
    kv_heads, kv_len = question.key.shape[1:3]
    askers = rank.unflatten(2, (question.tiles, -1)).unflatten(1, (kv_heads, -1))
    groups = KeyGroups.of_size(BLOCK, kv_len, rank.device)
    seen = question.sight.candidates
    if seen.shape[1] > 1:
        seen = seen.unflatten(1, (kv_heads, -1)).any(2)
    counts = groups.count(keys_before(seen))
    place = places(askers.movedim(2, 3).flatten(3, 4), counts)
    return question.take_groups(-question.per_query_head(place), groups)
