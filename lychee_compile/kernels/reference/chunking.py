"""Cut a sequence into chunks at its strongest boundaries, without a loop over tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lychee_compile.kernels.reference.runs import packed


def similarity_strengths(key: Tensor) -> Tensor:
    """Rate the cut after each token by how little its key resembles the next one.

    `key` is [B, Hkv, T, D]. The result is uint8 [B, T - 1]: 0 if a key and its successor point the
    same way in every head, 255 if they point in opposite directions.
    """
    key = key.float()
    length = torch.linalg.vector_norm(key, dim=-1).clamp_(min=1e-12)
    product = (key[:, :, :-1] * key[:, :, 1:]).sum(-1)
    cosine = (product / (length[:, :, :-1] * length[:, :, 1:])).mean(1)
    return ((1 - cosine.nan_to_num(0.0)) * 127.5).round().clamp_(0, 255).to(torch.uint8)


def best_cuts(strength: Tensor, end: Tensor, chunk: tuple[int, int]) -> Tensor:
    """Return the end of the chunk that would start at each token: int64 [B, T], exclusive.

    `strength` is uint8 [B, T]; `end`, int64 [B], is the number of tokens in each row. `chunk` is
    the (shortest, longest) length allowed. The cut with the strongest boundary wins, and among
    equals the longest chunk. An end of T + 1 means undecided. A chunk that could reach `end` is
    undecided: the strength of a cut after the last token depends on the token that comes next.
    """
    shortest, longest = chunk
    batch, tokens = strength.shape
    undecided = tokens + 1
    cuts = torch.full((batch, tokens), undecided, dtype=torch.int64, device=strength.device)
    if tokens <= longest:
        return cuts
    width = longest - shortest + 1
    window = strength[:, shortest - 1 : tokens - 1].unfold(1, width, 1)
    prefer_longer = torch.arange(width, device=strength.device)
    choice = (window.to(torch.int32) * width + prefer_longer).argmax(-1)
    start = torch.arange(choice.shape[1], device=strength.device)
    decided = start + longest < end[:, None]
    cuts[:, : choice.shape[1]] = torch.where(decided, start + shortest + choice, undecided)
    return cuts


def follow_cuts(cuts: Tensor, first: Tensor, shortest: int = 1) -> Tensor:
    """Mark the tokens that start a chunk when cutting greedily from `first`: bool [B, T].

    `cuts` comes from `best_cuts`; `first` is int64 [B], and T or more starts nothing. Pointers
    double: n rounds reach all chunks within 2^n - 1 jumps, so log2(T / shortest) rounds suffice if
    no chunk is shorter than `shortest`. The undecided tail starts at the last marked token.
    """
    batch, tokens = cuts.shape
    undecided = tokens + 1
    absorbing = torch.full((batch, 2), undecided, dtype=cuts.dtype, device=cuts.device)
    jump = torch.cat((cuts, absorbing), dim=1)
    reached = torch.zeros(batch, tokens + 2, dtype=torch.uint8, device=cuts.device)
    reached.scatter_(1, first.clamp(max=undecided)[:, None], 1)
    for _ in range(math.ceil(math.log2(tokens / shortest + 2))):
        reached = reached.scatter_reduce(1, jump, reached, "amax")
        jump = jump.gather(1, jump)
    return reached[:, :tokens].bool()


def cut_chunks(
    strength: Tensor, first: Tensor, end: Tensor, chunk: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the chunks that the strengths seen so far decide: (starts, lengths), int64 [B, C].

    `strength` is uint8 [B, T]; `first` and `end`, int64 [B], delimit the tokens to cut in each row.
    Rows with fewer chunks than others end in zero lengths. The tokens after the last chunk of a row
    are its tail, which is no longer than the longest chunk. Cutting all tokens at once gives the
    same chunks as cutting them while they arrive.
    """
    cuts = best_cuts(strength, end, chunk)
    closed = follow_cuts(cuts, first, chunk[0]) & (cuts <= strength.shape[1])
    starts, used = packed(closed)
    return starts, torch.where(used, cuts.gather(1, starts) - starts, 0)
