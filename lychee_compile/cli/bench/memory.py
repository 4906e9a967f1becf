"""Memory that is free, and that a cache takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lychee_compile.cli.caches import layers_with_keys, new_static_cache

SMALL = 16
"""Number of slots of a cache that is made to learn its shapes."""
CPU_SHARE = 0.6
"""Share of the free memory that a cache may take on a CPU, besides copies of keys and an index."""


def cache_bytes(model: Any, batch: int, slots: int) -> int:
    """Return the bytes of a static cache of `slots` slots for `batch` rows; none is made."""
    from transformers import StaticCache

    small = new_static_cache(model, 1, SMALL)
    planned = StaticCache(model.config, max_cache_len=slots)
    wide = [layer.max_cache_len for layer in planned.layers if hasattr(layer, "max_cache_len")]
    total = 0
    for layer, length in zip(layers_with_keys(small), wide, strict=False):
        for each in (layer.keys, layer.values):
            total += batch * length * each.element_size() * each.numel() // each.shape[2]
    return total


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that a cache may take on a device; None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return None if found is None else int(CPU_SHARE * 1024 * int(found[1]))
