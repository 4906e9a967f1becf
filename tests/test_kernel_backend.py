"""Decoding through generated kernels, end to end: what is read, and whose keys an index follows."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from kernel_steps import (
    DIM,
    EVERYTHING,
    GROUP,
    KV_HEADS,
    SIZE,
    SMALL,
    Cache,
    compiled,
    decode,
    grow,
    read_by,
    upkeep_of,
)
from tiny_models import LAYERS, VOCABULARY, StaticKV, TinyDecoder, decode_beside
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.kernels import decode_operators, slot_states
from lychee_compile.kernels.reference.slots import select_slots
from lychee_compile.kernels.slot_upkeep import WORTHWHILE
from lychee_compile.state import registry
from lychee_compile.stateful_graph import _warn_of_inference_mode

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def tokens(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, count))


def assert_exact(step: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*step, **CLOSE)


def assert_sparse(step: tuple[Tensor, Tensor], cache: Cache, budget: int = SMALL["budget"]) -> None:
    """Each KV head has read a budget of keys for each query, no more, and those by their weight."""
    got, dense = step
    read = read_by(got, cache)
    count = read.sum(-1)
    assert bool((count <= budget).all())
    assert bool((count > budget // 2).all())
    chosen = dense.double().masked_fill(~read.repeat_interleave(GROUP, 1), 0)
    expected = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(got.double(), expected, atol=2e-3, rtol=2e-2)


def sliding_window(budget: int, end: int) -> Tensor:
    """The keys that are read without any choice, bool [L]."""
    slot = torch.arange(SIZE)
    recent = (slot >= end - (budget - SMALL["sinks"])) & (slot < end)
    return (slot < SMALL["sinks"]) | recent


@pytest.mark.parametrize(
    ("count", "dtype", "batch"), [(1, torch.float32, 2), (3, torch.bfloat16, 1)]
)
def test_a_step_reads_sinks_recent_tokens_and_the_best_within_the_budget(
    count: int, dtype: torch.dtype, batch: int
) -> None:
    cache, step = Cache(batch, dtype).fill(100), compiled()
    first = cache.step(step, count)
    torch.testing.assert_close(*first, atol=1e-2, rtol=1e-2)
    assert bool((read_by(first[0], cache).sum(-1) >= 100).all())
    missed, missed_by_window = 0.0, 0.0
    for _ in range(3):
        got, dense = cache.step(step, count)
        assert_sparse((got, dense), cache)
        read = read_by(got, cache)
        assert bool(read[..., : SMALL["sinks"]].all())
        for place in range(count):
            end = cache.length - count + place + 1
            assert bool(read[:, :, place, end - SMALL["recent"] : end].all())
            assert not bool(read[:, :, place, end:].any())
            window = sliding_window(SMALL["budget"], end)
            missed_by_window += dense[:, :, place, ~window].sum().item()
        missed += dense.masked_fill(read.repeat_interleave(GROUP, 1), 0).sum().item()
    assert missed < 2 / 3 * missed_by_window


def test_it_selects_what_the_reference_selects() -> None:
    cache, step = Cache().fill(120), compiled()
    cache.step(step)
    parts = upkeep_of(cache.keys).index.parts
    given: list[Any] = []

    def noting(*operands: Tensor) -> Tensor:
        given[:] = operands
        return step(*operands)

    for _ in range(4):
        visible = (torch.arange(SIZE) <= cache.length).expand(1, KV_HEADS, GROUP, 1, SIZE)
        fresh = torch.tensor([cache.length])
        got, dense = cache.step(noting)
        always, rank, room = select_slots(
            given[0].unflatten(1, (KV_HEADS, GROUP)), parts, visible, fresh,
            lambda score: score * DIM**-0.5, DIM**-0.5,
            SMALL["budget"], SMALL["sinks"], SMALL["recent"], None,
        )  # fmt: skip
        best = rank.argsort(-1, descending=True).argsort(-1) < room[..., None]
        differs = read_by(got, cache) != (always | best)
        # Shares count by eighths of a factor of two: of those that end the budget any may be read.
        assert bool((differs.sum(-1) <= SMALL["budget"] // 5).all())
        assert dense.masked_fill(~differs.repeat_interleave(GROUP, 1), 0).sum() < 0.1 * dense.sum()


@pytest.mark.parametrize("growing", [False, True], ids=["static", "growing"])
def test_with_a_budget_for_all_greedy_tokens_are_dense(growing: bool) -> None:
    model = TinyDecoder().eval()
    step = torch.compile(model, backend="lychee", options=EVERYTHING)
    steps = decode_beside(model, step, tokens(104), 100, SIZE, growing)
    for got, expected in steps:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        words = model.words.weight.T
        assert torch.equal((got @ words).argmax(-1), (expected @ words).argmax(-1))
    assert counters["lychee"]["sparse"] > 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("growing", [False, True], ids=["static", "growing"])
def test_the_first_step_after_an_eager_prefill_is_exact_and_the_next_is_not(growing: bool) -> None:
    model = TinyDecoder().eval()
    step = torch.compile(model, backend="lychee", options=SMALL)
    (got, expected), *later = decode_beside(model, step, tokens(103), 100, SIZE, growing)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for got, expected in later:
        distance = (got - expected).norm() / expected.norm()
        assert 1e-3 < distance < 0.6


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
    assert len(registry) == 0


def rewritten_eagerly(cache: Cache) -> None:
    cache.fill(cache.length)


def emptied_and_filled(cache: Cache) -> None:
    cache.keys.zero_()
    cache.fill(50)


def reordered(cache: Cache) -> None:
    cache.keys.copy_(cache.keys.flip(0))


@pytest.mark.parametrize("happens", [rewritten_eagerly, emptied_and_filled, reordered])
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
    upkeep._patience, upkeep.trusted = 0, True  # as after many steps
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


def test_caches_made_in_inference_mode_are_read_in_full(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_inference_mode.cache_clear()
    step = compiled()
    with caplog.at_level(logging.WARNING, "lychee_compile"), torch.inference_mode():
        cache = Cache().fill(100)
        for _ in range(3):
            assert_exact(cache.step(step))
    (warning,) = [each.message for each in caplog.records]
    assert "torch.no_grad()" in warning


def test_inference_mode_is_fine_where_the_cache_is_not_of_it() -> None:
    cache, step = Cache().fill(100), compiled()
    with torch.inference_mode():
        cache.step(step)
        assert_sparse(cache.step(step), cache)
    assert_sparse(cache.step(step), cache)


def test_a_growing_cache_outgrows_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few keys match the query; they are sketched before the index is moved, and found after."""
    monkeypatch.setattr(slot_states, "_roomy", lambda layout: layout)  # no room to spare
    step, query = compiled(grow), torch.zeros(1, KV_HEADS * GROUP, 1, DIM)
    query[..., 0] = 40
    keys, values = torch.randn(2, 1, KV_HEADS, 505, DIM).clamp(-1, 1)
    slots = []
    for number in range(11):
        fresh = torch.randn(2, 1, KV_HEADS, 3, DIM).clamp(-1, 1)
        fresh[0, ..., 0] = 5 if number == 1 else 0
        dense = grow(query, keys, values, *fresh)[0]
        got, keys, values = step(query, keys, values, *fresh)
        if number != 0:
            torch.testing.assert_close(got, dense, **CLOSE)
        slots.append(upkeep_of(keys, growing=True).index.layout.slots)
    assert slots == [512] * 2 + [1024] * 9
    assert upkeep_of(keys, growing=True).trusted
    assert len(registry) == 1


