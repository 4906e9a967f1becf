"""Kernels for prefill, interpreted, against their specification and float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton_interpreter
from decode_problems import MASKS, SCORES, Sizes, element, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import KV, B, Captured, Q, TileSpec
from lychee_compile.kernels.gpu.common import (
    module_cache,
)
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import TileTuning
from lychee_compile.kernels.gpu.prefill import (
    launch as launch_prefill,
)
from lychee_compile.kernels.gpu.prefill.launch import PrefillBudget, PrefillLaunch, run_prefill
from lychee_compile.kernels.operators import (  # noqa: F401  registers
    prefill as prefill_operators,
)
from lychee_compile.kernels.policies.prefill.lychee import log_shares
from lychee_compile.kernels.reference import drawing
from lychee_compile.kernels.reference.drawing import luck_of
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.reference.tiles import Sight, tile_sight
from lychee_compile.kernels.sizes import QUERY_TILE, SLOT_BITS
from lychee_compile.passes.symbolic.elementwise import Flag

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FEW = settings(max_examples=max(settings().max_examples // 6, 1))
SINKS, RECENT, EVERYTHING = 4, 16, PrefillBudget(1e6)
SLOTS = (1 << SLOT_BITS) - 1


@pytest.fixture(autouse=True)
def few_tiles_together(monkeypatch):
    """Heads are filled up with empty tiles, which take their time here."""
    monkeypatch.setattr(launch_prefill, "TOGETHER", 4)
    monkeypatch.setattr(drawing, "DRAWN_FROM", 0)  # small problems draw keys, too


def tiled(**given):
    """Return a decoding problem whose specification is that of a prefill."""
    problem = make_problem(**given)
    problem.spec = replace(problem.spec, tiles=TileSpec("lychee", SINKS, RECENT))
    return problem


def give_mask(problem, mask, query=Q):
    """Make the mask of a problem a tensor, bool [B, 1, T, L], or [B, 1, 1, L] with `query` 0."""
    visible = Flag(element("mask", B, 0, query, KV))
    captured = (Captured("mask", "bool", 4),)
    problem.spec = replace(problem.spec, visible=visible, captured=captured)
    problem.captured = [mask]


@st.composite
def problems(draw):
    head_dim, group = draw(st.sampled_from([16, 40, 64])), draw(st.integers(1, 3))
    query_len, kv_len = draw(st.sampled_from([(130, 130), (40, 200), (200, 40), (257, 300)]))
    sizes = Sizes(
        1,
        draw(st.integers(1, 2)),
        group,
        query_len,
        kv_len,
        head_dim,
        draw(st.sampled_from([16, 48])),
    )
    return tiled(
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        sizes=sizes,
        score=draw(st.sampled_from(SCORES)),
        mask=draw(st.sampled_from(MASKS)),
        extra=draw(st.booleans()),
        layout=draw(st.sampled_from(["plain", "slots first", "channels first"])),
        length=draw(st.sampled_from([0, kv_len - query_len])),
        seed=draw(st.integers(0, 99)),
    )


@FEW
@given(problems(), st.sampled_from([TileTuning(128, 64, 8, 2), TileTuning(32, 16, 4, 2)]))
def test_everything_read_is_as_good_as_eager_attention(problem, tuning):
    output, _ = run_prefill(problem.module(), problem.operands(), EVERYTHING, tuning)
    problem.assert_as_good_as_eager(output)
    blind = ~problem.visible.any(-1)
    assert torch.equal(output[blind], torch.zeros_like(output[blind]))


def chosen_by_kernels(problem, budget, coverage=None):
    """Return keys that tiles chose, bool [B, Hq, tiles, L], the output, and log-sum-exps."""
    read = PrefillBudget(budget, coverage=coverage)
    launch = PrefillLaunch(problem.module(), problem.operands(), read)
    batch, heads, query_len, _ = problem.query.shape
    kv_len = problem.key.shape[2]
    chosen = torch.zeros(batch * heads * launch.tiles, kv_len, dtype=torch.bool)
    for first_row, count in launch.slices():
        launch.select(first_row, count)
        for place in range(count):
            number = int(launch.scratch["counts"][place])
            slots = launch.scratch["chosen"][place, :number].long() & SLOTS
            assert len(set(slots.tolist())) == number
            chosen[first_row + place, slots] = True
        launch.attend(first_row, count)
    chosen = chosen.view(batch, heads, launch.tiles, kv_len)
    used = -(-query_len // QUERY_TILE)
    assert not chosen[:, :, used:].any()
    return chosen[:, :, :used], launch.output, launch.log_sums


def specified(problem, budget):
    """Return the specification's question about the tiles of a problem, whose mask is a tensor."""
    batch, heads, query_len, head_dim = problem.query.shape
    sight = Sight(
        problem.visible, False, batch, query_len, problem.key.shape[2], torch.device("cpu")
    )
    seen = tile_sight(sight, 0, query_len, SINKS, RECENT)
    counts, always = seen.some.sum(-1), seen.always.sum(-1)
    allowed = (
        (budget * counts).ceil().long() if budget < 1 else torch.full_like(counts, int(budget))
    )
    room = (allowed - always).clamp(min=0).expand(batch, heads, -1)
    key = problem.key.float()
    scale = 1 / math.sqrt(head_dim)
    return PrefillQuestion(problem.query.float(), key, scale, None, seen, room, draws=True)


