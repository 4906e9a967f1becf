"""Every policy through torch.compile, on a decoder with static and growing caches."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, StaticKV, TinyDecoder, decode_beside
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile.kernels.policies.registry import find_policy, policy_names

POLICIES = sorted(policy_names())
OFTEN = ("lychee", "quest", "lycheecluster")
"""Policies that CI also decodes with a budget for everything: ranges, pages, and two levels."""
OPTIONS = {"budget": 40, "sinks": 2, "recent": 8, "chunk": (2, 4), "dense_layers": 0}


def least_budget(policy: str) -> int:
    """Return the budget from which on a policy can choose a group."""
    levels = find_policy(policy).levels
    return 0 if levels is None else levels.least_budget(OPTIONS["sinks"], OPTIONS["recent"])


@pytest.mark.parametrize(
    ("policy", "growing"),
    [
        pytest.param(
            each, growing, marks=pytest.mark.thorough if growing or each not in OFTEN else ()
        )
        for each in POLICIES
        for growing in (False, True)
        if not (each == "lychee" and growing)
    ]
    + [("lychee", True)],
)
@torch.no_grad()
def test_decoding_with_a_budget_for_everything_is_dense(policy, growing, uncompiled_graphs):
    torch.manual_seed(0)
    size, model = max(160, least_budget(policy) + 60), TinyDecoder().eval()
    options = {**OPTIONS, "policy": policy, "budget": size - 1}
    compiled = torch.compile(model, backend="lychee", options=options)
    ids = torch.randint(0, VOCABULARY, (1, size - 57))
    for got, expected in decode_beside(model, compiled, ids, size - 60, size, growing):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert counters["lychee"]["sparse"] > 0


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_every_policy_decodes_within_a_small_budget(policy, uncompiled_graphs):
    torch.manual_seed(0)
    budget = max(OPTIONS["budget"], least_budget(policy))
    model, cache = TinyDecoder().eval(), StaticKV.empty(2, budget + 360)
    options = {**OPTIONS, "policy": policy, "budget": budget}
    compiled = torch.compile(model, backend="lychee", options=options)
    model(torch.randint(0, VOCABULARY, (2, budget + 340)), cache=cache)
    with lychee_compile.record(mass=True) as recorder:
        for ids in torch.randint(0, VOCABULARY, (4, 2, 1)):
            assert compiled(ids, cache=cache).isfinite().all()
    assert len(recorder.calls) == 8
    for call in recorder.calls:
        assert ((call.tokens_read > 16) & (call.tokens_read <= budget)).all()
        assert (call.mass > 0).all()


@pytest.mark.parametrize(("given_layers", "sparse"), [(None, 0), (1, 1), (0, 2)])
@torch.no_grad()
def test_a_policy_leaves_the_layers_dense_that_its_paper_does(
    given_layers, sparse, uncompiled_graphs
):
    model, cache = TinyDecoder().eval(), StaticKV.empty(1, 200)
    options = {**OPTIONS, "policy": "quest", "dense_layers": given_layers}
    compiled = torch.compile(model, backend="lychee", options=options)
    compiled(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    sites = lychee_compile.reports()[-1].sites
    assert [site.decision == "sparse" for site in sites] == [False] * (2 - sparse) + [True] * sparse
    assert all(site.decision == "sparse" or site.by_design for site in sites)
