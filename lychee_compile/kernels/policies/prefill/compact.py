"""CompactAttention (arXiv 2605.16839) for prefill: a union of blocks that heads choose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.policies.prefill.union import Askers, GroupUnion
from lychee_compile.kernels.reference.key_groups import KeyGroups
from lychee_compile.kernels.sizes import PAGE, QUERY_TILE

BLOCK = PAGE
"""Number of keys of a block; larger blocks did worse on keys of Gemma-3-270M."""
QUERY_BLOCKS_PER_TILE = 4
"""Number of blocks of queries in a tile, each of which chooses for itself."""


def _blocks_of_keys(key: Tensor) -> tuple[KeyGroups, Tensor]:
    """Return the blocks of all keys, [B, Hkv, L, D], and their means [B, Hkv, N, D]."""
    means, _ = _means(key, BLOCK, -(-key.shape[2] // BLOCK))
    return KeyGroups.of_size(BLOCK, key.shape[2], key.device), means


def _blocks_of_queries(query: Tensor) -> Askers:
    """Return the means of the blocks of queries; those behind the last query are silent."""
    count = -(-query.shape[2] // QUERY_TILE) * QUERY_BLOCKS_PER_TILE
    means, tokens = _means(query, QUERY_TILE // QUERY_BLOCKS_PER_TILE, count)
    return Askers(means, (tokens == 0).expand(*query.shape[:2], -1))


def _means(vectors: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the means of every `size` neighbours, [B, H, count, D], and their number, [count]."""
    tokens = vectors.shape[2]
    blocks = F.pad(vectors, (0, 0, 0, count * size - tokens)).unflatten(2, (count, size))
    held = (tokens - size * torch.arange(count, device=vectors.device)).clamp(0, size)
    return blocks.sum(3) / held.clamp(min=1)[:, None], held


choose_block_union = GroupUnion(
    _blocks_of_keys, _blocks_of_queries, QUERY_BLOCKS_PER_TILE, longest=BLOCK, shared=True
)
"""The union of the blocks of keys that the query heads of a KV head choose.

As in the paper: a mask over blocks says which blocks of keys each block of queries of each query
head wants. The union over blocks of queries, and over the query heads that share a KV head, is
read: one table of blocks for the group.

Not as in the paper: the paper takes its masks from another sparse method; here they come from the
means of both blocks. The paper keeps all of the union; here every mask has equally many keys, so
many that their union fits the budget. The queries are those of one tile, not of a whole chunk of a
prefill. Biases that a mask adds to scores are not looked at.
"""
