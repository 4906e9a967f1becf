"""Prefill by the reference: dense if all is read, within the budget, true to its certificate."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from prefill_problems import Whole, prefill_config, prefill_configs, wholes
from strategies import DTYPES, KINDS, make_keys
from torch import Tensor

from lychee_compile.kernels.operators.observe import prefill_observers
from lychee_compile.kernels.operators.prefill import sparse_prefill
from lychee_compile.kernels.policies.registry import prefill_policy_names
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import (
    PrefillConfig,
    PrefillResult,
    prefill_attention,
)
from lychee_compile.kernels.reference.tiles import Sight, pair_bound, summarise, tile_sight
from lychee_compile.kernels.sizes import QUERY_TILE

POLICIES = prefill_policy_names()
policies = st.sampled_from(POLICIES)


@given(whole=wholes(), policy=policies)
def test_reading_everything_is_dense_attention(whole: Whole, policy: str):
    result = whole.attend(prefill_config(policy, whole.key.shape[2]), certify=True)
    assert bool((whole.read_rows(result) | ~whole.seen).all())
    assert result.output.dtype == whole.query.dtype
    far = (result.output.double() - whole.output()).abs().max().item()
    assert far <= whole.slack()
    assert bool((result.certificate == 0).all())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("query_len", "kv_len"), [(257, 257), (300, 40), (40, 300), (129, 1)])
def test_pytorch_agrees(policy: str, query_len: int, kv_len: int):
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, query_len, 8), torch.randn(2, 2, kv_len, 8)
    value = torch.randn(2, 2, kv_len, 3)
    for causal in (False, True):
        expected = F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=0.5, enable_gqa=True
        )
        config = prefill_config(policy, kv_len)
        result = prefill_attention(Operands(query, key, value, None, 0.5), config, causal)
        torch.testing.assert_close(result.output, expected, rtol=1e-4, atol=1e-5)


@given(whole=wholes(), config=prefill_configs(POLICIES))
def test_what_is_left_out_does_not_count(whole: Whole, config: PrefillConfig):
    result = whole.attend(config)
    read = whole.scores().masked_fill(~whole.read_rows(result), -torch.inf)
    total = read.logsumexp(-1)
    if whole.extra is not None:
        total = torch.logaddexp(total, whole.extra.double())
    nothing = total == -torch.inf
    weight = (read - total.masked_fill(nothing, 0)[..., None]).exp()
    group = weight.shape[1] // whole.value.shape[1]
    expected = weight @ whole.value.double().repeat_interleave(group, 1)
    assert (result.output.double() - expected).abs().max().item() <= whole.slack()
    assert bool((result.certificate == 1).all())
    known = ~nothing
    slack = whole.slack() + 1e-5 * total[known].abs()
    assert bool(((result.log_sum[known] - total[known]).abs() <= slack).all())
    assert bool((result.log_sum[nothing] == -torch.inf).all())


@given(whole=wholes(), config=prefill_configs(POLICIES))
def test_budgets_are_kept(whole: Whole, config: PrefillConfig):
    result = whole.attend(config)
    some, always = plain_sight(whole, config)
    assert not bool((always & ~result.read).any())
    assert not bool((result.read & ~some).any())
    counts = some.sum(-1)
    allowed = torch.full_like(counts, int(config.budget))
    if config.budget < 1:
        allowed = (config.budget * counts).ceil().long()
    allowed = torch.where(counts < config.shortest, counts, allowed)
    assert bool((result.read.sum(-1) <= torch.maximum(always.sum(-1), allowed)).all())


@given(whole=wholes(), config=prefill_configs(POLICIES))
def test_what_a_tile_sees_is_what_its_queries_see(whole: Whole, config: PrefillConfig):
    batch, _, query_len, _ = whole.query.shape
    device, kv_len = whole.query.device, whole.key.shape[2]
    sight = Sight(whole.mask, whole.causal, batch, query_len, kv_len, device, whole.order)
    got = tile_sight(sight, 0, query_len, config.sinks, config.recent)
    some, always = plain_sight(whole, config)
    assert torch.equal(got.some.expand_as(some), some)
    assert torch.equal(got.always.expand_as(always), always)
    if got.bias is None:
        assert bool((whole.bias == 0).all())
        return
    place = torch.arange(query_len) if whole.order is None else whole.order
    wide = got.bias.expand_as(some).double()
    for number, rows in enumerate(place.split(QUERY_TILE)):
        seen = whole.seen[:, :, rows]
        mean = (whole.bias[:, :, rows] * seen).sum(2) / seen.sum(2).clamp(min=1)
        torch.testing.assert_close(wide[:, :, number], mean, rtol=1e-4, atol=1e-4)


def plain_sight(whole: Whole, config: PrefillConfig) -> tuple[Tensor, Tensor]:
    """Return what tiles see and what they always read, by definition: bool [B, Hq, tiles, L]."""
    batch, heads, query_len, kv_len = whole.seen.shape
    place = list(range(query_len)) if whole.order is None else whole.order.tolist()
    tiles = [place[first : first + QUERY_TILE] for first in range(0, query_len, QUERY_TILE)]
    some = torch.zeros(batch, heads, len(tiles), kv_len, dtype=torch.bool)
    always = some.clone()
    for row, head, number in itertools.product(range(batch), range(heads), range(len(tiles))):
        seen = whole.seen[row, head, tiles[number]]
        looking = seen[seen.any(-1)]
        if len(looking) == 0:
            continue
        some[row, head, number] = looking.any(0)
        by_all = looking.all(0).nonzero().flatten().tolist()
        near = set(by_all[: config.sinks])
        near |= set(by_all[max(len(by_all) - config.recent, 0) :])
        if query_len == kv_len:
            reach = 0 if whole.order is not None else config.recent
            for position in tiles[number]:
                near |= set(range(position - reach, position + reach + 1))
        read = [n in near or n not in set(by_all) for n in range(kv_len)]
        always[row, head, number] = torch.tensor(read) & some[row, head, number]
    return some, always


def missed_share(whole: Whole, result: PrefillResult) -> Tensor:
    """Return each query's share of the softmax in keys that were not read, float64 [B, Hq, T]."""
    missed = whole.weights().masked_fill(whole.read_rows(result), 0).sum(-1)
    return missed.clamp(max=1)  # shares add up to 1 within rounding


