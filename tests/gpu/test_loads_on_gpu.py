"""Kernels over caches of which keys and values are computed, compiled; they need a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stored_caches import FORMS, Form, Sizes
from torch import Tensor
from torch._dynamo.utils import counters

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("seeded"),
]

SIZES = Sizes(batch=2, heads=2, group=4, slots=2048, head_dim=128, dtype=torch.bfloat16)
LENGTH, STEPS = 1500, 6
STORED = [
    "scale per token", "scale per channel", "scale per group", "float8", "4 bits", "half rotated",
    "rotated bytes", "pages of rows",
]  # fmt: skip


class Steps:
    """Steps of decoding over a cache on a GPU, beside what eager makes of them."""

    def __init__(self, name: str, budget: int, **options: Any) -> None:
        self.form: Form = FORMS[name]
        self.held = [each.cuda() for each in self.form.store(SIZES)]
        options = {"budget": budget, "sinks": 4, "recent": 16, "dense_layers": 0, **options}
        self.run = torch.compile(self.form.attend, backend="lychee", options=options)
        self.position = LENGTH

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return a step's output, that of eager PyTorch, and the exact one in float64."""
        torch.compiler.cudagraph_mark_step_begin()
        new = [each.cuda() for each in (SIZES.query(), SIZES.keys(1), SIZES.keys(1))]
        position = torch.tensor([self.position], device="cuda")
        self.position += 1
        copies = [each.clone() for each in self.held]
        wide = [each.double() if each.dtype == torch.bfloat16 else each.clone() for each in copies]
        exact = self.form.attend(*[each.double() for each in new], position, *wide)
        eager = self.form.attend(*new, position, *copies)
        return self.run(*new, position, *self.held), eager, exact


def assert_dense(step: tuple[Tensor, Tensor, Tensor]) -> None:
    """Check that a step is about as close to exact attention as eager PyTorch, which rounds keys
    more often."""
    got, eager, exact = step
    error, allowed = (float((each - exact).abs().max()) for each in (got, eager))
    assert error <= 1.5 * allowed + 5e-3


def assert_sparse(step: tuple[Tensor, Tensor, Tensor]) -> None:
    got, _, exact = step
    assert bool(got.isfinite().all())
    assert float((got - exact).norm() / exact.norm()) > 0.1


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", STORED)
def test_a_cache_that_is_read_in_full_is_dense(name: str, mode: str) -> None:
    steps = Steps(name, SIZES.slots - 1, mode=mode)
    for _ in range(STEPS):
        assert_dense(steps.step())
    assert counters["lychee"]["sparse"] == 1


@pytest.mark.parametrize("policy", ["lychee", "quest", "lycheecluster", "fasa"])
def test_every_kind_of_policy_reads_pages_of_bytes(policy: str) -> None:
    steps = Steps("pages of rows", SIZES.slots - 1, policy=policy)
    for _ in range(3):
        assert_dense(steps.step())
    assert counters["lychee"]["sparse"] == 1


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("name", "place"), [("scale per channel", 2), ("pages of rows", 4)])
def test_keys_are_compared_when_a_scale_or_a_table_changes(
    name: str, place: int, mode: str
) -> None:
    """No key of a row is as it was: the step reads all keys. A change of what no key depends on
    changes nothing."""
    steps = Steps(name, 64, mode=mode)
    assert_dense(steps.step())
    for _ in range(3):
        assert_sparse(steps.step())
    beside = steps.held[place]
    beside.copy_(beside.clone())
    assert_sparse(steps.step())
    beside.copy_(beside.flip(-1) if beside.dtype == torch.int64 else beside * 2)
    assert_dense(steps.step())
