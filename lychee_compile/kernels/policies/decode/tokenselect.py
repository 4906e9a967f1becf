"""TokenSelect: every token scored, all heads voting, and a choice kept while queries stay alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.question import Question, Runs

SIMILAR = 0.9
"""Least cosine between two queries at which the choice of one is kept for the other."""


@dataclass
class _Choice:
    """The tokens that the last query of a site chose."""

    query: Tensor
    """float32 [B, Hq * D], the query that chose."""
    slot: Tensor
    """Slots of the tokens, int64 [B, Hkv, K], -1 for none."""
    room: Tensor
    """Number of tokens that could be chosen, int64 [B, Hkv]."""
    valid: Tensor
    """bool [B]: True if the row still has the tokens chosen from, and the choice left some out."""


class TokenSelectIndex(KVIndex):
    """TokenSelect (arXiv 2411.02886): exact scores of all tokens, a soft vote, a selection cache.

    There are no groups and no summaries. A softmax over the tokens to choose from makes shares of
    each query head's scores. All heads of the layer add up their shares ("soft vote"). Every KV
    head reads the tokens of most votes, beside the `sinks` first and the `recent` last tokens. A
    choice is kept for the next queries as long as their cosine with the query that made it, over
    all heads together, is at least 0.9 (`similar`; above 1 every query votes). Tokens that leave
    the window meanwhile are not read until the next vote.

    Not as in the paper: scores are scaled, capped and biased as the attention's own are. Several
    query positions count as that many steps, where the paper votes once for a chunk of them. Its
    128 sinks, 512 recent and 2048 voted tokens are the options `sinks`, `recent` and `budget`. A
    choice is kept only where it is certain to be of the same attention (`Question.site`) over the
    same tokens, and as large as asked for: not after a rewind, nor for another budget.
    """

    reads_keys = True
    similar = SIMILAR

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        self.choices: dict[str, _Choice] = {}
        """The last choice of each site."""

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Let every token be chosen as soon as it is there."""
        self.end, self.tail = end.clone(), torch.maximum(end, self.start)

    def truncate(self, keep: Tensor) -> None:
        """Forget the tokens from position `keep`, int64 [B], on, and what was chosen from them."""
        self._forget(keep < self.end)
        super().truncate(keep)

    def rewrite(self, key: Tensor, slots: Tensor) -> None:
        """Forget the choices that hold one of `slots`, int64 [B, T]; -1 is none."""
        for choice in self.choices.values():
            held = choice.slot.flatten(1)[..., None] == slots[:, None]
            choice.valid = choice.valid & ~(held & (slots >= 0)[:, None]).flatten(1).any(1)

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they begin at `start`, int64 [B]."""
        self._forget(rows)
        super().restart(rows, start)

    def choose(self, question: Question) -> Runs:
        """Return the tokens of most votes, or an earlier choice for a query much alike."""
        candidate = question.candidates()
        queries = question.split(question.query).permute(0, 3, 1, 2, 4).flatten(2)
        choice = self.choices.get(question.site) if question.site else None
        if choice is not None and choice.query.shape != queries[:, 0].shape:
            choice = None
        voted: Tensor | None = None
        slots = []
        for place in range(question.query_len):
            query, there = queries[:, place], candidate[:, place]
            kept = torch.zeros_like(self.start, dtype=torch.bool)
            if choice is not None:
                kept = self._still_good(choice, query, there, question.room[..., place])
            if choice is None or not bool(kept.all()):
                voted = _vote(question) if voted is None else voted
                room = question.room[..., place]
                choice = _update(choice, kept, _Choice(query, voted[:, :, place], room, kept))
                left_out = there.sum(-1, keepdim=True) > room
                choice.valid = kept | left_out.all(-1)
            slots.append(choice.slot)
        if question.site and choice is not None:
            self.choices[question.site] = choice
        return _as_runs(slots)

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Count every key, which a vote reads; a choice that is kept reads next to none."""
        return 2 * self.head_dim * tokens

    def _still_good(
        self, choice: _Choice, query: Tensor, candidate: Tensor, room: Tensor
    ) -> Tensor:
        """Return the rows for which `choice` may be kept, bool [B].

        `candidate` is bool [B, L], `room` int64 [B, Hkv].
        """
        slots = candidate.shape[-1]
        chosen = choice.slot >= 0
        wide = candidate[:, None].expand(-1, choice.slot.shape[1], -1)
        there = wide.gather(-1, choice.slot.clamp(0, slots - 1)) & (choice.slot < slots)
        intact = (there | ~chosen).all(-1) & (choice.room == room)
        alike = F.cosine_similarity(query, choice.query, dim=-1) >= self.similar
        return choice.valid & alike & intact.all(-1)

    def _forget(self, rows: Tensor) -> None:
        for choice in self.choices.values():
            choice.valid = choice.valid & ~rows


def _vote(question: Question) -> Tensor:
    """Return the tokens of most votes of each position, int64 [B, Hkv, Tq, K], -1 for none."""
    raw = question.scale * (question.query @ question.keys().float().transpose(-1, -2))
    heads = question.query.shape[1]
    votes = question.token_share(raw).logsumexp(1, keepdim=True) - math.log(heads)
    start, length = question.take_tokens(votes.expand(-1, heads, -1, -1))
    return torch.where(length > 0, start, -1)


def _update(choice: _Choice | None, kept: Tensor, voted: _Choice) -> _Choice:
    """Return `choice` for the rows `kept`, bool [B], else what was `voted`."""
    if choice is None:
        return voted
    old, new = _same_width([choice.slot, voted.slot])
    slot = torch.where(kept[:, None, None], old, new)
    query = torch.where(kept[:, None], choice.query, voted.query)
    room = torch.where(kept[:, None], choice.room, voted.room)
    return _Choice(query, slot, room, kept)


def _same_width(slots: list[Tensor]) -> list[Tensor]:
    """Return slots [B, Hkv, K], padded with -1 to the widest."""
    width = max(each.shape[-1] for each in slots)
    return [F.pad(each, (0, width - each.shape[-1]), value=-1) for each in slots]


def _as_runs(slots: list[Tensor]) -> Runs:
    """Return the slots of each position, int64 [B, Hkv, K], -1 for none, as runs of one token."""
    slot = torch.stack(_same_width(slots), 2)
    return slot.clamp(min=0), (slot >= 0).long()
