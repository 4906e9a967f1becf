"""The question to a decode policy: which tokens does each query read?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lychee_compile.kernels.reference.decode_drawing import draw
from lychee_compile.kernels.reference.nodes import log_count
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.reference.visible import Visible, per_kv_head

_LEAST_SHARE = -80.0
"""Log of the least share of a head that is added up; float32 holds its exponential."""
Runs = tuple[Tensor, Tensor]
"""First slots and lengths of runs of slots that do not overlap, int64 [B, Hkv, Tq, R]. Length 0:
no run."""
DrawnRuns = tuple[Tensor, Tensor, Tensor]
"""`Runs`, and the logarithm of how many tokens each of their tokens stands for, float32
[B, Hkv, Tq, R]."""
Choice = Runs | DrawnRuns
"""Answer of a policy to a question."""


LEAST_SHARE = 1e-30
"""Least share of the softmax that tokens to choose from are taken to hold together."""


@dataclass(frozen=True)
class Question:
    """The queries of one attention, and the tokens that may be chosen for them."""

    query: Tensor
    """Queries, float32 [B, Hkv, G * Tq, D]. Row g * Tq + t is head g of the group at position t."""
    key: Tensor | None
    """Keys of the cache [B, Hkv, L, D], for policies that read them; None if not at hand."""
    query_len: int
    """Number of query positions, Tq."""
    scale: float
    """Softmax scale: the factor of q.k."""
    softcap: float | None
    """Bound that scores are bent to, softcap tanh(score / softcap); None: no bound."""
    visible: Visible
    """Slots that each position may see."""
    begin: Tensor
    end: Tensor
    """Range [begin, end) of slots to choose from, each int64 [B, Tq]. It lies between the sinks and
    the recent tokens, which are always read."""
    room: Tensor
    """Number of tokens that may be chosen, int64 [B, Hkv, Tq]."""
    budget: Tensor
    """Number of tokens that are read in all, int64 [B, Hkv, Tq]."""
    site: str = ""
    """Module path of the attention, for policies that remember earlier choices."""
    newest: Tensor | None = None
    """Newest slot that each position sees, int64 [B, Tq]; None: the last one."""
    may_miss: float | None = None
    """Share of the softmax from which on tokens are chosen, up to `room` of them: once less than it
    is left out, no more are. None: as many as there is room for."""
    log_always: Tensor | None = None
    """Log of the sum of exp(score) over what is always read, [B, Hkv, G, Tq]; None: not known, or
    not needed because `may_miss` is None."""
    salt: Tensor | None = None
    """Numbers that the luck of tokens depends on, int64 [B, Hkv, 1, 1], if tokens of small shares
    are drawn by chance; None: the tokens of the largest shares are read."""

    @property
    def group(self) -> int:
        """Number of query heads that share a KV head, G."""
        return self.query.shape[2] // self.query_len

    def candidates(self) -> Tensor:
        """Return the slots that may be chosen and that some head sees: bool [B, Tq, L]."""
        return self._candidates

    @cached_property
    def _candidates(self) -> Tensor:
        return self._between(self.begin, self.end)

    def seen(self) -> Tensor:
        """Return the slots that some head of a KV head sees: bool [B, 1 or Hkv, Tq, L]."""
        mask, inside = self.visible.mask, self._between(self.visible.first, self.visible.end)
        if mask is None or mask.shape[1] == 1:
            return inside[:, None]
        return inside[:, None] & self._per_head(mask).any(2)

    def _between(self, begin: Tensor, end: Tensor) -> Tensor:
        """Return the slots in [begin, end), int64 [B, Tq], that some head sees."""
        slot = torch.arange(self.visible.kv_len, device=self.query.device)
        inside = (slot >= begin[..., None]) & (slot < end[..., None])
        return inside if self.visible.mask is None else inside & self.visible.mask.any(1)

    def split(self, rows: Tensor) -> Tensor:
        """Split the rows of [B, Hkv, G * Tq, N] by head and position: [B, Hkv, G, Tq, N]."""
        return rows.unflatten(2, (self.group, self.query_len))

    def capped(self, scores: Tensor) -> Tensor:
        """Return the scores under the soft-cap, if there is one."""
        return capped(scores, self.softcap)

    def finish(self, raw: Tensor) -> Tensor:
        """Return raw scores [B, Hkv, G * Tq, N], N <= L, as the softmax sees them.

        They are soft-capped, biased, and -inf for slots that a head may not see:
        [B, Hkv, G, Tq, N].
        """
        return self._biased(raw, None)

    def token_scores(self) -> Tensor:
        """Return the exact scores of every slot, from its key: float32 [B, Hkv, G, Tq, L]."""
        return self.finish(self.scale * (self.query @ self.keys().float().transpose(-1, -2)))

    def keys(self) -> Tensor:
        """Return the keys. Raises ValueError if the question came without keys."""
        if self.key is None:
            raise ValueError("this policy reads the keys themselves: give select() the keys too")
        return self.key[:, :, : self.visible.kv_len]

    def choosable(self) -> Tensor:
        """Count the tokens to choose from, int64 [B, 1, Tq]."""
        inside = self.visible.tokens_within(self.begin[..., None], self.end[..., None])[..., 0]
        return torch.where(self.end > self.begin, inside, 0)[:, None]

    def held(self, start: Tensor, length: Tensor) -> Tensor:
        """Count the tokens to choose from in groups of slots [B, C]: int64 [B, Tq, C]."""
        begin, end = self._clip(start, length)
        return torch.where(end > begin, self.visible.tokens_within(begin, end), 0)

    def share(self, log_mass: Tensor, of_all: bool = False) -> Tensor:
        """Return the log of the softmax share of each node, summed over a group: [B, Hkv, Tq, N].

        `log_mass` [B, Hkv, G, Tq, N] is the log of what each node adds to the denominator of the
        softmax. Every head has the same weight, however large its scores. With `of_all` the nodes
        hold all tokens that a query sees. Without, they hold those that may be chosen; if a share
        of the softmax is to be covered, their shares count what is always read as well, but for
        all heads together: that never changes their order.
        """
        usable = log_mass.amax(-1, keepdim=True).isfinite()
        share = log_mass.log_softmax(-1)
        if bool(usable.all()):
            return self._with_always_read(_sum_of_shares(share), log_mass, of_all)
        mass = log_mass.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        usable = mass.amax(-1, keepdim=True).isfinite()
        share = torch.where(usable, mass.log_softmax(-1), mass).logsumexp(2)
        return self._with_always_read(share, mass, of_all)

    def _with_always_read(self, share: Tensor, mass: Tensor, of_all: bool) -> Tensor:
        """Return `share` [B, Hkv, Tq, N] as a part of all that is read, if that is asked for."""
        if self.log_always is None or of_all:
            return share
        chosen_from = torch.sigmoid(mass.logsumexp(-1) - self.log_always).nan_to_num(0.0)
        return share + chosen_from.mean(2).clamp(min=LEAST_SHARE).log()[..., None]

    def needed(self, best: Tensor, rank: Tensor) -> Tensor:
        """Return which of the `best` nodes it takes to leave out less than `may_miss`: bool.

        `rank` [B, Hkv, Tq, N] are the shares of all nodes that may be chosen, as `share` returns
        them, -inf for others; `best` [B, Hkv, Tq, K] are the largest of them, in order. If
        `may_miss` is None, all are needed.
        """
        if self.may_miss is None:
            return torch.ones_like(best, dtype=torch.bool)
        mass = best.double().exp()
        left_out = rank.exp().sum(-1, keepdim=True, dtype=torch.float64) - (mass.cumsum(-1) - mass)
        return ~(left_out <= self.may_miss * self.group)  # a NaN proves nothing

    def token_share(self, raw: Tensor) -> Tensor:
        """Return `share` of the candidates, for raw scores [B, Hkv, G * Tq, N], N <= L."""
        return self.share_of(raw, self.candidates()[:, None])

    def share_of(self, raw: Tensor, within: Tensor, of_all: bool = False) -> Tensor:
        """Return `share` of the slots `within`, for raw scores [B, Hkv, G * Tq, N], N <= L.

        `within` is bool [B, 1 or Hkv, Tq, L].
        """
        return self.share(self._biased(raw, within[:, :, None, :, : raw.shape[-1]]), of_all)

    def take_tokens(self, rank: Tensor, within: Tensor | None = None) -> Choice:
        """Return the best `room` tokens by `rank` [B, Hkv, Tq, N], N <= L, each a run, in order.

        Slots that may not be chosen, or are not `within`, bool of the same shape, are left out
        whatever their rank. A token whose rank is NaN comes first. Ranks are shares, as `share`
        returns them, if a share of the softmax is to be covered (`may_miss`): then fewer than
        `room` may do.
        """
        candidate = self.candidates()[:, None, :, : rank.shape[-1]]
        if self.salt is not None:
            slot = torch.arange(rank.shape[-1], device=rank.device)
            among = candidate if within is None else candidate & within
            return self._drawn(rank, slot.expand_as(rank), among)
        return self._runs(*self._best(rank, candidate, within))

    def take_own(self, raw: Tensor, slot: Tensor, held: Tensor) -> Choice:
        """Return the best `room` tokens among slots of each position's own, as `take_tokens` does.

        `slot`, int64 [B, 1 or Hkv, Tq, M], are slots that may be chosen where `held`, bool of the
        same shape. `raw` [B, Hkv, G, Tq, M] are their raw scores. There are no biases.
        """
        if raw.shape[-1] == 0:  # what is always read has left no room for any
            nothing = slot.new_zeros(*raw.shape[:2], raw.shape[3], 0)
            return nothing, nothing
        rank = self.share(_hidden(self.capped(raw), held[:, :, None]))
        if self.salt is not None:
            return self._drawn(rank, slot.expand_as(rank), held)
        best, taken = self._best(rank, held)
        return self._runs(slot.expand_as(rank).gather(-1, best), taken)

    def _best(
        self, rank: Tensor, candidate: Tensor, within: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the places of the best candidates [B, Hkv, Tq, R], and which are to be taken.

        Candidates that are not `within` are left out, but count for what a choice covers.
        """
        lowest = torch.finfo(rank.dtype).min
        rank = rank.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=lowest)
        rank = torch.where(candidate, rank, -torch.inf)
        among = rank if within is None else torch.where(within, rank, -torch.inf)
        count = min(int(self.room.max()), rank.shape[-1])
        best = among.topk(max(count, 0), dim=-1)
        number = torch.arange(best.values.shape[-1], device=rank.device)
        taken = (best.values > -torch.inf) & (number < self.room[..., None])
        if self.may_miss is not None:
            taken = taken & self.needed(best.values, rank)
        return best.indices, taken

    def _drawn(self, rank: Tensor, slot: Tensor, candidate: Tensor) -> DrawnRuns:
        """Return `room` of the tokens in `slot` [B, Hkv, Tq, N], drawn by their shares `rank`.

        Tokens that are no `candidate`, bool [B, 1 or Hkv, Tq, N], are left out.
        """
        assert self.salt is not None
        place, log_weight, taken = draw(rank, slot, candidate, self.room, self.salt)
        slot = torch.where(taken, slot.gather(-1, place), self.visible.kv_len)
        slot, order = slot.sort(-1)
        taken = slot < self.visible.kv_len
        return torch.where(taken, slot, 0), taken.long(), log_weight.gather(-1, order)

    def _runs(self, slot: Tensor, taken: Tensor) -> Runs:
        """Return the slots `taken` [B, Hkv, Tq, R], each a run, in order."""
        slot = torch.where(taken, slot, self.visible.kv_len).sort(-1).values
        taken = slot < self.visible.kv_len
        return torch.where(taken, slot, 0), taken.long()

    def take_groups(self, rank: Tensor, start: Tensor, length: Tensor) -> Runs:
        """Return the best whole groups by `rank` [B, Hkv, Tq, C] that fit into `room` tokens.

        Ranks are as in `take_tokens`, and as there fewer may do.
        A group is `length` slots from `start`, each int64 [B, C]. Slots of a group that may not be
        chosen are left out.
        """
        sizes = self.held(start, length)[:, None].expand_as(rank)
        rank = rank.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        rank = rank.masked_fill(sizes == 0, -torch.inf)
        order, inside = take_by_rank(rank, sizes, self.room[..., None], whole=True)
        if self.may_miss is not None:
            inside = inside & self.needed(rank.gather(-1, order), rank)
        order = order[..., : int(inside.sum(-1).max()) if inside.numel() else 0]
        begin, end = self._clip(start, length)

        def pick(values: Tensor) -> Tensor:
            return values[:, None].expand_as(rank).gather(-1, order)

        return pick(begin), torch.where(inside[..., : order.shape[-1]], pick(end - begin), 0)

    def _biased(self, raw: Tensor, within: Tensor | None) -> Tensor:
        """Return `finish(raw)`, and -inf for slots not `within`, bool [B, 1 or Hkv, 1, Tq, N]."""
        scores, slots, seen = self.split(self.capped(raw)), raw.shape[-1], within
        if self.visible.bias is not None:
            scores = scores + self._per_head(self.visible.bias)[..., :slots].float()
        mask = self.visible.mask
        # With a mask of one head, all heads see the same slots, and `within` tells which.
        if mask is not None and (within is None or mask.shape[1] > 1):
            seen = self._per_head(mask)[..., :slots]
            seen = seen if within is None else seen & within
        return scores if seen is None else _hidden(scores, seen)

    def _clip(self, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        begin = torch.maximum(start[:, None], self.begin[..., None])
        end = torch.minimum((start + length)[:, None], self.end[..., None])
        return begin, torch.where((length > 0)[:, None], torch.maximum(end, begin), begin)

    def _per_head(self, mask: Tensor) -> Tensor:
        return per_kv_head(mask, self.query.shape[1], self.group)


def _hidden(scores: Tensor, seen: Tensor) -> Tensor:
    """Return scores, and -inf where they are not `seen`, bool broadcastable to them.

    On a CPU it is many times as fast to add -inf, which is right for finite scores.
    """
    added = scores + torch.where(seen, 0.0, -torch.inf)
    if bool(added.amax().isnan()):
        return scores.masked_fill(~seen, -torch.inf)
    return added


def _sum_of_shares(share: Tensor) -> Tensor:
    """Return the log of the sum of exp(share) over heads, [B, Hkv, G, Tq, N]: [B, Hkv, Tq, N].

    Shares are at most 0. Overwrites `share`. On a CPU the exponential of -inf takes many times as
    long as that of other numbers, and most slots may be hidden: so no share counts as less than
    exp(-80), but where none is larger, the largest stands for the sum.
    """
    most = share.amax(2)
    total = share.clamp_(min=_LEAST_SHARE).exp_().sum(2).log_()
    return torch.where(most > _LEAST_SHARE, total, most)


def query_rows(query: Tensor, heads: int) -> Tensor:
    """Return queries [B, Hq, Tq, D] as the rows of a question: float32 [B, Hkv, G * Tq, D]."""
    return query.float().unflatten(1, (heads, -1)).flatten(2, 3)


def take_by_rank(
    rank: Tensor, tokens: Tensor, quota: Tensor | int, whole: bool
) -> tuple[Tensor, Tensor]:
    """Order nodes by `rank` [..., N], best first, and take a prefix within `quota` tokens.

    Returns the order, int64 [..., N], and a mask of the prefix in that order, bool [..., N]. With
    `whole` the prefix has at most `quota` tokens; without, it ends with the node that reaches
    `quota`. Equal ranks keep their order, so that a choice is repeatable.
    """
    order = rank.argsort(dim=-1, descending=True, stable=True)
    size = tokens.gather(-1, order)
    through = size.cumsum(-1)
    inside = through <= quota if whole else through - size < quota
    return order, inside & (size > 0)


def group_mass(mean_score: Tensor, tokens: Tensor) -> Tensor:
    """Return the log mass of nodes from the log of their mean exp(score) and their token counts.

    `mean_score` is [B, Hkv, G, Tq, N], `tokens` int64 broadcastable to [B, Hkv, Tq, N].
    """
    return mean_score + log_count(tokens)[:, :, None]
