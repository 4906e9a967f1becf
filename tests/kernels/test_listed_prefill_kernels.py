"""Prefill with a choice in PyTorch before kernels, interpreted, against the plain form."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import sympy
import torch
import triton_interpreter
from decode_problems import MASKS, RANGES, SCORES, Problem, Sizes, element, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_problems import RECENT, SINKS, prefill_problem
from torch import Tensor

from lychee_compile.codegen.module import chooses_by_kernels, emit_module
from lychee_compile.codegen.parts.listed import split_score
from lychee_compile.codegen.specification import KV, H, Q, S, TileSpec
from lychee_compile.kernels.gpu.prefill.listed import ListedPrefill, listed_config
from lychee_compile.kernels.policies import registry
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import (
    PrefillConfig,
    PrefillResult,
    prefill_attention,
)
from lychee_compile.kernels.reference.prefill_question import PrefillChoice, PrefillQuestion
from lychee_compile.kernels.reference.tiles import Sight, tile_sight
from lychee_compile.kernels.sizes import QUERY_TILE

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FEW = settings(max_examples=max(settings().max_examples // 6, 1))
CHOSEN_IN_PYTORCH = ("any streaming", "any dhsa", "any s2o", "any compact")
"""The policies of these names, without kernels that choose."""


@pytest.fixture(autouse=True)
def many_queries_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted steps take their time, whatever they are about."""
    monkeypatch.setattr("lychee_compile.kernels.gpu.prefill.listed.SEEN_QUERIES", 64)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register every policy under another name, as a function of which nothing is known."""
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))
    for name in CHOSEN_IN_PYTORCH:
        choice = registry.prefill_choice(name.removeprefix("any "))
        registry.register_policy(name, None, tiles=partial(_ask, choice))


def _ask(choice: PrefillChoice, question: PrefillQuestion) -> Tensor:
    return choice(question)


def plain(problem: Problem, config: PrefillConfig, order: Tensor | None = None) -> PrefillResult:
    """Return what the plain form does, which has the mask and the bias as one tensor."""
    split = split_score(problem.spec.score)
    mask, bias = _mask(problem)
    if bias is not None:
        mask = bias.masked_fill(~mask, -torch.inf)
    operands = Operands(
        problem.query, problem.key, problem.value, mask, split.scale, split.softcap, problem.extra
    )
    return prefill_attention(operands, config, order=order)


def slots_read(prefill: ListedPrefill, problem: Problem) -> Tensor:
    """Return the keys that the tiles of a prefill read, bool [B, Hq, tiles, L]."""
    (batch, heads, _, _), kv_len, parts = problem.query.shape, problem.key.shape[2], []
    for first_tile, tiles in prefill.slices():
        lists = prefill.lists(first_tile, tiles)
        read = torch.zeros(len(lists.counts), kv_len, dtype=torch.bool)
        for row, (count, edge) in enumerate(zip(lists.counts, lists.edge, strict=True)):
            slots = lists.chosen[row, : int(count)].long()
            assert bool((slots.diff() > 0).all())
            read[row, slots] = True
            for begin, end in edge[:6].view(3, 2).tolist():
                assert not bool(read[row, begin:end].any())
                read[row, begin:end] = True
        parts.append(read.view(batch, heads, tiles, kv_len))
    return torch.cat(parts, 2)


@pytest.mark.parametrize("policy", ["streaming", "dhsa", "s2o", "compact"])
@pytest.mark.parametrize("mask", MASKS)
def test_kernels_choose_unless_a_mask_has_holes(policy: str, mask: str) -> None:
    spec = prefill_problem(policy, mask=mask).spec
    assert chooses_by_kernels(spec) == (mask in RANGES)
    assert ("def see_tiles(" in emit_module(spec)) == (mask not in RANGES)
    assert not chooses_by_kernels(replace(spec, tiles=replace(spec.tiles, ordered=True)))


@st.composite
def problems(draw, policies=CHOSEN_IN_PYTORCH) -> Problem:
    query_len, kv_len = draw(st.sampled_from([(130, 130), (40, 200), (200, 70), (257, 300)]))
    head_dim, value_dim = draw(st.sampled_from([(16, 16), (40, 48)]))
    sizes = Sizes(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        query_len,
        kv_len,
        head_dim,
        value_dim,
    )
    return prefill_problem(
        draw(st.sampled_from(policies)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        sizes=sizes,
        score=draw(st.sampled_from(SCORES)),
        mask=draw(st.sampled_from(MASKS)),
        extra=draw(st.booleans()),
        layout=draw(st.sampled_from(["plain", "slots first"])),
        length=draw(st.sampled_from([0, max(kv_len - query_len, 0)])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("policy", CHOSEN_IN_PYTORCH)
@FEW
@given(data=st.data())
def test_everything_read_is_as_good_as_eager_attention(policy: str, data: st.DataObject) -> None:
    problem = data.draw(problems((policy,)))
    module = problem.module()
    output, _ = ListedPrefill(module, problem.operands(), listed_config(module, 1e6)).run()
    problem.assert_as_good_as_eager(output)
    blind = ~problem.visible.any(-1)
    assert torch.equal(output[blind], torch.zeros_like(output[blind]))


@pytest.mark.parametrize("policy", CHOSEN_IN_PYTORCH)
@FEW
@given(data=st.data())
def test_kernels_read_what_the_plain_form_reads(policy: str, data: st.DataObject) -> None:
    problem = data.draw(problems((policy,)))
    module = problem.module()
    config = listed_config(
        module, data.draw(st.sampled_from([0.3, 0.7, 90])), data.draw(st.sampled_from([0, 150]))
    )
    prefill = ListedPrefill(module, problem.operands(), config)
    read, expected = slots_read(prefill, problem), plain(problem, config)
    assert expected.read is not None
    if policy != "any s2o" or split_score(problem.spec.score).bias == 0:  # a bias rounds otherwise
        assert torch.equal(read & _some(problem), expected.read)
    sighted, _ = problem.visible.any(-1), prefill.run()
    near = {"float32": 1e-3, "bfloat16": 2e-2}[problem.spec.dtype]
    for got, wanted in ((prefill.output, expected.output), (prefill.log_sums, expected.log_sum)):
        torch.testing.assert_close(got[sighted], wanted[sighted], atol=near, rtol=near)


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_and_bias_is_seen_as_the_plain_form_sees_it(mask: str) -> None:
    score = SCORES[MASKS.index(mask) % len(SCORES)]
    problem = prefill_problem(
        "any streaming", mask=mask, score=score, sizes=Sizes(2, 1, 2, 140, 180, 16, 16)
    )
    prefill = ListedPrefill(
        problem.module(), problem.operands(), listed_config(problem.module(), 1)
    )
    sight, _ = prefill.see(0, 2)
    seen, bias = _mask(problem)
    mask_tensor = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
    whole = Sight(mask_tensor, False, 2, 140, 180, seen.device)
    expected = tile_sight(whole, 0, 140, SINKS, RECENT)
    for got, wanted in ((sight.some, expected.some), (sight.always, expected.always)):
        assert torch.equal(*torch.broadcast_tensors(got, wanted))
    assert (sight.bias is None) == (bias is None)
    if bias is not None:
        torch.testing.assert_close(*torch.broadcast_tensors(sight.bias, expected.bias))


def _mask(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return what is visible, bool [B, Hq, T, L], and the biases there, None if there are none."""
    shape = problem.visible.shape
    if split_score(problem.spec.score).bias == 0:
        return problem.visible, None
    nothing = torch.zeros(shape, dtype=torch.float64)
    return problem.visible, problem.score(nothing, torch.arange(shape[-1])).float()


