"""The plain form of policies that read chunks: cuts, clusters, choices and what is forgotten."""

from __future__ import annotations

from itertools import product
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from level_checks import below
from level_steps import noting
from strategies import CPU, random

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.levels.declaration import Keep, Level, LevelStack, Pages
from lychee_compile.kernels.levels.expressions import dot, field, key, mean, query
from lychee_compile.kernels.levels.groups import Chunks, Clusters, TokenClusters
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference import chunk_table, clustered
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [False, True], ids=["heads in turn", "tokens in turn"])
def test_chunks_have_the_moments_of_their_keys(monkeypatch, dtype, apart):
    """Keys may lie in memory head by head or token by token, and come in several parts."""
    monkeypatch.setattr(chunk_table, "CACHED_NUMBERS", 1000)
    keys = (3 + random(2, 2, 3, 200, 16)).to(dtype)
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2) if apart else keys
    index = made("lychee", keys)
    index.extend(keys, torch.tensor([200, 120]))
    index.complete(keys)
    low, length = bounds_of(index.span, (8, 16))
    for row, number in (index.span > 0).nonzero().tolist():
        begin = int(low[row, number])
        held = keys[row, :, begin : begin + int(length[row, number])].double()
        mean_key, variance = held.mean(1), held.var(1, correction=0)
        radius = (held - mean_key[:, None]).norm(dim=-1).amax(1, keepdim=True)
        expected = {"mean": mean_key, "variance": variance, "radius": radius}
        for name, value in expected.items():
            got = index.fields[f"chunk_{name}"][row, :, number].double()
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)


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


