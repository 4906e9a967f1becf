"""Kernels of declared policies end a choice at a share of the softmax, as the plain form does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from decode_problems import Sizes
from level_checks import always_of
from level_steps import Case, Steps

from lychee_compile.kernels.gpu.levels import chunk_index as device_chunks
from lychee_compile.kernels.reference.selection import select

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
SLACK = 0.06
"""Share by which the bins of kernels may be off."""
CASES = {
    "one head": {"sizes": Sizes(1, 1, 1, 1, 400, 16, 16)},
    "a group": {"sizes": Sizes(1, 2, 4, 1, 400, 16, 16)},
    "holes": {"sizes": Sizes(1, 1, 2, 1, 400, 16, 16), "mask": "mask"},
    "rows, two queries": {"sizes": Sizes(2, 1, 2, 2, 400, 24, 16), "mask": "rows"},
}


def reads(steps, asked, coverage):
    """Return the slots that the plain form reads to cover a share, bool [B, Hkv, T, L]."""
    index = steps.plain.index
    index.config = replace(index.config, coverage=coverage)
    return select(index, asked.inputs, steps.case.budget).token_mask()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("coverage", [0.5, 0.85])
@pytest.mark.parametrize("policy", ["dhsa", "lycheecluster", "clusterkv", "quest"])
def test_kernels_cover_a_share_with_as_many_tokens(policy, coverage, name, monkeypatch):
    """Between what the plain form reads for a little less and for a little more."""
    monkeypatch.setattr(device_chunks, "REFIT", 16)
    case = Case(policy, budget=300, coverage=coverage, seed=3, **CASES[name])
    steps = Steps(case, 380)
    problem, read, asked = steps.step()
    problem.assert_as_good_as_eager(read.output, read.slots)
    assert asked.question is not None
    seen = problem.visible.unflatten(1, (-1, problem.spec.group)).any(2)
    own = read.slots & seen
    assert (own | ~(seen & always_of(asked.question)[:, None])).all()
    few, many, most = (
        (reads(steps, asked, each) & seen).sum(-1)
        for each in (coverage - SLACK, coverage + SLACK, None)
    )
    clusters = getattr(steps.plain.index, "columns", None)  # two may share a bin
    largest = 16 if clusters is None else int(clusters["tokens"].max())
    count = own.sum(-1)
    assert (count >= few - largest).all(), "too little"
    assert (count <= many + largest).all(), "too much"
    assert (count <= torch.maximum(most, few)).all(), "over the budget"
    assert policy == "clusterkv" or (count < most).any(), "there is something to gain"
