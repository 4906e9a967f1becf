"""Sparse attention: dense attention where everything is read, with a true certificate where not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    KINDS,
    Heads,
    Mask,
    bounded_select,
    configs,
    heads,
    lengths,
    masks,
    random,
    seeds,
)
from torch import Tensor

from lychee_compile.functional import sparse_attention
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.attention import attend, dense_attention
from lychee_compile.kernels.reference.operands import Operands, ScoreInputs
from lychee_compile.kernels.reference.scores import rows_at
from lychee_compile.kernels.reference.selection import Selection, select

FACTORS = (1.0, 0.125, 0.02, -0.4)


@dataclass
class Case:
    """The operands of an attention over an indexed cache."""

    shape: Heads
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    scale: float
    selection: Selection

    def scores(self) -> Tensor:
        """Scaled, biased and masked, float64 [B, Hq, Tq, L]."""
        key = self.key.double().repeat_interleave(self.shape.group, 1)
        return self.scale * self.query.double() @ key.transpose(-1, -2) + self.mask.bias

    def read(self) -> Tensor:
        """Return slots read that the query head sees: bool [B, Hq, Tq, L]."""
        read = self.selection.token_mask().repeat_interleave(self.shape.group, 1)
        return read & self.mask.seen


@st.composite
def cases(draw, everything=False, dtypes=DTYPES):
    shape, config = draw(heads), draw(configs(policy="lychee") if everything else configs())
    tokens, dtype = draw(st.integers(1, 120)), draw(st.sampled_from(dtypes))
    query_len, seed = min(draw(st.integers(1, 4)), tokens), draw(seeds)
    key = shape.keys(draw(st.sampled_from(KINDS)), seed, tokens, dtype)
    value_dim = draw(st.sampled_from([1, 4, 5, 16]))
    value = random(seed + 5, shape.batch, shape.kv_heads, tokens, value_dim).to(dtype)
    mask = draw(masks(shape, query_len, tokens, dtype))
    query = shape.queries(seed, query_len, dtype)
    index = shape.index(config)
    index.extend(key, draw(lengths(shape.batch, tokens)))
    scale = draw(st.sampled_from(FACTORS))
    budget = draw(st.integers(tokens, tokens + 9) | st.none()) if everything else config.budget
    inputs = ScoreInputs(query, key, tokens, mask.tensor, scale)
    selection = bounded_select(index, inputs, budget)
    return Case(shape, query, key, value, mask, scale, selection)


def eager_attention(query, key, value, bias, scale):
    """Hand-written attention in the operands' own precision: [B, Hq, Tq, Dv]."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    score = scale * query @ key.transpose(-1, -2) + bias.to(query.dtype)
    return score.softmax(-1) @ value


def rounding_band(case):
    """Return the error that rounding of scores and output may cause: [B, Hq, Tq, 1]."""
    work = torch.promote_types(case.query.dtype, torch.float32)
    reach = case.query.double().norm(dim=-1) * case.key.double().norm(dim=-1).amax()
    reach = abs(case.scale) * reach + case.mask.bias.masked_fill(~case.mask.seen, 0).abs().amax(-1)
    in_scores = 2 * (case.query.shape[-1] + 8) * torch.finfo(work).eps * (1 + reach)
    in_output = 2 * torch.finfo(case.query.dtype).eps
    return ((in_scores.expm1() + in_output) * case.value.double().abs().amax())[..., None]


@given(cases(everything=True))
def test_reading_everything_is_dense_attention(case):
    """The output is as near to float64 as eager attention in its dtype, or as rounding explains."""
    operands = (case.query, case.key, case.value)
    output = sparse_attention(*operands, case.selection)
    exact = eager_attention(*(each.double() for each in operands), case.mask.bias, case.scale)
    assert output.shape == exact.shape
    assert output.dtype == case.query.dtype
    wrong = (output.double() - exact).abs()
    band = rounding_band(case)
    eager = (eager_attention(*operands, case.mask.bias, case.scale).double() - exact).abs()
    assert (wrong <= torch.maximum(eager.nan_to_num(0.0), band)).all()
    dense = dense_attention(Operands(*operands, case.mask.tensor, case.scale)).double()
    assert ((output.double() - dense).abs() <= (dense - exact).abs() + band).all()


@given(cases())
def test_sparse_attention_is_attention_over_what_is_read(case):
    """The selection as a mask of dense attention in float64."""
    operands = (case.query, case.key, case.value)
    given_ = Operands(*operands, case.mask.tensor, case.scale)
    output, log_total = attend(given_, case.selection)
    bias = case.mask.bias.masked_fill(~case.read(), -torch.inf)
    exact = eager_attention(*(each.double() for each in operands), bias, case.scale)
    reads_some = case.read().any(-1)
    assert ((output.double() - exact).abs() <= rounding_band(case))[reads_some].all()
    assert not output[~reads_some].any()
    total = case.scores().masked_fill(~case.read(), -torch.inf).logsumexp(-1)
    assert torch.equal(log_total == -torch.inf, ~reads_some)
    torch.testing.assert_close(
        log_total[reads_some].double(), total[reads_some], rtol=1e-4, atol=1e-2
    )


