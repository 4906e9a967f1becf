"""State that policies keep from step to step, and none that they do not keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from plain_caches import SCALE, SMALL_CLUSTERS, SmallClusterKV, between, cut, plain, shares
from strategies import CPU, random
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
        if waiting >= (SMALL_CLUSTERS.window if clusters else SMALL_CLUSTERS.size):
            count = waiting // SMALL_CLUSTERS.size
            fresh, margin = k_means(key[done:end], count)
            clusters += [[done + token for token in cluster] for cluster in fresh]
            done, closest = end, min(closest, margin)
    return clusters, closest


def clusterkv(steps):
    """ClusterKV's choice after growing in so many equal steps."""

    def method(keys, queries, config, start):
        keys = keys[:, start:]
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
        assert len(index.label[index.label >= 0].unique()) == clusters


def test_hisa_looks_into_64_blocks_of_128_tokens():
    """The last block is not full: it is among them, as the first one is."""
    index, length = index_class("hisa")(1, 1, 8, IndexConfig(budget=2048), CPU), 80 * 128 - 5
    key = random(0, 1, 1, 80 * 128, 8)
    key[..., :128, :] *= 0.01  # no token of the first block matters: looking is not reading
    index.extend(key, torch.tensor([length]))
    inputs = ScoreInputs(random(1, 1, 1, 1, 8), key, length, None, SCALE)
    question = asked_of(index, inputs, 2048)
    within = index.within(question)
    blocks = F.pad(within, (0, 5)).view(80, 128).any(1)
    assert blocks.sum() == 64
    assert blocks[0]
    assert blocks[-1]
    read = select(index, inputs, 2048).token_mask()
    assert read.sum() == 2048
    assert not (read & ~within)[..., :-1].any()


def asked_of(index, inputs, budget):
    """Return the question that `select` puts to the index."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        choose = index.choose
        patch.setattr(index, "choose", lambda question: asked.append(question) or choose(question))
        select(index, inputs, budget)
    return asked[0]


@pytest.mark.parametrize("site", ["", "layers.0"])
def test_tokenselect_votes_at_every_step(site):
    """The best token is read as soon as it is no longer a recent one, however alike queries are."""
    key = random(1, 1, 1, 64, 8)
    index = index_class("tokenselect")(1, 1, 8, IndexConfig(sinks=2, recent=2), CPU)
    query = random(2, 1, 1, 1, 8)
    index.extend(key, torch.tensor([60]))
    mask = (torch.arange(64) < 60)[None, None, None]
    select(index, ScoreInputs(query, key, 64, mask, SCALE), 10, site)
    key[:, :, 60] = 50 * query[:, :, 0]
    index.extend(key, torch.tensor([64]))
    inputs = ScoreInputs(1.1 * query, key, 64, None, SCALE)
    assert select(index, inputs, 10, site).token_mask()[0, 0, 0, 60]
