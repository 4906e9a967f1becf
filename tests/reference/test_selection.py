"""Selections hold what they must and nothing that they must not, for any index, mask and budget."""

from __future__ import annotations

import dataclasses
import functools

import torch
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
    make_keys,
    masks,
    random,
    seeds,
)
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import Selection, select
from lychee_compile.kernels.reference.visible import visible_keys

SINGLE = Heads(1, 1, 1, 4)


@dataclasses.dataclass
class Case:
    """An index over part of a cache, and a query that reads it."""

    shape: Heads
    config: IndexConfig
    key: Tensor
    query: Tensor
    mask: Mask
    start: Tensor
    end: Tensor
    budget: int | None

    @functools.cached_property
    def index(self) -> KVIndex:
        """Over the keys from `start` to `end`, each int64 [B]."""
        index = self.shape.index(self.config)
        index.restart(self.start > 0, self.start)
        index.extend(self.key, self.end)
        return index

    def with_keys(self, key: Tensor) -> Case:
        """Return the same case with other keys."""
        return dataclasses.replace(self, key=key)

    def select(self, **given_: object) -> Selection:
        budget = given_.get("budget", self.budget)
        inputs = ScoreInputs(self.query, self.key, self.key.shape[2], self.mask.tensor, 0.3)
        return bounded_select(self.index, inputs, budget)

    def seen(self):
        """Return slots that some head of a group or another may see: bool [B, Tq, L]."""
        return self.mask.seen.any(1)


@st.composite
def cases(draw, **fixed):
    shape, config = draw(heads), draw(configs(**fixed))
    tokens, query_len = draw(st.integers(1, 130)), draw(st.integers(1, 4))
    query_len = min(query_len, tokens)
    dtype, kind, seed = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS)), draw(seeds)
    key = shape.keys(kind, seed, tokens, dtype)
    mask = draw(masks(shape, query_len, tokens, dtype))
    end = draw(lengths(shape.batch, tokens) | st.just(torch.full((shape.batch,), tokens)))
    start = torch.minimum(draw(lengths(shape.batch, draw(st.sampled_from([0, 20])))), end)
    budget = draw(st.one_of(st.integers(1, 60), st.just(config.budget), st.none()))
    query = shape.queries(seed, query_len, dtype)
    return Case(shape, config, key, query, mask, start, end, budget)


def always_read(case):
    """Return sinks, recent tokens and what is in no chunk, of the slots seen: bool [B, Tq, L]."""
    seen, index = case.seen(), case.index
    kv_len = seen.shape[-1]
    slot = torch.arange(kv_len)
    first = seen.long().argmax(-1, keepdim=True)
    end = kv_len - seen.flip(-1).long().argmax(-1, keepdim=True)
    loose = (slot < index.start[:, None]) | (slot >= index.tail[:, None])
    kept = (slot < first + case.config.sinks) | (slot >= end - case.config.recent) | loose[:, None]
    outside = first < index.start[:, None, None]
    return seen & (kept | outside)


@given(cases())
def test_a_selection_holds_what_it_must_and_nothing_hidden(case):
    selection = case.select()
    token = selection.tokens()
    read, seen, always = selection.token_mask(), case.seen(), always_read(case)
    assert read.shape == (case.shape.batch, case.shape.kv_heads, *seen.shape[1:])
    assert not (read & ~seen[:, None]).any(), "a hidden position"
    assert (read >= always[:, None]).all(), "a sink, recent or loose token is missing"
    assert torch.equal((token >= 0).sum(-1), read.sum(-1)), "a duplicate"
    assert token.max() < case.key.shape[2]
    count = read.sum(-1)
    if case.budget is not None:
        most = always.sum(-1).clamp(min=case.budget)[:, None]
        assert (count <= most).all(), "over the budget"
    if case.budget is None:
        assert torch.equal(read, seen[:, None].expand_as(read))


@given(cases())
def test_a_budget_for_everything_reads_everything(case):
    read = case.select(budget=case.key.shape[2]).token_mask()
    assert torch.equal(read, case.seen()[:, None].expand_as(read))


@given(cases())
def test_runs_do_not_overlap(case):
    selection = case.select()
    start, size = selection.run_start, selection.run_length
    end = torch.where(size > 0, start + size, 0)
    order = torch.where(size > 0, start, case.key.shape[2]).argsort(-1)
    begin = torch.where(size > 0, start, case.key.shape[2]).gather(-1, order)
    assert (end.gather(-1, order)[..., :-1] <= begin[..., 1:]).all()


@given(cases())
def test_selection_is_repeatable_and_reads_no_garbage(case):
    """Twice the same, also where the slots that no query sees hold other keys."""
    first = case.select()
    stale = case.key.clone()
    hidden = ~case.seen().any(1)
    beyond = torch.arange(stale.shape[2]) >= case.end[:, None]
    stale[(hidden & beyond)[:, None].expand(stale.shape[:3])] = torch.nan
    second = case.with_keys(stale).select()
    assert torch.equal(first.run_start, second.run_start)
    assert torch.equal(first.run_length, second.run_length)
    assert torch.equal(first.log_unread_bound, second.log_unread_bound)


@given(configs(overfetch=1), st.sampled_from(KINDS), seeds, st.integers(1, 60))
def test_a_row_that_fits_the_budget_reads_everything_whatever_the_others_need(
    config, kind, seed, length
):
    shape, end = Heads(2, 2, 2, 4), torch.tensor([130, length])
    key, index = shape.keys(kind, seed, 130), shape.index(config)
    index.extend(key, end)
    mask = (torch.arange(130) < end[:, None])[:, None, None]
    inputs = ScoreInputs(10 * shape.queries(seed, 1), key, 130, mask, 1.0)
    selection = select(index, inputs, length)
    assert selection.token_mask()[1, ..., :length].all()


