"""Certificates by sketches, interpreted: true whatever the axes, and as small as sketches allow."""

from __future__ import annotations

import math

import pytest
import torch
import triton_interpreter
from decode_problems import DTYPES, LAYOUTS, MASKS, SCORES, Problem, Sizes, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from sketch_spec import token_scores
from sparse_steps import Step, built
from torch import Tensor

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.gpu.common.certificate import missed_of
from lychee_compile.kernels.gpu.lychee import layout as sketch_layout
from lychee_compile.kernels.gpu.lychee.layout import SketchState

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

EXAMPLES = max(settings().max_examples // 3, 1)
"""Interpreted kernels are slow."""


@st.composite
def problems(draw) -> Problem:
    """Draw an attention over a cache that is larger than the budget."""
    query_len = draw(st.sampled_from([1, 1, 2]))
    batch = draw(st.integers(1, 2)) if query_len == 1 else 1
    sparse = SparseSpec(
        "lychee",
        draw(st.integers(40, 200)),
        sinks=draw(st.integers(0, 20)),
        recent=draw(st.integers(1, 20)),
        overfetch=draw(st.integers(1, 4)),
        flat_tokens=draw(st.sampled_from([0, 65536])),
        epsilon=draw(st.sampled_from([1.0, 1.0, 0.9, 0.2])),
    )
    return make_problem(
        draw(st.sampled_from(list(DTYPES))),
        Sizes(
            batch, draw(st.integers(1, 2 // batch)), draw(st.integers(1, 9)), query_len,
            draw(st.integers(90, 400)), draw(st.sampled_from([16, 64, 80])),
        ),
        draw(st.sampled_from(SCORES)),
        draw(st.sampled_from([each for each in MASKS if each != "none"])),
        draw(st.booleans()),
        draw(st.sampled_from(LAYOUTS)),
        sparse,
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


def bounds(problem: Problem, state: SketchState) -> Tensor:
    """Return bounds of scores from the sketches of one block, float64 [B, Hq, T, L]."""
    kv_len, group = problem.key.shape[2], problem.spec.group
    query = problem.query.double().unflatten(1, (-1, group))
    axes = state.axes[:, :, :1].double()
    within = query @ axes.mT
    outside = (query - within @ axes).norm(dim=-1, keepdim=True)
    rest = state.residual[:, :, None, None, :kv_len].double()
    width = within.norm(dim=-1, keepdim=True) * rest[..., 0] + outside * rest[..., 1]
    estimate = token_scores(query.float(), state)[..., :kv_len].double()
    return problem.score((estimate + width).flatten(1, 2), torch.arange(kv_len))


def shares(problem: Problem, step: Step, read: Tensor) -> tuple[Tensor, Tensor]:
    """Return the true share outside of the slots `read`, and its bound, float64 [B, Hq, T]."""
    score = problem.finish_scores()
    unread = problem.visible & ~read.repeat_interleave(problem.spec.group, 1)
    seen = problem.visible & read.repeat_interleave(problem.spec.group, 1)
    log_read = score.masked_fill(~seen, -torch.inf).logsumexp(-1)
    found = []
    for each in (score, bounds(problem, step.state)):
        log_unread = each.masked_fill(~unread, -torch.inf).logsumexp(-1)
        share = (log_unread - log_read).sigmoid()
        found.append(torch.where(unread.any(-1), share, 0.0))
    return found[0], found[1]


def check(problem: Problem, step: Step, tight: bool = True) -> None:
    """Check that certificates are true, no larger than sketches make them, and kept."""
    assert problem.spec.sparse is not None
    epsilon = problem.spec.sparse.epsilon
    missed = missed_of(problem.operands(), step.scratch).double()
    seen = problem.visible.unflatten(1, (-1, problem.spec.group)).any(2)
    read = step.slots_read()
    whole = ~read.any(-1) & seen.any(-1)
    read = read | (whole[..., None] & seen)
    true, bound = shares(problem, step, read)
    assert (true <= missed).all()
    assert ((missed >= 0) & (missed <= epsilon)).all()
    problem.assert_as_good_as_eager(step.output, read)
    if tight:
        assert ((missed - bound).abs() <= 0.01)[missed > 0].all()


@settings(max_examples=EXAMPLES)
@given(problems())
def test_no_certificate_is_violated(problem):
    end = problem.key.shape[2] - problem.query.shape[2]
    index = built(problem, end)
    check(problem, Step.run(problem, index, torch.arange(end, problem.key.shape[2])))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(each, marks=pytest.mark.thorough if each == "float16" else ())
        for each in DTYPES
    ],
)
def test_keys_that_steps_write_are_measured(dtype):
    """Sketches grow by steps alone, are fitted anew, and are written again after a rewind."""
    sparse = SparseSpec("lychee", 60, 4, 8, 2, 65536, epsilon=1.0)
    sizes = Sizes(1, 2, 2, 2, 160, 32)
    first = make_problem(dtype, sizes, sparse=sparse, length=100)
    index = built(first, 100)
    for length in (100, 102, 104, 101, 103):
        problem = make_problem(dtype, sizes, sparse=sparse, length=length)
        random = torch.Generator().manual_seed(length)
        new = 3 * torch.randn(1, 2, 2, 32, generator=random)
        problem.key = first.key
        problem.key[:, :, length : length + 2] = new.to(problem.key.dtype)
        check(problem, Step.run(problem, index, torch.arange(length, length + 2)))
        if length == 104:
            index.refit(problem.module(), problem.key, [106])


def test_a_block_that_begins_forgets_what_it_had(monkeypatch):
    """The axes of a block change when its first key is written: of other keys nothing is known."""
    monkeypatch.setattr(sketch_layout, "BLOCK", 1024)
    sparse = SparseSpec("lychee", 60, 4, 8, 2, 65536, epsilon=1.0)
    problem = make_problem(sizes=Sizes(1, 1, 2, 1, 1100, 16), sparse=sparse)
    index = built(problem, 1100)
    assert index.layout.blocks > 1
    before = index.parts.residual.clone()
    early = make_problem(sizes=Sizes(1, 1, 2, 1, 1100, 16), sparse=sparse, length=1024)
    early.key, early.value = problem.key, problem.value
    Step.run(early, index, torch.tensor([1024]))
    residual = index.parts.residual[0, 0]
    assert torch.equal(residual[:1024], before[0, 0, :1024])
    assert residual[1024].isfinite().all()
    assert residual[1025:1100, 0].isinf().all()


def test_a_key_that_is_not_finite_proves_nothing():
    sparse = SparseSpec("lychee", 60, 4, 8, 2, 65536, epsilon=1.0)
    problem = make_problem(sizes=Sizes(1, 1, 2, 1, 200, 16), sparse=sparse)
    problem.key[0, 0, 50, 3] = math.nan
    step = Step.run(problem, built(problem, 199), torch.tensor([199]))
    read, missed = step.slots_read()[0, 0, 0], missed_of(problem.operands(), step.scratch)
    assert bool(read[50]) or bool((missed == 1).all())
