"""Prefill by positions, by groups of keys and until keys add little, chosen by kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from decode_problems import RANGES, Problem, Sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_problems import RECENT, SINKS, prefill_problem
from torch import Tensor

from lychee_compile.codegen.parts.listed import split_score
from lychee_compile.kernels.gpu.prefill import launch, ranked
from lychee_compile.kernels.gpu.prefill.launch import PrefillBudget, PrefillLaunch
from lychee_compile.kernels.gpu.prefill.listed import listed_config
from lychee_compile.kernels.gpu.prefill.ranked import RankedPrefill, run_by_kernels
from lychee_compile.kernels.policies import registry
from lychee_compile.kernels.policies.prefill.s2o import BLOCK, LEAST_SHARE
from lychee_compile.kernels.policies.prefill.union import GroupUnion
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import PrefillConfig, prefill_attention
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.reference.tiles import Sight, tile_sight

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FEW = settings(max_examples=max(settings().max_examples // 6, 1))
UNIONS = ("compact", "dhsa")
POLICIES = ("streaming", "s2o", *UNIONS)


@pytest.fixture(autouse=True)
def few_tiles_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are filled up with empty tiles, which take their time here."""
    monkeypatch.setattr(launch, "TOGETHER", 2)


@st.composite
def problems(draw, policies=POLICIES) -> Problem:
    query_len, kv_len = draw(st.sampled_from([(130, 130), (40, 200), (200, 70), (140, 300)]))
    return prefill_problem(
        draw(st.sampled_from(policies)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        sizes=Sizes(draw(st.integers(1, 2)), 1, draw(st.integers(1, 3)), query_len, kv_len, 16, 16),
        score=draw(st.sampled_from(["scaled", "soft-cap", "slopes"])),
        mask=draw(st.sampled_from(RANGES)),
        extra=draw(st.booleans()),
        length=draw(st.sampled_from([0, max(kv_len - query_len, 0)])),
        seed=draw(st.integers(0, 99)),
    )


def question_of(problem: Problem, config: PrefillConfig) -> PrefillQuestion:
    """Return the question that the plain form asks about all tiles."""
    batch, heads, query_len, _ = problem.query.shape
    kv_len, device = problem.key.shape[2], problem.key.device
    sight = Sight(problem.visible[:, :1], False, batch, query_len, kv_len, device)
    seen = tile_sight(sight, 0, query_len, SINKS, RECENT)
    split = split_score(problem.spec.score)
    assert split is not None
    key, room = problem.key.float().nan_to_num(), config.room(seen, heads).expand(batch, -1, -1)
    return PrefillQuestion(problem.query.float(), key, split.scale, split.softcap, seen, room)


def chosen_by(prefill: RankedPrefill | PrefillLaunch, question: PrefillQuestion) -> Tensor:
    """Return the keys that the lists of a prefill name, bool [B, Hq, tiles, L]."""
    (batch, heads, tiles), kv_len = question.room.shape, question.key.shape[2]
    chosen = torch.zeros(batch * heads, tiles, kv_len, dtype=torch.bool)
    for first, count in prefill.slices():
        if isinstance(prefill, RankedPrefill):
            lists = prefill.lists(first, count)
            slots, counts = lists.chosen, lists.counts
            at = [divmod(row, count) for row in range(len(counts))]
            at = [(head, first + tile) for head, tile in at]
        else:
            prefill.select(first, count)
            slots, counts = prefill.scratch["chosen"], prefill.scratch["counts"][:count]
            at = [divmod(first + row, prefill.tiles) for row in range(count)]
        for row, (head, tile) in enumerate(at):
            listed = slots[row, : int(counts[row])].long()
            assert bool((listed.diff() > 0).all())
            if tile < tiles:
                chosen[head, tile, listed] = True
    return chosen.view(batch, heads, tiles, kv_len)


@pytest.mark.parametrize("policy", POLICIES)
@FEW
@given(data=st.data())
def test_everything_read_is_as_good_as_eager_attention(policy: str, data: st.DataObject) -> None:
    problem = data.draw(problems((policy,)))
    output, _ = run_by_kernels(problem.module(), problem.operands(), PrefillBudget(1e6))
    problem.assert_as_good_as_eager(output)
    blind = ~problem.visible.any(-1)
    assert torch.equal(output[blind], torch.zeros_like(output[blind]))


budgets = st.builds(PrefillBudget, st.sampled_from([0.3, 0.7, 90]), st.sampled_from([0, 150]))


@FEW
@given(problem=problems(("streaming",)), budget=budgets)
def test_the_last_keys_are_those_of_the_plain_form(problem: Problem, budget: PrefillBudget) -> None:
    config = listed_config(problem.module(), budget.keys, budget.shortest)
    question = question_of(problem, config)
    prefill = RankedPrefill(problem.module(), problem.operands(), budget)
    assert torch.equal(chosen_by(prefill, question), config.choice(question))


def levels_of(rank: Tensor) -> Tensor:
    """Return levels of ranks from -1 to 1: 32 for each power of two, on both sides of 0."""
    distance = (rank.abs().view(torch.int16) >> 5).long()
    return torch.where(rank < 0, -distance, distance)


def union_of(prefill: RankedPrefill, question: PrefillQuestion) -> Tensor:
    """Return what a union of rankings by level reads, worked out by loops."""
    chosen = torch.zeros_like(question.candidates)
    groups, tiles = prefill._groups[0], question.tiles
    rank, silent = prefill.rank(0, tiles)
    heads = len(rank) // (len(chosen) * tiles)
    every = levels_of(rank).view(len(chosen), heads, tiles, *rank.shape[1:])
    silent = silent.view(every.shape[:4]).bool()
    for b, head, tile in torch.cartesian_prod(*map(torch.arange, question.room.shape)).tolist():
        there, row = question.candidates[b, head, tile], (b, head * heads // len(chosen[0]), tile)
        members = [torch.nonzero(there & (groups.label[b] == n)) for n in range(every.shape[-1])]
        counts = torch.tensor([len(each) for each in members])
        place = torch.full_like(counts, 2**30)
        for level in every[row][~silent[row]]:
            through = torch.stack([counts[level >= each].sum() for each in level])
            above = torch.stack([counts[level > each].sum() for each in level])
            place = torch.minimum(place, torch.maximum(above, through - 16))
        order = place.argsort(stable=True).tolist()
        slots = torch.cat([members[n].flatten() for n in order])
        chosen[b, head, tile, slots[: int(question.room[b, head, tile])]] = True
    return chosen


@pytest.mark.parametrize("policy", UNIONS)
@FEW
@given(data=st.data())
def test_groups_are_those_of_a_union_by_levels(policy: str, data: st.DataObject) -> None:
    problem, budget = data.draw(problems((policy,))), data.draw(budgets)
    config = listed_config(problem.module(), budget.keys, budget.shortest)
    question = question_of(problem, config)
    prefill = RankedPrefill(problem.module(), problem.operands(), budget)
    chosen = chosen_by(prefill, question)
    assert torch.equal(chosen, union_of(prefill, question))
    assert torch.equal(chosen.sum(-1), config.choice(question).sum(-1))


@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize("policy", UNIONS)
def test_rankings_are_those_of_the_plain_form(policy: str, scale: float) -> None:
    problem = prefill_problem(policy, mask="none", sizes=Sizes(2, 2, 2, 200, 300, 16, 16))
    problem.spec = replace(problem.spec, score=problem.spec.score * scale)
    prefill = RankedPrefill(problem.module(), problem.operands(), PrefillBudget(0.3))
    choice = registry.prefill_choice(policy)
    assert isinstance(choice, GroupUnion)
    question = question_of(problem, listed_config(problem.module(), 0.3))
    askers, (_, vectors) = choice.ask(question.query), choice.group(question.key)
    plain = question.scale * question.products(askers.vectors, vectors)
    plain = plain.unflatten(2, (2, -1))
    if choice.shared:
        plain = plain.unflatten(1, (2, 2)).movedim(2, 3).flatten(3, 4)
    rank, silent = prefill.rank(0, 2)
    plain = plain.reshape(rank.shape).double()
    plain -= plain.mean(-1, keepdim=True)
    alike = torch.cosine_similarity(plain, rank.double(), dim=-1)
    assert bool((alike[silent == 0] > 1 - 1e-5).all())
    assert 0 < int(silent.sum()) < silent.numel()


@pytest.mark.parametrize("policy", UNIONS)
def test_levels_read_nearly_what_the_plain_form_reads(policy: str) -> None:
    problem = prefill_problem(policy, mask="causal", sizes=Sizes(1, 1, 2, 129, 600, 16, 16), seed=5)
    config = listed_config(problem.module(), 0.5)
    question = question_of(problem, config)
    prefill = RankedPrefill(problem.module(), problem.operands(), PrefillBudget(0.5))
    got, expected = chosen_by(prefill, question), config.choice(question)
    assert (got & ~expected).sum() < 0.1 * expected.sum()


@pytest.mark.parametrize(("mask", "share"), [("none", 0.3), ("causal", 0.5), ("window", 0.7)])
def test_s2o_reads_the_keys_of_the_highest_shares(mask: str, share: float) -> None:
    problem = prefill_problem("s2o", mask=mask, sizes=Sizes(1, 1, 2, 129, 500, 16, 16), seed=1)
    question = question_of(problem, listed_config(problem.module(), share))
    prefill = PrefillLaunch(problem.module(), problem.operands(), PrefillBudget(share))
    chosen = chosen_by(prefill, question)
    importance, candidates = (
        question.scores(question.parts(128).mean)[:, :, :, 0],
        question.candidates,
    )
    assert not bool((chosen & ~candidates).any())
    worst = importance.masked_fill(~chosen, torch.inf).amin(-1)
    best = importance.masked_fill(chosen | ~candidates, -torch.inf).amax(-1)
    assert bool((best <= worst + 0.09).all())  # a bin is an eighth of an octave wide
    count, room = chosen.sum(-1), torch.minimum(question.room, candidates.sum(-1))
    assert bool((count <= room).all())
    total = importance.logsumexp(-1, keepdim=True)
    adds = (BLOCK * (importance - total).exp() >= 1.2 * LEAST_SHARE) & candidates
    assert bool((count >= torch.minimum(room, adds.sum(-1))).all())


def test_s2o_stops_early_where_few_keys_matter() -> None:
    problem = prefill_problem("s2o", mask="none", sizes=Sizes(1, 1, 1, 128, 1000, 16, 16))
    problem.query[:], problem.key[:] = 1, 0
    problem.key[:, :, 300:310] = 8
    for share, expected in ((0.5, 10), (2000, 1000 - SINKS - RECENT)):
        prefill = PrefillLaunch(problem.module(), problem.operands(), PrefillBudget(share))
        prefill.select(*next(prefill.slices()))
        count = int(prefill.scratch["counts"][0])
        assert count == expected
        slots = prefill.scratch["chosen"][0, :count].tolist()
        assert set(range(300, 310)) <= set(slots)


@pytest.mark.parametrize("policy", ["streaming", *UNIONS])
def test_tiles_done_apart_read_the_same(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = prefill_problem(policy, sizes=Sizes(1, 1, 2, 260, 260, 16, 16), length=0)
    budget = PrefillBudget(0.6)
    expected = run_by_kernels(problem.module(), problem.operands(), budget)
    monkeypatch.setattr("lychee_compile.kernels.gpu.prefill.lists.CHOICE_BYTES", 1)
    monkeypatch.setattr(ranked, "LISTED", 64)
    monkeypatch.setattr(ranked, "RANKED", 64)
    prefill = RankedPrefill(problem.module(), problem.operands(), budget)
    assert list(prefill.slices()) == [(0, 1), (1, 1), (2, 1)]
    for got, wanted in zip(prefill.run(), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("policy", UNIONS)
def test_what_no_query_sees_decides_nothing(policy: str) -> None:
    problem = prefill_problem(
        policy, mask="padded", sizes=Sizes(2, 1, 1, 130, 400, 16, 16), length=150
    )
    outputs = []
    for garbage in (0.0, torch.nan, torch.inf):
        for b, start in enumerate((3, 10)):
            problem.key[b, :, :start] = problem.key[b, :, 280:] = garbage
        outputs.append(run_by_kernels(problem.module(), problem.operands(), PrefillBudget(0.4))[0])
    assert bool(outputs[0].isfinite().all())
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_keys_that_are_all_alike_are_read_in_their_order() -> None:
    problem = prefill_problem("compact", mask="none", sizes=Sizes(1, 1, 2, 130, 300, 16, 16))
    problem.key[:] = 0.25
    question = question_of(problem, listed_config(problem.module(), 0.5))
    prefill = RankedPrefill(problem.module(), problem.operands(), PrefillBudget(0.5))
    slot = torch.arange(300.0).expand_as(question.candidates)
    assert torch.equal(chosen_by(prefill, question), question.take(-slot))


def test_a_union_of_ones_own_is_chosen_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))
    compact = registry.prefill_choice("compact")
    assert isinstance(compact, GroupUnion)
    registry.register_policy("apart", None, tiles=replace(compact, shared=False))
    problem = prefill_problem("apart", mask="causal", sizes=Sizes(1, 2, 2, 130, 300, 16, 16))
    config = listed_config(problem.module(), 0.6)
    question = question_of(problem, config)
    prefill = RankedPrefill(problem.module(), problem.operands(), PrefillBudget(0.6))
    assert torch.equal(chosen_by(prefill, question), union_of(prefill, question))


@pytest.mark.parametrize("policy", ["streaming", "compact"])
def test_kernels_attend_to_what_they_list(policy: str) -> None:
    problem = prefill_problem(policy, mask="causal", sizes=Sizes(1, 1, 2, 200, 300, 16, 16), seed=2)
    config = listed_config(problem.module(), 0.6)
    question = question_of(problem, config)
    prefill = RankedPrefill(problem.module(), problem.operands(), PrefillBudget(0.6))
    chosen = chosen_by(prefill, question)
    fixed = replace(config, choice=lambda each: chosen)
    tensors = problem.query, problem.key, problem.value, problem.visible
    operands = Operands(*tensors, question.scale, question.softcap)
    expected = prefill_attention(operands, fixed)
    for got, wanted in zip(prefill.run(), (expected.output, expected.log_sum), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
