"""A budget that widens until what is missed is proved small enough."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, KINDS, configs, heads, masks, random, seeds

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.adaptive import certified_attention
from lychee_compile.kernels.reference.attention import dense_attention
from lychee_compile.kernels.reference.operands import Operands

EPSILONS = (0.01, 0.1, 0.5)
NARROW = IndexConfig(budget=64, sinks=4, recent=16)


def index_of(key):
    """Return an index of one row of keys, for a budget of 64."""
    index = make_index(1, 1, key.shape[3], NARROW, key.device)
    index.extend(key, torch.tensor([key.shape[2]]))
    return index


def missed(query, key, mask, scale, selection):
    """Return the true share of the mass that a selection misses, in float64: [B, Hq, Tq]."""
    group = query.shape[1] // key.shape[1]
    scores = scale * query.double() @ key.repeat_interleave(group, 1).double().transpose(-1, -2)
    read = selection.token_mask().repeat_interleave(group, 1)
    share = (scores + mask.bias).softmax(-1).masked_fill(read, 0)
    return share.sum(-1).nan_to_num(0.0)


@given(
    heads, configs(), seeds, st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(20, 130),
    st.integers(1, 3), st.sampled_from(EPSILONS), st.sampled_from([0.2, 2.0]), st.data(),
)  # fmt: skip
def test_no_head_misses_more_than_it_may(
    shape, config, seed, kind, dtype, tokens, query_len, epsilon, scale, data
):
    key, query = shape.keys(kind, seed, tokens, dtype), shape.queries(seed, query_len, dtype)
    value = shape.keys("gaussian", seed + 1, tokens, dtype)
    mask = data.draw(masks(shape, query_len, tokens, dtype))
    index = shape.index(config)
    index.extend(key, torch.full((shape.batch,), tokens))
    operands = Operands(query, key, value, mask.tensor, scale)
    output, selection, share = certified_attention(index, operands, config.budget, epsilon)
    assert output.isfinite().all()
    assert (share <= epsilon).all()
    true = missed(query, key, mask, scale, selection)
    assert (true <= share.double()).all()


def peaked(tokens):
    """One key that a query is after, among many that are nothing to it."""
    key = 0.1 * random(0, 1, 1, tokens, 16)
    query = random(1, 1, 1, 1, 16)
    key[0, 0, 300] = 20 * query[0, 0, 0]
    return key, query


def test_a_peaked_attention_is_certified_within_its_budget():
    key, query = peaked(2000)
    index = index_of(key)
    _, selection, share = certified_attention(index, Operands(query, key, key, None, 1.0), 64, 0.1)
    assert selection.token_mask()[..., 300].all()
    assert int(selection.token_mask().sum()) <= 64
    assert float(share.max()) < 0.01


def test_a_flat_attention_reads_as_much_as_it_takes_and_no_more():
    key, query = random(0, 1, 1, 2000, 16), torch.zeros(1, 1, 1, 16)
    index = index_of(key)
    _, selection, share = certified_attention(index, Operands(query, key, key, None, 1.0), 64, 0.25)
    assert 1500 <= int(selection.token_mask().sum()) <= 1500 + 20
    assert float(share.max()) <= 0.25


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_keys_that_are_not_finite_give_the_dense_answer(bad):
    key, query = peaked(500)
    key[0, 0, 100, 3] = bad
    index = index_of(key)
    output, _, _ = certified_attention(index, Operands(query, key, key, None, 1.0), 64, 0.1)
    dense = dense_attention(Operands(query, key, key, None, 1.0))
    assert torch.equal(output.isnan(), dense.isnan())
