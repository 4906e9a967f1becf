"""Summaries of chunks and clusters are made once they are read, in time linear in the keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import CPU, Heads, random
from torch.utils.flop_counter import FlopCounterMode

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.reference import sparse_attention, update_index
from lychee_compile.kernels.operators.reference_owner import ReferenceCacheIndex
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.chunk_index import ChunkIndex
from lychee_compile.kernels.reference.clustering import cluster

SHAPE = Heads(2, 2, 2, 8)
TOKENS = 400
OPTIONS: dict[str, Any] = {"sinks": 2, "recent": 8, "chunk": (2, 4), "budget": 24}


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({}, False),
        ({"coverage": 0.8}, False),
        ({"flat_tokens": TOKENS, "overfetch": 1}, False),
        ({"flat_tokens": 0, "overfetch": 100}, False),
        ({"flat_tokens": TOKENS // 2, "overfetch": 1}, True),
        ({"epsilon": 0.1}, True),
        ({"policy": "lycheecluster"}, True),
        ({"policy": "dhsa"}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.thorough)]
)
def test_groups_are_made_when_they_are_read(
    options: dict[str, Any], read: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, complete = [], ChunkIndex.complete

    def spied(index: ChunkIndex, key: torch.Tensor) -> None:
        made.append(index)
        complete(index, key)

    monkeypatch.setattr(ChunkIndex, "complete", spied)
    owner = ReferenceCacheIndex(IndexConfig(**{**OPTIONS, **options}))
    key = SHAPE.keys("gaussian", 0, TOKENS + 3, dtype)
    for end in range(TOKENS + 1, TOKENS + 4):
        keys, at = key[:, :, :end], torch.tensor([end - 1])
        update_index(keys, None, at, None, owner.tensor, 1)
        query = SHAPE.queries(end, 1, dtype)
        sparse_attention(query, keys, keys, None, None, owner.tensor, 0.3, None, "")
    assert bool(made) is read
    assert owner.cache.index.any_waiting is not read


def multiplications(function: Any, *given: Any) -> int:
    """Return how many numbers `function` multiplies in matrix products."""
    with FlopCounterMode(display=False) as counter:
        function(*given)
    return counter.get_total_flops()


@pytest.mark.parametrize("per_group", [4, 16])
def test_twice_as_many_groups_are_clustered_by_twice_the_work(per_group: int) -> None:
    work = [
        multiplications(
            cluster, random(0, 1, 2, count, 16), torch.ones(1, 2, count).long(), per_group, None, 0
        )
        for count in (16_384, 32_768)
    ]
    assert 0 < work[1] < 2.3 * work[0]


@pytest.mark.parametrize("policy", ["lychee", "lycheecluster"])
def test_an_index_of_twice_the_keys_takes_twice_the_work(policy: str) -> None:
    def build(tokens: int) -> None:
        keys = random(1, 1, 2, tokens, 16)
        config = IndexConfig(policy=policy, chunk=(8, 16), flat_tokens=0)
        index = make_index(1, 2, 16, config, CPU)
        index.extend(keys, torch.tensor([tokens]))
        index.complete(keys)

    work = [multiplications(build, tokens) for tokens in (16_384, 32_768)]
    assert 0 < work[1] < 2.3 * work[0]
