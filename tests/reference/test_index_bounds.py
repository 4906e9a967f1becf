"""Whatever happens to a cache, its index covers the right tokens and its bounds are true."""

from __future__ import annotations

import dataclasses
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    GrownCache,
    Heads,
    configs,
    grown_caches,
    heads,
    histories,
    row_chunks,
    seeds,
)

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference import grouped as grouped_module
from lychee_compile.kernels.reference import tree as tree_module
from lychee_compile.kernels.reference.sketch import KeySketches

scales = st.sampled_from([1.0, 0.125, -0.5, 3.0])


def nodes_of(index, level):
    return index.chunks if level == "chunks" else getattr(index.tree, level)


def levels(index, row, head):
    """For each level its nodes, and under each node in use the tokens that it stands for."""
    chunks = [pair for pair in row_chunks(index, row) if pair[0] < int(index.tail[row])]
    under = {}
    for column, (start, size) in enumerate(chunks):
        cluster = int(index.tree.chunk_cluster[row, head, column])
        unit = int(index.tree.cluster_unit[row, head, cluster])
        for level, node in (("chunks", column), ("clusters", cluster), ("units", unit)):
            under.setdefault((level, node), []).extend(range(start, start + size))
    return under


def through(data, cache):
    """Take the cache through a history, stopping after every step; the seed of each step."""
    for place, (step, numbers) in enumerate(data.draw(histories(cache.shape.batch), "history")):
        cache.apply(step, numbers, place)
        yield place


@given(grown_caches(), scales, st.sampled_from([2, 2048]), st.data())
def test_every_score_is_within_the_bound_of_each_node_above(cache, scale, gathered, data):
    shape = cache.shape
    query = shape.queries(3, 2, cache.dtype)
    grouped = query.reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)
    with (
        patch.object(grouped_module, "GATHER_GROUPS", gathered),
        patch.object(tree_module, "_BLOCK", gathered),
    ):
        for _ in through(data, cache):
            index = cache.index
            scores = scale * grouped.double() @ cache.key.double().transpose(-1, -2)
            for level in ("chunks", "clusters", "units") if index.chunks.count else ():
                bound = nodes_of(index, level).score_bound(grouped.float(), scale).double()
                above = bound.gather(-1, wide_labels(index, level, bound, scores.shape[-1]))
                covered = (token_columns(index, scores.shape[-1]) >= 0)[:, None, None]
                assert (~covered | (scores <= above)).all(), level


@given(grown_caches(), scales, st.sampled_from([8, 64]), st.data())
def test_every_score_is_within_the_bound_of_its_token(cache, scale, block, data):
    """Whatever happened to the cache, over blocks of sketches that a short one has many of."""
    shape, index = cache.shape, cache.index
    index.sketches = KeySketches(
        shape.batch, shape.kv_heads, shape.head_dim, index.device, block, cache.config.repair
    )
    query = shape.queries(3, 2, cache.dtype)
    grouped = query.reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)
    for _ in through(data, cache):
        bound = index.score_bound(grouped.float(), scale)
        if bound is None:
            assert int(index.group_count.sum()) == 0
            continue
        slots = bound.shape[-1]
        score = scale * grouped.double() @ cache.key[:, :, :slots].double().transpose(-1, -2)
        slot = torch.arange(slots)
        known = (slot >= index.start[:, None]) & (slot < index.tail[:, None])
        assert (~known[:, None, None] | (score <= bound.double())).all()


