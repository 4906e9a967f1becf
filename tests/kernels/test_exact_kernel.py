"""Exact decode kernels, interpreted, against attention in float64."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter
from decode_problems import DTYPES, LAYOUTS, MASKS, SCORES, Sizes, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.gpu.common.tuning import Tuning

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SEVERAL = settings(max_examples=max(settings().max_examples // 4, 1))
DIMS = (64, 80, 96, 128, 192, 256)


@st.composite
def problems(draw):
    """Draw attentions with few rows of queries, and everything else that kernels are for."""
    head_dim = draw(st.sampled_from([16, *DIMS]))
    group, query_len = draw(st.integers(1, 16)), draw(st.sampled_from([1, 1, 2, 3, 7, 16]))
    most = max(1, 6 // query_len)
    batch = draw(st.integers(1, most))
    sizes = Sizes(
        batch,
        draw(st.integers(1, most // batch)),
        group,
        query_len,
        draw(st.integers(query_len, 180)),
        head_dim,
        draw(st.sampled_from([head_dim, head_dim, *DIMS])),
    )
    return make_problem(
        draw(st.sampled_from(list(DTYPES))),
        sizes,
        draw(st.sampled_from(SCORES)),
        draw(st.sampled_from(MASKS)),
        draw(st.booleans()),
        draw(st.sampled_from(LAYOUTS)),
        length=draw(st.integers(-3, sizes.kv_len - query_len)),
        seed=draw(st.integers(0, 99)),
    )


tunings = st.builds(
    Tuning,
    programs=st.integers(1, 24),
    keys=st.sampled_from([16, 32, 64]),
    warps=st.just(4),
    stages=st.just(2),
)


def run(problem, tuning=None):
    return run_exact(problem.module(), problem.operands(), tuning)


@SEVERAL
@given(problems(), tunings)
def test_it_is_as_good_as_eager_attention(problem, tuning):
    output = run(problem, tuning)
    problem.assert_as_good_as_eager(output)
    blind = ~problem.visible.any(-1)
    assert torch.equal(output[blind], torch.zeros_like(output[blind]))


@pytest.mark.parametrize("extra", [False, True], ids=["", "extra logit"])
@pytest.mark.parametrize("mask", ["causal", "mask"])
def test_queries_that_see_nothing_give_zeros(mask, extra):
    problem = make_problem(sizes=Sizes(query_len=2), mask=mask, extra=extra, length=-2)
    output = run(problem)
    assert torch.equal(output, torch.zeros_like(output))


@pytest.mark.parametrize("mask", ["causal", "window", "mask"])
def test_what_nobody_sees_is_not_read(mask):
    """Slots of a static cache that were never written may hold anything."""
    problem = make_problem(mask=mask, sizes=Sizes(kv_len=200), length=40)
    problem.key[:, :, 64:] = problem.value[:, :, 64:] = torch.nan
    if mask == "window":
        problem.key[:, :, :20] = problem.value[:, :, :20] = torch.nan
    assert run(problem).isfinite().all()


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_large_scores_do_not_overflow(dtype):
    problem = make_problem(dtype, Sizes(kv_len=150))
    problem.query *= 1000
    problem.assert_as_good_as_eager(run(problem))
