"""State that policies keep from step to step: clusters that never move, a choice that is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from plain_caches import SCALE, SmallClusterKV, best_tokens, between, cut, plain, shares
from strategies import CPU, Heads, random
from torch.nn.functional import cosine_similarity as cosine

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import index_class
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import select


def k_means(keys, count):
    """Return the tokens of each cluster of keys [N, D], by cosine, and the least margin."""
    size, label, margin = len(keys), [0] * len(keys), torch.inf
    centres = [keys[int((number + 0.5) * size / count)] for number in range(count)]
    for _ in range(10):
        likeness = torch.stack([cosine(keys, centre, dim=-1) for centre in centres], -1)
        if count > 1:
            best = likeness.topk(2, dim=-1).values
            margin = min(margin, (best[:, 0] - best[:, 1]).min().item())
        if likeness.argmax(-1).tolist() == label:
            break
        label = likeness.argmax(-1).tolist()
        members = [[token for token in range(size) if label[token] == c] for c in range(count)]
        centres = [keys[m].mean(0) if m else c for m, c in zip(members, centres, strict=True)]
    clusters = [[token for token in range(size) if label[token] == c] for c in range(count)]
    return [cluster for cluster in clusters if cluster], margin


def clusters_of(key, ends, sinks):
    """Return the clusters of one head when the row grows to each of the lengths `ends` in turn."""
    done, clusters, closest = sinks, [], torch.inf
    for end in ends:
        waiting = end - done
        if waiting >= (SmallClusterKV.window if clusters else SmallClusterKV.tokens_per_cluster):
            count = waiting // SmallClusterKV.tokens_per_cluster
            fresh, margin = k_means(key[done:end], count)
            clusters += [[done + token for token in cluster] for cluster in fresh]
            done, closest = end, min(closest, margin)
    return clusters, closest


def clusterkv(steps):
    """ClusterKV's choice after growing in so many equal steps."""

    def method(keys, queries, config):
        length = keys.shape[1]
        ends = [length * step // steps for step in range(1, steps + 1)]
        for key, query in zip(keys, queries, strict=True):
            clusters, margin = clusters_of(key, ends, config.sinks)
            assume(margin > 1e-5)
            waiting = length - max((max(each) + 1 for each in clusters), default=0)
            always, middle, room = between(length, config.sinks, max(waiting, 1), config.budget)
            inner = [[token for token in each if token in middle] for each in clusters]
            pairs = [pair for pair in zip(clusters, inner, strict=True) if pair[1]]
            tokens, margin = [], torch.inf
            if pairs:
                means = torch.stack([key[cluster].mean(0) for cluster, _ in pairs])
                ranks = shares(SCALE * query @ means.T).tolist()
                order = sorted(range(len(pairs)), key=lambda place: -ranks[place])
                tokens = [token for place in order for token in pairs[place][1]]
                sizes = torch.tensor([len(pairs[place][1]) for place in order]).cumsum(0).tolist()
                whole = sum(size <= room for size in sizes)
                margin = min(cut(ranks, whole), cut(ranks, whole + 1))
            yield [*always, *tokens[:room]], margin

    return method


@given(plain(tokens=200), st.sampled_from([1, 2, 5, 40]))
def test_clusterkv_clusters_the_prompt_and_then_every_window(case, steps):
    shape = case.shape
    index = SmallClusterKV(shape.batch, shape.kv_heads, shape.head_dim, case.config, CPU)
    index.restart(case.start > 0, case.start)
    for step in range(1, steps + 1):
        index.extend(case.key, case.start + (case.end - case.start) * step // steps)
    case.check(case.read_from(index), clusterkv(steps))


def test_clusterkv_has_the_sizes_of_its_paper():
    index = index_class("clusterkv")(1, 1, 8, IndexConfig(), CPU)
    key = random(0, 1, 1, 1200, 8)
    for end, tail, clusters in ((816, 816, 10), (1135, 816, 10), (1136, 1136, 14)):
        index.extend(key, torch.tensor([end]))
        assert index.tail.tolist() == [tail]
        assert len(index.cluster[index.cluster >= 0].unique()) == clusters


def test_hisa_looks_into_64_blocks_of_128_tokens():
    index = index_class("hisa")(1, 1, 8, IndexConfig(), CPU)
    key = random(0, 1, 1, 80 * 128, 8)
    index.extend(key, torch.tensor([80 * 128]))
    inputs = ScoreInputs(random(1, 1, 1, 1, 8), key, 80 * 128, None, SCALE)
    read = select(index, inputs, 2048).token_mask()
    assert read.sum() == 2048
    blocks = read.view(80, 128).any(1)
    assert blocks.sum() == 64
    assert blocks[0]
    assert blocks[-1]


class Remembered:
    """TokenSelect over one row, step by step."""

    def __init__(self):
        self.choices = {}

    def ask(self, site, keys, query, begin, end, room):
        """Return the tokens chosen of [begin, end) for the query [Hq, D] over keys [Hq, L, D]."""
        if site in self.choices:
            earlier, tokens = self.choices[site]
            alike = cosine(query.flatten(), earlier.flatten(), dim=0).item()
            assume(abs(alike - 0.9) > 1e-4)
            if alike >= 0.9 and len(tokens) == room:
                return tokens
        scores = SCALE * (keys[:, begin:end] @ query[..., None])[..., 0]
        tokens, margin = best_tokens(list(range(begin, end)), shares(scores).tolist(), room)
        assume(margin > 1e-5)
        if site:
            self.choices[site] = (query, tokens)
        return tokens


SINKS, RECENT = 2, 3
sites, steps = st.sampled_from(["", "a", "b"]), st.sampled_from([0.0, 0.2, 9])
asked = st.tuples(st.just("ask"), st.tuples(sites, st.sampled_from([14, 14, 20])), steps)
grown = st.tuples(st.just("grow"), st.integers(0, 1), st.integers(1, 6))
rewound = st.tuples(st.just("rewind"), st.integers(0, 1), st.integers(1, 20))
restarted = st.tuples(st.just("restart"), st.integers(0, 1), st.integers(0, 3))


@given(st.lists(st.one_of(asked, asked, asked, grown, rewound, restarted), max_size=12))
def test_tokenselect_keeps_a_choice_while_queries_are_alike(events):
    shape = Heads(batch=2, kv_heads=2, group=2, head_dim=8)
    config = IndexConfig(sinks=SINKS, recent=RECENT)
    index = index_class("tokenselect")(2, 2, 8, config, CPU)
    key, query = shape.keys("gaussian", 0, 120), random(9, 2, 4, 1, 8)
    start, end, rows = torch.tensor([0, 0]), torch.tensor([40, 30]), [Remembered(), Remembered()]
    index.extend(key, end)
    for number, (what, which, size) in enumerate(events):
        if what == "ask":
            query = query + size * random(number, 2, 4, 1, 8)
            slot = torch.arange(120)
            mask = ((slot >= start[:, None]) & (slot < end[:, None]))[:, None, None]
            site, budget = which
            inputs = ScoreInputs(query, key, 120, mask, SCALE)
            read = select(index, inputs, budget, site).token_mask()
            for row in range(2):
                begin, stop = int(start[row]), int(end[row])
                always, middle, room = between(stop - begin, SINKS, RECENT, budget)
                tokens = [begin + token for token in always]
                if len(middle) > room:
                    wide = key[row].double().repeat_interleave(2, 0)
                    low, high = begin + middle[0], begin + middle[-1] + 1
                    chosen = rows[row].ask(site, wide, query[row, :, 0].double(), low, high, room)
                else:
                    chosen = [begin + token for token in middle]
                for head in range(2):
                    assert set(read[row, head, 0].nonzero()[:, 0].tolist()) == {*tokens, *chosen}
        elif what == "grow":
            end[which] += size
            index.extend(key, end)
        elif what == "rewind":
            end[which] = max(int(end[which]) - size, int(start[which]) + 1)
            index.truncate(end)
            rows[which].choices.clear()
        else:
            start[which] = min(size, int(end[which]) - 1)
            index.restart(torch.arange(2) == which, start)
            index.extend(key, end)
            rows[which].choices.clear()


@pytest.mark.parametrize("site", ["", "layers.0"])
def test_tokenselect_reads_the_new_best_token_only_where_it_does_not_keep_a_choice(site):
    key = random(1, 1, 1, 64, 8)
    index = index_class("tokenselect")(1, 1, 8, IndexConfig(), CPU)
    query = random(2, 1, 1, 1, 8)
    budget = 3 * 16 + index.config.recent
    index.config = IndexConfig(budget=budget, sinks=2, recent=2)
    index.extend(key, torch.tensor([60]))
    mask = (torch.arange(64) < 60)[None, None, None]
    select(index, ScoreInputs(query, key, 64, mask, SCALE), 10, site)
    key[:, :, 60] = 50 * query[:, :, 0]
    index.extend(key, torch.tensor([64]))
    inputs = ScoreInputs(1.1 * query, key, 64, None, SCALE)
    read = select(index, inputs, 10, site).token_mask()
    assert bool(read[0, 0, 0, 60]) == (site == "")
