"""Decoding over caches behind memory keys: dense if all is read, within the budget otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import memory_keys
import pytest
import torch
import torch.nn.functional as F
from memory_keys import MEMORY, G, Growing, Static, caches, new, one_operator
from torch import Tensor
from torch._dynamo.utils import counters

from lychee_compile.kernels.operators.observe import SparseCall, observers

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

SMALL = {"budget": 24, "sinks": 2, "recent": 8, "chunk": (2, 4)}
EVERYTHING = {**SMALL, "budget": 60}
LENGTH, STEPS, SLOTS = 40, 4, 100
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


@pytest.fixture
def calls() -> Iterator[list[SparseCall]]:
    """Return the sparse calls of a test, each with what it has read."""
    seen: list[SparseCall] = []
    observers.append(seen.append)
    yield seen
    observers.remove(seen.append)


def grown(model: Any, step: Any, dtype: torch.dtype = torch.float32, count: int = 1) -> None:
    """Check that steps through the backend give what the model gives."""
    held = caches(LENGTH, dtype)
    for _ in range(STEPS):
        query, *fresh = new(count, dtype)
        expected, *left = model(query, *held, *fresh)
        got, *held = step(query, *held, *fresh)
        close = CLOSE if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(got, expected, **close)
        torch.testing.assert_close(held, left, atol=0, rtol=0)


@pytest.mark.parametrize("model", memory_keys.GROWING)
def test_a_growing_cache_that_is_read_in_full_is_dense(model: Any, calls: list[SparseCall]) -> None:
    made = model()
    grown(made, torch.compile(made, backend="lychee", options=EVERYTHING))
    assert len(calls) == STEPS - 1  # the first step, of a fixed length, is within the budget


def test_tokens_of_a_draft_in_half_precision(calls: list[SparseCall]) -> None:
    """Each sees the tokens of the draft, those behind it too."""
    made = Growing(dtype=torch.bfloat16)
    grown(made, torch.compile(made, backend="lychee", options=EVERYTHING), torch.bfloat16, 2)
    assert len(calls) == STEPS - 1


@pytest.mark.parametrize("model", memory_keys.STATIC)
def test_a_static_cache_that_is_read_in_full_is_dense(model: Any, calls: list[SparseCall]) -> None:
    made, held = model(), caches(SLOTS)
    step = torch.compile(made, backend="lychee", options=EVERYTHING)
    for pos in range(LENGTH, LENGTH + STEPS):
        query, *fresh = new()
        copies = [each.clone() for each in held]
        expected = made(query, *copies, torch.tensor([pos]), *fresh)
        got = step(query, *held, torch.tensor([pos]), *fresh)
        torch.testing.assert_close(got, expected, **CLOSE)
    assert len(calls) == STEPS
    assert counters["lychee"]["sparse"] == 1


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "coverage": 0.8}, {**SMALL, "epsilon": 0.5}])
def test_what_is_not_chosen_is_not_read(options: Any, calls: list[SparseCall]) -> None:
    made, held = Growing(), caches(SLOTS)
    step = torch.compile(made, backend="lychee", options=options)
    for _ in range(STEPS):
        query, *fresh = new()
        got, *held = step(query, *held, *fresh)
        read = calls[-1].selection.token_mask()
        mask = F.pad(read, (MEMORY, 0), value=True).repeat_interleave(G, 1)
        expected = one_operator(query, *made.before(*held), mask)
        torch.testing.assert_close(got, expected, **CLOSE)
        if "epsilon" not in options:
            assert int(read.sum(-1).max()) <= SMALL["budget"]
    assert len(calls) == STEPS


class Idle(Static):
    """A step of a server that only reads; `seen` [B, L] are the slots of its rows."""

    def forward(self, q: Tensor, ck: Tensor, cv: Tensor, seen: Tensor) -> Tensor:  # type: ignore[override]
        shown = F.pad(seen, (MEMORY, 0), value=True)
        return one_operator(q, *self.before(ck, cv), shown[:, None, None])


def test_a_row_that_sees_the_memory_alone(calls: list[SparseCall]) -> None:
    made, held, query = Idle(), caches(SLOTS), new()[0]
    step = torch.compile(made, backend="lychee", options=SMALL)
    seen = torch.arange(SLOTS) < torch.tensor([[0], [15]])
    for _ in range(3):
        torch.testing.assert_close(step(query, *held, seen), made(query, *held, seen), **CLOSE)
    assert len(calls) == 2  # a cache that is only read is indexed at the second call


def test_two_attentions_with_and_without_memory_over_one_cache(calls: list[SparseCall]) -> None:
    class Both(Growing):
        def attend(self, q: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
            return super().attend(q, ck, cv) + one_operator(q, ck, cv)

    made = Both()
    grown(made, torch.compile(made, backend="lychee", options=EVERYTHING))
    assert len(calls) == 2 * (STEPS - 1)
