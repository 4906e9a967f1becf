"""LycheeCluster (arXiv 2603.08453), extended by sketches that tell the tokens of a chunk apart."""

from __future__ import annotations

import torch
from sympy import sqrt
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.cpu.choice import choose
from lychee_compile.kernels.levels.declaration import Keep, Level, LevelStack
from lychee_compile.kernels.levels.expressions import (
    dot,
    field,
    greatest,
    key,
    mean,
    norm,
    query,
    softmax_scale,
)
from lychee_compile.kernels.levels.groups import Chunks, Clusters
from lychee_compile.kernels.reference.chunk_index import ChunkIndex
from lychee_compile.kernels.reference.own_slots import own_slots
from lychee_compile.kernels.reference.question import Choice, Question
from lychee_compile.kernels.reference.runs import expand_runs
from lychee_compile.kernels.reference.sketch import BLOCK, KeySketches
from lychee_compile.kernels.reference.sketch_axes import sketch_bits

UNITS_PER_CANDIDATE, CLUSTERS_PER_CANDIDATE = 4, 2
"""Tokens in the units and in the clusters that are looked into, for each candidate token."""
MOST_HIDDEN = 2
"""A query narrows its choice if it sees at least 1 / MOST_HIDDEN of the slots in its range."""
ALL = 2**40
"""Number of candidates that no context has."""


def _moments(
    groups: Chunks | Clusters, of: str, keep: Keep | None = None, ball: bool = False
) -> Level:
    """Return a level whose groups are ranked by mean and variance; with a `ball` it has a bound.

    The estimate is the second-order cumulant expansion with a diagonal covariance, the log of the
    mean of exp(s q.k) over s: q.m + s/2 sum_i q_i^2 v_i. It is exact for Gaussian keys.
    """
    centre, variance, radius = (field(f"{of}_{name}") for name in ("mean", "variance", "radius"))
    fields = {centre.name: mean(key), variance.name: mean((key - centre) ** 2)}
    if ball:
        fields[radius.name] = sqrt(greatest(dot(key - centre, key - centre)))
    return Level(
        groups,
        fields=fields,
        estimate=dot(query, centre) + softmax_scale * dot(query**2, variance) / 2,
        bound=dot(query, centre) + norm(query) * radius if ball else None,
        keep=keep,
    )


LYCHEE = LevelStack(
    levels=(
        _moments(Clusters(limited=True), "unit", Keep(UNITS_PER_CANDIDATE)),
        _moments(Clusters(), "cluster", Keep(CLUSTERS_PER_CANDIDATE)),
        _moments(Chunks(), "chunk", ball=True),
    ),
)
"""Chunks below fine clusters below coarse units, which narrow a long context down."""


