"""Base of the indexes that cut tokens into groups of neighbours and summarise each group."""

from __future__ import annotations

import abc

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.chunking import cut_chunks
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.question import Question, Runs, group_mass

GATHER_GROUPS = 2048
"""Number of groups whose keys are gathered at a time, to bound the memory of building."""


class GroupedIndex(KVIndex):
    """Cuts each row into groups from `start` to `tail`, shared by its heads, as tokens arrive.

    A policy of this kind defines the summary of a group (`summarise`) and an estimate of its mass
    (`log_estimate`). It may define a bound of the group's scores (`group_bound`) and the lengths of
    groups (`group_range`). Groups of a range of lengths end at the strongest boundary.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        self.compared = self.start.clone()
        """Number of tokens of each row whose keys have been compared for boundaries, int64 [B]."""
        self.group_start = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.group_length = self.group_start.clone()
        """First token and length of each group, int64 [B, C]; length 0: unused slot."""
        self.summaries: dict[str, Tensor] = {}
        """Summaries of all groups by name, each [B, Hkv, C, ...]."""
        no_keys = torch.zeros(batch, kv_heads, 0, 1, head_dim, device=device)
        no_tokens = torch.zeros(batch, 0, 1, dtype=torch.bool, device=device)
        self.summaries = self.summarise(no_keys, no_tokens)

    @abc.abstractmethod
    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Return named summaries of M groups, each [B, Hkv, M, ...].

        `keys` is float32 [B, Hkv, M, T, D]. `valid`, bool [B, M, T], is False for padding, which
        may be any number.
        """

    @abc.abstractmethod
    def log_estimate(self, query: Tensor, scale: float) -> Tensor:
        """Return the log of the estimated mean of exp(scale q.k) over each group: [B, Hkv, R, C].

        `query` is float32 [B, Hkv, R, D].
        """

    def group_bound(self, query: Tensor, scale: float) -> Tensor | None:
        """Return an upper bound of scale q.k over each group, [B, Hkv, R, C]; None: no bound."""
        return None

    @property
    def group_range(self) -> tuple[int, int]:
        """Lengths of the shortest and the longest group, in tokens."""
        return self.config.chunk

    @property
    def group_count(self) -> Tensor:
        """Number of groups of each row, int64 [B]."""
        return (self.group_length > 0).sum(1)

    def choose(self, question: Question) -> Runs:
        """Choose the groups of most estimated mass, as whole groups."""
        sizes = question.held(self.group_start, self.group_length)[:, None]
        mean = question.split(question.capped(self.log_estimate(question.query, question.scale)))
        if question.visible.bias is not None:
            mean = mean + self._group_bias(question)
        rank = question.share(group_mass(mean, sizes))
        return question.take_groups(rank, self.group_start, self.group_length)

    def score_bound(self, query: Tensor, scale: float) -> Tensor | None:
        """Return the bound of its group for each slot: [B, Hkv, R, N]."""
        bound = self.group_bound(query, scale)
        if bound is None or bound.shape[-1] == 0:
            return None
        return self.spread(bound)

    def spread(self, per_group: Tensor) -> Tensor:
        """Repeat values of groups, [B, Hkv, R, C], for each slot up to the last tail."""
        column = self.columns()[:, None, None].expand(-1, *per_group.shape[1:3], -1)
        return per_group.gather(-1, column)

    def columns(self) -> Tensor:
        """Return the group of each slot up to the last tail, int64 [B, N]; any outside a row."""
        slots = int(self.tail.max())
        begins = torch.zeros(self.batch, slots + 1, dtype=torch.int64, device=self.device)
        first = torch.where(self.group_length > 0, self.group_start, slots)
        begins.scatter_(1, first, 1)
        return (begins[:, :slots].cumsum(1) - 1).clamp(min=0)

    def partition(self) -> tuple[Tensor, Tensor]:
        """Return all indexed tokens as groups in order: (starts, lengths), int64 [B, C + 1].

        The last group of a row is its tail, whose end is not decided yet. Length 0: no group.
        """
        rest = (self.end - self.tail).clamp(min=0)
        starts = torch.cat((self.group_start, self.tail[:, None]), 1)
        lengths = torch.cat((self.group_length, rest[:, None]), 1)
        order = torch.argsort((lengths == 0).to(torch.uint8), dim=1, stable=True)
        lengths = lengths.gather(1, order)
        return torch.where(lengths > 0, starts.gather(1, order), 0), lengths

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Cut new tokens into groups, as far as cuts are decided, and summarise the groups."""
        self.end = end.clone()
        due = self.tail + self.group_range[1] < end
        if not bool(due.any()):
            return
        begin, last = int(self.tail[due].min()), int(end[due].max())
        self._find_boundaries(key, due, last)
        starts, lengths = cut_chunks(
            self.strengths.strength[:, begin:last],
            torch.where(due, self.tail, last) - begin,
            torch.where(due, end - begin, 0),
            self.group_range,
        )
        if starts.shape[1]:
            self._append(key, torch.where(lengths > 0, starts + begin, 0), lengths)

    def truncate(self, keep: Tensor) -> None:
        """Forget the tokens from position `keep`, int64 [B], on.

        A group is also dropped if a forgotten token took part in its cut. So later tokens are cut
        as if the forgotten ones had never been there.
        """
        self.strengths.forget(keep)
        self.compared = torch.minimum(self.compared, keep)
        self.end = torch.minimum(self.end, keep)
        self._drop(self.group_start + self.group_range[1] >= keep[:, None])

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they then begin at `start`, int64 [B]."""
        self._drop(rows[:, None])
        super().restart(rows, start)

    def group_keys(self, key: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys of the groups in `columns` [B, M], padded to the longest group.

        The keys are float32 [B, Hkv, M, T, D]. A mask, bool [B, M, T], is False for padding.
        """
        offset = torch.arange(self.group_range[1], device=key.device)
        valid = offset < self.group_length.gather(1, columns)[..., None]
        position = self.group_start.gather(1, columns)[..., None] + offset
        position = position.clamp(max=key.shape[2] - 1)
        row = torch.arange(key.shape[0], device=key.device)[:, None, None]
        return key[row, :, position].permute(0, 3, 1, 2, 4).float(), valid

    def rewrite(self, key: Tensor, slots: Tensor) -> None:
        """Summarise anew the groups whose `slots`, int64 [B, T], were written; -1 is none."""
        self.summarise_groups(key, self.columns().gather(1, slots.clamp(min=0)), slots >= 0)

    def close(self, key: Tensor, rows: Tensor) -> None:
        """Let the last tokens of the rows `rows`, bool [B], be a group, however few they are."""
        length = torch.where(rows, self.end - self.tail, 0).clamp(min=0)[:, None]
        if bool(length.any()):
            self._append(key, torch.where(length > 0, self.tail[:, None], 0), length)

    def summarise_groups(self, key: Tensor, columns: Tensor, used: Tensor) -> None:
        """Summarise the groups at `columns`, int64 [B, M], where `used`, bool [B, M]."""
        for part in range(0, columns.shape[1], GATHER_GROUPS):
            block = slice(part, part + GATHER_GROUPS)
            keys, valid = self.group_keys(key, columns[:, block].clamp(min=0))
            row, slot = used[:, block].nonzero(as_tuple=True)
            for name, value in self.summarise(keys, valid).items():
                self.summaries[name][row, :, columns[:, block][row, slot]] = value[row, :, slot]

    def _find_boundaries(self, key: Tensor, due: Tensor, last: int) -> None:
        """Learn boundary strengths of the rows `due`, bool [B], from their keys up to `last`."""
        self.strengths.reserve(last)
        if self.group_range[0] == self.group_range[1]:
            return  # of one length, groups end where they must
        self.strengths.compare_keys(key, max(int(self.compared[due].min()) - 1, 0), last)
        self.compared = torch.where(due, torch.maximum(self.compared, self.end), self.compared)

    def _append(self, key: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Add the groups [B, M] whose length is not 0."""
        used = lengths > 0
        columns = self.group_count[:, None] + used.long().cumsum(1) - 1
        needed = int(columns.max()) + 1
        if needed > self.group_start.shape[1]:
            self._reserve(needed + needed // 4)
        row, slot = used.nonzero(as_tuple=True)
        column = columns[row, slot]
        self.group_start[row, column] = starts[row, slot]
        self.group_length[row, column] = lengths[row, slot]
        self.summarise_groups(key, columns, used)
        self.tail = torch.maximum(self.tail, (starts + lengths).max(1).values)

    def _reserve(self, count: int) -> None:
        """Make room for `count` groups in each row."""
        more = count - self.group_start.shape[1]
        self.group_start = F.pad(self.group_start, (0, more))
        self.group_length = F.pad(self.group_length, (0, more))
        for name, value in self.summaries.items():
            room = value.new_zeros(*value.shape[:2], more, *value.shape[3:])
            self.summaries[name] = torch.cat((value, room), 2)

    def _drop(self, which: Tensor) -> None:
        """Drop the groups `which`, bool [B, 1 or C]; no kept group may follow a dropped one."""
        dropped = (self.group_length > 0) & which
        if not bool(dropped.any()):
            return
        self.group_length = torch.where(dropped, 0, self.group_length)
        left = torch.where(self.group_length > 0, self.group_start + self.group_length, 0)
        self.tail = torch.maximum(F.pad(left, (1, 0)).amax(1), self.start)

    def _group_bias(self, question: Question) -> Tensor:
        """Return the largest bias within each group: [B, 1 or Hkv, 1 or G, Tq, C]."""
        bias = question.finish(
            torch.zeros_like(question.query[..., :1]).expand(-1, -1, -1, question.visible.kv_len)
        )
        bias = bias.masked_fill(~question.candidates()[:, None, None], -torch.inf)
        slots = int(self.tail.max())
        column = self.columns()[:, None, None, None].expand(*bias.shape[:4], slots)
        floor = bias.new_full((*bias.shape[:4], self.group_start.shape[1]), -torch.inf)
        return floor.scatter_reduce(-1, column, bias[..., :slots], "amax")
