"""Decoding with `epsilon` through generated kernels: no share that is not read is larger."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from kernel_steps import DIM, GROUP, KV_HEADS, SIZE, Cache, compiled, grow, read_by
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]


class Sharp(Cache):
    """A cache whose neighbouring keys are alike and near a plane, so that bounds are narrow."""

    def fresh(self, count: int) -> Tensor:
        slot = torch.arange(self.length, self.length + count)
        slot = slot - self.length if count > 16 else slot
        random = torch.Generator().manual_seed(0)
        centres = 6 * torch.randn(KV_HEADS, SIZE // 16, 2, generator=random)
        centres = centres @ torch.randn(2, DIM, generator=random)
        return (centres[:, slot // 16] + 0.1 * super().fresh(count)).to(self.dtype)


def options(policy: str, epsilon: float, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "epsilon": epsilon, "dense_layers": 0, **more}


def unread(weights: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
    """Return the share of the softmax that a step has not read, [B, Hq, T]."""
    got, dense = weights
    read = read_by(got, cache).repeat_interleave(GROUP, 1)
    return dense.double().masked_fill(read, 0).sum(-1)


@pytest.mark.parametrize(
    ("policy", "epsilon", "count", "dtype"),
    [
        ("quest", 0.1, 1, torch.float32),
        ("lychee", 0.1, 1, torch.float32),
        pytest.param("lycheecluster", 0.1, 1, torch.float32, marks=pytest.mark.thorough),
        pytest.param("lychee", 0.5, 3, torch.bfloat16, marks=pytest.mark.thorough),
        pytest.param("quest", 0.5, 3, torch.bfloat16, marks=pytest.mark.thorough),
    ],
)
def test_no_more_than_epsilon_is_unread(
    policy: str, epsilon: float, count: int, dtype: torch.dtype
) -> None:
    cache, step = (
        Sharp(2, dtype).fill(100),
        compiled(**options(policy, epsilon)),
    )
    cache.step(step, count)
    found: list[Tensor] = []
    with lychee_compile.record() as recorder:
        for _ in range(4):
            weights = cache.step(step, count)
            missed = unread(weights, cache)
            assert missed.max() <= epsilon
            certificate = recorder.calls[-1].certificate
            assert certificate is not None
            assert (missed <= certificate + 1e-6).all()
            assert certificate.max() <= epsilon
            found.append(certificate)
            read = read_by(weights[0], cache).repeat_interleave(GROUP, 1)
            expected = weights[1].double().masked_fill(~read, 0)
            expected = expected / expected.sum(-1, keepdim=True)
            torch.testing.assert_close(weights[0].double(), expected, atol=2e-3, rtol=2e-2)
    certificates = torch.stack(found)
    assert (certificates == 0).any(), "some rows read all keys"
    assert (certificates > 0).any(), "some rows are certified by few keys"
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "sparse"
    assert site.reads.endswith(f"all keys where over {epsilon} of the softmax might be missed")
    assert "_e0_" in site.kernel


@pytest.mark.parametrize("policy", ["lychee"])
def test_growing_caches_are_certified(policy: str) -> None:
    cache, step = Sharp().fill(90), compiled(grow, **options(policy, 0.2))
    keys, values = cache.keys[:, :, :90].clone(), cache.values[:, :, :90].clone()
    random = torch.Generator().manual_seed(1)
    for end in range(91, 96):
        query = torch.randn(1, KV_HEADS * GROUP, 1, DIM, generator=random)
        value = torch.eye(SIZE)[end - 1].expand(1, KV_HEADS, 1, -1)
        got, keys, values = step(query, keys, values, cache.fresh(1), value)
        dense = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        assert unread((got, dense), cache).max() <= 0.2
    assert counters["lychee"]["sparse"] > 0


def test_graphs_with_and_without_epsilon_share_a_cache() -> None:
    cache = Sharp().fill(100)
    certified, plain = compiled(**options("lychee", 0.1)), compiled()
    for _ in range(3):
        weights = cache.step(certified)
        assert unread(weights, cache).max() <= 0.1
        got, _ = cache.step(plain)
        assert got.isfinite().all()


def test_everything_is_read_while_a_key_is_found_changed() -> None:
    """The step that notices it proves nothing by the index, and the next one distrusts it."""
    cache, step = Sharp().fill(100), compiled(**options("quest", 0.2))
    cache.step(step)
    cache.step(step)
    cache.keys[:, :, :80] = cache.keys[:, :, :80].flip(2)
    assert unread(cache.step(step), cache).max() <= 0.2
