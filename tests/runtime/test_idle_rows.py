"""Rows of a batch that see no key, one key or few cost nothing, and leave the others sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from kernel_steps import DIM, GROUP, SIZE, Cache, assert_sparse, compiled, read_by
from torch import Tensor

import lychee_compile

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]

LENGTH, STEPS = 100, 3
BUSY, IDLE, ONE, FEW = 0, SIZE, -1, -9
"""First slot that a row sees. Negative numbers count from the slot written, which is -1."""


def by_operator(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)


def by_every_head(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    return by_operator(query, keys, values, seen.expand(-1, query.shape[1], -1, -1))


def by_infinity(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    return by_operator(query, keys, values, torch.where(seen, 0.0, -torch.inf).to(query.dtype))


def by_least_number(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    least = torch.finfo(query.dtype).min
    return by_operator(query, keys, values, (~seen).to(query.dtype) * least)


def by_hand(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    keys, values = (each.repeat_interleave(GROUP, 1) for each in (keys, values))
    scores = query @ keys.mT * DIM**-0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values


ROWS = {
    "one is idle": (BUSY, IDLE, BUSY),
    "all are idle": (IDLE, IDLE),
    "one key": (ONE, BUSY),
    "sinks and recent tokens": (BUSY, FEW, IDLE),
}
OFTEN = [
    (by_operator, "sinks and recent tokens", True),
    (by_infinity, "one key", False),
    (by_hand, "sinks and recent tokens", False),
    (by_every_head, "one is idle", False),
    (by_least_number, "one is idle", False),
    (by_operator, "all are idle", False),
]
"""Spelling, rows and if kernels attend, of what CI tests; the others are thorough."""


def first_slots(rows: tuple[int, ...], slot: Tensor) -> Tensor:
    """Return the first slot that each row sees, [B, 1, 1, 1], at a step that writes `slot`."""
    rows = [row if row >= 0 else int(slot) + 1 + row for row in rows]  # type: ignore[assignment]
    return torch.tensor(rows)[:, None, None, None]


def cases() -> list[Any]:
    spellings = (by_operator, by_every_head, by_infinity, by_least_number, by_hand)
    found = [(each, rows, on) for each in spellings for rows in ROWS for on in (False, True)]
    return [
        pytest.param(*each, marks=() if each in OFTEN else pytest.mark.thorough) for each in found
    ]


@pytest.mark.parametrize(("attend", "kind", "kernels"), cases())
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.thorough)]
)
def test_idle_rows_give_zeros_and_others_stay_sparse(
    attend: Callable[..., Tensor], kind: str, kernels: bool, dtype: torch.dtype, request: Any
) -> None:
    if kernels:
        request.getfixturevalue("kernels_on_cpu")
    rows = ROWS[kind]
    cache = Cache(len(rows), dtype).fill(LENGTH)

    def write_and_attend(
        query: Tensor, keys: Tensor, values: Tensor, at: Tensor, key: Tensor, value: Tensor,
        first: Tensor,
    ) -> Tensor:  # fmt: skip
        keys.index_copy_(2, at, key)
        values.index_copy_(2, at, value)
        slot = torch.arange(SIZE)
        return attend(query, keys, values, ((slot <= at[:, None]) & (slot >= first)))

    step = compiled(write_and_attend)

    def both(query: Tensor, keys: Tensor, values: Tensor, at: Tensor, *new: Tensor) -> Any:
        first = first_slots(rows, at)
        dense = write_and_attend(query, keys.clone(), values.clone(), at, *new, first)
        return step(query, keys, values, at, *new, first), dense

    with lychee_compile.record() as recorder:
        for number in range(STEPS):
            (got, dense), _ = cache.step(both)
            assert_rows(rows, got, dense, cache, number > 0 or not kernels)
    if not (kernels and set(rows) == {IDLE}):  # kernels tell of no call that chose no key
        assert len(recorder.calls) == STEPS - kernels
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "sparse"


def assert_rows(
    rows: tuple[int, ...], got: Tensor, dense: Tensor, cache: Cache, sparse: bool
) -> None:
    """Check each row of one step: idle, short, or busy and sparse."""
    for place, row in enumerate(rows):
        mine, wanted = got[place : place + 1], dense[place : place + 1]
        if row == IDLE:
            assert torch.equal(mine, torch.zeros_like(mine))
        elif row == BUSY and sparse:
            assert_sparse((mine, wanted), cache)
        else:
            band = 1e-5 if mine.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(mine, wanted, atol=band, rtol=band)
            assert row == BUSY or int(read_by(mine, cache).sum(-1).max()) <= -row
