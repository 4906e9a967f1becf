"""Certificates by compiled kernels, and `epsilon` in CUDA graphs; needs a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decode_problems import Problem, Sizes, make_problem
from level_steps import on_device

import lychee_compile
from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.functional import build_index, select, sparse_attention
from lychee_compile.kernels.gpu.common.certificate import missed_of
from lychee_compile.kernels.gpu.common.launch_common import of_rows
from lychee_compile.kernels.gpu.common.launch_sparse import watch
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.gpu.methods import gpu_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

POLICIES = ["quest", "lychee"]
CASES = {
    "llama": ("bfloat16", Sizes(2, 2, 4, 1, 20000, 128, 128), "scaled", "causal"),
    "long": ("bfloat16", Sizes(1, 2, 4, 1, 90000, 128, 128), "scaled", "causal"),
    "wide heads": ("bfloat16", Sizes(1, 1, 8, 1, 9001, 256, 256), "soft-cap", "window"),
    "rows": ("float16", Sizes(2, 2, 4, 2, 9000, 64, 64), "scaled", "rows"),
    "slopes": ("float32", Sizes(1, 2, 3, 2, 9000, 96, 64), "slopes", "mask by head"),
}  # fmt: skip


def index_of(problem: Problem, policy: str, end: int):
    """Return an index of the keys in the slots [0, end)."""
    method, key = gpu_method(policy), problem.key
    layout = SketchLayout.over(key, measured=True) if policy == "lychee" else method.layout_of(key)
    index = method.new_index(layout, key.device)
    index.build(problem.module(), key, [end] * key.shape[0])
    return index


@pytest.mark.parametrize("sharp", [0.2, 1.0])
@pytest.mark.parametrize("epsilon", [1.0, 0.3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_certificate_is_violated(policy: str, case: str, epsilon: float, sharp: float) -> None:
    dtype, sizes, score, mask = CASES[case]
    spec = SparseSpec(policy, 1024, 16, 64, 16, 65536, epsilon=epsilon)
    problem = on_device(make_problem(dtype, sizes, score, mask, sparse=spec), "cuda")
    problem.query *= sharp
    end = sizes.kv_len - sizes.query_len
    index = index_of(problem, policy, end)
    late = 5 * torch.arange(sizes.batch) if mask == "rows" else torch.zeros(sizes.batch).long()
    positions = (torch.arange(end, sizes.kv_len) - late[:, None]).cuda()
    used = IndexOperands(index.layout, index.parts, positions)
    with watch() as steps:
        output = gpu_method(policy).run(problem.module(), problem.operands(), used)
    (step,) = steps
    missed = missed_of(step.operands, step.scratch).double()
    listed = of_rows(step.operands, step.scratch["chosen_list"].flatten(1).long())
    read = torch.zeros(*listed.shape[:3], sizes.kv_len + 1, dtype=torch.bool, device="cuda")
    read.scatter_(-1, torch.where(listed < 0, sizes.kv_len, listed), True)
    read = read[..., :-1] | (listed < 0).all(-1, keepdim=True)
    unread = ~read.repeat_interleave(sizes.group, 1)
    scores = problem.finish_scores().masked_fill(~problem.visible, -torch.inf)
    true = (scores.softmax(-1).nan_to_num(nan=0.0) * unread).sum(-1)
    assert (true <= missed).all()
    assert (missed <= epsilon).all()
    problem.assert_as_good_as_eager(output, read)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_functional_api_returns_certificates(policy: str) -> None:
    random = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(1, 8, 1, 128, generator=random, device="cuda").bfloat16()
    key, value = torch.randn(2, 1, 2, 8000, 128, generator=random, device="cuda").bfloat16()
    index = build_index(key, options={"policy": policy, "budget": 1024})
    selection = select(index, query)
    _, missed = sparse_attention(query, key, value, selection, return_certificate=True)
    unread = ~selection.token_mask().repeat_interleave(4, 1)
    weight = (query.double() @ key.double().repeat_interleave(4, 1).mT / 128**0.5).softmax(-1)
    assert ((weight * unread).sum(-1) <= missed).all()


def decode(query, keys, values, position, key, value):
    keys.index_copy_(2, position, key)
    values.index_copy_(2, position, value)
    mask = (torch.arange(keys.shape[2], device="cuda") <= position[:, None])[None, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_epsilon_holds_in_cuda_graphs(policy: str) -> None:
    """Keys of a page are alike, and pages far apart, so that some steps are certified."""
    lychee_compile.reset()
    torch._dynamo.reset()
    options = {"policy": policy, "budget": 512, "dense_layers": 0, "epsilon": 0.1}
    options["mode"] = "reduce-overhead"
    compiled = torch.compile(decode, backend="lychee", options=options)
    random = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device="cuda")

    centres = 6 * randn(1, 2, 512, 2) @ randn(2, 128)
    keys = centres.repeat_interleave(16, 2) + 0.1 * randn(1, 2, 8192, 128)
    keys, values = keys.bfloat16(), randn(1, 2, 8192, 128).bfloat16()
    for cache in (keys, values):
        torch._dynamo.mark_static_address(cache)
    for position in range(6000, 6024):
        query = randn(1, 8, 1, 128).bfloat16()
        at = torch.tensor([position], device="cuda")
        new = keys[:, :, position : position + 1].clone(), randn(1, 2, 1, 128).bfloat16()
        got = compiled(query, keys, values, at, *new).clone()
        expected = decode(query.float(), keys.float(), values.float(), at, *map(_float, new))
        largest = values.float().abs().amax()
        assert (got.float() - expected).abs().max() <= 2 * 0.1 * largest + 0.02
    assert lychee_compile.reports()[-1].sites[0].decision == "sparse"


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float()
