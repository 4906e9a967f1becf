"""Caches of millions of slots, whose elements no 32-bit number counts; needs a CUDA device."""

from __future__ import annotations

import pytest
import torch
from test_kernels_on_gpu import compiled, make_spec

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.methods import gpu_method, new_index

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HEADS, GROUP, HEAD_DIM, PAGE = 2, 4, 128, 16
STRONG = 30
"""Score of the keys that matter. The others have scores of about 1."""


def cache(slots: int, head_dim: int, slots_first: bool) -> torch.Tensor:
    """Return normal numbers [1, HEADS, slots, head_dim], in bfloat16."""
    shape = (1, slots, HEADS, head_dim) if slots_first else (1, HEADS, slots, head_dim)
    filled = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    return filled.transpose(1, 2) if slots_first else filled


@pytest.mark.parametrize("policy", ["lychee", "quest"])
@pytest.mark.parametrize(
    ("slots", "slots_first"), [(2**21, False), (2**22 + 512, True), (2**24, False)]
)
def test_what_matters_is_found_anywhere(slots: int, slots_first: bool, policy: str) -> None:
    torch.manual_seed(0)
    spec = make_spec(
        "bfloat16", GROUP, HEAD_DIM, sparse=SparseSpec(policy, 1024, 16, 64, 16, 65536)
    )
    module = compiled(spec)
    key, value = (cache(slots, HEAD_DIM, slots_first) for _ in range(2))
    one = torch.randn(1, HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    query = one.repeat_interleave(GROUP, 1)
    strength = STRONG * HEAD_DIM**0.5 / one.float().square().sum(-1, keepdim=True)
    places = [PAGE * (slots // PAGE * part // 8) for part in (1, 3, 5, 7)] + [slots - 128]
    for place in places:
        key[:, :, place : place + PAGE] = (one * strength).to(key.dtype)
    values = torch.cat([value[:, :, place : place + PAGE] for place in places], 2)
    expected = values.float().mean(2, keepdim=True).repeat_interleave(GROUP, 1)
    last = torch.tensor(slots - 1, device="cuda")
    operands = AttentionOperands(query, key, value, [last], None)

    index = new_index(gpu_method(policy).layout_of(key), key.device)
    index.build(module, key, [slots - 1])
    used = IndexOperands(index.layout, index.parts, last[None])
    sparse = gpu_method(policy).run(module, operands, used)
    torch.testing.assert_close(sparse.float(), expected, atol=0.02, rtol=0.02)
    exact = run_exact(module, operands)
    torch.testing.assert_close(exact.float(), expected, atol=0.02, rtol=0.02)
