"""K-means over nodes: labels, sizes, determinism; and what parents are made of."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, heads, make_keys, random, seeds

from lychee_compile.kernels.reference import clustering
from lychee_compile.kernels.reference.clustering import cluster
from lychee_compile.kernels.reference.nodes import Nodes, merge

sizes = st.integers(1, 5)
segments = st.sampled_from([7, 20, clustering.SEGMENT])
"""Small ones, so that few nodes make several segments."""


def leaves(shape, kind, seed, count, unused):
    """Return nodes of 1 to 9 tokens, the last `unused` of each row without any."""
    mean = shape.keys(kind, seed, count)
    size = (random(seed, *mean.shape[:3]).abs() * 4).long() + 1
    used = torch.arange(count) < count - unused[:, None]
    spread = random(seed + 1, *mean.shape).square()
    return Nodes(mean, spread, spread.sum(-1).sqrt(), size * used[:, None])


@st.composite
def node_sets(draw, kinds=KINDS):
    shape, count = draw(heads), draw(st.integers(1, 60))
    unused = draw(st.lists(st.integers(0, count), min_size=shape.batch, max_size=shape.batch))
    kind = draw(st.sampled_from(kinds))
    return leaves(shape, kind, draw(seeds), count, torch.tensor(unused))


def members(nodes, labels, count):
    """Return nodes in use under each label: int64 [B, Hkv, count]."""
    used = (nodes.tokens > 0).long()
    return torch.zeros(*labels.shape[:2], count, dtype=torch.int64).scatter_add(2, labels, used)


@given(node_sets(), sizes, st.none() | st.integers(1, 6), st.integers(0, 3), segments)
def test_groups_are_consecutive_and_as_large_as_they_may(nodes, per_group, most, seed, segment):
    with patch.object(clustering, "SEGMENT", segment):
        labels, count = cluster(nodes, per_group, most, seed)
    held = members(nodes, labels, count)
    assert labels.shape == nodes.tokens.shape
    assert labels.min() >= 0
    in_use = (held > 0).long()
    assert (in_use.diff(dim=-1) <= 0).all(), "an empty group before one that is not"
    assert count == max(int(in_use.sum(-1).max()), 1)
    if most is None:
        assert held.max() <= 2 * per_group
    else:
        assert count <= most


@given(node_sets(), sizes, st.integers(0, 3))
def test_clustering_is_repeatable(nodes, per_group, seed):
    first, count = cluster(nodes, per_group, None, seed)
    second, again = cluster(nodes, per_group, None, seed)
    assert count == again
    assert torch.equal(first, second)


@given(node_sets(), sizes, segments)
def test_unused_nodes_do_not_matter(nodes, per_group, segment):
    used = nodes.tokens > 0
    with patch.object(clustering, "SEGMENT", segment):
        labels, _ = cluster(nodes, per_group, None, 0)
        nodes.mean = nodes.mean.where(used[..., None], 1e3 * torch.ones(()))
        other, _ = cluster(nodes, per_group, None, 0)
    assert torch.equal(labels.where(used, 0), other.where(used, 0))


@given(seeds, st.integers(0, 9), st.sampled_from([20, clustering.SEGMENT]))
def test_two_topics_are_kept_apart(data_seed, seed, segment):
    """Two directions around a large common one, in alternating runs, as topics in a text."""
    topic = torch.arange(40) // 5 % 2
    directions = random(data_seed, 2, 16)
    noise = 0.05 * random(data_seed + 1, 40, 16)
    mean = 30 * random(data_seed + 2, 1, 16) + directions[topic] + noise
    ones = torch.full((1, 1, 40), 8)
    nodes = Nodes(mean[None, None], torch.zeros(1, 1, 40, 16), torch.zeros(1, 1, 40), ones)
    with patch.object(clustering, "SEGMENT", segment):
        labels, count = cluster(nodes, 5, None, seed)
    first = members(nodes, labels.masked_fill(topic == 1, count), count + 1)[..., :count]
    second = members(nodes, labels.masked_fill(topic == 0, count), count + 1)[..., :count]
    assert torch.minimum(first, second).sum() == 0


@given(heads, st.sampled_from(KINDS), seeds, st.integers(1, 30), st.data())
def test_a_parent_has_the_moments_and_the_reach_of_its_children(shape, kind, seed, count, data):
    """Against the definition: 4 keys below each child, all of them below the parent."""
    key = shape.keys(kind, seed, 4 * count)
    groups = key.unflatten(2, (count, 4))
    mean = groups.mean(3)
    radius = 1.001 * (groups - mean[:, :, :, None]).norm(dim=-1).amax(-1) + 1e-5 * mean.norm(dim=-1)
    four = torch.full(mean.shape[:3], 4)
    children = Nodes(mean, groups.var(3, correction=0), radius, four)
    parents = data.draw(st.integers(1, count))
    labels = torch.randint(parents, four.shape, generator=torch.Generator().manual_seed(seed))
    merged = merge(children, labels, parents)
    below = (labels[..., None] == torch.arange(parents)).repeat_interleave(4, 2)
    assert torch.equal(merged.tokens, below.sum(2))
    size = key.double().abs().amax() + 1e-30
    for parent in range(parents):
        chosen = below[..., parent, None]
        tokens = chosen.sum(2).clamp(min=1)
        expected = (key.double() * chosen).sum(2) / tokens
        centre = merged.mean[:, :, parent].double()
        torch.testing.assert_close(centre / size, expected / size, atol=1e-5, rtol=0)
        away = (key.double() - centre[:, :, None]) * chosen
        variance = away.square().sum(2) / tokens / size**2
        got = merged.variance[:, :, parent].double() / size**2
        torch.testing.assert_close(got, variance, atol=1e-5, rtol=0)
        reached = merged.radius[:, :, parent].double()
        assert (away.norm(dim=-1).amax(-1) <= reached).all()


def test_a_node_without_tokens_holds_nothing():
    nodes = Nodes.empty(1, 2, 3, torch.device("cpu")).resized(4)
    query = make_keys("gaussian", 0, (1, 2, 5, 3), torch.float32)
    assert nodes.count == 4
    assert (nodes.log_mass_floor(query, 1.0) == -torch.inf).all()
    assert nodes.resized(2).count == 2
    labels, count = cluster(nodes, 4, None, 0)
    assert count == 1
    assert not labels.any()
    assert not merge(nodes, labels, count).tokens.any()
