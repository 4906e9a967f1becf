"""Chunks that narrow a long context of "lychee", under compiled kernels; needs a CUDA device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_problems import Problem, Sizes, make_problem
from level_steps import on_device

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_lychee
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.levels.groups import GroupSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CASES = {
    "llama": {"sizes": Sizes(1, 2, 4, 1, 60000, 128, 128), "dtype": "bfloat16"},
    "rows": {"sizes": Sizes(2, 2, 4, 1, 40000, 64, 64), "dtype": "float16", "mask": "rows"},
    "two positions": {
        "sizes": Sizes(1, 1, 8, 2, 20000, 80, 64), "score": "soft-cap", "mask": "padding mask",
    },
}  # fmt: skip


def problem(case: str, flat_tokens: int, overfetch: int = 4) -> Problem:
    sparse = SparseSpec("lychee", 1024, 16, 64, overfetch, flat_tokens, groups=GroupSettings())
    given = dict(CASES[case])
    sizes = given.pop("sizes")
    length = sizes.kv_len - 40
    return on_device(make_problem(sizes=sizes, sparse=sparse, length=length, **given), "cuda")


def decoded(problem: Problem, narrows: bool) -> list[torch.Tensor]:
    """Return the outputs of some steps that write the same keys, with a refit between them."""
    settings = GroupSettings() if narrows else None
    layout = replace(SketchLayout.over(problem.key), settings=settings)
    index = SketchIndex(layout, problem.key.device)
    sizes, module = problem.query.shape[2], problem.module()
    batch, first = problem.key.shape[0], problem.key.shape[2] - 40
    late = 5 * torch.arange(batch, device="cuda")[:, None] if "lengths" in str(problem.spec) else 0
    index.build(module, problem.key, [first - 40] * batch)
    outputs = []
    for number in range(first - 40, first + 1):
        positions = number + torch.arange(sizes, device="cuda").expand(batch, -1) - late
        used = IndexOperands(layout, index.parts, positions)
        outputs.append(run_lychee(module, problem.operands(), used))
        if number % 20 == 0:
            index.refit(module, problem.key, index.parts.header[1:].tolist())
    return outputs


def lost(given: Problem, narrows: bool) -> float:
    """Return the error of the last step, relative to attention over all keys."""
    truth = given.attention(torch.float32)
    return float((decoded(given, narrows)[-1].float() - truth).norm() / truth.norm())


@pytest.mark.parametrize("case", CASES)
def test_chunks_that_narrow_nothing_lose_what_flat_scans_do(case: str) -> None:
    """Tokens whose shares are alike may be chosen in another order."""
    flat, wide = lost(problem(case, 2**30), False), lost(problem(case, 0, overfetch=100), True)
    assert abs(wide - flat) < 0.05 * flat, (flat, wide)


@pytest.mark.parametrize("case", CASES)
def test_chunks_lose_little(case: str) -> None:
    flat, chunks = lost(problem(case, 2**30), False), lost(problem(case, 0), True)
    assert chunks < 2 * flat + 0.05, (flat, chunks)
