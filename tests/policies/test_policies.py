"""Properties of every policy, whatever the cache, the mask, the budget and the history."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_caches import SMALL_CLUSTERS, SmallClusterKV, SmallHISA
from strategies import (
    CPU,
    DTYPES,
    KINDS,
    GrownCache,
    Heads,
    Mask,
    heads,
    histories,
    lengths,
    masks,
    seeds,
)
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import index_class, policy_names
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import Selection, select

SMALL = {"hisa": SmallHISA, "clusterkv": SmallClusterKV}
POLICIES = sorted(policy_names())
HISTORY_FREE = ["hisa", "oracle", "quest", "streaming", "tokenselect"]
"""Policies whose index depends on the keys alone, not on how they arrived."""
BOUNDING = ["lychee", "quest"]

configs = st.builds(
    IndexConfig,
    sinks=st.integers(0, 5),
    recent=st.integers(1, 9),
    chunk=st.sampled_from([(1, 2), (3, 3), (2, 6)]),
    boundaries=st.sampled_from(["similarity", "fixed"]),
    flat_tokens=st.sampled_from([0, 65536]),
    cluster_chunks=st.integers(1, 3),
)


def small(policy: str) -> type[KVIndex]:
    """Return the policy, with groups that a short cache holds many of."""
    return SMALL.get(policy, index_class(policy))


@dataclasses.dataclass
class Case:
    """A cache that is indexed in part, and queries under a mask."""

    shape: Heads
    config: IndexConfig
    key: Tensor
    query: Tensor
    mask: Mask
    start: Tensor
    end: Tensor
    budget: int
    written: int
    """Tokens of each row that the last step wrote; 0: the index is used without steps."""

    def index(self, policy: str, key: Tensor | None = None) -> KVIndex:
        shape = self.shape
        index = small(policy)(shape.batch, shape.kv_heads, shape.head_dim, self.config, CPU)
        index.restart(self.start > 0, self.start)
        index.extend(self.key if key is None else key, self.end)
        if self.written:
            index.fresh = torch.maximum(self.end - self.written, self.start)
        return index

    def select(self, index: KVIndex, budget: int | None, key: Tensor | None = None) -> Selection:
        key = self.key if key is None else key
        inputs = ScoreInputs(self.query, key, key.shape[2], self.mask.tensor, 0.3)
        return select(index, inputs, budget)

    def check(self, index: KVIndex, read: Tensor, fills: bool = True) -> None:
        """Check that only visible keys are read, those always read included, within the budget.

        With `fills` no room is left in the budget.
        """
        seen = self.mask.seen.any(1)
        slot, tokens = torch.arange(seen.shape[-1]), seen.shape[-1]
        first = seen.long().argmax(-1, keepdim=True)
        end = tokens - seen.flip(-1).long().argmax(-1, keepdim=True)
        sinks, recent = index.always_read_of(self.budget)
        unknown = (slot < index.start[:, None]) | (slot >= index.unread[:, None])
        always = (slot < first + sinks) | (slot >= end - recent) | unknown[:, None]
        always = seen & (always | (first < index.start[:, None, None]))
        assert not (read & ~seen[:, None]).any(), "a hidden slot"
        assert (read >= always[:, None]).all(), "a sink, a recent or an unknown token is missing"
        most = always.sum(-1).clamp(min=self.budget)[:, None]
        assert (read.sum(-1) <= most).all(), "over the budget"
        fits = (end - first <= (self.budget if fills else 0))[:, None]
        assert (read | ~fits | ~seen[:, None]).all(), "room left"


@st.composite
def cases(draw):
    shape, config, seed = draw(heads), draw(configs), draw(seeds)
    tokens = draw(st.integers(1, 130))
    query_len = min(draw(st.integers(1, 4)), tokens)
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS))
    key = shape.keys(kind, seed, tokens, dtype)
    mask = draw(masks(shape, query_len, tokens, dtype))
    end = draw(st.just(torch.full((shape.batch,), tokens)) | lengths(shape.batch, tokens))
    start = torch.minimum(draw(lengths(shape.batch, draw(st.sampled_from([0, 20])))), end)
    query = shape.queries(seed, query_len, dtype)
    budget, written = draw(st.integers(1, 70)), draw(st.integers(0, 3))
    return Case(shape, config, key, query, mask, start, end, budget, written)


def strange(key: Tensor, seed: int) -> Tensor:
    """Return the keys, some of their numbers infinite or none at all."""
    which = torch.randint(0, 40, key.shape, generator=torch.Generator().manual_seed(seed))
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(key.dtype)
    return torch.where(which < 3, odd[which.clamp(max=2)], key)


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases())
def test_a_policy_reads_what_it_must_and_nothing_hidden(policy, case):
    index = case.index(policy)
    selection = case.select(index, case.budget)
    read, token = selection.token_mask(), selection.tokens()
    case.check(index, read)
    assert torch.equal((token >= 0).sum(-1), read.sum(-1)), "a slot twice"


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases(), seed=seeds)
def test_keys_that_are_not_numbers_break_nothing(policy, case, seed):
    key = strange(case.key, seed)
    index = case.index(policy, key)
    case.check(index, case.select(index, case.budget, key).token_mask())


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases())
def test_a_budget_for_everything_reads_everything(policy, case):
    index, seen = case.index(policy), case.mask.seen.any(1)[:, None]
    for budget in (None, case.key.shape[2]):
        read = case.select(index, budget).token_mask()
        assert torch.equal(read, seen.expand_as(read))


@pytest.mark.parametrize("policy", BOUNDING)
@given(case=cases(), scale=st.sampled_from([1.0, 0.125, -0.5]), odd=st.none() | seeds)
def test_no_score_is_above_its_bound(policy, case, scale, odd):
    key = case.key if odd is None else strange(case.key, odd)
    index = case.index(policy, key)
    rows = case.query.reshape(case.shape.batch, case.shape.kv_heads, -1, case.shape.head_dim)
    bound = index.score_bound(rows.float(), scale)
    if bound is None:
        assert (index.tail == index.start).all(), "no bound of keys that are known"
        return
    slots = min(bound.shape[-1], key.shape[2])
    score = scale * rows.double() @ key[:, :, :slots].double().transpose(-1, -2)
    slot = torch.arange(slots)
    known = (slot >= index.start[:, None]) & (slot < index.tail[:, None])
    known = known[:, None, None].expand_as(score)
    unbounded = bound[..., :slots] >= torch.finfo(torch.float32).max
    assert (~known | unbounded | (score <= bound[..., :slots].double())).all()


@pytest.mark.parametrize("policy", HISTORY_FREE)
@given(shape=heads, config=configs, kind=st.sampled_from(KINDS), data=st.data())
def test_a_policy_chooses_after_any_history_as_a_fresh_one(policy, shape, config, kind, data):
    cache = GrownCache(shape, config, kind, torch.float32)
    cache.index = small(policy)(shape.batch, shape.kv_heads, shape.head_dim, config, CPU)
    query = shape.queries(3, 2)
    for place, (step, numbers) in enumerate(data.draw(histories(shape.batch), "history")):
        cache.apply(step, numbers, place)
        if int(cache.end.max()) == 0:
            continue
        fresh = small(policy)(shape.batch, shape.kv_heads, shape.head_dim, config, CPU)
        fresh.restart(cache.index.start > 0, cache.index.start)
        fresh.extend(cache.key, cache.end)
        slot = torch.arange(cache.key.shape[2])
        mask = (slot >= cache.index.start[:, None]) & (slot < cache.end[:, None])
        inputs = ScoreInputs(query, cache.key, len(slot), mask[:, None, None], 0.3)
        cache.index.extend(cache.key, cache.end)
        read = select(cache.index, inputs, 30).token_mask()
        assert torch.equal(read, select(fresh, inputs, 30).token_mask())


@given(shape=heads, config=configs, data=st.data())
def test_clusters_hold_each_token_once_and_the_mean_of_theirs(shape, config, data):
    cache = GrownCache(shape, config, "gaussian", torch.float32)
    cache.index = index = SmallClusterKV(shape.batch, shape.kv_heads, shape.head_dim, config, CPU)
    rewound = False  # clusters keep their centroids then
    for place, (step, numbers) in enumerate(data.draw(histories(shape.batch), "history")):
        cache.apply(step, numbers, place)
        index.extend(cache.key, cache.end)
        rewound |= step != "grow"
        for row in range(shape.batch):
            first, tail = int(index.start[row]) + config.sinks, int(index.tail[row])
            assert int(cache.end[row]) - max(tail, first) < SMALL_CLUSTERS.window
            for head in range(shape.kv_heads):
                label = index.label[row, head]
                assert (label[first:tail] >= 0).all()
                assert (label[:first] < 0).all()
                assert (label[max(first, tail) :] < 0).all()
                for number in [] if rewound else label[first:tail].unique().tolist():
                    members = (label == number).nonzero()[:, 0]
                    mean = cache.key[row, head, members].mean(0)
                    torch.testing.assert_close(index.columns["centroid"][row, head, number], mean)


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_grow_with_the_context_and_not_faster(policy):
    index = index_class(policy)(1, 2, 64, IndexConfig(), CPU)
    few, many = (index.bytes_per_step(tokens, 1024) for tokens in (1 << 14, 1 << 18))
    assert 0 <= few <= many <= 32 * max(few, 1)
    assert many <= 2 * 64 * (1 << 18), "more than all keys"


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases(), coverages=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_a_share_to_cover_takes_the_best_of_the_budget(policy, case, coverages):
    """The larger the share, the more is read; the whole is all that the budget allows.

    "tokenselect" keeps choices and weighs KV heads by the share that is left to choose from.
    """
    reads = []
    for coverage in (*sorted(coverages), 1.0, None):
        config = dataclasses.replace(case.config, coverage=coverage)
        index = dataclasses.replace(case, config=config).index(policy)
        reads.append(case.select(index, case.budget).token_mask())
        case.check(index, reads[-1], fills=coverage is None)
    for few, many in itertools.pairwise(reads):
        assert policy == "tokenselect" or not (few & ~many).any()
    assert torch.equal(*reads[-2:])


@given(case=cases(), coverage=st.floats(0.01, 0.999))
def test_no_more_tokens_are_read_than_it_takes_to_cover_the_share(case, coverage):
    """With one head, true scores and any number of tokens, the share is that of dense attention."""
    case = one_head(case)
    selection = voted(case, coverage)
    read, seen = selection.token_mask()[:, 0], case.mask.seen[:, 0]
    score = torch.einsum("btd,bld->btl", case.query[:, 0].float(), case.key[:, 0].float()) * 0.3
    bias = selection.visible.bias
    score = score if bias is None else score + bias[:, 0].float()
    share = score.double().masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    covered = (share * read).sum(-1)
    used_up = (read == voted(case, None).token_mask()[:, 0]).all(-1)
    assert (used_up | (covered >= coverage - 1e-4)).all(), "too little"
    always = voted(case, 1e-9).token_mask()[:, 0]
    chosen = read & ~always
    last = share.masked_fill(~chosen, torch.inf).amin(-1)
    assert (~chosen.any(-1) | (covered - last < coverage + 1e-4)).all(), "too much"


def voted(case, coverage):
    """Return what "tokenselect" chooses to cover a share, by true scores at every position."""
    config = dataclasses.replace(case.config, coverage=coverage)
    index = dataclasses.replace(case, config=config).index("tokenselect")
    index.similar = 2
    return case.select(index, case.budget)


def one_head(case):
    """Return the first query head and KV head of a case."""
    shape = dataclasses.replace(case.shape, kv_heads=1, group=1)
    tensor, seen = case.mask.tensor, case.mask.seen
    if tensor is not None:
        tensor = tensor[(None,) * (4 - tensor.dim())][:, :1]
    mask = dataclasses.replace(case.mask, tensor=tensor, seen=seen[:, :1])
    small_case = {"shape": shape, "key": case.key[:, :1], "query": case.query[:, :1], "mask": mask}
    return dataclasses.replace(case, **small_case)
