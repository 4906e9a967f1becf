"""Steps of decoding by a policy of uneven groups: its kernels beside its plain form.

Clusters are fitted by the host now and then. So the plain form takes those that the kernels have,
and is asked what it would choose by them; that both make the same clusters is tested apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from level_steps import (
    LOWEST,
    TIE,
    Case,
    Steps,
    always_of,
    check_best,
    kept_scratch,
    noting,
    rounding,
    score_inputs,
)
from torch import Tensor

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common import launch_sparse
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.operators.cache_index import CacheWrite
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.chunk_index import ChunkIndex
from lychee_compile.kernels.reference.chunk_table import bounds_of, decided
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.question import Question
from lychee_compile.kernels.reference.selection import select
from lychee_compile.kernels.reference.uneven_index import below
from lychee_compile.kernels.reference.visible import visible_keys

EVENTS = ("step", "rewind", "rewind far", "written by another", "refit")
"""Events that may happen to a cache before the next step."""


@dataclass
class UnevenCase(Case):
    """A policy of uneven groups, and an attention that it decodes."""

    chunk: tuple[int, int] = (8, 16)

    @property
    def config(self) -> IndexConfig:
        """Options of the plain form's index."""
        return replace(super().config, chunk=self.chunk)

    def plain(self, key: Tensor, end: Tensor) -> KVIndex:
        """Return the plain form's index of the slots [0, end), int64 [B], made at once."""
        index = make_index(len(key), key.shape[1], key.shape[3], self.config, key.device)
        index.extend(key, end)
        return index

    def problem(self, length: int, sparse: bool = True):
        """Return the attention whose first query is at the slot `length`."""
        made = super().problem(length, sparse)
        settings = GroupSettings.of(self.config)
        sizes = self.budget, self.sinks, self.recent, 16, 65536
        spec = SparseSpec(self.policy, *sizes, groups=settings, epsilon=self.epsilon)
        made.spec = replace(made.spec, sparse=spec if sparse else None)
        return made


