"""Exact decode kernels, interpreted, against attention in float64."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter
from decode_problems import DTYPES, LAYOUTS, MASKS, SCORES, Sizes, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from lychee_compile.kernels.launch import run_exact
from lychee_compile.kernels.tuning import Tuning

triton_interpreter.use()

SEVERAL = settings(max_examples=settings().max_examples // 4)
DIMS = (64, 80, 96, 128, 192, 256)


@st.composite
def problems(draw):
    """Attentions of at most a few rows of queries, with everything else that kernels are for."""
    head_dim = draw(st.sampled_from(DIMS))
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
    operands = problem.query, problem.key, problem.value
    return run_exact(problem.module(), *operands, problem.captured, problem.extra, tuning)


@SEVERAL
@given(problems(), tunings)
def test_it_is_as_good_as_eager_attention(problem, tuning):
    output = run(problem, tuning)
    problem.assert_as_good_as_eager(output)
    blind = ~problem.visible.any(-1)
    assert torch.equal(output[blind], torch.zeros_like(output[blind]))
