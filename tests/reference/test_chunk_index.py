"""The plain form of policies that read chunks: cuts, clusters, choices and what is forgotten."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import CPU, random

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.levels.declaration import Keep, Level, LevelStack, Pages
from lychee_compile.kernels.levels.expressions import dot, field, key, mean, query
from lychee_compile.kernels.levels.groups import Chunks, Clusters, TokenClusters
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.chunk_table import bounds_of
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import select


def made(policy, keys, chunk=(8, 16), **options):
    config = IndexConfig(policy=policy, chunk=chunk, **options)
    return make_index(len(keys), keys.shape[1], keys.shape[3], config, CPU)


def read(index, keys, end, budget):
    mask = (torch.arange(keys.shape[2]) < end[:, None])[:, None, None]
    queries = random(7, len(keys), 2 * keys.shape[1], 1, keys.shape[3])
    inputs = ScoreInputs(queries, keys, keys.shape[2], mask, 0.3)
    return select(index, inputs, budget).token_mask()


@given(
    ends=st.lists(st.integers(1, 120), min_size=2, max_size=6),
    chunk=st.sampled_from([(8, 16), (3, 7), (5, 5), (1, 4)]),
    seed=st.integers(0, 99),
)
def test_steps_and_rewinds_cut_as_all_at_once(ends, chunk, seed):
    keys = random(seed, 2, 2, 130, 16)
    index = made("dhsa", keys, chunk)
    for turn, last in enumerate(ends):
        end = torch.tensor([last, max(last - 5, 0)])
        index.truncate(torch.minimum(index.end, end // 2))
        keys[:, :, int(index.end.min()) :] = random(turn, 2, 2, 130 - int(index.end.min()), 16)
        index.truncate(index.end.amin().expand(2))
        index.extend(keys, end)
    once = made("dhsa", keys, chunk)
    once.extend(keys, end)
    count = min(index.span.shape[1], once.span.shape[1])
    assert torch.equal(index.span[:, :count], once.span[:, :count])
    assert not index.span[:, count:].any()
    assert torch.equal(index.tail, once.tail)
    low, length = bounds_of(once.span, chunk)
    for row in range(2):
        used = length[row] > 0
        assert used.any() or once.tail[row] == 0
        assert ((length[row][used] >= chunk[0]) & (length[row][used] <= chunk[1])).all()
        assert torch.equal(low[row][used], length[row][used].cumsum(0) - length[row][used])
        assert length[row].sum() == once.tail[row]
        assert once.end[row] - once.tail[row] <= chunk[1]


@pytest.mark.parametrize("policy", ["dhsa", "lycheecluster", "clusterkv"])
def test_a_choice_never_exceeds_the_budget_and_fills_it(policy):
    keys = random(0, 2, 2, 1300, 16)
    index, end = made(policy, keys, budget=150), torch.tensor([1280, 900])
    index.extend(keys, end)
    for budget in (100, 150, 400):
        assert (read(index, keys, end, budget).sum(-1) == budget).all()
    everything = read(index, keys, end, 1300).sum(-1)
    assert torch.equal(everything, end[:, None, None].expand_as(everything))


def test_chunks_that_came_since_are_looked_into_until_they_join_a_cluster():
    keys = random(1, 1, 2, 900, 16)
    index = made("lycheecluster", keys, budget=150)
    index.extend(keys, torch.tensor([500]))
    assert (index.above.labels[-1][:, :, index.span[0] > 0] >= 0).all()
    index.extend(keys, torch.tensor([600]))
    waiting = (index.above.labels[-1] < 0) & (index.span > 0)[:, None]
    assert waiting.any()
    index.extend(keys, torch.tensor([760]))
    assert not ((index.above.labels[-1] < 0) & (index.span > 0)[:, None]).any()
    for columns in index.above.columns:
        assert (columns["tokens"].sum(-1) == index.open[:, None]).all()


def test_a_bound_holds_for_every_key_of_a_chunk():
    keys, queries = random(2, 1, 2, 300, 16), random(3, 1, 2, 4, 16)
    index = made("lycheecluster", keys)
    index.extend(keys, torch.tensor([300]))
    bound = index.score_bound(queries, 0.5)
    scores = 0.5 * queries @ keys[:, :, : bound.shape[-1]].transpose(-1, -2)
    assert (scores <= bound).all()


def test_a_full_ring_reads_within_the_budget():
    keys = random(4, 1, 2, 120, 16)
    fixed = {"budget": 60, "sinks": 2, "recent": 16, "boundaries": "fixed"}
    index, end = made("lycheecluster", keys, **fixed), torch.tensor([120])
    index.extend(keys, end)
    index.close(keys, torch.tensor([True]))
    assert index.tail == 120 or 120 - index.tail < 8
    keys[:, :, 31] = 5.0
    index.rewrite(keys, torch.tensor([[31]]))
    once = made("lycheecluster", keys, **fixed)
    once.extend(keys, end)
    place = once.span[0] > 0
    for name, held in once.fields.items():
        mine = index.fields[name][:, :, : len(place)]
        torch.testing.assert_close(mine[:, :, place], held[:, :, place])
    assert (read(index, keys, end, 60).sum(-1) <= 60).all()


@pytest.mark.parametrize(
    "groups",
    [
        (Chunks(), Clusters()),
        (Clusters(),),
        (Pages(16), Chunks()),
        (Clusters(), TokenClusters(8, 8)),
    ],
)
def test_levels_that_do_not_fit_together_are_refused(groups):
    *above, _ = groups
    keeps = [*(Keep(2) for _ in above), None]
    levels = tuple(
        Level(each, dot(query, field(name)), {name: mean(key)}, keep=keep)
        for name, each, keep in zip("ab", groups, keeps, strict=False)
    )  # fmt: skip
    with pytest.raises(ValueError, match="levels of uneven groups are Clusters"):
        LevelStack(levels)


@pytest.mark.parametrize("groups", [(Clusters(), Chunks()), (TokenClusters(8, 8),)])
def test_heads_of_a_layer_do_not_vote_on_clusters_that_each_has_for_itself(groups):
    keeps = [*(Keep(2) for _ in groups[1:]), None]
    levels = tuple(
        Level(each, dot(query, field(name)), {name: mean(key)}, keep=keep)
        for name, each, keep in zip("ab", groups, keeps, strict=False)
    )
    assert LevelStack(levels).levels == levels
    with pytest.raises(ValueError, match="vote='layer' is for groups that all KV heads share"):
        LevelStack(levels, vote="layer")
