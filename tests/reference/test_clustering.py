"""K-means over groups: labels, sizes, determinism; and what clusters are made of."""

from __future__ import annotations

from unittest.mock import patch

import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import CPU, KINDS, heads, random, seeds

from lychee_compile.kernels.levels.declaration import Level
from lychee_compile.kernels.levels.expressions import dot, field, greatest, key, mean, query
from lychee_compile.kernels.levels.groups import Clusters
from lychee_compile.kernels.policies.decode.lychee import LYCHEE
from lychee_compile.kernels.reference import clustering
from lychee_compile.kernels.reference.clustered import merge_columns, write_columns
from lychee_compile.kernels.reference.clustering import cluster
from lychee_compile.kernels.reference.level_values import follows_from_moments
from lychee_compile.kernels.reference.uneven_index import empty_columns, with_room

sizes = st.integers(1, 5)
segments = st.sampled_from([7, 20, clustering.SEGMENT])
"""Small ones, so that few groups make several segments."""


def leaves(shape, kind, seed, count, unused):
    """Return mean keys of groups, and their 1 to 9 tokens; the last `unused` of a row have none."""
    mean = shape.keys(kind, seed, count)
    size = (random(seed, *mean.shape[:3]).abs() * 4).long() + 1
    used = torch.arange(count) < count - unused[:, None]
    return mean, size * used[:, None]


@st.composite
def group_sets(draw, kinds=KINDS):
    shape, count = draw(heads), draw(st.integers(1, 60))
    unused = draw(st.lists(st.integers(0, count), min_size=shape.batch, max_size=shape.batch))
    kind = draw(st.sampled_from(kinds))
    return leaves(shape, kind, draw(seeds), count, torch.tensor(unused))


def members(tokens, labels, count):
    """Return groups in use under each label: int64 [B, Hkv, count]."""
    used = (tokens > 0).long()
    return torch.zeros(*labels.shape[:2], count, dtype=torch.int64).scatter_add(2, labels, used)


@given(group_sets(), sizes, st.none() | st.integers(1, 6), st.integers(0, 3), segments)
def test_groups_are_consecutive_and_as_large_as_they_may(groups, per_group, most, seed, segment):
    mean, tokens = groups
    with patch.object(clustering, "SEGMENT", segment):
        labels, count = cluster(mean, tokens, per_group, most, seed)
    held = members(tokens, labels, count)
    assert labels.shape == tokens.shape
    assert labels.min() >= 0
    in_use = (held > 0).long()
    assert (in_use.diff(dim=-1) <= 0).all(), "an empty group before one that is not"
    assert count == max(int(in_use.sum(-1).max()), 1)
    if most is None:
        assert held.max() <= 2 * per_group
    else:
        assert count <= most


@given(group_sets(), sizes, st.integers(0, 3))
def test_clustering_is_repeatable(groups, per_group, seed):
    first, count = cluster(*groups, per_group, None, seed)
    second, again = cluster(*groups, per_group, None, seed)
    assert count == again
    assert torch.equal(first, second)


@given(group_sets(), sizes, segments, seeds)
def test_unused_groups_do_not_matter(groups, per_group, segment, seed):
    """Nor where they are among the others: chunks are numbered with gaps."""
    (mean, tokens), (batch, heads) = groups, groups[1].shape[:2]
    used = tokens > 0
    with patch.object(clustering, "SEGMENT", segment):
        labels, _ = cluster(mean, tokens, per_group, None, 0)
        other = mean.where(used[..., None], 1e3 * torch.ones(()))
        other, _ = cluster(other, tokens, per_group, None, 0)
        count = tokens.shape[2]
        place = random(seed, 2 * count).argsort()[:count].sort().values
        spaced, sizes = torch.zeros(batch, heads, 2 * count, mean.shape[3]), tokens.repeat(1, 1, 2)
        spaced[:, :, place], sizes = mean, torch.zeros_like(sizes)
        sizes[:, :, place] = tokens
        apart, _ = cluster(spaced, sizes, per_group, None, 0)
    assert torch.equal(labels.where(used, 0), apart[:, :, place].where(used, 0))
    assert torch.equal(labels.where(used, 0), other.where(used, 0))


@given(seeds, st.integers(0, 9), st.sampled_from([20, clustering.SEGMENT]))
def test_two_topics_are_kept_apart(data_seed, seed, segment):
    """Two directions around a large common one, in alternating runs, as topics in a text."""
    topic = torch.arange(40) // 5 % 2
    directions = random(data_seed, 2, 16)
    noise = 0.05 * random(data_seed + 1, 40, 16)
    mean = 30 * random(data_seed + 2, 1, 16) + directions[topic] + noise
    tokens = torch.full((1, 1, 40), 8)
    with patch.object(clustering, "SEGMENT", segment):
        labels, count = cluster(mean[None, None], tokens, 5, None, seed)
    first = members(tokens, labels.masked_fill(topic == 1, count), count + 1)[..., :count]
    second = members(tokens, labels.masked_fill(topic == 0, count), count + 1)[..., :count]
    assert torch.minimum(first, second).sum() == 0


@given(heads, st.sampled_from(KINDS), seeds, st.integers(1, 30), st.data())
def test_clusters_take_their_moments_from_their_members(shape, kind, seed, count, data):
    """Against the definition: 4 keys below each chunk, all of them below its cluster."""
    keys = shape.keys(kind, seed, 4 * count)
    groups = keys.unflatten(2, (count, 4))
    tokens = 4 * (random(seed + 1, *groups.shape[:3]) > -1).long()
    first = 4 * torch.arange(count).expand_as(tokens)
    parts = {"tokens": tokens, "first": first, "end": first + 4}
    parts |= {"mean": groups.mean(3), "variance": groups.var(3, correction=0)}
    clusters = data.draw(st.integers(1, count))
    label = torch.randint(-1, clusters, first.shape, generator=torch.Generator().manual_seed(seed))
    level = LYCHEE.levels[1]
    columns = empty_columns(level, shape.batch, shape.kv_heads, shape.head_dim, CPU)
    columns = with_room(columns, clusters)
    merge_columns(level, parts, label, columns)
    of_slot = torch.where(tokens > 0, label, -1).repeat_interleave(4, 2)
    expected = with_room(
        empty_columns(level, shape.batch, shape.kv_heads, shape.head_dim, CPU), clusters
    )
    write_columns(level, keys, of_slot, expected, torch.zeros_like(label[..., 0]))
    size = keys.abs().amax() + 1e-30
    for name, power in (("tokens", 0), ("first", 0), ("end", 0), ("cluster_mean", 1),
                        ("cluster_variance", 2)):  # fmt: skip
        got, wanted = columns[name] / size**power, expected[name] / size**power
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_only_polynomials_of_second_degree_follow_from_moments():
    centre = field("centre")
    for summary, follows in (
        (mean(key), True),
        (mean((key - centre) ** 2), True),
        (mean(key * centre) - mean(key) ** 2, True),
        (mean(key**3), False),
        (mean(sympy.exp(key)), False),
        (greatest(key), False),
        (mean(dot(key, key)), False),
    ):
        level = Level(Clusters(), dot(query, centre), {"centre": mean(key), "other": summary})
        assert follows_from_moments(level) is follows, summary


def test_groups_without_keys_are_one_cluster_of_none():
    labels, count = cluster(torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4).long(), 4, None, 0)
    assert count == 1
    assert not labels.any()