def _some(problem: Problem) -> Tensor:
    """Return the keys that some query of each tile sees, bool [B, Hq, tiles, L]."""
    tiles = problem.visible.split(QUERY_TILE, 2)
    return torch.stack([each.any(2) for each in tiles], 2)


@pytest.mark.parametrize("policy", CHOSEN_IN_PYTORCH)
def test_tiles_done_apart_read_the_same(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory decides how many tiles are done together, and facts of keys are worked out once."""
    problem = prefill_problem(policy, sizes=Sizes(2, 1, 2, 260, 260, 16, 16), length=0)
    module = problem.module()
    config = listed_config(module, 0.4)
    expected = slots_read(ListedPrefill(module, problem.operands(), config), problem)
    asked: list[PrefillQuestion] = []
    choice = config.choice
    config = replace(config, choice=lambda each: (asked.append(each), choice(each))[1])
    monkeypatch.setattr("lychee_compile.kernels.gpu.prefill.lists.CHOICE_BYTES", 1)
    prefill = ListedPrefill(module, problem.operands(), config)
    assert list(prefill.slices()) == [(0, 1), (1, 1), (2, 1)]
    assert torch.equal(slots_read(prefill, problem), expected)
    assert len({id(each.key) for each in asked}) == len({id(each.facts) for each in asked}) == 1


def test_queries_in_another_order_read_keys_at_their_own_positions() -> None:
    problem = prefill_problem("any s2o", mask="none", sizes=Sizes(1, 1, 2, 300, 300, 16, 16))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    module = problem.module()
    config = listed_config(module, 0.6)
    operands = replace(problem.operands(), query=problem.query.index_select(2, order))
    read = slots_read(ListedPrefill(module, operands, config, order), problem)
    expected = plain(problem, config, order).read
    assert expected is not None
    assert torch.equal(read, expected)
    for tile, own in enumerate(order.split(QUERY_TILE)):
        assert bool(read[:, :, tile, own].all())


def test_rows_and_heads_that_see_different_keys() -> None:
    """The mask is a tensor per head; one head sees nothing at all, one row has no padding."""
    problem = prefill_problem(
        "any compact", mask="mask by head", sizes=Sizes(2, 1, 2, 140, 200, 16, 16)
    )
    (mask,) = problem.captured
    mask[0, 1] = False
    mask[1, :, :, 100:120] = True
    module = problem.module()
    config = listed_config(module, 0.5)
    prefill = ListedPrefill(module, problem.operands(), config)
    read = slots_read(prefill, problem)
    expected = plain(problem, config).read
    assert expected is not None
    assert torch.equal(read, expected)
    assert not bool(read[0, 1].any())
    prefill.run()
    assert torch.equal(prefill.output[0, 1], torch.zeros_like(prefill.output[0, 1]))


def choose_every_third(question: PrefillQuestion) -> Tensor:
    """Return the candidates that come first of every third key."""
    slot = torch.arange(question.key.shape[2], device=question.key.device)
    rank = (slot % 3 == 0).float() - slot / 10_000
    return question.take(rank.expand_as(question.candidates))


@FEW
@given(data=st.data())
def test_a_policy_of_ones_own_needs_no_triton(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_policies", dict(registry._policies))
        registry.register_policy("every third", None, tiles=choose_every_third)
        problem = data.draw(problems(("every third",)))
        module = problem.module()
        config = listed_config(module, 0.4)
        read = slots_read(ListedPrefill(module, problem.operands(), config), problem)
    expected = plain(problem, config).read
    assert expected is not None
    assert torch.equal(read & _some(problem), expected)


SLOPE = element("slopes", H) * (KV - Q)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (S, (1.0, None, 0)),
        (-S / 4, (-0.25, None, 0)),
        ((S + SLOPE) / 8, (0.125, None, SLOPE / 8)),
        (50 * sympy.tanh(S / 400), (0.125, 50.0, 0)),
        (3 * sympy.tanh(S / 3) + SLOPE, (1.0, 3.0, SLOPE)),
        (S * element("slopes", H), None),
        (S**2, None),
        (S / 8 + sympy.tanh(S), None),
        (3 * sympy.tanh(S / 3 + SLOPE), None),
        (SLOPE, None),
    ],
    ids=str,
)
def test_scores_are_split_into_a_product_and_a_bias(
    score: sympy.Expr, expected: tuple[float, float | None, sympy.Expr] | None
) -> None:
    split = split_score(score)
    if expected is None:
        assert split is None
        problem = make_problem(score="slopes")
        spec = replace(problem.spec, score=score, tiles=TileSpec("compact", SINKS, RECENT))
        with pytest.raises(ValueError, match="no policy without kernels of its own ranks keys by"):
            emit_module(spec)
        return
    assert split is not None
    assert math.isclose(split.scale, expected[0])
    assert split.softcap == expected[1]
    assert sympy.expand(split.bias - expected[2]) == 0
