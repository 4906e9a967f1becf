"""Decoding for a long time: nothing is compiled again, and nothing piles up."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernel_steps import Cache, compiled, grow
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.kernels.gpu.lychee.index import LEAST_REFIT, SketchIndex
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.passes.lower.index_inputs import CacheArgument
from lychee_compile.runtime.cache_registry import registry
from lychee_compile.runtime.stateful_graph import StatefulGraph

LITTLE = 64 << 10
"""Bytes that counters and caches of Python itself may take."""


def growth(run: Callable[[], Any], first: int, more: int) -> int:
    """Return bytes of Python's memory that `more` calls of `run` leave, after the `first`."""
    tracemalloc.start()
    try:
        held = []
        for count in (first, more):
            for _ in range(count):
                run()
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        return held[1] - held[0]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("calls", [4_000, pytest.param(100_000, marks=pytest.mark.thorough)])
def test_many_calls_of_a_graph_leave_nothing_behind(
    calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refits = 0

    def build(index: SketchIndex, _module: Any, _key: Tensor, ends: Sequence[int]) -> None:
        index.trust([512] * len(ends))

    def refit(*_: Any) -> None:
        nonlocal refits
        refits += 1

    monkeypatch.setattr(SketchIndex, "build", build)
    monkeypatch.setattr(SketchIndex, "refit", refit)
    monkeypatch.setattr("lychee_compile.kernels.gpu.lifecycle.load", lambda _: None)
    keys = torch.zeros(1, 2, 512, 16)
    layout = SketchLayout.over(keys)
    use = CacheUse("decode_lychee_f32_g2_d16_b40", lambda cache: cache, 1, layout, "lychee")
    graph = StatefulGraph(lambda *_: (), [CacheArgument(0, None, use=use)], IndexConfig(), None)
    assert growth(lambda: graph(keys), 1000, calls) < LITTLE
    assert len(registry) == 1
    made = 1000 + calls
    assert made // (keys.shape[2] + 1) <= refits <= made // LEAST_REFIT


@pytest.mark.thorough
@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
def test_a_static_cache_is_decoded_for_long_by_one_graph() -> None:
    step, cache = compiled(), Cache().fill(60)

    def once() -> None:
        if cache.length == cache.size:
            cache.length = 60  # the oldest drafts are rejected
        cache.step(step)

    assert growth(once, 300, 600) < LITTLE
    assert len(lychee_compile.reports()) == 1
    assert len(registry) == 1


@pytest.mark.parametrize("steps", [128, pytest.param(4096, marks=pytest.mark.thorough)])
@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
def test_steps_over_a_growing_cache_are_two_compilations(steps: int) -> None:
    step = compiled(grow)
    keys, values = torch.randn(1, 1, 41, 8), torch.randn(1, 1, 41, 8)
    for _ in range(steps):
        fresh = torch.randn(3, 1, 1, 1, 8)
        _, keys, values = step(fresh[0], keys, values, fresh[1], fresh[2])
    assert keys.shape[2] == 41 + steps
    assert len(lychee_compile.reports()) == 2
    assert len(registry) == 1
