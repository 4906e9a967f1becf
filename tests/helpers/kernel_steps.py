"""One decoding step over a cache in many forms, and a cache whose values tell what was read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.runtime.cache_registry import registry

SIZE, DIM, KV_HEADS, GROUP = 128, 16, 2, 2
SMALL = {"budget": 40, "sinks": 4, "recent": 16, "chunk": (2, 4)}
EVERYTHING = {**SMALL, "budget": SIZE - 1}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@dataclass
class Cache:
    """Keys [B, Hkv, L, D] with a few directions that matter, and values that are unit vectors.

    So the output of an attention is its weights, [B, Hq, T, SIZE].
    """

    batch: int = 1
    dtype: torch.dtype = torch.float32
    size: int = SIZE
    seed: int = 0
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    length: int = 0

    def __post_init__(self) -> None:
        self.keys = torch.zeros(self.batch, KV_HEADS, self.size, DIM, dtype=self.dtype)
        self.values = torch.zeros(self.batch, KV_HEADS, self.size, SIZE, dtype=self.dtype)
        self._generator = torch.Generator().manual_seed(self.seed)

    def fill(self, length: int) -> Cache:
        """Write keys and values as an eager prefill does, which the backend does not see."""
        self.keys[:, :, :length] = self.fresh(length)
        self.values[:, :, :length] = torch.eye(SIZE)[:length]
        self.length = length
        return self

    def fresh(self, count: int) -> Tensor:
        """Return keys [B, Hkv, T, D] to write."""
        shape = (self.batch, KV_HEADS, count, DIM)
        keys = torch.randn(*shape, generator=self._generator)
        keys = keys * torch.linspace(3, 0.1, DIM) + torch.linspace(1, 0, DIM)
        return keys.to(self.dtype)

    def step(self, attend: Callable[..., Any], count: int = 1) -> tuple[Any, Tensor]:
        """Write `count` tokens and attend, through `attend`; also what eager makes of it."""
        shape = (self.batch, KV_HEADS * GROUP, count, DIM)
        query = torch.randn(*shape, generator=self._generator).to(self.dtype)
        positions = torch.arange(self.length, self.length + count)
        new = torch.eye(SIZE, dtype=self.dtype)[positions].expand(self.batch, KV_HEADS, -1, -1)
        given = (query, positions, self.fresh(count), new)
        keys, values = self.keys.clone(), self.values.clone()
        dense = decode(query, keys, values, *given[1:])
        self.length += count
        return attend(given[0], self.keys, self.values, *given[1:]), dense


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    key: Tensor | None,
    value: Tensor | None,
) -> Tensor:
    """Write to a static cache, what is not there yet, and attend to what is in it."""
    for cache, fresh in ((keys, key), (values, value)):
        if fresh is not None:
            cache.index_copy_(2, positions, fresh)
    mask = (torch.arange(keys.shape[2]) <= positions[:, None])[None, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def grow(query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> Any:
    """Append to a growing cache and attend to all of it."""
    keys, values = torch.cat((keys, key), 2), torch.cat((values, value), 2)
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), keys, values


def compiled(function: Callable[..., Any] = decode, **options: Any) -> Callable[..., Any]:
    """Return `function` through the backend."""
    return torch.compile(function, backend="lychee", options={**SMALL, **options})


def upkeep_of(keys: Tensor, growing: bool = False) -> Any:
    """Return the owner of the index of a cache [B, Hkv, L, D]; None if the cache has no index."""
    settings = GroupSettings(chunk=SMALL["chunk"], sinks=SMALL["sinks"])
    return registry.owner_of(keys, ("lychee", settings) if growing else SketchLayout.over(keys))


def read_by(weights: Tensor, cache: Cache) -> Tensor:
    """Return the slots with any weight, bool [B, Hkv, T, L]: a group of heads reads the same."""
    return (weights != 0).unflatten(1, (KV_HEADS, GROUP)).any(2)


def assert_exact(step: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*step, **CLOSE)


def assert_sparse(step: tuple[Tensor, Tensor], cache: Cache, budget: int = SMALL["budget"]) -> None:
    """Check that each KV head has read a budget of keys for each query, chosen by their weight."""
    got, dense = step
    read = read_by(got, cache)
    count = read.sum(-1)
    assert bool((count <= budget).all())
    assert bool((count > budget // 2).all())
    chosen = dense.double().masked_fill(~read.repeat_interleave(GROUP, 1), 0)
    expected = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(got.double(), expected, atol=2e-3, rtol=2e-2)