def by_masks(index, question, budget, room):
    """Return the slots of the best chunks, bool [B, Hkv, Tq, L], all groups scored and masked."""
    levels, looked = index.stack.levels, None
    if index.above.fitted_any:
        for level, columns, label in zip(
            levels, index.above.columns, index.above.labels, strict=False
        ):
            looked = below(index.keep(question, level, columns, looked, budget), label)
    groups = index.chunk_columns(None)
    rank, possible = index.ranks(question, levels[-1], groups, looked)
    order = rank.masked_fill(~possible, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    read = torch.zeros(*rank.shape[:3], question.visible.kv_len, dtype=torch.bool)
    for at in product(*map(range, rank.shape[:3])):
        left = int(room[at])
        for number in order[at].tolist():
            if possible[at][number] and left > 0:
                first = max(int(groups["first"][at[0], 0, number]), int(question.begin[at[::2]]))
                end = min(int(groups["end"][at[0], 0, number]), int(question.end[at[::2]]))
                end = min(end, first + left)
                read[at][first:end] = True
                left -= max(end - first, 0)
    return read


def slots_of(runs, kv_len):
    """Return the slots in runs [B, Hkv, Tq, R], bool [B, Hkv, Tq, L]."""
    slot = torch.arange(kv_len)
    start, length = (each[..., None] for each in runs)
    return ((slot >= start) & (slot < start + length)).any(-2)


EVENTS = st.sampled_from(["grow", "grow far", "rewind", "rewrite", "restart", "fit"])


@given(
    policy=st.sampled_from(["lycheecluster", "lychee"]),
    events=st.lists(EVENTS, min_size=1, max_size=5),
    query_len=st.integers(1, 3),
    units=st.sampled_from([2, 7, 64]),
    window=st.sampled_from([1000, 150]),
    seed=st.integers(0, 99),
)
def test_lists_of_children_choose_what_masks_over_all_groups_choose(
    policy, events, query_len, units, window, seed
):
    keys = random(seed, 2, 2, 700, 8)
    index = made(policy, keys, (2, 5), budget=30, coarse_units=units, sinks=2, recent=8)
    ends = torch.tensor([260, 190])
    with patch.object(clustered, "REFIT", 32):
        for turn, event in enumerate(["grow", *events]):
            if event.startswith("grow"):
                ends = (ends + (90 if event == "grow far" else 9)).clamp(max=700)
            elif event == "rewind":
                ends = ends - torch.tensor([13, 60])
                index.truncate(ends)
                keys[:, :, int(ends.min()) :] = random(turn, 2, 2, 700 - int(ends.min()), 8)
                index.truncate(ends.amin().expand(2))
            elif event == "rewrite":
                keys[:, :, 21:24] = random(turn, 2, 2, 3, 8)
                index.rewrite(keys, torch.tensor([[21, 22, 23], [23, -1, 22]]))
            elif event == "restart":
                index.restart(torch.tensor([False, True]), torch.tensor([0, 11]))
            index.extend(keys, ends)
            index.complete(keys)
            if event == "fit":
                index.fit(keys)
            question = asked(index, keys, ends, query_len, window)
            budget = 2 * question.room if policy == "lychee" else 30
            room = budget if policy == "lychee" else question.room
            runs = index.best_chunks(question, budget, room)
            assert torch.equal(slots_of(runs, 700), by_masks(index, question, budget, room))


def asked(index, keys, ends, query_len, window):
    """Return the question of a step at the end of each row, which sees a window of slots."""
    slot, at = torch.arange(700), ends[:, None] - query_len + torch.arange(query_len)
    mask = (slot <= at[..., None]) & (slot > at[..., None] - window)
    queries = random(7, 2, 4, query_len, 8)
    inputs, questions = ScoreInputs(queries, keys, 700, mask[:, None], 0.3), []
    with patch.object(index, "choose", noting(questions, index.choose)):
        select(index, inputs, 30)
    return questions[0]


@pytest.mark.parametrize("hidden", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("query_len", [1, 2])
def test_a_narrowed_choice_fills_its_budget_with_what_is_seen(hidden, query_len):
    keys, queries = in_topics(5, 2000, query_len)
    options = {"budget": 60, "sinks": 2, "recent": 16, "overfetch": 4}
    index, flat = made("lychee", keys, flat_tokens=0, **options), made("lychee", keys, **options)
    seen = torch.rand(2, 1, 1, 2000, generator=torch.Generator().manual_seed(0)) >= hidden
    inputs = ScoreInputs(queries, keys, 2000, seen, 0.25)
    for each in (index, flat):
        each.extend(keys, torch.tensor([2000, 2000]))
    read, best = (select(each, inputs, 60).token_mask() for each in (index, flat))
    assert torch.equal(read.sum(-1), best.sum(-1))
    assert not (read & ~seen).any()
    assert index.above.fitted_any is (hidden < 0.5), "too few of the slots are seen"
    assert not flat.above.fitted_any
    assert (read & best).sum() > 0.8 * best.sum()


def in_topics(seed, tokens, query_len=1):
    """Return keys [2, 2, L, 16] of topics that come and go, and queries after one of them."""
    topics = random(seed, 2, 2, 40, 16)
    turns = torch.randint(40, (tokens // 20 + 1,), generator=torch.Generator().manual_seed(seed))
    noise = 0.5 * random(seed + 1, 2, 2, tokens, 16)
    keys = 2 * topics[:, :, turns.repeat_interleave(20)[:tokens]] + 3 + noise
    queries = 3 * topics[:, :, :query_len].repeat_interleave(2, 1)
    return keys, queries + 0.5 * random(seed + 2, *queries.shape)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("events", [[], ["grow", "rewrite", "grow"]])
def test_a_narrowed_choice_is_as_good_as_one_of_all_tokens(seed, events):
    """Captured mass within 0.015 and output error within 5 % of those of a scan of all sketches."""
    keys, queries = in_topics(seed, 6000)
    values = random(seed + 9, 2, 2, 6000, 16)
    options = {"budget": 200, "sinks": 2, "recent": 16}
    indexes = [made("lychee", keys, flat_tokens=each, **options) for each in (0, 65536)]
    end = 6000 - 800 * events.count("grow")
    for index in indexes:
        index.extend(keys, torch.tensor([end, end]))
        index.complete(keys)
    for event in events:
        end += 800 * (event == "grow")
        if event == "rewrite":
            keys[:, :, 1000:1400] = keys[:, :, 3000:3400]
        for index in indexes:
            if event == "rewrite":
                index.rewrite(keys, torch.arange(1000, 1400).expand(2, -1))
            index.extend(keys, torch.tensor([end, end]))
    share = (queries.unflatten(1, (2, 2)) @ keys[:, :, None].mT / 4).softmax(-1)
    found = []
    for index in indexes:
        selection = select(index, ScoreInputs(queries, keys, 6000, None, 0.25), 200)
        chosen = share * selection.token_mask()[:, :, None]
        mass = chosen.sum(-1, keepdim=True)
        exact = share @ values[:, :, None]
        wrong = (chosen / mass) @ values[:, :, None] - exact
        found.append((float(mass.mean()), float((wrong.norm(dim=-1) / exact.norm(dim=-1)).mean())))
    (mass, error), (best_mass, least_error) = found
    assert best_mass < 0.99
    assert mass > best_mass - 0.015
    assert error < 1.05 * least_error + 0.01


def test_rows_of_few_tokens_and_of_little_room_are_not_narrowed():
    """A batch may have some of each; each row reads what it would read alone."""
    keys, _ = in_topics(8, 2000)
    index = made("lychee", keys, flat_tokens=500, budget=60, sinks=2, recent=16, overfetch=4)
    flat = made("lychee", keys, budget=60, sinks=2, recent=16)
    ends = torch.tensor([2000, 450])
    for each in (index, flat):
        each.extend(keys, ends)
    narrowed, scanned = (read(each, keys, ends, 60) for each in (index, flat))
    assert index.above.fitted_any
    assert (narrowed[1] ^ scanned[1]).sum() <= 4, "more than ties"
    assert not torch.equal(narrowed[0], scanned[0])
