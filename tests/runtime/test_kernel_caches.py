"""Whose keys an index by slot follows, and what it does when somebody else writes them."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
import triton_interpreter
from kernel_steps import (
    CLOSE,
    DIM,
    GROUP,
    KV_HEADS,
    SIZE,
    SMALL,
    Cache,
    assert_exact,
    assert_sparse,
    compiled,
    decode,
    grow,
    read_by,
    upkeep_of,
)
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.kernels.gpu import owners
from lychee_compile.kernels.gpu.lifecycle import WORTHWHILE
from lychee_compile.kernels.operators import decode as decode_operators
from lychee_compile.kernels.operators.observe import warn_of_replays
from lychee_compile.kernels.trust import Trust
from lychee_compile.runtime import stateful_graph
from lychee_compile.runtime.cache_registry import registry
from lychee_compile.runtime.stateful_graph import _warn_of_inference_mode

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]


def test_two_caches_through_one_graph_never_mix() -> None:
    step, alone = compiled(), compiled()
    together = [Cache(seed=seed).fill(90 + seed) for seed in (1, 2)]
    outputs: list[list[Tensor]] = [[], []]
    for _ in range(3):
        for cache, into in zip(together, outputs, strict=True):
            into.append(cache.step(step)[0])
    assert len(registry) == 2
    for seed, several in zip((1, 2), outputs, strict=True):
        cache = Cache(seed=seed).fill(90 + seed)
        assert all(torch.equal(cache.step(alone)[0], each) for each in several)
    del together, cache
    gc.collect()  # tests collect seldom by themselves
    assert len(registry) == 0


def rewritten_eagerly(cache: Cache) -> None:
    cache.fill(cache.length)


def emptied_and_filled(cache: Cache) -> None:
    cache.keys.zero_()
    cache.fill(50)


def reordered(cache: Cache) -> None:
    cache.keys.copy_(cache.keys.flip(0))


@pytest.mark.parametrize(
    "happens",
    [
        pytest.param(rewritten_eagerly, marks=pytest.mark.thorough),
        pytest.param(emptied_and_filled, marks=pytest.mark.thorough),
        reordered,
    ],
)
def test_a_cache_that_somebody_else_wrote_is_read_in_full_and_then_indexed_anew(
    happens: Any,
) -> None:
    cache, step = Cache(batch=2).fill(100), compiled()
    cache.step(step)
    assert_sparse(cache.step(step), cache)
    happens(cache)
    assert_exact(cache.step(step))
    # Its index did not live long, so the next one is not built at once.
    for _ in range(3):
        last = cache.step(step)
    assert_sparse(last, cache)


@pytest.mark.thorough
def test_an_index_that_keeps_being_lost_is_not_built_over_and_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, step, built = Cache().fill(60), compiled(), []
    cache.step(step)
    upkeep = upkeep_of(cache.keys)
    build = upkeep.index.build
    monkeypatch.setattr(upkeep.index, "build", lambda *given: (built.append(1), build(*given)))
    for _ in range(8):
        cache.keys[:, :, 0] += 0  # a write that nobody told us of
        assert_exact(cache.step(step))
    assert not built
    upkeep._calls = WORTHWHILE
    upkeep._calls_to_wait, upkeep.trust = 0, Trust.TRUSTED  # as after many steps
    cache.keys[:, :, 0] += 0
    assert_exact(cache.step(step))
    assert_sparse(cache.step(step), cache)
    assert built == [1]


def test_rewound_drafts_are_forgotten() -> None:
    """Tokens that are written over are those of the last write, without any distrust."""
    cache, step = Cache().fill(100), compiled()
    cache.step(step, 4)
    for _ in range(3):
        cache.length -= 3
        assert_sparse(cache.step(step, 4), cache)
    assert upkeep_of(cache.keys).trusted


def test_a_prefill_through_the_backend_is_found_out_by_the_next_step() -> None:
    cache, step = Cache().fill(20), compiled()
    assert_exact(cache.step(step, 60))
    assert len(registry) == 0
    assert_exact(cache.step(step))
    assert_sparse(cache.step(step), cache)
    assert_exact(cache.step(step, 40))
    assert_exact(cache.step(step))


def test_caches_made_in_inference_mode_are_sparse_and_never_stale() -> None:
    """PyTorch does not count who writes them. Kernels notice it in the very step."""
    step = compiled()
    with torch.inference_mode():
        cache = Cache().fill(100)
        assert_exact(cache.step(step))
        assert_sparse(cache.step(step), cache)
        cache.fill(90)
        assert_exact(cache.step(step))


def test_kernels_that_notice_no_writes_read_caches_of_inference_mode_in_full(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _warn_of_inference_mode.cache_clear()
    monkeypatch.setattr(stateful_graph, "able", lambda policy, ability: False)
    step = compiled()
    with caplog.at_level(logging.WARNING, "lychee_compile"), torch.inference_mode():
        cache = Cache().fill(100)
        for _ in range(2):
            assert_exact(cache.step(step))
    (warning,) = [each.message for each in caplog.records]
    assert "torch.no_grad()" in warning


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.thorough), {"coverage": 0.5}, {"policy": "quest"}],
    ids=str,
)
def test_what_kernels_read_is_recorded(options: dict[str, Any]) -> None:
    step, cache = compiled(**options, dense_layers=0), Cache(batch=2).fill(100)
    cache.step(step)
    with lychee_compile.record(mass=True) as recorder:
        steps = [cache.step(step) for _ in range(2)]
    assert len(recorder.calls) == 2
    for (got, dense), call in zip(steps, recorder.calls, strict=True):
        read = read_by(got, cache)
        told = torch.zeros_like(read).scatter(-1, call.tokens.clamp(min=0), True)
        assert not (read & ~told).any()
        assert torch.equal(told.sum(-1), call.tokens_read)
        assert (call.tokens_read <= SMALL["budget"]).all()
        mass = dense.double().masked_fill(~read.repeat_interleave(GROUP, 1), 0).sum(-1)
        torch.testing.assert_close(call.mass.double(), mass, atol=1e-4, rtol=1e-4)


def test_of_tokens_that_kernels_draw_each_counts_once_in_what_is_recorded() -> None:
    """The sums of the kernels hold what they stand for, which is not read."""
    step, cache = compiled(draw=True, dense_layers=0), Cache(batch=2).fill(100)
    cache.step(step)
    with lychee_compile.record(mass=True) as recorder:
        got, dense = cache.step(step)
    (call,) = recorder.calls
    read = read_by(got, cache)
    told = torch.zeros_like(read).scatter(-1, call.tokens.clamp(min=0), True)
    assert not (read & ~told).any()
    assert torch.equal(told.sum(-1), call.tokens_read)
    mass = dense.double().masked_fill(~read.repeat_interleave(GROUP, 1), 0).sum(-1)
    torch.testing.assert_close(call.mass.double(), mass, atol=1e-4, rtol=1e-4)


def test_calls_that_read_all_keys_are_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    step, cache = compiled(), Cache().fill(100)
    with caplog.at_level(logging.WARNING, "lychee_compile"), lychee_compile.record() as recorder:
        assert_exact(cache.step(step))
    assert not recorder.calls
    (warning,) = [each.message for each in caplog.records]
    assert "Nothing was recorded" in warning


def test_who_records_a_replay_is_told_that_it_tells_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay runs the kernels without the operator."""
    warn_of_replays.cache_clear()
    step, cache = compiled(), Cache().fill(100)
    cache.step(step)
    run = decode_operators.run_sparse_kernel

    def replay(*given: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(decode_operators, "kernel_observers", [])
            return run(*given)

    monkeypatch.setattr(decode_operators, "run_sparse_kernel", replay)
    with caplog.at_level(logging.WARNING, "lychee_compile"), lychee_compile.record() as recorder:
        cache.step(step)
    assert not recorder.calls
    first, second = [each.message for each in caplog.records if "recorded" in each.message]
    assert 'mode="reduce-overhead"' in first
    assert "Nothing was recorded" in second


def test_inference_mode_is_fine_where_the_cache_is_not_of_it() -> None:
    cache, step = Cache().fill(100), compiled()
    with torch.inference_mode():
        cache.step(step)
        assert_sparse(cache.step(step), cache)
    assert_sparse(cache.step(step), cache)


def test_a_growing_cache_outgrows_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few keys match the query; they are sketched before the index is moved, and found after."""
    monkeypatch.setattr(owners, "roomy", lambda layout: layout)  # no room to spare
    step, query = compiled(grow), torch.zeros(1, KV_HEADS * GROUP, 1, DIM)
    query[..., 0] = 40
    keys, values = torch.randn(2, 1, KV_HEADS, 505, DIM).clamp(-1, 1)
    slots = []
    for number in range(6):
        fresh = torch.randn(2, 1, KV_HEADS, 3, DIM).clamp(-1, 1)
        fresh[0, ..., 0] = 5 if number == 1 else 0
        dense = grow(query, keys, values, *fresh)[0]
        got, keys, values = step(query, keys, values, *fresh)
        if number != 0:
            torch.testing.assert_close(got, dense, **CLOSE)
        slots.append(upkeep_of(keys, growing=True).index.layout.slots)
    assert slots == [512] * 2 + [1024] * 4
    assert upkeep_of(keys, growing=True).trusted
    assert len(registry) == 1


@pytest.mark.parametrize(
    "order",
    [
        pytest.param((0, 2, 1, 3), marks=pytest.mark.thorough, id="BLHD"),
        pytest.param((1, 2, 0, 3), id="HLBD"),
    ],
)
def test_a_cache_in_another_layout_is_read_where_it_lies(order: tuple[int, ...]) -> None:
    back = [order.index(dim) for dim in range(4)]

    def other(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *new: Tensor) -> Any:
        keys.index_copy_(1, positions, new[0].permute(order))
        return decode(query, keys.permute(back), values, positions, None, new[1])

    cache, step = Cache(batch=2).fill(100), compiled(other)
    keys = cache.keys.permute(order).contiguous()
    cache.keys = keys.permute(back)
    for number in range(3):
        got, dense = cache.step(lambda query, _, *rest: step(query, keys, *rest))
        assert_exact((got, dense)) if number == 0 else assert_sparse((got, dense), cache)


def test_reset_forgets_and_a_broken_call_drops_what_it_may_have_spoilt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, step = Cache().fill(100), compiled()
    cache.step(step)
    lychee_compile.reset()
    assert len(registry) == 0
    assert_exact(cache.step(step))
    assert_sparse(cache.step(step), cache)

    def broken(*given: Any) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(decode_operators, "load", broken)
        with pytest.raises(KeyboardInterrupt):
            cache.step(step)
    assert len(registry) == 0
    assert_exact(cache.step(step))


@pytest.mark.thorough
def test_a_cache_of_any_size_goes_through_one_graph() -> None:
    """The second size makes it symbolic: the index is then found by a handle."""
    step = compiled()
    for size in (96, SIZE, 112):
        cache = Cache(size=size, seed=size).fill(80)
        assert_exact(cache.step(step))
        for _ in range(2):
            assert_sparse(cache.step(step), cache)
        assert upkeep_of(cache.keys, growing=size != 96).trusted
    assert counters["stats"]["unique_graphs"] == 2


def test_a_prefix_of_a_cache_is_read_by_the_index_of_the_whole() -> None:
    """The first of two rows, the first 112 slots."""

    def prefix(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *new: Tensor) -> Any:
        keys.index_copy_(2, positions, new[0])
        values.index_copy_(2, positions, new[1])
        return decode(query[:1], keys[:1, :, :112], values[:1, :, :112], positions, None, None)

    cache, step = Cache(batch=2).fill(100), compiled(prefix)
    for number in range(3):
        got, dense = cache.step(step)
        together = got, dense[:1]
        assert_exact(together) if number == 0 else assert_sparse(together, cache)


def test_one_head_may_be_left_out_and_heads_be_folded_into_rows() -> None:
    def folded(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *new: Tensor) -> Any:
        keys.index_copy_(1, positions, new[0].flatten(0, 1))
        values.index_copy_(1, positions, new[1].flatten(0, 1))
        mask = torch.arange(SIZE) <= positions[:, None]
        wide = [each.repeat_interleave(GROUP, 0) for each in (keys, values)]
        scores = query.flatten(0, 1) @ wide[0].mT * DIM**-0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ wide[1]).unflatten(0, query.shape[:2])

    cache, step = Cache(batch=2).fill(100), compiled(folded)
    keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
    for number in range(3):
        got, dense = cache.step(lambda query, _, __, *rest: step(query, keys, values, *rest))
        assert_exact((got, dense)) if number == 0 else assert_sparse((got, dense), cache)
    (site,) = lychee_compile.reports()[-1].sites
    assert site.form == "eager"
