"""Generated kernels over a quantised past with a tail in full precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import triton_interpreter
from stored_caches import Sizes
from tailed_caches import Growing, Sliced, Static, Tailed
from torch import Tensor

import lychee_compile
from lychee_compile.kernels.gpu import lifecycle

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]

BEGIN, SLOTS = 64, 96
OPTIONS = {"budget": 32, "sinks": 4, "recent": 8, "chunk": (2, 4)}


class Steps:
    """Steps over a cache through kernels, beside what eager makes of them."""

    def __init__(self, cache: Tailed) -> None:
        self.cache = cache
        self.run = torch.compile(cache.attend, backend="lychee", options=OPTIONS)

    def step(self, query: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s, cache = self.cache.sizes, self.cache
        new = s.query() if query is None else query, s.keys(1), s.keys(1)
        other = copy.deepcopy(cache)
        want = other.take(other.attend(*new, *other.given()))
        held = cache.given()
        for each in held if isinstance(cache, Growing) else ():
            torch._dynamo.maybe_mark_dynamic(each, 2)
        return cache.take(self.run(*new, *held)), want


def is_sparse(pair: tuple[Tensor, Tensor]) -> bool:
    return float((pair[0] - pair[1]).norm() / pair[1].norm()) > 0.02


@pytest.mark.parametrize(
    "kind",
    [Growing, Static, pytest.param(Sliced, marks=pytest.mark.thorough)],
)
def test_keys_are_chosen_until_the_tail_moves(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after a move reads all keys, or finds the one that outweighs all others."""
    monkeypatch.setattr(lifecycle, "LOOK", 1)  # the host looks at every call
    s = Sizes(group=1, slots=SLOTS)
    keys = "bytes" if kind is Sliced else "groups of tokens"
    steps = Steps(kind(keys, "bytes", s, BEGIN))
    sparse = [is_sparse(steps.step()) for _ in range(7)]
    assert sum(sparse) >= 3
    steps.step()  # moves the tail
    query = s.query()
    fresh = steps.cache.ways[0].store(6 * query.expand(-1, -1, 8, -1))
    for held, part in zip(steps.cache.past, fresh, strict=False):
        count = part.shape[2]
        held[:, :, 24 // 8 * count : 24 // 8 * count + count] = part
    got, want = steps.step(query)
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)
    for report in lychee_compile.reports():
        assert [site.decision for site in report.sites] == ["sparse"]
