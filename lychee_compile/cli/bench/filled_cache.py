"""Static caches full of random keys and values, as a long prompt would leave them.

A prefill of 128k tokens takes minutes, and tells nothing of the time of a step: a step reads as
many keys whatever they are. Keys and values are therefore drawn, for each KV head and channel, with
the mean and the deviation that a short prompt of random tokens gives. Only the options `coverage`
and `epsilon` let the number of keys read depend on them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lychee_compile.cli.caches import layers_with_keys, new_static_cache, note_filled
from lychee_compile.evaluate.cache_argument import cache_argument

PROMPT = 64
"""Number of random tokens whose keys and values are looked at."""


@torch.no_grad()
def filled_cache(model: Any, batch: int, filled: int, slots: int) -> Any:
    """Return a cache of `slots` slots for `model`, `filled` of them with random keys and values."""
    cache = new_static_cache(model, batch, slots)
    for layer, (keys, values) in zip(layers_with_keys(cache), _samples(model), strict=True):
        _draw(layer.keys, keys)
        _draw(layer.values, values)
    note_filled(cache, filled)
    return cache


def _samples(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values [1, Hkv, T, D] of each layer that has some, of a short prompt."""
    from transformers import StaticCache

    cache = StaticCache(model.config, max_cache_len=PROMPT)
    words = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(words, (1, PROMPT), generator=generator).to(model.device)
    model(prompt, **{cache_argument(model): cache})
    return [(layer.keys, layer.values) for layer in layers_with_keys(cache)]


def _draw(buffer: Tensor, like: Tensor) -> None:
    """Fill `buffer` [B, H, L, D] with numbers of the mean and deviation of `like` [1, H, T, D]."""
    mean = like.float().mean(2, keepdim=True)
    deviation = like.float().std(2, keepdim=True)
    buffer.normal_()
    for row in buffer:  # one at a time: a copy of a whole cache might not fit
        row.mul_(deviation[0].to(row.dtype)).add_(mean[0].to(row.dtype))
