"""An extra logit with a value, in `combine` interpreted and in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from decode_problems import Sizes, make_problem
from torch import Tensor

from lychee_compile.codegen.specification import S
from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.reference.attention import attend, dense_attention
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.selection import Selection

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


LOGITS = [0.7, 30.0, -300.0, -torch.inf]


class Case:
    """Four query heads at two positions, the first of which sees no key of the cache."""

    def __init__(self, logit: float) -> None:
        self.problem = make_problem(
            sizes=Sizes(kv_len=70, query_len=2, value_dim=48), score="scaled", length=-1
        )
        self.extra = torch.full((1, 4, 2), logit)
        self.value = torch.randn(1, 4, 48, 2).transpose(2, 3)

    def check(self, got: Tensor) -> None:
        """Compare with attention in float64 over one key more."""
        problem = self.problem
        score = problem.finish_scores().masked_fill(~problem.visible, -torch.inf)
        weight = torch.cat((score, self.extra[..., None].double()), -1).softmax(-1).nan_to_num(0)
        values = problem.value.double().repeat_interleave(4, 1)
        expected = weight[..., :-1] @ values + weight[..., -1:] * self.value
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)

    def operands(self) -> Operands:
        """Return what the plain form is given."""
        problem = self.problem
        scale = float(problem.spec.score.coeff(S))
        return Operands(
            problem.query, problem.key, problem.value, problem.visible, scale,
            extra=self.extra, extra_value=self.value,
        )  # fmt: skip


@pytest.mark.parametrize("logit", LOGITS)
def test_kernels_give_the_value_the_share_of_its_logit(logit: float) -> None:
    case = Case(logit)
    case.problem.spec = replace(case.problem.spec, extra=True, extra_value=True)
    given = replace(case.problem.operands(), extra=case.extra, extra_value=case.value)
    case.check(run_exact(case.problem.module(), given, None))


@pytest.mark.parametrize("logit", LOGITS)
def test_dense_attention_does(logit: float) -> None:
    case = Case(logit)
    case.check(dense_attention(case.operands()))


@pytest.mark.parametrize("logit", LOGITS)
def test_attention_over_selected_keys_does(logit: float) -> None:
    case = Case(logit)
    operands = case.operands()
    start = torch.zeros(1, 1, 2, 1, dtype=torch.int64)
    visible = operands.score_inputs.visible()
    everything = Selection(start, torch.full_like(start, 70), visible, operands.scale)
    output, log_total = attend(operands, everything)
    case.check(output)
    assert torch.allclose(log_total[:, :, 0], case.extra[:, :, 0])
