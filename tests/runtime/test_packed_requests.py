"""Requests packed into one row of a compiled step read their own keys within the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from torch import Tensor

import lychee_compile

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("uncompiled_graphs", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]

KV_HEADS, GROUP, DIM, SLOTS, STEPS = 2, 2, 16, 192, 3
OPTIONS: dict[str, Any] = {"budget": 32, "sinks": 2, "recent": 8, "chunk": (2, 4)}

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query, keys, values, request of each slot [L], slots written [T]) -> output."""


def masked(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)


def by_number(q: Tensor, keys: Tensor, values: Tensor, request: Tensor, at: Tensor) -> Tensor:
    seen = (request == request[at][:, None]) & (torch.arange(SLOTS) <= at[:, None])
    return masked(q, keys, values, seen)


def added(q: Tensor, keys: Tensor, values: Tensor, request: Tensor, at: Tensor) -> Tensor:
    other = (request != request[at][:, None]) | (torch.arange(SLOTS) > at[:, None])
    return masked(q, keys, values, torch.zeros(other.shape).masked_fill(other, -1e9)[None, None])


def between_ends(q: Tensor, keys: Tensor, values: Tensor, request: Tensor, at: Tensor) -> Tensor:
    """Requests begin at multiples of 64 slots."""
    first, slot = at // 64 * 64, torch.arange(SLOTS)
    return masked(q, keys, values, (slot >= first[:, None]) & (slot <= at[:, None]))


def by_hand(q: Tensor, keys: Tensor, values: Tensor, request: Tensor, at: Tensor) -> Tensor:
    keys, values = (each.repeat_interleave(GROUP, 1) for each in (keys, values))
    scores = q @ keys.mT * DIM**-0.5
    scores = scores.masked_fill(request[at][:, None] != request, -torch.inf)
    scores = scores.masked_fill(torch.arange(SLOTS) > at[:, None], -torch.inf)
    return scores.softmax(-1) @ values


SIDE_BY_SIDE = torch.arange(SLOTS) // 64
UNEVEN = (torch.arange(SLOTS) >= 50).long() + (torch.arange(SLOTS) >= 130)
CASES = [
    (by_number, SIDE_BY_SIDE, (45, 110, 170), False),
    (by_number, UNEVEN, (120, 180), True),
    (added, UNEVEN, (40, 120, 180), False),
    (added, SIDE_BY_SIDE, (170, 45), True),
    (between_ends, SIDE_BY_SIDE, (45, 110, 170), True),
    (between_ends, SIDE_BY_SIDE, (3, 170), False),
    (by_hand, torch.arange(SLOTS) % 3, (150, 151, 152), False),
]
"""Spelling, request of each slot, slots of the first step, and if kernels attend."""
OFTEN = (0, 2, 4, 6)


@pytest.mark.parametrize(
    ("attend", "request_of", "first", "kernels"),
    [
        pytest.param(*each, marks=() if number in OFTEN else pytest.mark.thorough)
        for number, each in enumerate(CASES)
    ],
)
def test_a_query_reads_its_own_request_within_the_budget(
    attend: Attend,
    request_of: Tensor,
    first: tuple[int, ...],
    kernels: bool,
    request: pytest.FixtureRequest,
) -> None:
    if kernels:
        request.getfixturevalue("kernels_on_cpu")

    def step(query: Tensor, cache: tuple[Tensor, Tensor], at: Tensor, key: Tensor) -> Tensor:
        cache[0].index_copy_(2, at, key)
        return attend(query, *cache, request_of, at)

    compiled = torch.compile(step, backend="lychee", options=OPTIONS)
    keys = torch.randn(1, KV_HEADS, SLOTS, DIM)
    cache = keys, torch.eye(SLOTS).expand(1, KV_HEADS, -1, -1).contiguous()
    apart = len(first) if attend is by_hand else 1
    for number in range(STEPS):
        at = torch.tensor(first) + apart * number
        query = 2 * torch.randn(1, KV_HEADS * GROUP, len(at), DIM)
        new = torch.randn(1, KV_HEADS, len(at), DIM)
        dense = step(query, (keys.clone(), cache[1]), at, new)
        got = compiled(query, cache, at, new)
        if kernels and number == 0:  # the index is made after the first step
            torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)
            continue
        read = (got > 0).unflatten(1, (KV_HEADS, GROUP)).any(2)
        own = (request_of == request_of[at][:, None]) & (torch.arange(SLOTS) <= at[:, None])
        assert not bool((read & ~own).any())
        count, room = read.sum(-1), own.sum(-1).clamp(max=OPTIONS["budget"])
        assert bool((count <= room).all())
        assert bool((count > room // 2).all())
        chosen = dense.masked_fill(~read.repeat_interleave(GROUP, 1), 0)
        expected = chosen / chosen.sum(-1, keepdim=True)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    assert [site.decision for site in lychee_compile.reports()[-1].sites] == ["sparse"]
