"""Memory of the index of one cache, time to build it, and bytes that choosing by it reads."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lychee_compile.functional import build_index
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.gpu.levels.method import LevelMethod
from lychee_compile.kernels.gpu.lychee.layout import (
    SketchLayout,
    block_size,
    pays_to_narrow,
    planes,
)
from lychee_compile.kernels.gpu.lychee.method import LycheeMethod
from lychee_compile.kernels.gpu.methods import gpu_method
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.operators.cache_index import CacheIndex, CacheWrite
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.sketch_axes import sketch_bits
from lychee_compile.kernels.sizes import PAGE
from lychee_compile.options import Options

SMALL, LARGE = 1024, 4096
"""Numbers of random keys of which an index is built on a CPU, to learn what it costs."""
RUNS = 3
"""Number of indexes built, of which the fastest counts."""
LONGEST = 131072
"""Largest number of random keys of which an index is built on a GPU."""


@dataclass(frozen=True)
class CacheShape:
    """Sizes of the key cache of one attention, [batch, kv_heads, kv_len, head_dim]."""

    batch: int
    kv_heads: int
    kv_len: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class IndexCosts:
    """Costs of the index of a cache, under given options."""

    options: Options
    kernels: bool
    """True if generated kernels keep the index."""
    _measured: dict[Any, float] = field(default_factory=dict)

    def bytes(self, shape: CacheShape) -> int:
        """Return the bytes of the index: those of its layout, on a CPU those of a small one."""
        if self.kernels:
            key = torch.empty(_sizes(shape), dtype=shape.dtype, device="meta")
            return _layout_bytes(key, self.options)
        config, heads = self.options.index_config(), shape.kv_heads
        small, large = (_built(n, heads, shape.head_dim, config)[0] for n in (SMALL, LARGE))
        per_key = (large - small) / (LARGE - SMALL)
        return round(shape.batch * (large + per_key * (shape.kv_len - LARGE)))

    def build_seconds(self, shape: CacheShape) -> float | None:
        """Return about the time to build the index, measured with random keys on the device.

        On a CPU it is that of fewer keys of one row, multiplied. None: it is not measured, as for
        the reference on a GPU.
        """
        if shape.device.type != "cpu" and not (self.kernels and self.options.epsilon is None):
            return None
        if not self.kernels:
            _, seconds = _built(LARGE, shape.kv_heads, shape.head_dim, self.options.index_config())
            return seconds * shape.batch * shape.kv_len / LARGE
        keys = min(shape.kv_len, LONGEST)
        if (shape.kv_heads, keys, shape.head_dim, shape.dtype) not in self._measured:
            seconds = self._seconds_on_gpu(shape, keys)
            self._measured[shape.kv_heads, keys, shape.head_dim, shape.dtype] = seconds
        seconds = self._measured[shape.kv_heads, keys, shape.head_dim, shape.dtype]
        return seconds * shape.batch * shape.kv_len / keys

    def _seconds_on_gpu(self, shape: CacheShape, keys: int) -> float:
        key = torch.randn(
            1, shape.kv_heads, keys, shape.head_dim, dtype=shape.dtype, device=shape.device
        )
        seconds = 0.0
        for _ in range(2):  # the first compiles kernels
            torch.cuda.synchronize(shape.device)
            started = time.perf_counter()
            build_index(key, options=self.options)
            torch.cuda.synchronize(shape.device)
            seconds = time.perf_counter() - started
        return seconds

    def bytes_per_step(self, shape: CacheShape, budget: int) -> int:
        """Return the bytes of the index that one step reads to choose, of all rows and KV heads."""
        config = self.options.index_config()
        rows = shape.batch * shape.kv_heads
        method = gpu_method(config.policy) if self.kernels else None
        if isinstance(method, LycheeMethod) and not pays_to_narrow(
            rows, shape.kv_len, config.flat_tokens
        ):
            return rows * _scanned_bytes(shape, budget, config)
        index = make_index(1, 1, shape.head_dim, config, torch.device("cpu"))
        return rows * index.bytes_per_step(shape.kv_len, budget)


def _sizes(shape: CacheShape) -> tuple[int, int, int, int]:
    return shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim


def _scanned_bytes(shape: CacheShape, budget: int, config: IndexConfig) -> int:
    """Return what kernels of "lychee" read of the sketches of one KV head.

    It is the sketches of all keys, or the means of all pages and the sketches of the best.
    """
    bits = sketch_bits(shape.head_dim)
    fine = sum(each.width for each in planes(shape.head_dim)[0][:1])
    blocks = -(-shape.kv_len // block_size(shape.kv_len))
    axes = blocks * (2 * len(bits) * shape.head_dim + 4 * (shape.head_dim + len(bits)))
    sketch = sum(bits) // 8
    if shape.kv_len <= config.flat_tokens:
        return axes + shape.kv_len * sketch
    candidates = min(config.overfetch * budget, shape.kv_len)
    return axes + shape.kv_len // PAGE * fine + candidates * sketch


def _layout_bytes(key: Tensor, options: Options) -> int:
    """Return the bytes of the index that kernels keep of a cache `key` [B, Hkv, L, D]."""
    method, settings = gpu_method(options.policy), GroupSettings.of(options)
    if isinstance(method, LevelMethod):
        return LevelLayout.over(key, options.policy, settings).size
    if not isinstance(method, LycheeMethod):
        return int(method.layout_of(key).size)
    if options.epsilon is not None:
        return SketchLayout.over(key, measured=True).size
    return SketchLayout.over(key, settings, options.flat_tokens).size


@lru_cache(maxsize=64)
def _built(tokens: int, kv_heads: int, head_dim: int, config: IndexConfig) -> tuple[int, float]:
    """Build the index of random keys on a CPU; return its bytes and the least time of runs."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, kv_heads, tokens, head_dim, generator=generator)
    write = CacheWrite(torch.zeros(1, dtype=torch.int64), torch.arange(tokens)[None], None)
    seconds = math.inf
    for _ in range(RUNS):
        started = time.perf_counter()
        index = CacheIndex(key, config)
        index.update(key, write, build=True)
        seconds = min(seconds, time.perf_counter() - started)
    storages = {each.untyped_storage().data_ptr(): each for each in _tensors(index, set())}
    return sum(each.untyped_storage().nbytes() for each in storages.values()), seconds


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield all tensors that an object of this package holds."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each, seen)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each, seen)
    elif type(value).__module__.startswith("lychee_compile."):
        yield from _tensors(getattr(value, "__dict__", {}), seen)
