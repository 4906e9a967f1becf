"""CompactAttention (arXiv 2605.16839) for whole sequences: a union of blocks chosen by heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.policies.prefill.positions import places
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.reference.tiles import summarise
from lychee_compile.kernels.sizes import PAGE, QUERY_TILE

BLOCK = PAGE
"""Keys of a block; larger ones did worse on keys of Gemma-3-270M."""
QUERY_BLOCKS_PER_TILE = 4
"""Blocks of queries in a tile, each of which chooses for itself."""


def choose_block_union(question: PrefillQuestion) -> Tensor:
    """The union of the blocks of keys that a KV head's query heads choose, block of queries by one.

    As in the paper: a mask over blocks says which blocks of keys each block of queries of each
    query head wants, and what is read is the union over the blocks of queries and over the query
    heads that share a KV head: one table of blocks for the group, read in place.

    Not as in the paper: it takes its masks from another sparse method, here they come from the
    means of both blocks; it keeps all of the union, here every mask has equally many keys, as many
    as their union has room for in the budget. The queries are those of one tile, not a whole chunk
    of a prefill. What a mask adds to scores is not looked at.
    """
    parts = question.parts(QUERY_TILE // QUERY_BLOCKS_PER_TILE)
    blocks = question.per_query_head(summarise(question.key, BLOCK).mean)
    score = question.scale * (parts.mean @ blocks.transpose(-1, -2))
    rank = score.masked_fill((parts.tokens == 0)[..., None], -torch.inf)
    kv_heads = question.key.shape[1]
    askers = rank.unflatten(2, (question.tiles, -1)).unflatten(1, (kv_heads, -1))
    seen = question.candidates.unflatten(1, (kv_heads, -1)).any(2)
    missing = (-seen.shape[-1]) % BLOCK
    counts = F.pad(seen, (0, missing)).unflatten(-1, (-1, BLOCK)).sum(-1)
    place = places(askers.movedim(2, 3).flatten(3, 4), counts)
    return question.take(question.spread(-question.per_query_head(place).float(), BLOCK))
