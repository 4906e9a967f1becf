"""The plain form of policies whose groups differ in length: how groups are ranked and kept."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.levels.declaration import Level, LevelStack
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.reference.clustered import Columns
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.level_values import estimate
from lychee_compile.kernels.reference.question import Question, take_by_rank


class UnevenIndex(KVIndex):
    """Groups of any length, each ranked by the share of the softmax that one of its keys has.

    A group takes part if it has a key that a query sees and that was there before this step. It can
    be chosen if it has one between the sinks and the recent tokens.
    """

    stack: ClassVar[LevelStack]
    """The declaration."""

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        self.settings = GroupSettings.of(config)

    @property
    def always_read(self) -> tuple[int, int]:
        """Numbers of first and of last tokens that every query reads."""
        config = self.config
        return self.stack.always_read(config.sinks, config.recent, config.budget)

    @property
    def indexed(self) -> Tensor:
        """Slot after the last token that was there before this step, int64 [B]."""
        return self.end if self.fresh is None else torch.minimum(self.fresh, self.end)

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Count the summaries, and the numbers of the groups that belong to others."""
        return self.stack.bytes_per_step(tokens, budget, self.head_dim)

    def ranks(
        self, question: Question, level: Level, groups: Columns, looked_into: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the log share of each group, and which can be chosen: [B, Hkv, Tq, N].

        `groups` are the fields of the level and the numbers `tokens`, `first` and `end`, each
        [B, 1 or Hkv, N]. Groups that are not `looked_into`, bool [B, Hkv, Tq, N], have no share;
        None: all are.
        """
        score, shown = self._scores(question, level, groups, looked_into)
        share = question.share(score.masked_fill(~shown[:, :, None], -torch.inf))
        if self.stack.vote == "layer":
            share = share.logsumexp(1, keepdim=True).expand_as(share)
        share = share.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo().min)
        first, end = (groups[name][:, :, None] for name in ("first", "end"))
        between = (first < question.end[:, None, :, None]) & (
            end > question.begin[:, None, :, None]
        )
        return share, shown & between

    def needed(
        self, question: Question, level: Level, groups: Columns, order: Tensor, size: Tensor
    ) -> Tensor:
        """Return which groups it takes, in `order`, to cover the share that is asked for.

        `size`, int64 [B, Hkv, Tq, N], are the tokens of each group that may be chosen: its mass is
        that of one of its keys, times their number. The result is bool like `order`, of that shape.
        """
        if question.may_miss is None:
            return torch.ones_like(order, dtype=torch.bool)
        score, _ = self._scores(question, level, groups, None)
        mass = question.share(score + size.log()[:, :, None])
        return question.needed(mass.gather(-1, order), mass)

    def _scores(
        self, question: Question, level: Level, groups: Columns, looked_into: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of groups, [B, Hkv, G, Tq, N], and which have a share: see `ranks`."""
        first, end = (groups[name][:, :, None].long() for name in ("first", "end"))
        visible = question.visible
        begin = torch.maximum(first, visible.first[:, None, :, None])
        behind = torch.minimum(end, visible.end[:, None, :, None])
        behind = torch.minimum(behind, self.indexed[:, None, None, None])
        shown = (groups["tokens"][:, :, None] > 0) & (begin < behind)
        if looked_into is not None:
            shown = shown & looked_into
        shown = shown.expand(-1, self.kv_heads, -1, -1)
        fields = {name: groups[name] for name in level.fields}
        raw = estimate(level, question.query, fields, question.scale)
        score = question.split(question.capped(question.scale * raw))
        return score + self.bias(question, level, begin, behind), shown

    def bias(self, question: Question, level: Level, begin: Tensor, end: Tensor) -> Tensor | float:
        """Return what a mask adds to the scores of groups, broadcastable to [B, Hkv, G, Tq, N].

        The groups lie in the slots [begin, end), each int64 [B, 1 or Hkv, Tq, N].
        """
        return 0.0

    def keep(
        self,
        question: Question,
        level: Level,
        groups: Columns,
        looked_into: Tensor | None,
        budget: int | Tensor,
    ) -> Tensor:
        """Return the groups kept for the next level, bool [B, Hkv, Tq, N].

        They are the best ones, until they have as many tokens as the level keeps for a `budget`,
        int or int64 [B, Hkv, Tq].
        """
        assert level.keep is not None
        rank, possible = self.ranks(question, level, groups, looked_into)
        tokens = torch.where(possible, groups["tokens"][:, :, None].long(), 0)
        rank = rank.masked_fill(~possible, -torch.inf)
        quota = torch.as_tensor(budget, device=rank.device)[..., None] * level.keep.per_token
        order, inside = take_by_rank(rank, tokens, quota.clamp(min=level.keep.least), whole=False)
        return torch.zeros_like(possible).scatter(-1, order, inside)


def with_room(columns: Columns, count: int) -> Columns:
    """Return columns [B, Hkv, N, ...] with room for `count` groups, or more; new ones are 0."""
    found = {}
    for name, held in columns.items():
        more = count - held.shape[2]
        tail = (0, 0) * (held.dim() - 3)
        found[name] = F.pad(held, (*tail, 0, more)) if more > 0 else held
    return found


def empty_columns(
    level: Level, batch: int, heads: int, head_dim: int, device: torch.device
) -> Columns:
    """Return the numbers of no cluster: `tokens`, `first` and `end`, and the fields by name."""
    none = torch.zeros(batch, heads, 0, dtype=torch.int64, device=device)
    columns = dict.fromkeys(("tokens", "first", "end"), none)
    for name, wide in level.channels.items():
        columns[name] = torch.zeros(batch, heads, 0, head_dim if wide else 1, device=device)
    return columns
