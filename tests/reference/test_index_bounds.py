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
from lychee_compile.kernels.policies.decode.lychee import LYCHEE
from lychee_compile.kernels.reference import chunk_table, clustered
from lychee_compile.kernels.reference.chunk_table import bounds_of, numbers_of_slots
from lychee_compile.kernels.reference.level_values import bound, estimate, moments
from lychee_compile.kernels.reference.sketch import KeySketches

scales = st.sampled_from([1.0, 0.125, -0.5, 3.0])


UNIT, CLUSTER, CHUNK = range(3)


@pytest.fixture(autouse=True)
def early_fits():
    """Let few tokens be enough for clusters, and for others to join them."""
    with patch.object(clustered, "REFIT", 16):
        yield


def fields_of(index, level):
    """Return mean, variance and tokens of all groups of a level: [B, Hkv, N, ...]."""
    columns = index.chunk_columns(None) if level == CHUNK else index.above.columns[level]
    mean, variance = moments(LYCHEE.levels[level], columns)
    return mean, variance, columns["tokens"].expand(mean.shape[:3])


def levels(index, row, head):
    """For each level and group in use the tokens that it stands for."""
    low, length = bounds_of(index.span, index.settings.chunk)
    under = {}
    for number in (index.span[row] > 0).nonzero()[:, 0].tolist():
        groups, labels = [(CHUNK, number)], index.above.labels
        cluster = int(labels[1][row, head, number]) if labels[1].shape[2] else -1
        if cluster >= 0:
            groups += [(CLUSTER, cluster), (UNIT, int(labels[0][row, head, cluster]))]
        first = int(low[row, number])
        for group in groups:
            under.setdefault(group, []).extend(range(first, first + int(length[row, number])))
    return under


def through(data, cache):
    """Take the cache through a history, stopping after every step; the seed of each step."""
    for place, (step, numbers) in enumerate(data.draw(histories(cache.shape.batch), "history")):
        cache.apply(step, numbers, place)
        yield place


@given(grown_caches(), scales, st.sampled_from([2, 2**18]), st.data())
def test_every_score_is_within_the_bound_of_its_chunk(cache, scale, gathered, data):
    shape, level = cache.shape, LYCHEE.levels[CHUNK]
    grouped = shape.queries(3, 2, cache.dtype).float()
    grouped = grouped.reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)
    with patch.object(chunk_table, "CACHED_NUMBERS", gathered):
        for _ in through(data, cache):
            index = cache.index
            if not index.span.any():
                continue
            scores = scale * grouped.double() @ cache.key.double().transpose(-1, -2)
            of_slot = numbers_of_slots(
                index.span, index.span > 0, scores.shape[-1], index.settings.chunk
            )[:, None, None].expand_as(scores)
            found = bound(level, grouped, index.fields, scale).double()
            above = found.gather(-1, of_slot.clamp(min=0))
            assert ((of_slot < 0) | (scores <= above)).all()


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
            assert not index.span.any()
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
    assert not late.index.above.fitted_any
    query = cache.shape.queries(3, 2, cache.dtype)
    grouped = query.reshape(cache.shape.batch, cache.shape.kv_heads, -1, cache.shape.head_dim)
    bounds = [index.score_bound(grouped.float(), scale) for index in (early.index, late.index)]
    if bounds[0] is None:
        assert not late.index.span.any()
        return
    slot = torch.arange(bounds[0].shape[-1])
    known = (slot >= early.index.start[:, None]) & (slot < early.index.tail[:, None])
    assert (~known[:, None, None] | (bounds[0] <= bounds[1])).all()
    late.index.complete(late.key)
    assert torch.equal(late.index.span, early.index.span)
    used = (early.index.span > 0)[:, None, :, None]
    for name, held in early.index.fields.items():
        torch.testing.assert_close(late.index.fields[name].where(used, 0), held.where(used, 0))


@given(grown_caches(), st.data())
def test_groups_hold_the_moments_of_the_keys_below(cache, data):
    """Chunks always do; clusters right after a fit, and between fits they may hold more or less."""
    for _ in through(data, cache):
        pass
    index = cache.index
    fits = bool((index.end - index.start >= 16).any())
    if fits:
        index.fit(cache.key)
    for row in range(index.batch):
        for head in range(index.kv_heads):
            under = levels(index, row, head)
            for level in (UNIT, CLUSTER, CHUNK) if fits else (CHUNK,):
                mean, variance, tokens = (each[row, head] for each in fields_of(index, level))
                counts = {
                    group: len(below) for (name, group), below in under.items() if name == level
                }
                held = enumerate(tokens.tolist())
                assert {group: count for group, count in held if count} == counts
                for group in counts:
                    key = cache.key[row, head, under[level, group]].double()
                    assert_moments(mean[group], variance[group], key)