@given(cases(), seeds)
def test_a_row_chooses_whatever_is_in_the_others(case, seed):
    """Built at once, as clusters depend on when they are made; so many channels do not tie."""
    shape, tokens = dataclasses.replace(case.shape, head_dim=33), case.key.shape[2]
    query = shape.queries(seed, case.query.shape[2])
    case = dataclasses.replace(case, shape=shape, query=query)
    key = case.shape.keys("gaussian", tokens, tokens, case.key.dtype)
    others = case.shape.keys("topics", seed, tokens, case.key.dtype)
    read = case.with_keys(key).select().token_mask()
    for row in range(case.shape.batch):
        mixed = others.clone()
        mixed[row] = key[row]
        assert torch.equal(case.with_keys(mixed).select().token_mask()[row], read[row])


def test_a_budget_that_is_always_read_leaves_no_room_to_choose():
    config = IndexConfig(budget=6, sinks=2, recent=4, chunk=(1, 2), flat_tokens=0)
    key, query = random(0, 1, 2, 60, 16), random(1, 1, 4, 1, 16)
    index = make_index(1, 2, 16, config, key.device)
    index.extend(key, torch.tensor([60]))
    index.complete(key)
    read = select(index, ScoreInputs(query, key, 60, None, 0.25), 6).token_mask()
    slot = torch.arange(60)
    assert torch.equal(read[0, 0, 0], (slot < 2) | (slot >= 56))


def oracle_case(budget, seed):
    """One head and query over 600 tokens of topics, one of them the query's own."""
    config = IndexConfig(
        budget=budget, sinks=4, recent=16, chunk=(4, 8), cluster_chunks=4, flat_tokens=0
    )
    topic = torch.arange(600) // 12 % 10
    directions = random(seed, 10, 32)
    key = (directions[topic] + 0.3 * random(seed + 1, 600, 32)).view(1, 1, 600, 32)
    query = 3 * directions[seed % 10].view(1, 1, 1, 32)
    return config, key, query


@given(st.integers(0, 10_000))
def test_the_topic_asked_for_is_found(seed):
    """A tenth of the tokens hold nearly all the mass: a fifth of them read must hold most of it."""
    config, key, query = oracle_case(120, seed)
    index = dataclasses.replace(SINGLE, head_dim=32).index(config)
    index.extend(key, torch.tensor([600]))
    inputs = ScoreInputs(query, None, 600, None, 32**-0.5)
    read = select(index, inputs, config.budget).token_mask()[0, 0, 0]
    share = (query @ key.transpose(-1, -2))[0, 0, 0].mul(32**-0.5).softmax(-1)
    best = share.topk(120).values.sum()
    assert share[read].sum() >= 0.8 * best


@given(st.data(), heads, seeds)
def test_visible_keys_describe_the_mask(data, shape, seed):
    kv_len = data.draw(st.integers(1, 40))
    query_len = data.draw(st.integers(1, min(3, kv_len)))
    dtype = data.draw(st.sampled_from(DTYPES))
    mask = data.draw(masks(shape, query_len, kv_len, dtype))
    visible = visible_keys(mask.tensor, shape.batch, query_len, kv_len, mask.seen.device)
    seen = mask.seen.any(1)
    slots = [[row.nonzero().flatten() for row in each] for each in seen]
    assert visible.first.tolist() == [[int(slot[0]) for slot in each] for each in slots]
    assert visible.end.tolist() == [[int(slot[-1]) + 1 for slot in each] for each in slots]
    edges = torch.randint(
        kv_len + 1, (2, shape.batch, query_len, 7), generator=torch.Generator().manual_seed(seed)
    )
    begin, end = edges.sort(0).values
    slot = torch.arange(kv_len)
    inside = (slot >= begin[..., None]) & (slot < end[..., None]) & seen[:, :, None]
    assert torch.equal(visible.tokens_within(begin, end), inside.sum(-1))
    if visible.bias is not None:
        bias = visible.bias.double().expand(*mask.bias.shape)
        assert torch.equal(bias[mask.seen], mask.bias[mask.seen])
    else:
        assert not mask.bias[mask.seen].any()


def test_a_query_that_sees_nothing():
    visible = visible_keys(torch.zeros(2, 5, dtype=torch.bool), 1, 2, 5, torch.device("cpu"))
    assert visible.first.tolist() == [[5, 5]]
    assert visible.end.tolist() == [[0, 0]]
    index = SINGLE.index(IndexConfig(budget=None))
    key = make_keys("gaussian", 0, (1, 1, 100, 4), torch.float32)
    index.extend(key, torch.tensor([100]))
    hidden = torch.zeros(1, 1, 1, 100, dtype=torch.bool)
    inputs = ScoreInputs(key[:, :, :1], key, 100, hidden, 1.0)
    selection = bounded_select(index, inputs, 90)
    assert not selection.token_mask().any()
    assert (selection.log_unread_bound == -torch.inf).all()


@given(
    st.sampled_from([0, 65536]),
    st.integers(0, 399),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    seeds,
)
def test_a_key_that_is_not_finite_is_read(flat_tokens, place, bad, seed):
    """So that the output is what dense attention makes of it, NaN for one."""
    config = IndexConfig(budget=60, sinks=2, recent=16, chunk=(4, 8), flat_tokens=flat_tokens)
    key = random(seed, 1, 1, 400, 4)
    key[0, 0, place, seed % 4] = bad
    index = SINGLE.index(config)
    index.extend(key, torch.tensor([400]))
    inputs = ScoreInputs(random(seed + 1, 1, 1, 1, 4), key, 400, None, 1.0)
    selection = select(index, inputs, 60)
    assert selection.token_mask()[..., place].all()
    assert int(selection.token_mask().sum()) <= 60
