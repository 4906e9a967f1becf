"""Rows of a cache that every query sees in full, and what methods say about them one row a time."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import torch
from hypothesis import assume
from hypothesis import strategies as st
from strategies import CPU, DTYPES, Heads, heads, lengths, seeds
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.levels.declaration import Keep, Pages
from lychee_compile.kernels.levels.groups import TokenClusters
from lychee_compile.kernels.policies.decode.clusterkv import CLUSTERKV
from lychee_compile.kernels.policies.decode.hisa import HISA
from lychee_compile.kernels.reference.declared_index import declared_index
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import select

SCALE = 0.3


SMALL_BLOCK, SMALL_CANDIDATES = 8, 24
SMALL_HISA = dataclasses.replace(
    HISA,
    levels=(
        dataclasses.replace(
            HISA.levels[0], groups=Pages(SMALL_BLOCK), keep=Keep(4, SMALL_CANDIDATES)
        ),
        HISA.levels[1],
    ),
)
"""HISA with blocks of 8 tokens, and at least 3 of them as candidates."""
SmallHISA = declared_index("small_hisa", SMALL_HISA)


SMALL_CLUSTERS = TokenClusters(size=10, window=40)
SmallClusterKV = declared_index(
    "small_clusterkv",
    dataclasses.replace(
        CLUSTERKV, levels=(dataclasses.replace(CLUSTERKV.levels[0], groups=SMALL_CLUSTERS),)
    ),
)


@dataclasses.dataclass
class Plain:
    """Rows of tokens from `start` to `end`, and queries that see all of them."""

    shape: Heads
    config: IndexConfig
    key: Tensor
    query: Tensor
    start: Tensor
    end: Tensor

    def read(self, index_type) -> Tensor:
        """Return what is read of an index that is built at once: bool [B, Hkv, Tq, L]."""
        shape = self.shape
        index = index_type(shape.batch, shape.kv_heads, shape.head_dim, self.config, CPU)
        index.restart(self.start > 0, self.start)
        index.extend(self.key, self.end)
        return self.read_from(index)

    def read_from(self, index, site: str = "") -> Tensor:
        slot = torch.arange(self.key.shape[2])
        mask = (slot >= self.start[:, None]) & (slot < self.end[:, None])
        inputs = ScoreInputs(self.query, self.key, len(slot), mask[:, None, None], SCALE)
        return select(index, inputs, self.config.budget, site).token_mask()

    def check(self, read: Tensor, method) -> None:
        """Compare `read` with what `method` says of each row and query.

        It yields, for each KV head, the tokens that are read, and how clear that is. It gets the
        keys of all slots [Hkv, end, D], and the slot of the row's first token.
        """
        for row in range(self.shape.batch):
            begin, end = int(self.start[row]), int(self.end[row])
            keys, own = self.key[row, :, :end].double(), self.key[row, :, begin:end].double()
            for place in range(self.query.shape[2]):
                queries = self.query[row, :, place].double().unflatten(0, (self.shape.kv_heads, -1))
                chosen = method(keys, queries, self.config, begin)
                for head, (tokens, margin) in enumerate(chosen):
                    size = 1 + (queries @ own.transpose(-1, -2)).abs().max().item()
                    assume(margin > 1e-5 * size)
                    got = read[row, head, place].nonzero()[:, 0] - begin
                    assert set(got.tolist()) == set(tokens)


@st.composite
def plain(draw, tokens=150, **fixed):
    shape, query_len, seed = draw(heads), draw(st.integers(1, 3)), draw(seeds)
    length = draw(st.integers(2, tokens))
    start = draw(lengths(shape.batch, draw(st.sampled_from([0, length - 2]))))
    ends = lengths(shape.batch, length, least=int(start.max()) + 1)
    end = draw(st.just(torch.full((shape.batch,), length)) | ends)
    kind = draw(st.sampled_from(["gaussian", "common", "topics", "huge"]))
    dtype = draw(st.sampled_from(DTYPES))
    sinks, recent = draw(st.integers(0, 6)), draw(st.integers(1, 12))
    chunk = draw(st.sampled_from([(3, 3), (2, 5)]))
    drawn = {"budget": draw(st.integers(1, 90)), "sinks": sinks, "recent": recent, "chunk": chunk}
    config = IndexConfig(**{**drawn, "boundaries": "fixed", **fixed})
    key = shape.keys(kind, seed, length, dtype)
    return Plain(shape, config, key, shape.queries(seed, query_len, dtype), start, end)


def shares(scores: Tensor) -> Tensor:
    """Log of the softmax shares [G, N], summed over heads."""
    return scores.log_softmax(-1).logsumexp(0)


def cut(ranks: list[float], count: int) -> float:
    """Return how far the last of the `count` best ranks is above the next; inf if there is none."""
    ordered = sorted(ranks, reverse=True)
    return ordered[count - 1] - ordered[count] if 0 < count < len(ranks) else torch.inf


def pages_of(start: int, length: int, size: int) -> list[tuple[int, int]]:
    """Return the pages of a row whose first token is in slot `start`, as tokens (begin, end)."""
    edges = {0, length, *range(-start % size, length, size)}
    return list(pairwise(sorted(edges)))


def whole_groups(groups, ranks, room):
    """Take groups (begin, end), best first, until one does not fit; return tokens and margin."""
    tokens, taken = [], 0
    for place in sorted(range(len(groups)), key=lambda place: -ranks[place]):
        if len(tokens) + groups[place][1] - groups[place][0] > room:
            break
        tokens += range(*groups[place])
        taken += 1
    return tokens, cut(ranks, taken)


def best_tokens(candidates, ranks, room):
    order = sorted(range(len(candidates)), key=lambda place: -ranks[place])
    room = max(min(room, len(order)), 0)
    return [candidates[place] for place in order[:room]], cut(ranks, room)


def between(length, sinks, recent, budget):
    """Return tokens that are read anyway, those to choose from, and how many."""
    begin = min(sinks, length)
    end = max(length - recent, begin)
    always = [*range(begin), *range(end, length)]
    return always, list(range(begin, end)), max(budget - len(always), 0)