def test_left_padding_is_hidden_and_sinks_come_behind_it() -> None:
    valid = torch.ones(2, SIZE, dtype=torch.bool)
    valid[1, :30] = False

    def padded(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *new: Tensor) -> Any:
        keys.index_copy_(2, positions, new[0])
        values.index_copy_(2, positions, new[1])
        mask = (torch.arange(SIZE) <= positions[:, None])[None, None] & valid[:, None, None]
        return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)

    cache, step = Cache(batch=2).fill(100), compiled(padded)

    def both(query: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        dense = padded(query, keys.clone(), values.clone(), *rest)
        return step(query, keys, values, *rest), dense

    for number in range(3):
        (got, dense), _ = cache.step(both)
        assert not bool((got[1, ..., :30] != 0).any())
        if number == 0:
            torch.testing.assert_close(got, dense, **CLOSE)
            continue
        assert_sparse((got, dense), cache)
        read = read_by(got, cache)
        assert bool(read[0, ..., :4].all())
        assert bool(read[1, ..., 30:34].all())


def test_sites_that_share_a_cache_share_its_index() -> None:
    def twice(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *new: Tensor) -> Any:
        first = decode(query, keys, values, positions, *new)
        mask = (torch.arange(SIZE) <= positions[:, None])[None, None]
        second = F.scaled_dot_product_attention(-query, keys, values, mask, enable_gqa=True)
        return torch.stack((first, second))

    cache, step = Cache().fill(100), compiled(twice)
    cache.step(step)
    assert len(registry) == 1
    both, _ = cache.step(step)
    for got in both:
        assert bool((read_by(got, cache).sum(-1) <= SMALL["budget"]).all())
    assert not torch.equal(*both)
    assert counters["lychee"]["sparse"] == 2


def test_a_graph_that_only_reads_indexes_the_whole_cache() -> None:
    def read(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    cache, step = Cache().fill(SIZE), compiled(read)
    for number in range(3):
        query = torch.randn(1, KV_HEADS * GROUP, 1, DIM)
        dense, got = read(query, cache.keys, cache.values), step(query, cache.keys, cache.values)
        if number == 0:
            torch.testing.assert_close(got, dense, **CLOSE)
        else:
            assert_sparse((got, dense), cache)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 2, 0, 3)], ids=["BLHD", "HLBD"])
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


def test_nothing_is_compiled_more_often_than_without_us() -> None:
    model = TinyDecoder().eval()

    def graphs(name: str, **given: Any) -> int:
        torch._dynamo.reset()
        counters.clear()
        step = torch.compile(model, backend=name, **given)
        cache = StaticKV.empty(1, SIZE)
        for ids in (tokens(60), *(tokens(1) for _ in range(6))):
            step(ids, cache=cache)
        return counters["stats"]["unique_graphs"]

    expected = graphs("aot_eager")
    assert graphs("lychee", options=SMALL) == expected
    assert counters["lychee"]["sparse"] == LAYERS


def test_a_policy_with_kernels_of_its_own_keeps_an_index_of_its_own() -> None:
    """Quest reads whole pages of sixteen tokens."""
    cache = Cache().fill(100)
    step = compiled(policy="quest", dense_layers=0, budget=60)
    assert_exact(cache.step(step))
    for _ in range(2):
        got, dense = cache.step(step)
        assert_sparse((got, dense), cache, budget=60)
        middle = read_by(got, cache)[..., 16:80].unflatten(-1, (4, 16))
        assert torch.equal(middle.any(-1), middle.all(-1))
    (site,) = lychee_compile.reports()[-1].sites
    assert site.kernel.startswith("decode_quest_f32_g2_d16_v128_b60_")
    assert "policy quest" in site.reason
    assert len(registry) == 1
