"""Each policy against its method, written once more from its paper for one row of a cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from plain_caches import (
    SCALE,
    AlwaysVoting,
    SmallHISA,
    best_tokens,
    between,
    plain,
    shares,
    whole_groups,
)
from strategies import greedy_chunks

from lychee_compile.kernels.policies.registry import index_class


def quest(keys, queries, config):
    """Yield pages but the last, by sum_i max(q_i m_i, q_i M_i)."""
    length = keys.shape[1]
    pages = [(page, page + 16) for page in range(0, length, 16) if page + 16 < length]
    written = pages[-1][1] if pages else 0
    for key, query in zip(keys, queries, strict=True):
        scores = [
            torch.maximum(query * key[slice(*page)].amin(0), query * key[slice(*page)].amax(0))
            for page in pages
        ]
        scores = torch.stack([SCALE * score.sum(-1) for score in scores], -1) if pages else None
        ranks = shares(scores).tolist() if pages else []
        room = config.budget - (length - written)
        if config.budget >= length:
            room = length
        tokens, margin = whole_groups(pages, ranks, room)
        yield [*tokens, *range(written, length)], margin


def streaming(keys, queries, config):
    length = keys.shape[1]
    first = length - max(config.recent, config.budget - min(config.sinks, length))
    kept = {*range(min(config.sinks, length)), *range(max(first, 0), length)}
    return [(kept, torch.inf)] * len(keys)


def oracle(keys, queries, config):
    """Yield chunks by their true softmax mass."""
    length = keys.shape[1]
    chunks, tail = greedy_chunks([0] * length, 0, length, config.chunk)
    recent = max(config.recent, length - tail)
    always, middle, room = between(length, config.sinks, recent, config.budget)
    low, high = (middle[0], middle[-1] + 1) if middle else (0, 0)
    groups = [(max(start, low), min(start + size, high)) for start, size in chunks]
    groups = [group for group in groups if group[0] < group[1]]
    for key, query in zip(keys, queries, strict=True):
        share = shares(SCALE * query @ key.T)
        ranks = [share[slice(*group)].logsumexp(0).item() for group in groups]
        tokens, margin = whole_groups(groups, ranks, room)
        yield [*always, *tokens], margin


def tokenselect(keys, queries, config):
    """Let all heads vote with their softmax over the tokens between sinks and window."""
    parts = between(keys.shape[1], config.sinks, config.recent, config.budget)
    always, middle, room = parts
    votes = []
    if middle:
        scores = SCALE * queries @ keys[:, middle].transpose(-1, -2)
        votes = shares(scores.flatten(0, 1)).tolist()
    tokens, margin = best_tokens(middle, votes, room)
    return [([*always, *tokens], margin)] * len(keys)


def hisa(keys, queries, config):
    """Yield tokens of the first, the last and the best blocks, by their scores."""
    length, size, most = keys.shape[1], SmallHISA.block, SmallHISA.candidate_blocks
    always, middle, room = between(length, 0, 1, config.budget)
    blocks = sorted({token // size for token in middle})
    most = max(most, 4 * room // size)
    for key, query in zip(keys, queries, strict=True):
        kept, margin = blocks[:1] + blocks[-1:], torch.inf
        full = [block for block in blocks if size * (block + 1) <= length]
        if full:
            means = torch.stack([key[size * block : size * (block + 1)].mean(0) for block in full])
            share = dict(zip(full, shares(SCALE * query @ means.T).tolist(), strict=True))
            inner = [block for block in full if block not in kept]
            more, margin = best_tokens(inner, [share[each] for each in inner], most - len({*kept}))
            kept = kept + more
        candidates = [token for token in middle if token // size in kept]
        ranks = []
        if candidates:
            scores = SCALE * query @ key.T
            ranks = shares(scores[:, middle])[[middle.index(each) for each in candidates]].tolist()
        tokens, second = best_tokens(candidates, ranks, room)
        yield [*always, *tokens], min(margin, second)


METHODS = [
    pytest.param(index_class("quest"), quest, id="quest"),
    pytest.param(index_class("streaming"), streaming, id="streaming"),
    pytest.param(index_class("oracle"), oracle, id="oracle"),
    pytest.param(AlwaysVoting, tokenselect, id="tokenselect"),
    pytest.param(SmallHISA, hisa, id="hisa"),
]


@pytest.mark.parametrize(("index_type", "method"), METHODS)
@given(case=plain())
def test_a_policy_chooses_as_its_paper_says(index_type, method, case):
    case.check(case.read(index_type), method)