@given(cases())
def test_the_certificate_bounds_the_missed_share(case):
    _, certificate = sparse_attention(
        case.query, case.key, case.value, case.selection, return_certificate=True
    )
    assert certificate.shape == case.query.shape[:3]
    assert certificate.dtype == torch.float32
    scores, read = case.scores(), case.read()
    unread = scores.masked_fill(read, -torch.inf).logsumexp(-1)
    missed = (unread - scores.masked_fill(~read, -torch.inf).logsumexp(-1)).sigmoid()
    missed[unread == -torch.inf] = 0
    excess = missed - certificate.double()
    assert excess.max() <= 0, (missed.flatten()[excess.argmax()], case.query.dtype)
    assert ((certificate >= 0) & (certificate <= 1)).all()
    complete = (case.selection.token_mask() | ~case.mask.seen.any(1)[:, None]).all(-1)
    assert not certificate[complete.repeat_interleave(case.shape.group, 1)].any()
    assert (certificate > 0)[(case.mask.seen & ~read).any(-1)].all()


@given(cases(everything=True))
def test_everything_read_is_certified(case):
    _, certificate = sparse_attention(
        case.query, case.key, case.value, case.selection, return_certificate=True
    )
    assert not certificate.any()


@given(heads, seeds, st.integers(1, 200), st.floats(0.1, 10))
def test_a_larger_budget_misses_no_more(shape, seed, tokens, size):
    """The share that is read grows with the budget, and the certificate with what is missed."""
    key = shape.keys("topics", seed, tokens)
    config = IndexConfig(sinks=2, recent=8, chunk=(4, 8), cluster_chunks=2)
    index = shape.index(config)
    index.extend(key, torch.full((shape.batch,), tokens))
    query = size * shape.queries(seed, 1)
    operands = Operands(query, key, key, None, 1.0)
    log_read = [
        attend(operands, select(index, operands.score_inputs, budget))[1]
        for budget in (12, tokens // 2 + 12, tokens + 12)
    ]
    assert (log_read[0] <= log_read[2] + 1e-4 * (1 + log_read[2].abs())).all()
    assert (log_read[1] <= log_read[2] + 1e-4 * (1 + log_read[2].abs())).all()


@given(heads, seeds, st.integers(1, 60), st.data())
def test_ragged_rows_equal_each_row_alone(shape, seed, tokens, data):
    """A budget for everything: each row is dense attention over its own tokens."""
    end = data.draw(lengths(shape.batch, tokens, least=1))
    key, query = shape.keys("common", seed, tokens), shape.queries(seed, 1)
    index = shape.index(IndexConfig(sinks=1, recent=4, chunk=(2, 4)))
    index.extend(key, end)
    mask = (torch.arange(tokens) < end[:, None])[:, None, None]
    operands = Operands(query, key, key, mask, 0.5)
    output = attend(operands, select(index, operands.score_inputs, tokens))[0]
    for row, length in enumerate(end.tolist()):
        own = key[row : row + 1, :, :length]
        dense = F.scaled_dot_product_attention(
            query[row : row + 1], own, own, scale=0.5, enable_gqa=True
        )
        torch.testing.assert_close(output[row : row + 1], dense, rtol=1e-4, atol=1e-4)


@given(heads, seeds, st.integers(1, 30))
def test_rows_are_taken_from_any_layout(shape, seed, tokens):
    tensor = shape.keys("gaussian", seed, tokens)
    slot = torch.randint(
        tokens, (shape.batch, shape.kv_heads, 2, 5), generator=torch.Generator().manual_seed(seed)
    )
    expected = torch.stack(
        [
            tensor[row, head, slot[row, head]]
            for row in range(shape.batch)
            for head in range(shape.kv_heads)
        ]
    )
    expected = expected.view(*slot.shape, shape.head_dim)
    strided = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat((tensor, tensor), 2)[:, :, :tokens]
    for each in (tensor, strided, wide):
        assert torch.equal(rows_at(each, slot), expected)


@pytest.mark.parametrize("hidden", [False, -torch.inf])
def test_a_query_that_sees_nothing_gets_zeros_and_misses_nothing(hidden):
    shape = Heads(2, 2, 2, 4)
    key, query = shape.keys("gaussian", 0, 100), shape.queries(0, 1)
    index = shape.index(IndexConfig())
    index.extend(key, torch.tensor([100, 100]))
    mask = torch.zeros(2, 1, 1, 100) if hidden else torch.ones(2, 1, 1, 100, dtype=torch.bool)
    mask[1] = hidden
    selection = bounded_select(index, ScoreInputs(query, key, 100, mask, 0.5), 90)
    output, certificate = sparse_attention(query, key, key, selection, return_certificate=True)
    assert not output[1].any()
    assert not certificate[1].any()
    assert output[0].all()


@pytest.mark.parametrize("extra", [False, True])
def test_weights_add_up_to_one_far_below_zero(extra):
    """Next to biases of -1e9 float32 cannot hold the logarithm of the sum of weights."""
    shape = Heads(1, 1, 2, 4)
    key, query = shape.keys("gaussian", 0, 100), shape.queries(0, 1)
    index = shape.index(IndexConfig())
    index.extend(key, torch.tensor([100]))
    mask = torch.full((1, 1, 1, 100), -1e9)
    mask[..., ::3] = -2e9
    sink = torch.full((2, 1), -1e9) if extra else None
    operands = Operands(query, key, torch.ones(1, 1, 100, 3), mask, 0.5, None, sink)
    output = attend(operands, select(index, operands.score_inputs, 100))[0]
    assert (output <= 1).all()
    if not extra:
        torch.testing.assert_close(output, torch.ones_like(output))
