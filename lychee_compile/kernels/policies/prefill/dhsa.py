"""DHSA (arXiv 2510.24606) for prefill: chunks of queries against chunks of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.policies.prefill.union import Askers, GroupUnion
from lychee_compile.kernels.reference.chunking import best_cuts, follow_cuts, similarity_strengths
from lychee_compile.kernels.reference.key_groups import KeyGroups
from lychee_compile.kernels.sizes import QUERY_TILE

CHUNK = (8, 16)
"""Shortest and longest chunk, in tokens; longer chunks did worse on keys of Gemma-3-270M."""


def chunk_vectors(vectors: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chunk of each token, int64 [B, T], and the vector of each chunk, [B, H, N, D].

    `vectors` is float32 [B, H, T, D]; `used`, float32 [B, T], 1 for tokens and 0 for the padding
    behind them.
    """
    batch, heads, _, head_dim = vectors.shape
    strength = F.pad(similarity_strengths(vectors), (0, 1))
    first = torch.zeros(batch, dtype=torch.int64, device=vectors.device)
    starts = follow_cuts(best_cuts(strength, used.sum(-1).long(), CHUNK), first)
    label = starts.long().cumsum(-1) - 1
    count = _enough(label)
    wide = label[:, None, :, None].expand(-1, heads, -1, head_dim)
    total = vectors.new_zeros(batch, heads, count, head_dim).scatter_add(2, wide, vectors)
    length = vectors.new_zeros(batch, count).scatter_add(1, label, used)
    return label, total / length.clamp(min=1).sqrt()[:, None, :, None]


def _enough(label: Tensor) -> int:
    """Return a number of chunks that is enough for labels [B, T]; it never waits for a GPU."""
    if label.is_cuda:
        return (label.shape[1] - 1) // CHUNK[0] + 1  # all but the last are as long as that
    return int(label.max()) + 1


def _key_chunks(key: Tensor) -> tuple[KeyGroups, Tensor]:
    """Return the chunks of all keys, [B, Hkv, L, D], and their vectors [B, Hkv, N, D]."""
    label, vectors = chunk_vectors(key, key.new_ones(len(key), key.shape[2]))
    return KeyGroups.of_labels(label, vectors.shape[2]), vectors


def _query_chunks(query: Tensor) -> Askers:
    """Return the vectors of each tile's chunks; an unused chunk has the vector 0 and is silent."""
    tokens = query.shape[2]
    tiles = -(-tokens // QUERY_TILE)
    padded = F.pad(query, (0, 0, 0, tiles * QUERY_TILE - tokens)).unflatten(2, (tiles, QUERY_TILE))
    used = (torch.arange(tiles * QUERY_TILE, device=padded.device) < tokens).to(padded.dtype)
    used = used.view(1, tiles, QUERY_TILE).expand(len(padded), -1, -1)
    apart = padded.transpose(1, 2)  # [B, tiles, Hq, QUERY_TILE, D]: a tile's chunks are its own
    _, chunks = chunk_vectors(apart.flatten(0, 1), used.flatten(0, 1))
    vectors = chunks.unflatten(0, (-1, tiles)).transpose(1, 2).flatten(2, 3)
    return Askers(vectors, (vectors == 0).all(-1))


choose_by_chunks = GroupUnion(_key_chunks, _query_chunks, QUERY_TILE // CHUNK[0], CHUNK[1])
"""The keys of the chunks that are most like any chunk of a tile's queries.

As in the paper: chunks of varying length, each summarised by the sum of its vectors over the square
root of their number; the similarity of two chunks stands for that of their tokens, and each chunk
of queries prefers the tokens that are most similar, up to the budget.

Not as in the paper: its boundaries come from a predictor trained for each model; here they are
where neighbouring vectors differ most, of the queries within their tile. A whole tile reads the
same keys: equally many from the top of the list of each of its chunks, as many as the budget has
room for. Biases that a mask adds to scores are not looked at.
"""
