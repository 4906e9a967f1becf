"""Generated kernels over caches behind memory keys, interpreted."""

from __future__ import annotations

from typing import Any

import memory_keys
import pytest
import torch
import triton_interpreter
from kernel_steps import upkeep_of
from memory_keys import MEMORY, B, D, G, Growing, H, Static, new
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]

SLOTS, LENGTH, STEPS = 128, 100, 3
SMALL = {"budget": 40, "sinks": 4, "recent": 16, "chunk": (2, 4)}
EVERYTHING = {**SMALL, "budget": SLOTS - 1}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def caches() -> tuple[Tensor, Tensor]:
    return torch.randn(B, H, SLOTS, D), torch.randn(B, H, SLOTS, memory_keys.DV)


def in_place(made: Any, step: Any, held: tuple[Tensor, Tensor], pos: int) -> tuple[Tensor, Tensor]:
    """Return what the compiled step gives and what the model gives."""
    query, *fresh = new()
    copies = [each.clone() for each in held]
    position = torch.tensor([pos])
    expected = made(query, *copies, position, *fresh)
    return step(query, *held, position, *fresh), expected


@pytest.mark.parametrize(
    "model", [memory_keys.StaticHidden, pytest.param(Static, marks=pytest.mark.thorough)]
)
def test_a_static_cache_that_is_read_in_full_is_dense(model: Any) -> None:
    made, held = model(), caches()
    step = torch.compile(made, backend="lychee", options=EVERYTHING)
    for pos in range(LENGTH, LENGTH + STEPS):
        torch.testing.assert_close(*in_place(made, step, held, pos), **CLOSE)
    assert counters["lychee"]["sparse"] == 1
    assert upkeep_of(held[0]) is not None


@pytest.mark.parametrize(
    "model",
    [
        memory_keys.Biased,
        memory_keys.WithSink,
        pytest.param(memory_keys.OfAllHeads, marks=pytest.mark.thorough),
        pytest.param(memory_keys.TokensFirst, marks=pytest.mark.thorough),
    ],
)
def test_a_growing_cache_that_is_read_in_full_is_dense(model: Any) -> None:
    made, held = model(), caches()
    step = torch.compile(made, backend="lychee", options={**EVERYTHING, "budget": SLOTS + 8})
    for _ in range(STEPS + 1):
        query, *fresh = new()
        expected = made(query, *held, *fresh)[0]
        got, *held = step(query, *held, *fresh)
        torch.testing.assert_close(got, expected, **CLOSE)
    assert counters["lychee"]["sparse"] == 1


class Weights(Static):
    """Values of memory and cache are unit vectors: the output is the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(torch.eye(MEMORY + SLOTS)[:MEMORY].expand(H, -1, -1))


def test_memory_is_read_besides_the_budget() -> None:
    made, keys = Weights(), torch.randn(B, H, SLOTS, D)
    held = keys, torch.eye(MEMORY + SLOTS)[MEMORY:].expand(B, H, -1, -1).clone()
    step = torch.compile(made, backend="lychee", options=SMALL)
    for pos in range(LENGTH, LENGTH + STEPS):
        query, key, _ = new()
        value = held[1][:, :, pos : pos + 1].clone()
        given = torch.tensor([pos]), key, value
        dense = made(query, *(each.clone() for each in held), *given)
        got = step(query, *held, *given)
        if pos == LENGTH:  # the first step has no index yet
            torch.testing.assert_close(got, dense, **CLOSE)
            continue
        read = got > 0
        assert bool(read[..., :MEMORY].all())
        count = read[..., MEMORY:].unflatten(1, (H, G)).any(2).sum(-1)
        assert bool((count <= SMALL["budget"]).all())
        assert bool((count > SMALL["budget"] // 2).all())
        chosen = dense * read
        torch.testing.assert_close(got, chosen / chosen.sum(-1, keepdim=True), **CLOSE)


def test_what_is_exact_reads_memory_and_cache_by_one_kernel() -> None:
    made, held = Growing(), caches()
    step = torch.compile(made, backend="lychee", options={**SMALL, "policy": "oracle"})
    query, *fresh = new()
    torch.testing.assert_close(
        step(query, *held, *fresh)[0], made(query, *held, *fresh)[0], **CLOSE
    )
    (site,) = lychee_compile.reports()[-1].sites
    assert (site.decision, site.cache) == ("exact", "dynamic")