def assert_moments(mean, variance, key):
    size = key.abs().max() + 1e-30
    torch.testing.assert_close(mean.double() / size, key.mean(0) / size, atol=1e-5, rtol=0)
    expected = key.var(0, correction=0)
    torch.testing.assert_close(variance.double() / size**2, expected / size**2, atol=1e-5, rtol=0)


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
        above, config = cache.index.above, cache.config
        chunks = (cache.index.span > 0).sum(1)
        if not above.fitted_any or not above.clustered:
            continue
        assert above.columns[UNIT]["tokens"].shape[2] <= config.coarse_units
        assert above.columns[CLUSTER]["tokens"].shape[2] <= max(above.clustered, 1)
        assert chunks.max() <= 2 * above.clustered + 2 * max(16, int(cache.end.max()) // 16)


@given(heads, configs(), seeds, scales)
def test_estimates_of_equal_keys_are_exact(shape, config, seed, scale):
    """The moment estimate is the mean of exp(score), which is each key's where all are equal."""
    key = shape.keys("gaussian", seed, 1).expand(-1, -1, 60, -1)
    index = shape.index(config)
    index.extend(key, torch.full((shape.batch,), 60))
    index.complete(key)
    query = shape.queries(seed, 1).reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)
    score = scale * query @ key[:, :, :1].transpose(-1, -2)
    for number, level in enumerate(LYCHEE.levels):
        tokens = fields_of(index, number)[2]
        groups = index.fields if number == CHUNK else index.above.columns[number]
        fields = {name: groups[name] for name in level.fields}
        wrong = (scale * estimate(level, query, fields, scale) - score).abs()
        assert (wrong.where((tokens > 0)[:, :, None], 0) <= 1e-4 * (1 + score.abs())).all()


def test_a_grafted_chunk_joins_its_own_kind():
    shape, config = Heads(1, 1, 1, 4), IndexConfig(chunk=(4, 4), recent=4, cluster_chunks=8)
    topic = torch.eye(4)[torch.arange(136) // 4 % 2]
    key = (topic + 0.01 * torch.arange(136)[:, None] / 136).view(1, 1, 136, 4)
    index = shape.index(config)
    index.extend(key[:, :, :84], torch.tensor([84]))
    index.complete(key)
    before = index.above.columns[CLUSTER]["tokens"].shape[2]
    for end in range(85, 129):
        index.extend(key, torch.tensor([end]))
        index.complete(key)
    assert index.above.columns[CLUSTER]["tokens"].shape[2] == before
    labels = index.above.labels[1][0, 0, : int((index.span > 0).sum())]
    assert (labels >= 0).sum() >= 28
    first, second = ({*each.tolist()} - {-1} for each in (labels[0::2], labels[1::2]))
    assert first.isdisjoint(second)


def test_clusters_are_as_many_as_chunks_need_while_decoding():
    shape, config = Heads(1, 1, 1, 4), IndexConfig(chunk=(2, 2), recent=2, cluster_chunks=2)
    cache = GrownCache(shape, config, "common", torch.float32)
    cache.apply("grow", torch.tensor([50]), 0)
    for seed in range(60):
        cache.apply("grow", torch.tensor([2]), seed)
    chunks = int((cache.index.span > 0).sum())
    assert (cache.index.above.columns[CLUSTER]["tokens"] > 0).sum() >= math.ceil(chunks / 4)


def test_without_repair_chunks_are_never_clustered_anew():
    shape = Heads(1, 1, 1, 4)
    clusters = []
    for repair in (True, False):
        config = IndexConfig(chunk=(2, 2), recent=2, cluster_chunks=2, repair=repair)
        cache = GrownCache(shape, config, "common", torch.float32)
        for seed in range(8):
            cache.apply("grow", torch.tensor([50]), seed)
        clusters.append(int((cache.index.above.columns[CLUSTER]["tokens"] > 0).sum()))
        assert not bool((cache.index.above.labels[1] < 0)[:, :, :180].any())
    assert clusters[0] > 3 * clusters[1]


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
