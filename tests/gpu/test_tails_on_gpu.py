"""Kernels over a quantised past with a tail in full precision; they need a CUDA device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stored_caches import Sizes
from tailed_caches import Growing, Sliced, Static
from torch import Tensor
from torch._dynamo.utils import counters

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("seeded"),
]

SIZES = Sizes(batch=2, heads=2, group=4, slots=2048, head_dim=128, dtype=torch.bfloat16)
BEGIN = 1536
KINDS = [
    (Growing, "groups of tokens", "bytes"),
    (Static, "groups of tokens", "4 bits"),
    (Static, "4 bits", "bytes"),
    (Sliced, "bytes", "bytes"),
]


class Steps:
    """Steps of decoding over a cache on a GPU, beside what eager makes of them."""

    def __init__(self, kind: Any, keys: str, values: str, budget: int, **options: Any) -> None:
        self.cache = kind(keys, values, SIZES, BEGIN)
        self.cache.past = [each.cuda() for each in self.cache.past]
        self.cache.tail = [each.cuda() for each in self.cache.tail]
        self.copies = options.get("mode") == "reduce-overhead"
        options = {"budget": budget, "sinks": 4, "recent": 16, "dense_layers": 0, **options}
        self.run = torch.compile(self.cache.attend, backend="lychee", options=options)

    def step(self, query: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return a step's output and that of eager PyTorch."""
        torch.compiler.cudagraph_mark_step_begin()
        given = SIZES.query() if query is None else query, SIZES.keys(1), SIZES.keys(1)
        new, cache = [each.cuda() for each in given], self.cache
        other = copy.deepcopy(cache)
        want = other.take(other.attend(*new, *other.given()))
        held = cache.given()
        for each in held if isinstance(cache, Growing) else ():
            torch._dynamo.maybe_mark_dynamic(each, 2)
        found = self.run(*new, *held)
        if self.copies:  # the next replay overwrites what this one has returned
            found = [each.clone() for each in found] if isinstance(found, tuple) else found.clone()
        return cache.take(found), want


def distance(pair: tuple[Tensor, Tensor]) -> float:
    got, want = (each.float() for each in pair)
    assert bool(got.isfinite().all())
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("kind", "keys", "values"), KINDS)
def test_a_cache_that_is_read_in_full_is_dense(
    kind: Any, keys: str, values: str, mode: str
) -> None:
    """The tail moves to the past on the way."""
    steps = Steps(kind, keys, values, SIZES.slots, mode=mode)
    for _ in range(12):
        assert distance(steps.step()) < 0.02
    assert counters["lychee"]["sparse"] >= 1


@pytest.mark.parametrize(("kind", "keys", "values"), KINDS)
def test_few_keys_are_read_and_one_that_changes_is_found(kind: Any, keys: str, values: str) -> None:
    steps = Steps(kind, keys, values, 64)
    assert sum(distance(steps.step()) > 0.1 for _ in range(7)) >= 3
    steps.step()  # moves the tail
    query = SIZES.query()
    wide = 6 * query[:, ::4].float().expand(-1, -1, 8, -1)
    fresh = steps.cache.ways[0].store(wide)
    for held, part in zip(steps.cache.past, fresh, strict=False):
        count = part.shape[2]
        held[:, :, 40 * count : 41 * count] = part.cuda()
    assert distance(steps.step(query)) < 0.1
