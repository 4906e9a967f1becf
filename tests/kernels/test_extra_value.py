"""An extra logit with a value, in `combine` interpreted and in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from decode_problems import Sizes, make_problem

from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.reference.attention import attend, dense_attention
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.selection import Selection

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize("logit", [0.7, 30.0, -300.0, -torch.inf])
def test_the_value_has_the_share_of_its_logit(logit: float) -> None:
    """The first query sees no key of the cache."""
    sizes = Sizes(kv_len=70, query_len=2, value_dim=48)
    problem = make_problem(sizes=sizes, length=-1)
    problem.spec = replace(problem.spec, extra=True, extra_value=True)
    extra = torch.full((1, 4, 2), logit)
    wide = torch.randn(1, 4, 48, 2).transpose(2, 3)
    operands = replace(problem.operands(), extra=extra, extra_value=wide)
    got = run_exact(problem.module(), operands, None)
    score = problem.finish_scores().masked_fill(~problem.visible, -torch.inf)
    weight = torch.cat((score, extra[..., None].double()), -1).softmax(-1).nan_to_num(0)
    value = problem.value.double().repeat_interleave(4, 1)
    expected = weight[..., :-1] @ value + weight[..., -1:] * wide
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