def assert_drawn(chosen, question):
    """Check that all room is used, and keys are those that the specification draws.

    Rounding may move a share to the next bin. That moves its key, and the last of equal priority.
    """
    candidates = question.candidates
    assert not (chosen & ~candidates).any()
    assert torch.equal(chosen.sum(-1), torch.minimum(question.room, candidates.sum(-1)))
    expected = question.draw(log_shares(question)).read
    assert (chosen ^ expected).sum() <= 0.02 * expected.sum()


@pytest.mark.parametrize(
    ("mask", "budget", "together"),
    [
        ("none", 0.3, 4),
        ("causal", 0.3, 16),
        ("causal", 150, 2),
        ("window", 0.3, 4),
        ("padded", 150, 4),
    ],
)
def test_the_keys_that_matter_most_are_read(mask, budget, together, monkeypatch):
    """The specified number of keys is read, and no key left out weighs more than one of them."""
    monkeypatch.setattr(launch_prefill, "TOGETHER", together)
    problem = tiled(sizes=Sizes(1, 1, 2, 300, 300, 32, 16), mask=mask, length=0, seed=1)
    chosen, output, log_sums = chosen_by_kernels(problem, budget)
    question = specified(problem, budget)
    assert_drawn(chosen, question)
    weight = question.draw(log_shares(question)).log_weight.masked_fill(~chosen, 0)
    weight = weight.repeat_interleave(QUERY_TILE, 2)[:, :, :300].double()
    read = (chosen | question.sight.always).repeat_interleave(QUERY_TILE, 2)[:, :, :300]
    seen = read & problem.visible
    score = (problem.finish_scores() + weight).masked_fill(~seen, -torch.inf)
    expected = score.softmax(-1).nan_to_num() @ problem.value.double().repeat_interleave(2, 1)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(log_sums.double(), score.logsumexp(-1), atol=1e-4, rtol=1e-4)


def test_luck_is_that_of_the_specification():
    problem = tiled(sizes=Sizes(1, 1, 1, 130, 1000, 16, 16), mask="none")
    launch = PrefillLaunch(problem.module(), problem.operands(), PrefillBudget(0.3))
    launch.select(*next(launch.slices()))
    luck = luck_of(torch.arange(len(launch.scratch["luck"])))
    assert torch.equal(launch.scratch["luck"].int(), luck)


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_a_coverage_ends_the_list_as_specified(mask):
    problem = tiled(sizes=Sizes(1, 1, 2, 130, 700, 32, 16), mask=mask, length=570, seed=1)
    problem.query *= 3
    chosen, _, _ = chosen_by_kernels(problem, 0.6, coverage=0.7)
    question = replace(specified(problem, 0.6), coverage=0.7)
    expected = question.draw(log_shares(question)).read
    assert (chosen ^ expected).sum() <= 0.02 * expected.sum()
    assert expected.sum() < question.room.minimum(question.candidates.sum(-1)).sum()