@given(whole=wholes(), config=prefill_configs(POLICIES))
def test_the_certificate_holds(whole: Whole, config: PrefillConfig):
    result = whole.attend(config, certify=True)
    missed = missed_share(whole, result)
    assert bool((missed <= result.certificate.double()).all())
    assert bool((result.certificate <= 1).all())


@given(whole=wholes(), policy=policies, epsilon=st.sampled_from([0.5, 0.1, 1e-3]))
def test_epsilon_is_proved_everywhere(whole: Whole, policy: str, epsilon: float):
    result = whole.attend(prefill_config(policy, 0.05, 2, 4, epsilon))
    missed = missed_share(whole, result)
    assert result.certificate.max().item() <= epsilon
    assert missed.max().item() <= epsilon


def test_epsilon_does_not_read_everything():
    """Far pages of keys are proved to hold little, and queries that see nothing want no more."""
    torch.manual_seed(0)
    about = F.normalize(torch.randn(8), dim=0)
    query, key = 20 * about.expand(1, 1, 512, 8), 0.05 * torch.randn(1, 1, 512, 8)
    key = key + torch.where(torch.arange(512) % 256 < 32, 1.0, -1.0)[:, None] * about
    mask = (torch.arange(512) >= 5)[:, None].expand(-1, 512)
    config = prefill_config("lychee", 0.2, 2, 4, epsilon=0.05)
    result = prefill_attention(Operands(query, key, key, mask, 1.0), config)
    assert result.certificate.max() <= 0.05
    assert result.read.sum(-1).max() < 300


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_of_pairs_holds(kind: str):
    """All pairs of queries and keys in all pairs of nodes, over 100,000 of each kind."""
    pairs = 0
    numbers = itertools.product(DTYPES, KINDS, (1.0, -0.3))
    for seed, (dtype, query_kind, scale) in enumerate(numbers):
        size, dim = (16, 7)[seed % 2], (1, 4, 33)[seed % 3]
        queries = make_keys(query_kind, seed, (1, 2, 40, dim), dtype).float()
        keys = make_keys(kind, seed + 1, (1, 2, 45, dim), dtype).float()
        bound = pair_bound(summarise(queries, size), summarise(keys, size), scale)
        wide = bound.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :40, :45]
        true = scale * queries.double() @ keys.double().transpose(-1, -2)
        assert bool((true <= wide).all()), (dtype, query_kind, scale)
        pairs += true.numel()
    assert pairs >= 100_000


ARGUMENTS = {
    "policy": "lychee",
    "budget": 0.3,
    "coverage": None,
    "sinks": 2,
    "recent": 4,
    "epsilon": None,
}


@pytest.mark.parametrize("changed", [{}, {"policy": "s2o", "shortest": 1000}, {"epsilon": 0.1}])
def test_opcheck(changed):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 140, 8) for heads in (4, 2, 2))
    mask = torch.ones(140, 140, dtype=torch.bool).tril() if changed else None
    more = {**ARGUMENTS, "shortest": 0, **changed}
    operands = (query, key, value, mask, None, None, not changed, 0.3, 5.0)
    torch.library.opcheck(sparse_prefill, operands, {**more, "site": "here"})


def test_the_operator_is_the_specification_and_dense_below_the_shortest():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 300, 8) for heads in (4, 2, 2))
    calls = []
    prefill_observers.append(calls.append)
    try:
        rest = (None, None, None, True, 0.3, None, *ARGUMENTS.values())
        sparse = sparse_prefill(query, key, value, *rest, 300, "here")
        dense = sparse_prefill(query, key, value, *rest, 301, "here")
    finally:
        prefill_observers.remove(calls.append)
    config = prefill_config(**ARGUMENTS, shortest=300)
    operands = Operands(query, key, value, None, 0.3)
    expected = prefill_attention(operands, config, causal=True)
    assert torch.equal(sparse, expected.output)
    (call,) = calls
    assert (call.site, call.causal) == ("here", True)
    assert torch.equal(call.result.read, expected.read)
    assert expected.read.sum(-1).unique().tolist() == [90, 128, 256]
    exact = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(dense, exact, rtol=1e-4, atol=1e-5)
    assert (sparse - exact).abs().max() > 1e-3


def test_what_nobody_sees_may_hold_anything():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 300, 8) for _ in range(3))
    mask = (torch.arange(300) < 250).expand(300, -1)
    key[:, :, 250:], value[:, :, 250:] = torch.nan, torch.nan
    for policy in POLICIES:
        operands = Operands(query, key, value, mask, 1.0, softcap=3.0)
        result = prefill_attention(operands, prefill_config(policy), causal=True)
        assert bool(result.output.isfinite().all())
