"""The channels of keys that tell most tokens apart, in pairs that rotary positions turn."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.levels.declaration import DominantPairs

SAMPLE = 2048
"""Most keys of a row that channels are chosen from."""
REFIT_GROWTH = 4
"""Times that the tokens must have become more until channels are chosen anew."""
SCATTER = 7919
"""A prime that spreads the sampled keys, so that no rotation keeps step with them."""


def fitted_tokens(tokens: Tensor) -> Tensor:
    """Return how many first tokens channels are chosen from: the power of two up to `tokens`.

    Both are int64 [B]; 0 tokens give 0. The choice thus depends on how many tokens there are, not
    on the steps in which they came.
    """
    exponent = torch.frexp(tokens.double()).exponent.long() - 1
    return torch.where(tokens > 0, 2 ** exponent.clamp(min=0), 0)


def channels_of(key: Tensor, tokens: Tensor, pairs: DominantPairs) -> Tensor:
    """Return the channels of the dominant pairs of each row and KV head, int64 [B, Hkv, C].

    They are chosen from the first `tokens`, int64 [B], keys of `key` [B, Hkv, L, D]; of no keys,
    the first pairs are. A pair dominates by the variance of its two channels. It is (i, i + D/2) or
    (2i, 2i + 1): see `_disagreement`.
    """
    moments = [_moments(each, count) for each, count in zip(key, tokens.tolist(), strict=True)]
    energy, variance = (torch.stack(each) for each in zip(*moments, strict=True))
    count = pairs.channels(key.shape[-1]) // 2
    layouts = _layouts(key.shape[-1], key.device)
    if count == 0:
        return layouts[0].new_zeros(*variance.shape[:2], pairs.channels(key.shape[-1]))
    found = torch.stack([_best(variance, layout, count) for layout in layouts])
    disagreement = torch.stack([_disagreement(energy, layout) for layout in layouts])
    interleaved = disagreement[1] < disagreement[0]
    return torch.where(interleaved[:, None, None], found[1], found[0])


def pick(vectors: Tensor, channels: Tensor) -> Tensor:
    """Return the `channels`, int64 [B, Hkv, C], of `vectors` [B, Hkv, N, D]: [B, Hkv, N, C]."""
    return vectors.gather(-1, channels[:, :, None].expand(-1, -1, vectors.shape[2], -1))


def _moments(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean square and variance of each channel, float32 [Hkv, D], of keys [Hkv, L, D].

    At most `SAMPLE` of the first `count` keys are looked at.
    """
    step = max(count // SAMPLE, 1)
    number = torch.arange(min(count, SAMPLE), device=key.device)
    keys = key.index_select(1, number * step + number * SCATTER % step)
    mean = keys.sum(1, keepdim=True, dtype=torch.float32) / max(len(number), 1)
    variance = (keys - mean).square().sum(1) / max(len(number), 1)
    energy = variance + mean[:, 0].square()
    return energy.nan_to_num(nan=torch.inf), variance.nan_to_num(nan=torch.inf)


def _layouts(head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the pairs of channels by halves and interleaved, int64 [D // 2, 2] each."""
    first = torch.arange(head_dim // 2, device=device)
    by_halves = torch.stack((first, first + head_dim // 2), -1)
    return by_halves, torch.stack((2 * first, 2 * first + 1), -1)


def _best(variance: Tensor, layout: Tensor, count: int) -> Tensor:
    """Return the channels of the `count` pairs of largest variance, in order: int64 [B, Hkv, C]."""
    of_pair = variance[..., layout].sum(-1)
    order = of_pair.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return layout[order].flatten(-2).sort(-1).values


def _disagreement(energy: Tensor, layout: Tensor) -> Tensor:
    """Return how much the two channels of pairs differ in energy, float32 [B].

    A rotation by all angles gives both channels of a pair the same energy. Fast pairs have gone
    round often, so that the layout whose pairs differ less is the one that was rotated.
    """
    energy = energy.clamp(1e-12, 1e30)
    logs = (energy + 1e-6 * energy.mean(-1, keepdim=True)).log()[..., layout]
    return (logs[..., 0] - logs[..., 1]).abs().sum((-1, -2))