class UnevenSteps(Steps):
    """A cache written step by step, the index of the kernels, and that of the plain form."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings = GroupSettings.of(self.case.config)
        layout = self.method.layout_with(settings, self.key)
        self.index = self.method.new_index(layout, self.key.device)
        self.rebuild()

    def refit(self) -> None:
        """Fit the clusters of the kernels anew, as happens now and then."""
        ends = self.index.parts.header[1:].tolist()
        self.index.refit(self.case.problem(self.length).module(), self.key, ends)

    def compare(self) -> None:
        """Write, attend in both ways, and check that both choose the same, up to ties."""
        self.write()
        problem, positions = self.problem(), self.positions()
        question, plain = self._asked(problem, positions)
        used = IndexOperands(self.index.layout, self.index.parts, positions)
        with kept_scratch(few_programs=self.key.device.type == "cpu") as made:
            output = self.method.run(problem.module(), problem.operands(), used)
        slots = self._read(made["chosen_list"].flatten(1), problem.query.shape[2])
        problem.assert_as_good_as_eager(output, slots)
        self.length += self.case.sizes.query_len
        seen = problem.visible.unflatten(1, (-1, problem.spec.group)).any(2)
        if question is None:
            assert torch.equal(slots & seen, plain & seen), "everything fits"
            return
        always = always_of(question)[:, None]
        assert not (seen & always & ~slots).any(), "a token that is always read is not"
        most = torch.maximum(question.room + (seen & always).sum(-1), question.room)
        assert ((slots & seen).sum(-1) <= most).all(), "over the budget"
        tie = TIE + rounding(problem)
        own = slots & seen & ~always
        if isinstance(self.plain.index, ChunkIndex):
            self._check_chunks(question, made, own, tie)
        else:
            self._check_clusters(question, own, tie)

    def _read(self, listed: Tensor, query_len: int) -> Tensor:
        """Return listed slots [rows, N], -1 for none, as bool [B, Hkv, T, L]."""
        heads, length = self.key.shape[1:3]
        rows = torch.zeros(len(listed), length + 1, dtype=torch.bool, device=listed.device)
        rows.scatter_(1, torch.where(listed < 0, length, listed).long(), True)
        return rows[:, :-1].unflatten(0, (-1, query_len, heads)).transpose(1, 2)

    def _asked(self, problem, positions: Tensor) -> tuple[Question | None, Tensor]:
        """Return the question to the plain form, None if everything fits, and what it reads."""
        inputs = score_inputs(problem, self.case)
        mask = visible_keys(inputs.mask, len(self.key), inputs.query.shape[2], self.key.shape[2],
                            self.key.device)  # fmt: skip
        write = CacheWrite(mask.first.amin(1), positions, None, mask.end.amax(1))
        self.plain.update(self.key, write, build=True)
        self._share_clusters()
        index, asked = self.plain.index, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "choose", noting(asked, index.choose))
            read = select(index, inputs, self.case.budget).token_mask()
        return (asked[0] if asked else None), read

    def _share_clusters(self) -> None:
        """Let the plain form have the clusters of the kernels."""
        index, named = self.plain.index, self.index.named
        if not isinstance(index, ChunkIndex):
            index.label = named["label"].long() - 1
            index.tail = torch.minimum(named["waiting"][:, 0, 0].long(), index.fresh)
            index.columns = {
                k: v.clone() for k, v in with_channel(self.index.columns(0, len(self.key))).items()
            }
            return
        for number in range(len(index.labels)):
            columns = with_channel(self.index.columns(number, len(self.key)))
            index.clusters[number] = {name: held.clone() for name, held in columns.items()}
            label = named[f"label_{number + 1}"].long() - 1
            if number == len(index.labels) - 1:
                count = index.span.shape[1]
                label = F.pad(label, (0, max(count - label.shape[2], 0)), value=-1)[:, :, :count]
            index.labels[number] = label

    def _check_chunks(self, question: Question, made, own: Tensor, tie: float) -> None:
        index, looked = self.plain.index, None
        levels = index.stack.levels
        for number, label in enumerate(index.labels):
            columns = index.clusters[number]
            rank, possible = index.ranks(question, levels[number], columns, looked)
            marks = made[f"bins_{number}"][:, : rank.shape[-1]] > 0
            marks = marks.unflatten(0, (len(rank), rank.shape[2], rank.shape[1])).transpose(1, 2)
            tokens = torch.where(possible, columns["tokens"][:, :, None].long(), 0)
            room = torch.full_like(question.room, levels[number].keep.tokens(self.case.budget))
            fits = (question.end - question.begin)[:, None] <= question.room
            room = torch.where(fits, 2**26, room)
            check_weighed(marks, rank, tokens, room, tie)
            looked = below(marks, label)
        low, length = (each[:, None] for each in bounds_of(index.span, index.settings.chunk))
        used = torch.where(index._used()[:, None], length, 0)
        groups = {**index.fields, "tokens": used, "first": low, "end": low + length}
        rank, possible = index.ranks(question, levels[-1], groups, looked)
        begin = torch.maximum(low[:, :, None], question.begin[:, None, :, None])
        end = torch.minimum((low + length)[:, :, None], question.end[:, None, :, None])
        size = torch.where(possible, end - begin, 0)
        taken = torch.zeros_like(size)
        of_slot = F.pad(own.long().cumsum(-1), (1, 0))
        wide = [
            each.expand(own.shape[:3] + size.shape[-1:]).clamp(0, own.shape[-1])
            for each in (begin, end)
        ]
        taken = torch.where(size > 0, of_slot.gather(-1, wide[1]) - of_slot.gather(-1, wide[0]), 0)
        assert (taken.sum(-1) == own.sum(-1)).all(), "a slot of no chunk"
        check_weighed(taken > 0, rank, size, question.room, tie)

    def _check_clusters(self, question: Question, own: Tensor, tie: float) -> None:
        index = self.plain.index
        rank, possible = index.ranks(question, index.stack.levels[0], index.columns, None)
        label = index.label[:, :, None, : own.shape[-1]].expand(own.shape)
        rank = rank.masked_fill(~possible, -torch.inf).gather(-1, label.clamp(min=0))
        chosen = question.candidates()[:, None] & (label >= 0)
        rounded = launch_sparse.MOST_SPARSE_SPLITS + own.shape[-1] // 256
        check_best(own, rank.masked_fill(~chosen, -torch.inf), question.room, tie, rounded)


def with_channel(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return columns whose fields of one number have an axis for it, as the plain form has."""
    numbers = ("tokens", "first", "end")
    return {
        name: held.float()[..., None] if held.dim() == 3 and name not in numbers else
        held.float() if held.dim() == 4 else held.long()
        for name, held in columns.items()
    }  # fmt: skip


def check_weighed(chosen: Tensor, rank: Tensor, size: Tensor, room: Tensor, tie: float) -> None:
    """Check that groups of largest rank are chosen until they fill `room`, but for ties."""
    possible = size > 0
    assert not (chosen & ~possible).any(), "a group that may not be chosen"
    rank = rank.clamp(min=LOWEST).masked_fill(~possible, -torch.inf)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    through = size.gather(-1, order).cumsum(-1)
    ordered = rank.gather(-1, order)
    before = F.pad(through, (1, 0))[..., :-1] < room[..., None]
    last = torch.where(before & (ordered > -torch.inf), ordered, torch.inf).amin(-1, keepdim=True)
    overflow = torch.where(through >= room[..., None], ordered, -torch.inf).amax(-1, keepdim=True)
    assert (~chosen | (rank >= last - tie)).all(), "a group below the cut"
    assert (chosen | ~possible | (rank <= overflow + tie)).all(), "a group above the cut left out"


def follow(steps: UnevenSteps, history: list[str]) -> None:
    """Take a cache through a history, and compare both choices at each step."""
    case = steps.case
    for event in history:
        if event == "rewind":
            steps.length -= 3
        elif event == "rewind far":
            steps.length = max(steps.length - 40, 12)
        elif event == "written by another":
            steps.key[:, :, : steps.length // 2] = steps.key[:, :, : steps.length // 2].flip(2)
            steps.rebuild()
        elif event == "refit":
            steps.refit()
        if steps.length + case.sizes.query_len > case.sizes.kv_len:
            steps.length -= 20
        steps.compare()


def table_of(index, rows: int) -> tuple[Tensor, Tensor]:
    """Return the chunks that the kernels know, int32 [B, Hkv, N], and which of them are decided."""
    end = index.parts.header[1 : 1 + rows].long()
    span = index.named["span"][:rows]
    return span, decided(span, end[:, None].expand(-1, span.shape[1]), index.layout.settings.chunk)
