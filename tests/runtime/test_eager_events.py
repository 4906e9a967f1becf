"""Growing caches that a loop changes between steps cost no compilation that others do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

B, H, G, D, L, STEPS = 5, 2, 2, 8, 60, 4
SMALL = {"budget": 24, "sinks": 2, "recent": 4, "chunk": (2, 4)}

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(query [B, H * G, 1, D], cache, new keys) -> (output, grown cache); values are the keys."""


def attend(query: Tensor, keys: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)


def heads_first(query: Tensor, cache: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    cache = torch.cat((cache, new.transpose(1, 2)), 2)
    return attend(query, cache), cache


def tokens_first(query: Tensor, cache: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    cache = torch.cat((cache, new), 1)
    return attend(query, cache.transpose(1, 2)), cache


def folded(query: Tensor, cache: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    cache = torch.cat((cache, new.flatten(2)), 1)
    return attend(query, cache.unflatten(-1, (H, D)).transpose(1, 2)), cache


SHAPES = {heads_first: (B, H, L, D), tokens_first: (B, L, H, D), folded: (B, L, H * D)}


def token_dim(cache: Tensor) -> int:
    return 2 if cache.dim() == 4 and cache.shape[1] == H else 1


def a_turn(cache: Tensor) -> Tensor:
    """Tokens that an eager prefill appends."""
    dim = token_dim(cache)
    return torch.cat((cache, torch.randn_like(cache.narrow(dim, 0, 7))), dim)


def rows_taken_out(cache: Tensor) -> Tensor:
    return cache[torch.arange(len(cache)) != 1]


def a_row_joins(cache: Tensor) -> Tensor:
    return torch.cat((cache, cache[:1].flip(-1)))


def beams_in_another_order(cache: Tensor) -> Tensor:
    return cache.index_select(0, torch.arange(len(cache)).flip(0))


def drafts_taken_back(cache: Tensor) -> Tensor:
    dim = token_dim(cache)
    return cache.narrow(dim, 0, cache.shape[dim] - 2)


def a_copy(cache: Tensor) -> Tensor:
    return cache.clone()


UNCOPIED = [(heads_first, each) for each in (a_turn, drafts_taken_back, a_copy)]
"""Caches whose past is copied once after an event. Others are concatenated, as by PyTorch."""
EVENTS = (a_turn, rows_taken_out, a_row_joins, beams_in_another_order, drafts_taken_back, a_copy)


class Loop:
    """Decoding with an event after every few steps; notes graphs, outputs and copies."""

    def __init__(self, step: Step, event: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        self.step, self.event, self.dtype = step, event, dtype
        self.copies: list[int] = []
        """Number of buffers that the steps after each event went through."""

    def run(self, function: Step) -> list[Tensor]:
        """Decode through `function` and return all outputs, and the last cache."""
        torch.manual_seed(1)
        self.copies.clear()
        cache, outputs = torch.randn(SHAPES[self.step], dtype=self.dtype), []
        for turn in range(4):
            cache = self.event(cache) if turn else cache
            places = set()
            for _ in range(STEPS):
                new = torch.randn(len(cache), 1, H, D, dtype=self.dtype)
                query = torch.randn(len(cache), H * G, 1, D, dtype=self.dtype)
                output, cache = function(query, cache, new)
                outputs.append(output)
                places.add(cache.untyped_storage().data_ptr())
            self.copies.append(len(places))
        return [*outputs, cache]

    def compiled(self, **given: Any) -> tuple[list[Tensor], int]:
        """Return outputs through a backend, and the number of graphs that it compiled."""
        torch._dynamo.reset()
        counters.clear()
        outputs = self.run(torch.compile(self.step, **given))
        return outputs, counters["stats"]["unique_graphs"]


OFTEN = [
    (heads_first, drafts_taken_back), (heads_first, rows_taken_out), (tokens_first, a_row_joins),
    (folded, a_turn),
]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "event"),
    [
        pytest.param(step, event, marks=() if (step, event) in OFTEN else pytest.mark.thorough)
        for step in SHAPES
        for event in EVENTS
    ],
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.thorough)]
)
def test_an_event_costs_what_it_costs_other_backends(
    step: Step, event: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    loop = Loop(step, event, dtype)
    dense, graphs = loop.compiled(backend="aot_eager")
    got, _ = loop.compiled(backend="lychee", options={**SMALL, "budget": 10**4})
    band = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, dense, atol=band, rtol=band)
    with lychee_compile.record() as recorder:
        got, ours = loop.compiled(backend="lychee", options=SMALL)
    assert torch.equal(got[-1], dense[-1])
    assert ours <= graphs
    assert len(recorder.calls) == 4 * STEPS
    assert max(int(call.tokens_read.max()) for call in recorder.calls) == SMALL["budget"]
    if (step, event) in UNCOPIED:
        assert loop.copies == [1] * 4
