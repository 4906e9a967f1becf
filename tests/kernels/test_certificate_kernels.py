"""Certificates by kernels, interpreted: true, as the plain form's, and kept by `epsilon`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
import triton_interpreter
from decode_problems import CAP, DTYPES, LAYOUTS, MASKS, SCORES, Problem, Sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from known_policies import known_policies
from level_steps import EVENTS, Asked, Case, Read, Steps, kept_scratch, score_inputs
from torch import Tensor

from lychee_compile.kernels.gpu.common.certificate import missed_of
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.levels.declaration import Keep, Level, LevelStack, Pages
from lychee_compile.kernels.levels.expressions import (
    dot,
    field,
    greatest,
    key,
    least,
    mean,
    norm,
    query,
)
from lychee_compile.kernels.reference.attention import attend
from lychee_compile.kernels.reference.certificate import log_unread_bound, missed_share
from lychee_compile.kernels.reference.chunk_table import decided, numbers_of_slots
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.selection import select

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

AROUND = norm(key - field("centre"))
BALL = dot(query, field("centre")) + norm(query) * field("radius")
SMALL = {
    "balls": LevelStack(
        levels=(
            Level(
                Pages(16), fields={"outer": mean(key)}, estimate=dot(query, field("outer")),
                keep=Keep(2),
            ),
            Level(
                Pages(4), fields={"centre": mean(key), "radius": greatest(AROUND)},
                estimate=dot(query, field("centre")), bound=BALL,
            ),
        ),
        sinks=2,
    ),
    "norms": LevelStack(
        levels=(
            Level(
                Pages(8), fields={"longest": greatest(norm(key)), "low": least(key)},
                estimate=dot(query, field("low")), bound=norm(query) * field("longest"),
            ),
        ),
        recent=3,
    ),
}  # fmt: skip
"""Stacks whose bounds have products that no tensor core computes."""
EXAMPLES = max(settings().max_examples // 3, 1)
"""Interpreted kernels are slow."""


@pytest.fixture(autouse=True, scope="module")
def small_stacks() -> Iterator[None]:
    """The small stacks are known until the tests of this file are over."""
    with known_policies(SMALL):
        yield


@st.composite
def cases(draw) -> tuple[Case, int]:
    """Draw an attention without its policy, and how many tokens it begins with."""
    slots = draw(st.integers(60, 200))
    batch, kv_heads, query_len = draw(st.sampled_from([(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 2)]))
    sizes = Sizes(
        batch=batch,
        kv_heads=kv_heads,
        group=draw(st.integers(1, 6)),
        query_len=query_len,
        kv_len=slots,
        head_dim=draw(st.sampled_from([16, 24, 40])),
        value_dim=16,
    )
    case = Case(
        policy="",
        sizes=sizes,
        budget=draw(st.integers(14, 130)),
        sinks=draw(st.integers(0, 4)),
        recent=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        mask=draw(st.sampled_from([each for each in MASKS if each != "none"])),
        score=draw(st.sampled_from(SCORES)),
        layout=draw(st.sampled_from([each for each in LAYOUTS if each != "one head"])),
        extra=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
        epsilon=draw(st.sampled_from([1.0, 1.0, 0.9, 0.3])),
    )
    return case, draw(st.integers(50, slots - 10))


def taken(case: Case, length: int, history: list[str]) -> Iterator[tuple[Problem, Read, Asked]]:
    """Yield each step of a cache that goes through a history."""
    steps = Steps(case, length)
    for event in history:
        if event.startswith("rewind"):
            steps.length = max(steps.length - (3 if event == "rewind" else 40), 12)
        elif event == "written by another":
            steps.key[:, :, : steps.length // 2] = steps.key[:, :, : steps.length // 2].flip(2)
            steps.rebuild()
        if steps.length + case.sizes.query_len > case.sizes.kv_len:
            steps.length -= 20
        yield steps.step()


def true_shares(problem: Problem, read: Tensor) -> Tensor:
    """Return the share of the softmax outside of the slots `read`, float64 [B, Hq, T]."""
    score = problem.finish_scores().masked_fill(~problem.visible, -torch.inf)
    unread = ~read.repeat_interleave(problem.spec.group, 1)
    return (score.softmax(-1).nan_to_num(nan=0.0) * unread).sum(-1)


def plain_shares(case: Case, problem: Problem, asked: Asked, read: Tensor) -> Tensor:
    """Return the certificates of the plain form for the slots `read`, bool [B, Hkv, T, L]."""
    inputs, index = score_inputs(problem, case), asked.index
    order = (~read).to(torch.uint8).argsort(dim=-1, stable=True)
    lengths = read.gather(-1, order).long()
    selection = select(index, inputs, case.budget)
    selection = replace(selection, run_start=torch.where(lengths > 0, order, 0), run_length=lengths)
    cap = CAP if case.score == "soft-cap" else None
    operands = Operands(problem.query, problem.key, problem.value, inputs.mask, inputs.scale, cap)
    _, log_read = attend(operands, selection)
    bound = log_unread_bound(index, problem.query, selection, cap)
    return missed_share(
        problem.key, problem.query, replace(selection, log_unread_bound=bound), log_read
    )


@pytest.mark.parametrize(
    "policy", ["quest", *(pytest.param(each, marks=pytest.mark.thorough) for each in SMALL)]
)
@settings(max_examples=EXAMPLES)
@given(drawn=cases(), history=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=2))
def test_no_certificate_is_violated(policy, drawn, history):
    case, length = drawn
    case.policy = policy
    for problem, read, asked in taken(case, length, history):
        assert read.missed is not None
        heads, group = problem.key.shape[1], problem.spec.group
        seen = problem.visible.unflatten(1, (heads, group)).any(2)
        whole = ~read.slots.any(-1) & seen.any(-1)
        slots = read.slots | (whole[..., None] & seen)
        missed = read.missed.double()
        assert ((missed >= 0) & (missed <= 1)).all()
        assert (true_shares(problem, slots) <= missed).all()
        assert (missed <= case.epsilon).all()
        problem.assert_as_good_as_eager(read.output, slots)
        complete = (slots | ~seen).all(-1).repeat_interleave(group, 1)
        assert (missed[complete] == 0).all()
        plain = plain_shares(case, problem, asked, slots).double()
        rounded = 1e-3 if policy != "balls" else 0.1  # its centres are rounded
        assert ((missed - plain).abs() <= rounded)[missed > 0].all()
        if case.epsilon < 1:
            over = plain.unflatten(1, (heads, group)).amax(2) > case.epsilon
            assert not over.any()


@st.composite
def chunked(draw) -> Case:
    """Draw an attention by chunks below clusters, with scores that clusters can have."""
    case, _ = draw(cases())
    given = {each.name: getattr(case, each.name) for each in fields(case)}
    given |= {"policy": "lycheecluster", "score": draw(st.sampled_from(["scaled", "soft-cap"]))}
    given["budget"] = max(case.budget, case.sinks + case.recent + 1)
    return Case(**given | {"chunk": draw(st.sampled_from([(2, 4), (4, 12), (8, 16)]))})


def chunk_bounds(steps: Steps, problem: Problem, fresh: Tensor) -> Tensor:
    """Return bounds of scores by the chunks before the slots `fresh` [B], float64 [B, Hq, T, L]."""
    named, chunk = steps.index.named, steps.case.chunk
    heads, slots = problem.key.shape[1:3]
    query = problem.query.double().unflatten(1, (heads, -1))
    found = []
    for head in range(heads):
        span = named["span"][:, head]
        used = decided(span, fresh, chunk)
        number = numbers_of_slots(span, used, slots, chunk)
        at = number.clamp(min=0)
        row = torch.arange(len(at))[:, None]
        centre = named["summary_chunk_mean"][:, head][row, at].double()
        radius = named["summary_chunk_radius"][:, head][row, at].double()
        own = query[:, head]
        bound = own @ centre[:, None].mT
        bound += own.norm(dim=-1, keepdim=True) * radius[:, None, None]
        found.append(bound.masked_fill((number < 0)[:, None, None], torch.inf))
    return problem.score(torch.stack(found, 1).flatten(1, 2), torch.arange(slots))


@settings(max_examples=EXAMPLES)
@given(case=chunked(), history=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=3))
def test_no_certificate_of_chunks_is_violated(case, history):
    steps = Steps(case, case.sizes.kv_len - 12)
    for event in history:
        if event.startswith("rewind"):
            steps.length = max(steps.length - (3 if event == "rewind" else 40), 12)
        elif event == "written by another":
            steps.key[:, :, : steps.length // 2] = steps.key[:, :, : steps.length // 2].flip(2)
            steps.rebuild()
        elif event == "refit":
            steps.refit()
        if steps.length + case.sizes.query_len > case.sizes.kv_len:
            steps.length -= 20
        steps.write()
        problem, positions = steps.problem(), steps.positions()
        used = IndexOperands(steps.index.layout, steps.index.parts, positions)
        with kept_scratch(few_programs=True) as made:
            output = steps.method.run(problem.module(), problem.operands(), used)
        steps.length += case.sizes.query_len
        slots = steps.slots_of(made["chosen_list"].flatten(1))
        missed = missed_of(problem.operands(), made).double()
        seen = problem.visible.unflatten(1, (-1, problem.spec.group)).any(2)
        slots = slots | ((~slots.any(-1) & seen.any(-1))[..., None] & seen)
        assert (true_shares(problem, slots) <= missed).all()
        assert (missed <= case.epsilon).all()
        problem.assert_as_good_as_eager(output, slots)
        score, unread = problem.finish_scores(), ~slots.repeat_interleave(problem.spec.group, 1)
        bound = chunk_bounds(steps, problem, positions.amin(1))
        parts = ((bound, unread), (score, ~unread))
        left, read = (
            each.masked_fill(~(problem.visible & which), -torch.inf).logsumexp(-1)
            for each, which in parts
        )
        assert ((missed - (left - read).sigmoid()).abs() <= 0.01)[missed > 0].all()
