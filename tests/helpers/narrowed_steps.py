"""Steps of decoding by "lychee" in a context that chunks narrow, beside the plain form's choice.

The plain form of the narrowing is a chunk index over the levels of lychee, which is asked for as
many tokens as there are candidates. What sketches choose of these is compared with
`sketch_spec.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from decode_problems import Problem
from level_checks import TIE, below, check_weighed, kept_clusters, rounding
from level_steps import Case, Steps
from sparse_steps import Step
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.levels import chunk_index
from lychee_compile.kernels.gpu.levels.index import columns_of
from lychee_compile.kernels.gpu.lychee import index as sketch_index
from lychee_compile.kernels.gpu.lychee import layout as sketch_layout
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_lychee
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.operators.cache_index import CacheIndex
from lychee_compile.kernels.policies import registry
from lychee_compile.kernels.policies.decode.lychee import LYCHEE
from lychee_compile.kernels.reference.chunk_index import ChunkIndex
from lychee_compile.kernels.reference.chunk_table import bounds_of
from lychee_compile.kernels.reference.question import Question

PLAIN = "narrowing"
"""Name of the policy of the plain form, within `short_contexts`."""


class Narrowing(ChunkIndex):
    """Chunks of lychee, where every token before this step can be chosen, in a chunk or not."""

    stack = LYCHEE

    @property
    def unread(self) -> Tensor:
        return self.indexed


@contextmanager
def short_contexts() -> Iterator[None]:
    """Let chunks narrow contexts however short, and few tokens have clusters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_policies", dict(registry._policies))
        registry.register_policy(PLAIN, Narrowing)
        patch.setattr(sketch_layout, "NARROWED_SLOTS", 1)
        patch.setattr(sketch_layout, "NARROWED_ROW", 1)
        patch.setattr(chunk_index, "REFIT", 16)
        patch.setattr(sketch_index, "refit_after", lambda end: 16)
        yield


@dataclass
class NarrowedCase(Case):
    """An attention whose context is longer than `flat_tokens`."""

    overfetch: int = 2
    flat_tokens: int = 20

    @property
    def config(self) -> IndexConfig:
        return replace(super().config, policy=PLAIN)

    def problem(self, length: int, sparse: bool = True) -> Problem:
        made = super().problem(length, sparse)
        if made.spec.sparse is not None:
            sizes = {"overfetch": self.overfetch, "flat_tokens": self.flat_tokens}
            made.spec = replace(made.spec, sparse=replace(made.spec.sparse, **sizes))
        return made


class NarrowedSteps(Steps):
    """A cache that is written step by step, whose long context chunks narrow."""

    case: NarrowedCase

    def __post_init__(self) -> None:
        case, self._number = self.case, 0
        problem = case.problem(self.length)
        self.key, self.value = problem.key, problem.value
        layout = SketchLayout.over(self.key, case.settings, case.flat_tokens)
        self.sketches = SketchIndex(layout, self.key.device)
        self.plain = CacheIndex(self.key, case.config)
        self.rebuild()

    @property
    def index(self) -> SimpleNamespace:
        """The chunks of the kernels' index, as that of a declared policy shows them."""
        named, layout = self.sketches.parts.chunks, self.sketches.layout
        return SimpleNamespace(
            named=named,
            layout=layout,
            parts=self.sketches.parts,
            columns=lambda number, rows: columns_of(LYCHEE, named, number, rows),
            build=self.sketches.build,
            refit=self.sketches.refit,
        )

    def decode(self) -> None:
        """Let the kernels alone decode a step."""
        used = IndexOperands(self.sketches.layout, self.sketches.parts, self.positions())
        problem = self.problem()
        run_lychee(problem.module(), problem.operands(), used)

    def compare(self) -> None:
        """Write, choose in both ways and attend; the next step goes on behind it."""
        self.write()
        problem, positions = self.problem(), self.positions()
        question = self._ask(problem, positions).question
        step = Step.run(problem, self.sketches, positions)
        self.length += self.case.sizes.query_len
        assert step.narrowed
        step.check()
        if question is not None:
            self._check_candidates(question, step, TIE + rounding(problem))

    def _check_candidates(self, question: Question, step: Step, tie: float) -> None:
        """Check the clusters that each level keeps, and the slots that are looked at."""
        index, room = self.plain.index, question.room
        read = SimpleNamespace(made=step.scratch)
        quota = self.case.overfetch * room
        width = (question.end - question.begin)[:, None]
        whole = (width <= self.case.flat_tokens) | (width <= room)
        looked = None
        for number, label in enumerate(index.above.labels):
            level, columns = LYCHEE.levels[number], index.above.columns[number]
            rank, possible = index.ranks(question, level, columns, looked)
            marks = kept_clusters(self, read, number, rank)
            tokens = torch.where(possible, columns["tokens"][:, :, None].long(), 0)
            assert level.keep is not None
            least = torch.where(whole, 2**26, level.keep.per_token * quota)
            check_weighed(marks, rank, tokens, least.expand_as(room), tie)
            looked = below(marks, label)
        low, length = (each[:, None] for each in bounds_of(index.span, index.settings.chunk))
        used = torch.where(index._used()[:, None], length, 0)
        groups = {**index.fields, "tokens": used, "first": low, "end": low + length}
        rank, possible = index.ranks(question, LYCHEE.levels[-1], groups, looked)
        begin = torch.maximum(low[:, :, None], question.begin[:, None, :, None])
        end = torch.minimum((low + length)[:, :, None], question.end[:, None, :, None])
        size = torch.where(possible, end - begin, 0)
        listed = self._listed(step)
        count = F.pad(listed.long().cumsum(-1), (1, 0))
        wide = [
            each.expand(*listed.shape[:3], size.shape[-1]).clamp(0, listed.shape[-1])
            for each in (begin, end)
        ]
        taken = torch.where(size > 0, count.gather(-1, wide[1]) - count.gather(-1, wide[0]), 0)
        behind = torch.where(used > 0, low + length, 0).amax(-1)[:, :, None, None]
        slot = torch.arange(listed.shape[-1])
        open_slots = (slot >= torch.maximum(behind, question.begin[:, None, :, None])) & (
            slot < question.end[:, None, :, None]
        )
        assert (listed | ~open_slots).all(), "a slot of no chunk is left out"
        assert (taken.sum(-1) + open_slots.sum(-1) == listed.sum(-1)).all(), "a slot of no chunk"
        check_weighed(taken > 0, rank, size, torch.where(whole, 2**26, quota).expand_as(room), tie)
        assert (whole | (taken.sum(-1) <= quota)).all(), "too many"

    def _listed(self, step: Step) -> Tensor:
        """Return the slots that sketches have ranked, bool [B, Hkv, T, L]; none is listed twice."""
        listed, count = step.scratch["candidates_2"], step.scratch["candidate_count"]
        inside = torch.arange(listed.shape[1]) < count[:, None]
        slots = self.slots_of(torch.where(inside, listed, -1))
        assert torch.equal(slots.transpose(1, 2).flatten(0, 2).sum(-1), count.long()), "twice"
        return slots
