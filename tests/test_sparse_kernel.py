"""Sparse decode kernels, interpreted: what they select, read and make of it."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter
from decode_problems import DTYPES, LAYOUTS, MASKS, Sizes, make_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_steps import Step, built

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.tuning import Tuning

triton_interpreter.use()

FEW = settings(max_examples=max(settings().max_examples // 10, 1))
FLAT, PAGED = 65536, 0


@st.composite
def problems(draw):
    """Trusted indexes over all keys but those of a step, which comes next."""
    query_len = draw(st.sampled_from([1, 1, 2, 3]))
    batch = draw(st.integers(1, 2)) if query_len == 1 else 1
    sizes = Sizes(
        batch,
        draw(st.integers(1, 2 // batch)) if query_len == 1 else 1,
        draw(st.integers(1, 16)),
        query_len,
        draw(st.integers(query_len + 80, 640)),
        draw(st.sampled_from([64, 80, 128])),
    )
    sparse = SparseSpec(
        "lychee",
        draw(st.integers(40, 200)),
        sinks=draw(st.integers(0, 20)),
        recent=draw(st.integers(1, 20)),
        overfetch=draw(st.integers(1, 4)),
        flat_tokens=draw(st.sampled_from([FLAT, PAGED])),
    )
    return make_problem(
        draw(st.sampled_from(list(DTYPES))),
        sizes,
        draw(st.sampled_from(["scaled", "soft-cap", "slopes", "bias"])),
        draw(st.sampled_from(MASKS)),
        draw(st.booleans()),
        draw(st.sampled_from(LAYOUTS)),
        sparse,
        seed=draw(st.integers(0, 99)),
    )


def newest(problem):
    """The slots that the queries are at: the last ones."""
    end = problem.key.shape[2]
    return torch.arange(end - problem.query.shape[2], end)


@FEW
@given(problems(), st.integers(1, 12))
def test_a_step_reads_the_best(problem, programs):
    positions = newest(problem)
    index = built(problem, int(positions[0]))
    step = Step.run(problem, index, positions, Tuning(programs, 32, 4, 2))
    step.check()
