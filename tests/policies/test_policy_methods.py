"""Each policy against its method, written once more from its paper for one row of a cache."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from hypothesis import given
from plain_caches import (
    SCALE,
    SMALL_BLOCK,
    SMALL_CANDIDATES,
    SmallHISA,
    best_tokens,
    between,
    pages_of,
    plain,
    shares,
    whole_groups,
)
from strategies import greedy_chunks

from lychee_compile.kernels.policies.registry import index_class


def quest(keys, queries, config, start):
    """Yield pages but the last, by sum_i max(q_i m_i, q_i M_i), as many as there is room for."""
    length = keys.shape[1] - start
    pages = pages_of(start, length, 16)
    full = [page for page in pages if (start + page[1]) % 16 == 0]
    written = pages[-1][0]
    inner = [page for page in full if page[1] <= written]
    room = length if config.budget >= length else max(config.budget - (length - written), 0)
    for key, query in zip(keys, queries, strict=True):
        ranks = []
        if full:
            scores = [
                SCALE * best_corner(query, of_page(key, start, page, 16))
                + math.log(page[1] - page[0])
                for page in full
            ]
            ranks = shares(torch.stack(scores, -1)).tolist()[: len(inner)]
        best, margin = best_tokens(inner, ranks, room if room == length else room // 16)
        yield [*chain(*(range(*page) for page in best)), *range(written, length)], margin


def of_page(key, start, page, size):
    """Return the keys of a page: those in front of the row too."""
    return key[(start + page[0]) // size * size : start + page[1]]


def best_corner(query, key):
    return torch.maximum(query * key.amin(0), query * key.amax(0)).sum(-1)


def streaming(keys, queries, config, start):
    length = keys.shape[1] - start
    first = length - max(config.recent, config.budget - min(config.sinks, length))
    kept = {*range(min(config.sinks, length)), *range(max(first, 0), length)}
    return [(kept, torch.inf)] * len(keys)


def oracle(keys, queries, config, start):
    """Yield chunks by their true softmax mass."""
    keys = keys[:, start:]
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


def tokenselect(keys, queries, config, start):
    """Let all heads vote with their softmax over all tokens."""
    keys = keys[:, start:]
    parts = between(keys.shape[1], config.sinks, config.recent, config.budget)
    always, middle, room = parts
    votes = shares((SCALE * queries @ keys.transpose(-1, -2)).flatten(0, 1)).tolist()
    tokens, margin = best_tokens(middle, [votes[each] for each in middle], room)
    return [([*always, *tokens], margin)] * len(keys)


def hisa(keys, queries, config, start):
    """Yield tokens of the first, the last and the best blocks, by their scores."""
    length = keys.shape[1] - start
    always, middle, room = between(length, 0, 1, config.budget)
    blocks = pages_of(start, length, SMALL_BLOCK)
    full = [block for block in blocks if (start + block[1]) % SMALL_BLOCK == 0]
    inner = [block for block in blocks if middle and block[0] <= middle[-1]]
    most = max(SMALL_CANDIDATES, 4 * config.budget) // SMALL_BLOCK
    for key, query in zip(keys, queries, strict=True):
        kept, margin = [each for each in inner if each == blocks[0] or each not in full], torch.inf
        if full:
            sizes = torch.tensor([end - begin for begin, end in full]).log()
            means = torch.stack([of_page(key, start, block, SMALL_BLOCK).mean(0) for block in full])
            share = dict(zip(full, shares(SCALE * query @ means.T + sizes).tolist(), strict=True))
            others = [each for each in inner if each not in kept]
            ranks = [share[each] for each in others]
            more, margin = best_tokens(others, ranks, most - len(kept))
            kept = kept + more
        within = sorted(chain(*(range(*block) for block in kept)))
        tokens, second = [], torch.inf
        if within:
            share = shares(SCALE * query @ key[start:][within].T).tolist()
            rank = {token: share[place] for place, token in enumerate(within) if token in middle}
            tokens, second = best_tokens(list(rank), list(rank.values()), room)
        if len(middle) <= room:
            tokens, margin, second = middle, torch.inf, torch.inf
        yield [*always, *tokens], min(margin, second)


METHODS = [
    pytest.param(index_class("quest"), quest, id="quest"),
    pytest.param(index_class("streaming"), streaming, id="streaming"),
    pytest.param(index_class("oracle"), oracle, id="oracle"),
    pytest.param(index_class("tokenselect"), tokenselect, id="tokenselect"),
    pytest.param(SmallHISA, hisa, id="hisa"),
]


@pytest.mark.parametrize(("index_type", "method"), METHODS)
@given(case=plain())
def test_a_policy_chooses_as_its_paper_says(index_type, method, case):
    case.check(case.read(index_type), method)
