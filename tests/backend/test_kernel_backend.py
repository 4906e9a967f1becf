"""Decoding through generated kernels, end to end: what is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from kernel_steps import (
    CLOSE,
    DIM,
    EVERYTHING,
    GROUP,
    KV_HEADS,
    SIZE,
    SMALL,
    Cache,
    assert_exact,
    assert_sparse,
    compiled,
    decode,
    read_by,
    upkeep_of,
)
from sketch_spec import SelectionSizes, select_slots
from tiny_models import LAYERS, VOCABULARY, StaticKV, TinyDecoder, decode_beside
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.runtime.cache_registry import registry

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]


def tokens(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, count))


def sliding_window(budget: int, end: int) -> Tensor:
    """Return the keys that are read without any choice, bool [L]."""
    slot = torch.arange(SIZE)
    recent = (slot >= end - (budget - SMALL["sinks"])) & (slot < end)
    return (slot < SMALL["sinks"]) | recent


@pytest.mark.parametrize(
    ("count", "dtype", "batch"),
    [
        pytest.param(1, torch.float32, 2, marks=pytest.mark.thorough),
        (3, torch.bfloat16, 1),
    ],
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
        fresh = torch.tensor([[[cache.length]]])
        got, dense = cache.step(noting)
        always, rank, room = select_slots(
            given[0].unflatten(1, (KV_HEADS, GROUP)), parts, visible, fresh,
            lambda score: score * DIM**-0.5, DIM**-0.5,
            SelectionSizes(SMALL["budget"], SMALL["sinks"], SMALL["recent"]),
        )  # fmt: skip
        best = rank.argsort(-1, descending=True).argsort(-1) < room[..., None]
        differs = read_by(got, cache) != (always | best)
        # Shares count by eighths of a factor of two: of those that end the budget any may be read.
        assert bool((differs.sum(-1) <= SMALL["budget"] // 5).all())
        assert dense.masked_fill(~differs.repeat_interleave(GROUP, 1), 0).sum() < 0.1 * dense.sum()


STATIC_OR_GROWING = pytest.mark.parametrize(
    "growing",
    [
        pytest.param(False, marks=pytest.mark.thorough, id="static"),
        pytest.param(True, id="growing"),
    ],
)


@STATIC_OR_GROWING
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


@STATIC_OR_GROWING
def test_the_first_step_after_an_eager_prefill_is_exact_and_the_next_is_not(growing: bool) -> None:
    model = TinyDecoder().eval()
    step = torch.compile(model, backend="lychee", options=SMALL)
    (got, expected), *later = decode_beside(model, step, tokens(103), 100, SIZE, growing)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for got, expected in later:
        distance = (got - expected).norm() / expected.norm()
        assert 1e-3 < distance < 0.6


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
    assert "policy quest" in site.reads
    assert len(registry) == 1
