"""Other uses of what is inside an attention, and memory that is written while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from region_steps import (
    BATCH,
    DIM,
    HEADS,
    NOT_FOLLOWED,
    SAME,
    SIZE,
    SPARSE,
    scores_are_used,
    weights_are_returned,
)
from tracing import Traced

import lychee_compile
from lychee_compile.passes.graph.dataflow import operator_key
from lychee_compile.passes.graph.region import Order, overwritten_before, region_between
from lychee_compile.passes.site import Site

START, STEPS = 140, 3
EVERYTHING = {"budget": SIZE - 1, "sinks": 2, "recent": 8, "chunk": (2, 4)}

Step = Callable[..., Any]
"""(query, key cache, value cache, new key, new value, position tensor) -> outputs."""


def decode(step: Step) -> list[Site]:
    """Compare compiled and eager steps over equal caches; return the sites of the last graph."""
    k, v = torch.randn(2, BATCH, HEADS, SIZE, DIM)
    k_eager, v_eager = k.clone(), v.clone()
    compiled = torch.compile(step, backend="lychee", options=EVERYTHING)
    for at in range(START, START + STEPS):
        q, k_new, v_new = torch.randn(3, BATCH, HEADS, 1, DIM)
        place = torch.tensor([at])
        got = compiled(q.clone(), k, v, k_new, v_new, place)
        expected = step(q.clone(), k_eager, v_eager, k_new, v_new, place)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close((k, v), (k_eager, v_eager), rtol=0, atol=1e-6)
    return lychee_compile.reports()[-1].sites


@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
@pytest.mark.parametrize("step", SAME, ids=lambda step: step.__name__)
def test_the_output_is_that_of_eager(step: Step, caplog) -> None:
    sites = decode(step)
    assert not [each for each in caplog.records if "unchanged" in each.message]
    decisions = [site.decision for site in sites]
    if step in SPARSE:
        assert decisions == ["sparse"]
    if step in NOT_FOLLOWED or step in (weights_are_returned, scores_are_used):
        assert "sparse" not in decisions


def test_a_region_is_what_lies_between() -> None:
    def function(q, k, v):
        scores = q @ k.mT
        other = scores.sum()
        return scores.softmax(-1) @ v, other

    gm = Traced(function, *torch.randn(3, 2, 4, 4)).gm
    order = Order(gm.graph)
    first, last = (node for node in order.nodes if operator_key(node) == "matmul")
    region = region_between(first, last, order)
    assert [operator_key(n) for n in order.nodes if n in region] == ["matmul", "softmax", "matmul"]


@pytest.mark.parametrize(
    ("write", "hurts"),
    [
        (lambda k, s: k.add_(1), True),
        (lambda k, s: k[1:].zero_(), True),
        (lambda k, s: k.mT.mul_(2), True),
        (lambda k, s: k.unbind(0)[0].mul_(2), True),
        (lambda k, s: k.diagonal(dim1=-2, dim2=-1).mul_(2), True),
        (lambda k, s: torch.add(s.sum(), k, out=k), True),
        (lambda k, s: k.clone().add_(1), False),
        (lambda k, s: s.add_(1), False),
        (lambda k, s: k + 1, False),
    ],
)
def test_a_write_after_the_read_is_seen(write: Callable[..., Any], hurts: bool) -> None:
    def function(q, k):
        scores = q @ k.mT
        write(k, scores)
        return scores.exp()

    traced = Traced(function, *torch.randn(2, 2, 4, 4))
    order = Order(traced.gm.graph)
    read = next(node for node in order.nodes if operator_key(node) == "matmul")
    last = next(node for node in order.nodes if operator_key(node) == "exp")
    assert overwritten_before(last, [(traced.inputs[1], read)], order) == hurts