@pytest.mark.parametrize("why", ["long", "small"])
def test_very_long_sequences_and_small_budgets_read_the_best_keys(why, monkeypatch):
    """A slot needs all its bits, or there is too little room to draw."""
    if why == "long":
        monkeypatch.setattr(launch_prefill, "SLOT_BITS", 8)
    else:
        monkeypatch.setattr(drawing, "DRAWN_FROM", 512)
    problem = tiled(sizes=Sizes(1, 1, 1, 300, 300, 32, 16), length=0, seed=1)
    chosen, _, log_sums = chosen_by_kernels(problem, 0.3)
    question = specified(problem, 0.3)
    expected = question.take(log_shares(question))
    assert (chosen ^ expected).sum() <= 0.25 * expected.sum()  # shares of one bin are equal
    read = (chosen | question.sight.always).repeat_interleave(QUERY_TILE, 2)[:, :, :300]
    score = problem.finish_scores().masked_fill(~(read & problem.visible), -torch.inf)
    torch.testing.assert_close(log_sums.double(), score.logsumexp(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("misleading", [False, True])
def test_a_sample_that_misleads_changes_nothing(misleading, monkeypatch):
    """All bins are counted if the budget ends in none of those that a sample suggests."""
    monkeypatch.setattr(launch_prefill, "LANES", 256)
    problem = tiled(sizes=Sizes(1, 1, 1, 130, 1000, 16, 16), mask="none", seed=3)
    if misleading:  # the sample is of runs of 16 slots, one in three
        slot = torch.arange(1000)
        problem.key[:, :, slot // 16 % 3 != 0] *= 3
    module, calls = problem.module(), []
    counted = module.counted
    monkeypatch.setattr(module, "counted", lambda *each: calls.append(1) or counted(*each))
    chosen, _, _ = chosen_by_kernels(problem, 0.3)
    assert bool(calls) == misleading
    assert_drawn(chosen, specified(problem, 0.3))


@pytest.mark.parametrize(
    ("dtype", "times"),
    [
        ("float16", 40),
        pytest.param("float32", 400, marks=pytest.mark.thorough),
        ("bfloat16", 400),
    ],
)
def test_keys_may_outweigh_what_is_read_first_by_far(dtype, times):
    """Weights relative to what was read first would overflow."""
    problem = tiled(dtype=dtype, sizes=Sizes(1, 1, 1, 130, 130, 16, 16), length=0)
    problem.key[:, :, 60:64] *= times
    score = problem.finish_scores().masked_fill(~problem.visible, -torch.inf) / math.log(2)
    first = torch.cat((score[..., :SINKS], score[..., 64:]), -1).amax(-1)
    assert (score.amax(-1) - first).max() > (15 if dtype == "float16" else 100)
    small = TileTuning(128, 16, 4, 2)
    output, log_sums = run_prefill(problem.module(), problem.operands(), EVERYTHING, small)
    problem.assert_as_good_as_eager(output)
    expected = (score * math.log(2)).logsumexp(-1)
    torch.testing.assert_close(log_sums.double(), expected, atol=0.02, rtol=1e-2)


def test_a_base_of_what_is_read_first_is_as_good_as_online_softmax(monkeypatch):
    problem = tiled(sizes=Sizes(1, 1, 1, 130, 500, 16, 16), mask="none")
    module, small = problem.module(), TileTuning(128, 16, 4, 2)
    launch = PrefillLaunch(module, problem.operands(), PrefillBudget(0.4), small)
    launch.select(*next(launch.slices()))
    assert (launch.scratch["chosen"][0, :100] >> SLOT_BITS).count_nonzero() > 20  # some are drawn
    usual = run_prefill(module, problem.operands(), PrefillBudget(0.4), tuning=small)
    monkeypatch.setattr(module, "MOST", triton.language.constexpr(0.0))  # always too much
    again = run_prefill(module, problem.operands(), PrefillBudget(0.4), tuning=small)
    for each in zip(usual, again, strict=True):
        torch.testing.assert_close(*each, atol=1e-5, rtol=1e-5)


def test_tiles_that_see_few_keys_read_all_of_them():
    problem = tiled(sizes=Sizes(1, 1, 1, 400, 400, 16, 16), length=0)
    launch = PrefillLaunch(problem.module(), problem.operands(), PrefillBudget(0.1, shortest=257))
    ((first_row, count),) = launch.slices()
    launch.select(first_row, count)
    launch.attend(first_row, count)
    dense = problem.attention()
    torch.testing.assert_close(launch.output[:, :, :256], dense[:, :, :256].float())
    assert (launch.output[:, :, 256:] - dense[:, :, 256:]).norm(dim=-1).min() > 1e-3


def test_tiles_that_see_few_keys_read_what_no_part_of_them_votes_on_too():
    """One query sees all, others what lies at the ends and in the middle."""
    problem = tiled(sizes=Sizes(1, 1, 1, 128, 400, 16, 16), mask="mask", length=0)
    mask = torch.zeros(1, 1, 128, 400, dtype=torch.bool)
    mask[..., :20] = mask[..., 200:300] = mask[..., 380:] = mask[:, :, 5] = True
    give_mask(problem, mask)
    problem.visible = mask
    output, _ = run_prefill(problem.module(), problem.operands(), PrefillBudget(0.2, shortest=401))
    problem.assert_as_good_as_eager(output)


def test_a_mask_that_is_the_same_for_all_queries():
    problem = tiled(sizes=Sizes(2, 1, 2, 140, 300, 16, 16), mask="none", length=0)
    mask = torch.rand(2, 1, 1, 300, generator=torch.Generator().manual_seed(0)) > 0.3
    give_mask(problem, mask, query=0)
    problem.visible = mask.expand(2, 2, 140, 300)
    output, _ = run_prefill(problem.module(), problem.operands(), EVERYTHING)
    problem.assert_as_good_as_eager(output)
    chosen, output, _ = chosen_by_kernels(problem, 0.5)
    assert not (chosen & ~mask).any()
    assert output.isfinite().all()


@pytest.mark.parametrize("mask", ["padding mask", "mask"])
def test_where_a_mask_has_holes_no_hidden_key_counts(mask):
    problem = tiled(sizes=Sizes(2, 1, 1, 140, 300, 32, 32), mask=mask, length=160)
    unseen = ~problem.visible.any(1).any(1)
    problem.value.masked_fill_(unseen[:, None, :, None], torch.nan)
    _, output, log_sums = chosen_by_kernels(problem, 0.3)
    assert output.isfinite().all()
    dense = problem.finish_scores().masked_fill(~problem.visible, -torch.inf).logsumexp(-1)
    sighted = problem.visible.any(-1)
    assert ((log_sums.double() - dense).abs() < 3)[sighted].float().mean() > 0.9


def test_a_mask_as_a_tensor_leaves_out_no_query_of_a_chunk():
    """Causal with an offset: what a query is the first to see, its own token, is read."""
    problem = tiled(sizes=Sizes(1, 1, 1, 200, 400, 32, 32), mask="causal", length=200, seed=2)
    mask = problem.visible[:, :1].contiguous()
    give_mask(problem, mask)
    chosen, output, _ = chosen_by_kernels(problem, 0.7)
    query = torch.arange(200)
    own = chosen.repeat_interleave(QUERY_TILE, 2)[0, 0, query, query + 200]
    assert own[1 : 200 - RECENT].all()  # there is none before the first
    assert output.isfinite().all()


def test_queries_in_another_order_have_no_keys_of_their_own():
    problem = tiled(sizes=Sizes(1, 1, 1, 300, 300, 16, 16), mask="none", extra=True)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    module = module_cache.store(emit_module(problem.spec), problem.spec.name).stem
    logits = torch.randn(1, 1, 300)
    operands_of = problem.query, problem.key, problem.value
    tiled_prefill = torch.ops.lychee.tiled_prefill.default
    got = tiled_prefill(*operands_of, [], logits, order, "", 1.0, 1e6, None, 0, module)
    expected = tiled_prefill(*operands_of, [], logits, None, "", 1.0, 1e6, None, 0, module)
    torch.testing.assert_close(got, expected)
    given = AttentionOperands(*operands_of, [], logits)
    launch = PrefillLaunch(problem.module(), given, PrefillBudget(0.1, own=False))
    launch.select(*next(launch.slices()))
    edge = launch.scratch["edge"][0]
    assert int(edge[3] - edge[2]) == 0


def test_little_scratch_memory_gives_the_same(monkeypatch):
    problem = tiled(sizes=Sizes(2, 1, 1, 140, 140, 16, 16), length=0)
    expected = run_prefill(problem.module(), problem.operands(), PrefillBudget(0.4))
    monkeypatch.setattr(launch_prefill, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(launch_prefill, "SCANNED", 32)
    launch = PrefillLaunch(problem.module(), problem.operands(), PrefillBudget(0.4))
    assert len(list(launch.slices())) == 2
    got = run_prefill(problem.module(), problem.operands(), PrefillBudget(0.4))
    assert all(torch.equal(*each) for each in zip(got, expected, strict=True))