@given(grown_caches(), scales, st.data())
def test_an_index_that_nobody_completed_is_true_and_the_same(cache, scale, data):
    """Choices are those of a complete index that scans all tokens; bounds are true, but wider."""
    config = dataclasses.replace(cache.config, flat_tokens=10**6)
    early, late = (GrownCache(cache.shape, config, cache.kind, cache.dtype) for _ in range(2))
    steps = data.draw(histories(cache.shape.batch), "history")
    with patch.object(type(late.index), "complete", lambda index, key: None):
        for place, (step, numbers) in enumerate(steps):
            late.apply(step, numbers, place)
    for place, (step, numbers) in enumerate(steps):
        early.apply(step, numbers, place)
    assert late.index.tree.clusters.count == 0
    query = cache.shape.queries(3, 2, cache.dtype)
    grouped = query.reshape(cache.shape.batch, cache.shape.kv_heads, -1, cache.shape.head_dim)
    bounds = [index.score_bound(grouped.float(), scale) for index in (early.index, late.index)]
    if bounds[0] is None:
        assert int(late.index.group_count.sum()) == 0
        return
    slot = torch.arange(bounds[0].shape[-1])
    known = (slot >= early.index.start[:, None]) & (slot < early.index.tail[:, None])
    assert (~known[:, None, None] | (bounds[0] <= bounds[1])).all()
    late.index.complete(late.key)
    assert torch.equal(late.index.chunks.tokens, early.index.chunks.tokens)


def token_columns(index, tokens):
    """Return the chunk each token is in, int64 [B, T], -1 for none."""
    columns = torch.full((index.batch, tokens), -1)
    for row in range(index.batch):
        for column, (start, size) in enumerate(row_chunks(index, row)):
            if start < int(index.tail[row]):
                columns[row, start : start + size] = column
    return columns


def wide_labels(index, level, like, tokens):
    """Return the node of a level that each token is under, 0 for none: [B, Hkv, R, T]."""
    node = token_columns(index, tokens).clamp(min=0)[:, None].expand(-1, index.kv_heads, -1)
    if level != "chunks":
        node = index.tree.chunk_cluster.gather(2, node)
    if level == "units":
        node = index.tree.cluster_unit.gather(2, node)
    return node[:, :, None].expand(-1, -1, like.shape[2], -1)


@given(grown_caches(), st.data())
def test_nodes_hold_the_moments_of_the_keys_below(cache, data):
    for _ in through(data, cache):
        pass
    index = cache.index
    for row in range(index.batch):
        for head in range(index.kv_heads):
            under = levels(index, row, head)
            for level in ("chunks", "clusters", "units"):
                nodes = nodes_of(index, level)
                counts = {
                    node: len(tokens) for (name, node), tokens in under.items() if name == level
                }
                held = nodes.tokens[row, head].tolist()
                assert {node: count for node, count in enumerate(held) if count} == counts
                for node in counts:
                    key = cache.key[row, head, under[level, node]].double()
                    assert_moments(nodes, row, head, node, key)


def assert_moments(nodes, row, head, node, key):
    size = key.abs().max() + 1e-30
    mean = nodes.mean[row, head, node].double()
    torch.testing.assert_close(mean / size, key.mean(0) / size, atol=1e-5, rtol=0)
    variance = nodes.variance[row, head, node].double()
    expected = key.var(0, correction=0)
    torch.testing.assert_close(variance / size**2, expected / size**2, atol=1e-5, rtol=0)


@given(grown_caches(), st.data())
def test_the_index_covers_what_one_built_at_once_covers(cache, data):
    for _ in through(data, cache):
        fresh = cache.shape.index(cache.config)
        fresh.restart(torch.ones(fresh.batch, dtype=torch.bool), cache.index.start)
        fresh.extend(cache.key, cache.end)
        for row in range(fresh.batch):
            chunks = row_chunks(cache.index, row)
            assert chunks == row_chunks(fresh, row)
            covered = [token for start, size in chunks for token in range(start, start + size)]
            assert covered == list(range(int(cache.index.start[row]), int(cache.end[row])))


@given(grown_caches(), st.data())
def test_the_shape_of_the_index_stays_within_its_configuration(cache, data):
    for _ in through(data, cache):
        index, config = cache.index, cache.config
        chunks = index.group_count[:, None]
        assert ((index.tree.clusters.tokens > 0).sum(-1) <= chunks).all()
        assert ((index.tree.units.tokens > 0).sum(-1) <= config.coarse_units).all()
        in_use = (index.group_length > 0)[:, None].expand_as(index.tree.chunk_cluster)
        members = torch.zeros(index.batch, index.kv_heads, index.tree.clusters.count + 1)
        members.scatter_add_(2, index.tree.chunk_cluster, in_use.float())
        assert (members <= 2 * config.cluster_chunks).all()


