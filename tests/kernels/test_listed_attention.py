"""Kernels of many rows list the keys to read in a kernel of its own, and read the same keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from decode_problems import Sizes, make_problem
from sparse_steps import Step, built
from test_sparse_kernel import FLAT, PAGED

from lychee_compile.kernels.gpu.common import launch_sparse, tuning

triton_interpreter.use()
pytestmark = pytest.mark.usefixtures("kernel_folder")

CASES = {
    "range": ("causal", FLAT),
    "holes": ("mask by head", FLAT),
    "pages": ("causal", PAGED),
    "mass": ("causal", replace(FLAT, coverage=0.9)),
    "certificate": ("causal", replace(FLAT, epsilon=0.3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "stale"])
def test_listed_keys_are_those_that_are_chosen(case, trusted, monkeypatch):
    mask, sparse = CASES[case]
    problem = make_problem(sizes=Sizes(2, group=2, kv_len=200), mask=mask, sparse=sparse)
    index = built(problem, 200)
    index.parts.header[0] = int(trusted)
    few = tuning.tuning_for(problem.module(), "sparse", problem.operands())
    expected = Step.run(problem, index, None, few)
    monkeypatch.setattr(tuning, "LISTED_ROWS", 1)
    found = Step.run(problem, index, None, few)
    lists, counts = found.scratch["chosen_list"], found.scratch["list_count"]
    assert bool((counts < 0).all()) is not trusted
    for row, split in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        count = max(int(counts[row, split]), 0)
        own = lists[row, split, :count]
        assert torch.equal(own, expected.scratch["chosen_list"][row, split, :count])
    assert torch.equal(found.output, expected.output)


def test_drafts_are_listed_as_they_are_chosen(monkeypatch):
    """Each query position has lists of its own, and the step brings the index up to date."""
    steps = []
    for rows in (tuning.LISTED_ROWS, 1):
        monkeypatch.setattr(tuning, "LISTED_ROWS", rows)
        sizes = Sizes(2, kv_heads=2, group=2, query_len=3, kv_len=200)
        problem = make_problem(sizes=sizes, sparse=FLAT)
        few = tuning.tuning_for(problem.module(), "exact", problem.operands())
        steps.append(Step.run(problem, built(problem, 197), torch.arange(197, 200), few))
        steps[-1].check()
    apart, listed = steps
    assert torch.equal(listed.slots_read(), apart.slots_read())
    assert torch.equal(listed.output, apart.output)
    assert torch.equal(listed.index.state, apart.index.state)


def test_few_rows_list_and_read_at_once(monkeypatch):
    problem = make_problem(sizes=Sizes(kv_len=100), sparse=FLAT)
    launched = []
    launch = launch_sparse.launch

    def noted(kernel, *given, **options):
        launched.append(kernel.fn.__name__)
        launch(kernel, *given, **options)

    monkeypatch.setattr(launch_sparse, "launch", noted)
    Step.run(problem, built(problem, 100), None)
    assert launched == ["attend"]
    monkeypatch.setattr(tuning, "LISTED_ROWS", 1)
    Step.run(problem, built(problem, 100), None)
    assert launched == ["attend", "choose", "attend"]
