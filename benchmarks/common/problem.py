"""One decode attention to measure: shapes, keys with structure, the exact answer in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RUN = 24
"""Number of neighbouring tokens whose keys have something in common."""
NOISE = 0.3
"""Size of the part of a key outside of the principal axes."""
SPREAD = 4.0
"""Standard deviation of the scores, in nats. With it the 1,024 best of 131,072 keys hold 0.94 of
the softmax mass, and the 1,024 best of 524,288 keys 0.87."""
SAMPLE = 4096
"""Number of keys from which the size of a query is computed."""
PASSES = 4
"""Least number of L2 caches that the reads of all buffers together fill, if buffers suffice."""


@dataclass(frozen=True)
class Problem:
    """One decode attention: a query token per row over a full cache."""

    batch: int
    context: int
    """Tokens in the cache, L."""
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Number of query heads that share a KV head."""
        return self.heads // self.kv_heads

    def cache_bytes(self, tokens: int | None = None) -> int:
        """Return the bytes of `tokens` keys and values of every row and KV head; None means all."""
        length = self.context if tokens is None else min(tokens, self.context)
        numbers = 2 * self.batch * self.kv_heads * length * self.head_dim
        return numbers * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """Query [B, Hq, 1, D], key and value [B, Hkv, L, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


def make_inputs(problem: Problem, device: torch.device, seed: int) -> Inputs:
    """Return keys near a subspace of decaying axes, neighbours alike, and queries along it.

    Scores are about normal with `SPREAD`: attention is peaked, and yet no few keys hold all of it.
    Values are normal.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (problem.batch, problem.kv_heads, problem.context, problem.head_dim)
    key = torch.empty(shape, dtype=problem.dtype, device=device)
    value = torch.empty(shape, dtype=problem.dtype, device=device)
    query = torch.empty(
        (problem.batch, problem.heads, 1, problem.head_dim), dtype=problem.dtype, device=device
    )
    for row in range(problem.batch):
        axes = _axes(problem, generator)
        value[row].normal_(generator=generator)
        key[row] = _keys(problem, axes, generator)
        query[row] = _queries(problem, axes, key[row], generator)
    return Inputs(query, key, value)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def _axes(problem: Problem, generator: torch.Generator) -> Tensor:
    """Return axes [Hkv, D/4, D], each less weighty than the one before."""
    rank = max(problem.head_dim // 4, 1)
    weight = torch.arange(1, rank + 1, device=generator.device).float().rsqrt()
    axes = _normal(generator, problem.kv_heads, rank, problem.head_dim)
    return axes * weight[:, None] / weight.norm()


def _keys(problem: Problem, axes: Tensor, generator: torch.Generator) -> Tensor:
    """Return one row's keys, float32 [Hkv, L, D]: offset + run's part + token's part + noise."""
    heads, rank, head_dim = axes.shape
    runs = _normal(generator, heads, -(-problem.context // RUN), rank)
    coordinates = runs.repeat_interleave(RUN, 1)[:, : problem.context]
    coordinates += _normal(generator, *coordinates.shape)
    key = coordinates.mul_(math.sqrt(0.5)) @ axes
    key += _normal(generator, heads, 1, head_dim)
    return key.add_(_normal(generator, *key.shape), alpha=NOISE)


def _queries(problem: Problem, axes: Tensor, key: Tensor, generator: torch.Generator) -> Tensor:
    """Return the queries of one row, float32 [Hq, 1, D]: the group's part and the head's own."""
    heads, rank, head_dim = axes.shape
    wanted = _normal(generator, heads, 1, rank) + _normal(generator, heads, problem.group, rank)
    query = wanted @ axes
    scores = query @ key[:, :SAMPLE].float().transpose(-1, -2) / math.sqrt(head_dim)
    deviation = scores.std(-1, keepdim=True, correction=0).clamp(min=1e-6)
    return (SPREAD * query / deviation).view(problem.heads, 1, head_dim)


def checked_rows(problem: Problem) -> list[int]:
    """Return the rows of the batch in which outputs are checked."""
    return sorted({0, problem.batch - 1})


def reference(inputs: Inputs, rows: Sequence[int]) -> Tensor:
    """Return softmax attention over all keys in float64, for some rows: [R, Hq, 1, D]."""
    kv_heads, head_dim = inputs.key.shape[1], inputs.key.shape[3]
    outputs = []
    for row in rows:
        queries = inputs.query[row, :, 0].double().view(kv_heads, -1, head_dim)
        for head in range(kv_heads):  # one at a time: a head's keys take half a GB at 512k
            scores = queries[head] @ inputs.key[row, head].double().mT / math.sqrt(head_dim)
            outputs.append(scores.softmax(-1) @ inputs.value[row, head].double())
    return torch.stack(outputs).view(len(rows), -1, 1, head_dim)


def relative_error(output: Tensor, exact: Tensor, rows: Sequence[int]) -> float:
    """Return the norm of the difference over the norm of `exact` [R, Hq, 1, D], in float64."""
    return ((output[list(rows)].double() - exact).norm() / exact.norm()).item()


def buffer_count(kv_bytes: int, least_read: int, l2_bytes: int, free: float, most: int) -> int:
    """Return how many caches to rotate so that a call finds nothing of an earlier call in L2.

    `least_read` are the bytes that the thriftiest variant reads. The number is at least two and at
    most `most`; it is one if half of the `free` bytes hold no more, and 0 if not even one fits.
    """
    if kv_bytes > 0.9 * free:
        return 0
    wanted = max(-(-PASSES * l2_bytes // least_read), 2)
    return max(min(wanted, most, int(0.5 * free / kv_bytes)), 1)