class LycheeIndex(ChunkIndex):
    """LycheeCluster: boundary-aware chunks below fine clusters below coarse units, per KV head.

    Every key has a sketch (`KeySketches`), which ranks single tokens. In a long context the chunks
    of most estimated mass are found first, by way of clusters and units (`LYCHEE`); the sketches of
    their tokens are ranked then. The triangle inequality, q.k <= q.c + |q| r, bounds scores by the
    ball of a chunk, and Cauchy-Schwarz bounds what a sketch leaves out; the lesser bound holds.
    Sinks and recent tokens are always read.

    Not as in the paper: the paper chooses whole chunks, this chooses tokens. The best choice of
    chunks holds less of the mass than a choice of tokens by a sketch of 48 bits per 16 channels
    (measured: see benchmarks/results/summaries.md), which takes fewer bytes than the moments of
    chunks. A context of up to `flat_tokens` is scanned by sketches alone. In a longer one the
    chunks hold `overfetch` times as many tokens as are read. Chunks, clusters and units are
    summarised when a long context or a certificate first asks for them. Chunks join the nearest
    cluster some at a time, and all are clustered anew when they are twice as many.
    """

    stack = LYCHEE
    late = True
    from_start = True

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        self.above.frozen = not config.repair
        self.sketches = KeySketches(batch, kv_heads, head_dim, device, repair=config.repair)
        self.sketched = self.start.clone()
        """Slot of each row after the last one that has a sketch, int64 [B]."""

    @property
    def unread(self) -> Tensor:
        """First token of each row that is always read: it has no sketch yet."""
        return self.tail

    @property
    def indexed(self) -> Tensor:
        """Slot after the last token that can be chosen, int64 [B]: those of this step can be."""
        return self.end

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Cut new tokens into chunks, as far as cuts are decided, and sketch them."""
        super().extend(key, end)
        self._sketch(key)

    def close(self, key: Tensor, rows: Tensor) -> None:
        """Sketch the last tokens of the rows `rows`, bool [B], however few they are."""
        super().close(key, rows)
        self.tail = torch.where(rows, torch.maximum(self.end, self.start), self.tail)
        self._sketch(key)

    def truncate(self, keep: Tensor) -> None:
        """Forget the tokens from position `keep`, int64 [B], on, and the chunks that they decided.

        So later tokens are cut as if the forgotten ones had never been there.
        """
        super().truncate(keep)
        self._forget_sketches()

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they begin at `start`, int64 [B]."""
        super().restart(rows, start)
        self._forget_sketches()

    def rewrite(self, key: Tensor, slots: Tensor) -> None:
        """Sketch the keys in the slots, int64 [B, T], anew; -1 is none. Their chunks change."""
        self.sketches.rewrite(key, self.start, self.tail, slots)
        super().rewrite(key, slots)

    def choose(self, question: Question) -> Choice:
        """Return the tokens of most estimated mass, by their sketches."""
        query = question.split(question.query)
        candidates = self.candidates(question)
        if candidates is not None:
            slot, held = candidates
            raw = self.sketches.scores_at(query, question.scale, slot)
            return question.take_own(raw, slot, held)
        own = own_slots(question)
        if own is not None:
            slot, held = own.slot[:, None], own.held[:, None]
            raw = self.sketches.scores_at(query, question.scale, slot)
            return question.take_own(raw, slot, held)
        slots = int(self.tail.max())
        if (chosen := choose(self.sketches, question, slots)) is not None:
            return chosen
        rank = question.token_share(self.sketches.scores(question.query, question.scale, slots))
        return question.take_tokens(rank)

    def candidates(self, question: Question) -> tuple[Tensor, Tensor] | None:
        """Return slots in order, int64 [B, Hkv, Tq, M], and which are worth a look, bool.

        None: the sketches of all tokens are looked at. A query that sees at most
        `flat_tokens` tokens has them all.
        """
        total = question.choosable()
        quota = self.config.overfetch * question.room
        if not self._narrows(question, total, quota):
            return None
        whole = (total <= self.config.flat_tokens) | (total <= question.room)
        slot, held = self._in_chunks(question, torch.where(whole, ALL, quota))
        found = held.sum(-1)
        short = ~whole & (found < torch.minimum(question.room, total))
        if bool(short.any()):  # hidden tokens took the place of others
            slot, held = self._in_chunks(question, torch.where(whole | short, ALL, quota))
        return slot, held

    def score_bound(self, query: Tensor, scale: float) -> Tensor | None:
        """Return the lesser of the bounds of a token's chunk and of its sketch: [B, Hkv, R, N].

        Before `complete` it is the bound of the sketch.
        """
        slots = int(self.tail.max())
        if slots == 0:
            return None
        by_sketch = self.sketches.score_bound(query, scale, slots)
        by_chunk = None if self.any_waiting else super().score_bound(query, scale)
        return by_sketch if by_chunk is None else torch.minimum(by_chunk, by_sketch)

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Count sketches and their axes; in a long context summaries, and fewer sketches."""
        bits = sketch_bits(self.head_dim)
        per_block = 2 * (self.head_dim * (len(bits) + 1) + len(bits))
        axes = -(-tokens // BLOCK) * per_block
        if tokens <= self.config.flat_tokens:
            return axes + tokens * sum(bits) // 8
        quota = self.config.overfetch * budget
        nodes = self.stack.bytes_per_step(tokens, quota, self.head_dim)
        return axes + nodes + quota * sum(bits) // 8

    def _narrows(self, question: Question, total: Tensor, quota: Tensor) -> bool:
        """True if chunks are to narrow the choice from `total` tokens, int64 [B, 1, Tq].

        `quota`, int64 [B, Hkv, Tq], are the candidates that are wanted. A choice that ends by the
        share that it covers needs the shares of all tokens.
        """
        visible, most = question.visible, int(total.max())
        many = question.query_len * int(quota.max())
        if most <= self.config.flat_tokens or not 0 < many < most:
            return False
        if question.may_miss is not None:
            return False
        if visible.bias is not None or (visible.mask is not None and visible.mask.shape[1] > 1):
            return False
        width = (question.end - question.begin)[:, None]
        if bool((MOST_HIDDEN * total < width).any()):
            return False
        if question.key is not None:
            self.complete(question.key)
        return not self.any_waiting  # without the keys nothing can be summarised

    def _in_chunks(self, question: Question, quota: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots of the best chunks that hold `quota` tokens, see `candidates`.

        Tokens that are in no chunk yet are among them.
        """
        start, length = self.best_chunks(question, quota, quota)
        begin = torch.maximum(self.open[:, None], question.begin)
        rest = (question.end - begin).clamp(min=0)
        start, length = (
            torch.cat((of, more[:, None, :, None].expand(*of.shape[:3], 1)), -1)
            for of, more in ((start, begin), (length, rest))
        )
        order = torch.where(length > 0, start, ALL).argsort(-1)
        slot, _, real = expand_runs(start.gather(-1, order), length.gather(-1, order))
        if question.visible.counts is not None:
            seen = question.candidates()[:, None].expand(-1, slot.shape[1], -1, -1)
            real &= seen.gather(-1, slot)
        return slot, real

    def _sketch(self, key: Tensor) -> None:
        """Sketch the keys up to `tail` that have no sketch."""
        begin = torch.minimum(self.sketched, self.tail)
        if bool((begin < self.tail).any()):
            self.sketches.encode(key, self.start, begin, self.tail)
            self.sketched = torch.maximum(self.sketched, self.tail)

    def _forget_sketches(self) -> None:
        """Forget the sketches from `tail` on."""
        self.sketched = torch.minimum(torch.maximum(self.sketched, self.start), self.tail)
        self.sketches.forget(self.start, self.sketched)

    def _used(self) -> Tensor:
        """Return the chunks whose tokens can be chosen, bool [B, N]: all that are cut."""
        return self.span > 0
