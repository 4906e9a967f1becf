"""Generated kernels over a prefix that rows share, interpreted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import shared_prefixes
import torch
import triton_interpreter
from kernel_steps import upkeep_of
from shared_prefixes import SLOTS, B, Static, caches, new, prefix
from torch._dynamo.utils import counters

import lychee_compile

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]

SHAPE = {"sinks": 4, "recent": 16, "chunk": (2, 4)}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def steps(made: Any, options: dict[str, Any], held: list[Any], count: int = 1) -> list[Any]:
    """Return pairs of what three compiled steps give and what the model gives."""
    step = torch.compile(made, backend="lychee", options=options)
    found = []
    for pos in range(20, 23):
        query, *fresh = new(count)
        copies, position = [each.clone() for each in held], torch.arange(pos, pos + count)
        expected = made(query, *copies, position, *fresh)
        found.append((step(query, *held, position, *fresh), expected))
    return found


@pytest.mark.parametrize(
    ("model", "budget"),
    [
        (shared_prefixes.Padded, 36),
        pytest.param(shared_prefixes.WithSink, 56, marks=pytest.mark.thorough),
        pytest.param(Static, 36, marks=pytest.mark.thorough),
    ],
)
def test_a_prefix_that_is_read_whole_is_dense(model: Any, budget: int) -> None:
    """Own keys, 40 slots, are read by an exact kernel, or by one that selects among them."""
    held = [*prefix(count=100), *caches(SLOTS)]
    for got, expected in steps(model(), {"budget": budget, **SHAPE}, held):
        torch.testing.assert_close(got, expected, **CLOSE)
    assert counters["lychee"]["sparse"] == 1


@pytest.mark.thorough
def test_exact_steps_read_the_prefix_once() -> None:
    held = [*prefix(count=100), *caches(SLOTS)]
    for got, expected in steps(shared_prefixes.Padded(), {"budget": None}, held):
        torch.testing.assert_close(got, expected, **CLOSE)
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "exact"
    assert list(Path(os.environ["LYCHEE_CACHE_DIR"]).rglob("decode_exact_f32_g6_*_part*.py"))


@pytest.mark.thorough
def test_drafts_are_dense_before_there_is_an_index() -> None:
    held = [*prefix(count=300), *caches(SLOTS)]
    got, expected = steps(Static(), {"budget": 40, **SHAPE}, held, count=2)[0]
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("policy", ["lychee", pytest.param("quest", marks=pytest.mark.thorough)])
def test_each_row_chooses_through_one_index(policy: str) -> None:
    count = 210
    keys, values = torch.randn(1, 2, count, 16), torch.eye(count + SLOTS)[:count]
    own = torch.eye(count + SLOTS)[count:].expand(B, 2, -1, -1).clone()
    held = [keys, values.expand(1, 2, -1, -1).clone(), caches(SLOTS)[0], own]
    made, options = Static(), {"budget": 34, "policy": policy, "dense_layers": 0, **SHAPE}
    step = torch.compile(made, backend="lychee", options=options)
    for pos in range(20, 23):
        query, key, _ = new()
        value = held[3][:, :, pos : pos + 1].clone()
        given = torch.tensor([pos]), key, value
        dense = made(query, *(each.clone() for each in held), *given)
        got = step(query, *held, *given)
        if pos == 20:  # the first step has no index yet
            torch.testing.assert_close(got, dense, **CLOSE)
            continue
        read = got > 0
        chosen = read[..., :count].unflatten(1, (2, 2)).any(2).sum(-1)
        assert bool((chosen <= 34).all())
        assert bool((chosen > 20).all())
        rest = dense * read
        torch.testing.assert_close(got, rest / rest.sum(-1, keepdim=True), **CLOSE)
    if policy == "lychee":
        upkeep = upkeep_of(keys)
        assert upkeep is not None
        assert upkeep.index.layout.batch == 1


@pytest.mark.parametrize(
    ("budget", "policy"), [(56, "lychee"), pytest.param(36, "quest", marks=pytest.mark.thorough)]
)
def test_a_prefix_of_any_length_is_dense_before_there_is_an_index(budget: int, policy: str) -> None:
    made, options = Static(), {"budget": budget, "policy": policy, "dense_layers": 0, **SHAPE}
    step = torch.compile(made, backend="lychee", options=options)
    for count in (300, 290):
        held = [*prefix(count=count), *caches(SLOTS)]
        for each in held[:2]:
            torch._dynamo.mark_dynamic(each, 2)
        query, *fresh = new()
        copies, position = [each.clone() for each in held], torch.tensor([20])
        expected = made(query, *copies, position, *fresh)
        torch.testing.assert_close(step(query, *held, position, *fresh), expected, **CLOSE)
        again = step(query, *held, position, *fresh)
        assert not torch.allclose(again, expected, atol=1e-4)
    assert counters["lychee"]["sparse"] == 1