@given(heads, configs(), seeds, scales)
def test_estimates_of_equal_keys_are_exact(shape, config, seed, scale):
    """The moment estimate is the mean of exp(score), which is each key's where all are equal."""
    key = shape.keys("gaussian", seed, 1).expand(-1, -1, 60, -1)
    index = shape.index(config)
    index.extend(key, torch.full((shape.batch,), 60))
    index.complete(key)
    query = shape.queries(seed, 1).reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)
    score = scale * query @ key[:, :, :1].transpose(-1, -2)
    for nodes in (index.chunks, index.tree.clusters, index.tree.units):
        used = (nodes.tokens > 0)[:, :, None]
        wrong = (nodes.log_estimate(query, scale) - score).abs()
        assert (wrong.where(used, 0) <= 1e-4 * (1 + score.abs())).all()
        floor = nodes.log_mass_floor(query, scale) - nodes.tokens.float().log()[:, :, None]
        assert ((floor - score).abs().where(used, 0) <= 1e-4 * (1 + score.abs())).all()


@given(grown_caches(), scales, st.data())
def test_the_floor_is_below_the_mass(cache, scale, data):
    """Jensen: n exp(mean score) is at most the sum of exp(score)."""
    for _ in through(data, cache):
        pass
    index, shape = cache.index, cache.shape
    query = shape.queries(3, 1, cache.dtype)[:, :: shape.group]
    score = scale * query.double() @ cache.key.double().transpose(-1, -2)
    reach = abs(scale) * query.double().norm(dim=-1).amax()
    for row in range(index.batch):
        for head in range(index.kv_heads):
            under = levels(index, row, head)
            for (level, node), tokens in under.items():
                floor = nodes_of(index, level).log_mass_floor(query.float(), scale)
                rounding = 1e-5 * (
                    1 + reach * cache.key[row, head, tokens].double().norm(dim=-1).amax()
                )
                mass = score[row, head, 0, tokens].logsumexp(0)
                assert floor[row, head, 0, node] <= mass + rounding


def test_a_grafted_chunk_joins_its_own_kind():
    shape, config = Heads(1, 1, 1, 4), IndexConfig(chunk=(4, 4), recent=4, cluster_chunks=8)
    topic = torch.eye(4)[torch.arange(96) // 4 % 2]
    key = (topic + 0.01 * torch.arange(96)[:, None] / 96).view(1, 1, 96, 4)
    index = shape.index(config)
    index.extend(key[:, :, :84], torch.tensor([84]))
    index.complete(key)
    before = index.tree.clusters.count
    for end in range(85, 97):
        index.extend(key, torch.tensor([end]))
        index.complete(key)
    assert index.tree.clusters.count == before
    labels = index.tree.chunk_cluster[0, 0, : int(index.group_count)]
    assert set(labels[0::2].tolist()).isdisjoint(labels[1::2].tolist())


def test_a_full_cluster_is_split_while_decoding():
    shape, config = Heads(1, 1, 1, 4), IndexConfig(chunk=(2, 2), recent=2, cluster_chunks=2)
    cache = GrownCache(shape, config, "common", torch.float32)
    cache.apply("grow", torch.tensor([50]), 0)
    for seed in range(60):
        cache.apply("grow", torch.tensor([2]), seed)
    chunks = int(cache.index.group_count)
    assert (cache.index.tree.clusters.tokens > 0).sum() >= math.ceil(chunks / 4)


@pytest.mark.parametrize("step", ["truncate", "restart"])
def test_an_empty_index_can_be_emptied(step):
    index = Heads(2, 1, 1, 4).index(IndexConfig())
    if step == "truncate":
        index.truncate(torch.zeros(2, dtype=torch.int64))
    else:
        index.restart(torch.tensor([True, False]), torch.tensor([3, 0]))
        assert index.tail.tolist() == [3, 0]
    starts, lengths = index.partition()
    assert not lengths.any()
    assert not starts.any()


def test_an_update_keeps_its_own_record_of_the_end():
    index = Heads(1, 1, 1, 4).index(IndexConfig())
    end = torch.tensor([30])
    index.extend(torch.randn(1, 1, 40, 4), end)
    end += 10
    assert index.end.tolist() == [30]
