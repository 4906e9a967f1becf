"""Kernels over caches behind memory keys, compiled; everything here needs a CUDA device."""

from __future__ import annotations

from typing import Any

import memory_keys
import pytest
import torch
from memory_keys import caches, new
from torch import Tensor
from torch._dynamo.utils import counters

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("seeded"),
]

SLOTS, LENGTH, STEPS = 3000, 2500, 6
OPTIONS = {"budget": 2999, "sinks": 4, "recent": 16}
CLOSE = {"float32": 2e-4, "bfloat16": 2e-2}


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [each.cuda() for each in tensors]


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_static_cache_that_is_read_in_full_is_dense(mode: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    made = memory_keys.Static(dtype=kind).cuda()
    held = on_gpu(*caches(SLOTS, kind))
    step = torch.compile(made, backend="lychee", options={**OPTIONS, "mode": mode})
    for pos in range(LENGTH, LENGTH + STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        query, *fresh = on_gpu(*new(dtype=kind))
        position = torch.tensor([pos], device="cuda")
        expected = made(query, *(each.clone() for each in held), position, *fresh)
        got = step(query, *held, position, *fresh)
        torch.testing.assert_close(got, expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    assert counters["lychee"]["sparse"] == 1


@pytest.mark.parametrize("policy", ["lychee", "quest"])
@pytest.mark.parametrize("model", [memory_keys.Growing, memory_keys.WithSink])
def test_a_growing_cache_that_is_read_in_full_is_dense(model: Any, policy: str) -> None:
    made, held = model().cuda(), on_gpu(*caches(LENGTH))
    options = {**OPTIONS, "budget": 3000, "policy": policy, "dense_layers": 0}
    step = torch.compile(made, backend="lychee", options=options)
    for _ in range(STEPS):
        query, *fresh = on_gpu(*new())
        expected = made(query, *held, *fresh)[0]
        got, *held = step(query, *held, *fresh)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    assert counters["lychee"]["sparse"] == 1
