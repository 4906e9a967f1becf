"""Products of sketches, four codes at a time as on a GPU; programs that scan several tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton.language as tl
import triton_interpreter
from decode_problems import Sizes, make_problem
from sparse_steps import Step, built
from test_sparse_kernel import FLAT, PAGED

from lychee_compile.kernels.gpu.lychee import launch as sketch_launch

triton_interpreter.use()
pytestmark = pytest.mark.usefixtures("kernel_folder")

BY_MASS = replace(FLAT, coverage=0.9)
CASES = [  # head_dim and heads of a group; words of planes are padded, or no power of two
    (64, 4, "mask by head", "slopes", FLAT),
    (32, 1, "window", "soft-cap", FLAT),
    (72, 2, "rows", "scaled", PAGED),
    (96, 3, "causal", "bias", FLAT),
    (256, 2, "causal", "scaled", PAGED),
    (16, 20, "mask", "scaled", FLAT),
]


@pytest.mark.parametrize(("head_dim", "group", "mask", "score", "sparse"), CASES)
def test_words_give_the_bins_of_single_codes(head_dim, group, mask, score, sparse, monkeypatch):
    sizes = Sizes(2 if mask == "rows" else 1, group=group, kv_len=150, head_dim=head_dim)
    problem = make_problem(sizes=sizes, mask=mask, score=score, sparse=sparse)
    index, module = built(problem, 150), problem.module()
    expected = Step.run(problem, index, None)
    expected.check()
    assert module.IN_WORDS.value is False
    monkeypatch.setattr(module, "IN_WORDS", tl.constexpr(True))
    found = Step.run(problem, index, None)
    for name in ("weights", "bins", "histogram", "chosen_list"):
        assert torch.equal(found.scratch[name], expected.scratch[name]), name
    assert torch.equal(found.output, expected.output)


@pytest.mark.parametrize(
    ("mask", "sparse", "words"),
    [("causal", FLAT, False), ("causal", FLAT, True), ("mask by head", BY_MASS, False)],
    ids=["range", "words", "holes"],
)
def test_a_program_that_scans_several_tiles_does_as_several_do(mask, sparse, words, monkeypatch):
    problem = make_problem(sizes=Sizes(group=2, kv_len=1100), mask=mask, sparse=sparse)
    index, module = built(problem, 1100), problem.module()
    monkeypatch.setattr(module, "IN_WORDS", tl.constexpr(words))
    expected = Step.run(problem, index, None)
    monkeypatch.setattr(sketch_launch, "SCAN_PROGRAMS", 1)
    assert sketch_launch.scan_steps(3, index.layout.block) == 2
    found = Step.run(problem, index, None)
    found.check()
    for name in ("bins", "histogram", "tile_first", "tile_end", "chosen_list"):
        if mask == "causal" and name.startswith("tile"):
            continue  # the kernels leave them alone
        assert torch.equal(found.scratch[name], expected.scratch[name]), name
    assert torch.equal(found.output, expected.output)
