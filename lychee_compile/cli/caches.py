"""Static caches of transformers that are as full as after a long prompt, without its prefill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lychee_compile.evaluate.cache_argument import cache_argument


def new_static_cache(model: Any, batch: int, slots: int) -> Any:
    """Return a cache of `slots` slots for `batch` rows, with memory and one token in it."""
    from transformers import StaticCache

    cache = StaticCache(model.config, max_cache_len=slots)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        model(token, **{cache_argument(model): cache})
    return cache


def layers_with_keys(cache: Any) -> Iterator[Any]:
    """Yield the layers of a cache that hold keys: a recurrent layer holds none."""
    for layer in cache.layers:
        if isinstance(getattr(layer, "keys", None), Tensor):
            yield layer


def cache_bytes(layer: Any) -> int:
    """Return the bytes of keys and values of one layer; 0 for a layer without keys."""
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(each.numel() * each.element_size() for each in held if isinstance(each, Tensor))


def note_filled(cache: Any, filled: int) -> None:
    """Let all layers count `filled` tokens, as many as came before the next one."""
    for layer in layers_with_keys(cache):
        layer.cumulative_length.fill_(filled)
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = filled
