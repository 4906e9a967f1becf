"""Steps of decoding by a declared policy: its kernels beside its plain form, on any device.

Clusters are fitted by the host now and then. So the plain form takes those that the kernels have
(`level_fits`), and is asked what it would choose by them. Other tests show that both make the same
clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from decode_problems import CAP, Problem, Sizes, make_problem
from level_checks import assert_alike
from level_fits import share_fits
from torch import Tensor

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common import launch_sparse
from lychee_compile.kernels.gpu.common.certificate import missed_of
from lychee_compile.kernels.gpu.common.launch_common import Scratch
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.gpu.levels.method import LevelMethod
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.operators.cache_index import CacheIndex, CacheWrite
from lychee_compile.kernels.policies.registry import levels_of, make_index
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.question import Question
from lychee_compile.kernels.reference.selection import select
from lychee_compile.kernels.reference.visible import visible_keys


@dataclass
class Case:
    """A policy and an attention that it decodes."""

    policy: str
    sizes: Sizes
    budget: int = 120
    sinks: int = 4
    recent: int = 9
    dtype: str = "float32"
    mask: str = "causal"
    score: str = "scaled"
    layout: str = "plain"
    extra: bool = False
    seed: int = 0
    device: str = "cpu"
    chunk: tuple[int, int] = (8, 16)
    coverage: float | None = None
    epsilon: float | None = None

    @property
    def config(self) -> IndexConfig:
        """Options of the plain form's index."""
        return IndexConfig(
            budget=self.budget, sinks=self.sinks, recent=self.recent, policy=self.policy,
            chunk=self.chunk, coverage=self.coverage,
        )  # fmt: skip

    @property
    def settings(self) -> GroupSettings:
        """Settings of uneven groups."""
        return GroupSettings.of(self.config)

    def at_once(self, key: Tensor, end: Tensor) -> KVIndex:
        """Return the plain form's index of the slots [0, end), int64 [B], made at once."""
        index = make_index(len(key), key.shape[1], key.shape[3], self.config, key.device)
        index.extend(key, end)
        return index

    def problem(self, length: int, sparse: bool = True) -> Problem:
        """Return the attention whose first query is at the slot `length`."""
        sizes = self.budget, self.sinks, self.recent, 16, 65536
        spec = SparseSpec(self.policy, *sizes, self.coverage, self.settings, self.epsilon)
        made = make_problem(
            self.dtype, self.sizes, self.score, self.mask, self.extra, self.layout,
            spec if sparse else None, length, self.seed,
        )  # fmt: skip
        return on_device(made, self.device)


def on_device(problem: Problem, device: str) -> Problem:
    """Return a problem whose tensors are on a device, with the same strides on a CPU."""
    if device == "cpu":
        return problem
    moved = {name: getattr(problem, name) for name in ("query", "key", "value", "visible")}
    moved = {name: each.to(device) for name, each in moved.items()}
    extra = None if problem.extra is None else problem.extra.to(device)
    score, home = problem.score, torch.device("cpu")

    def scored(products: Tensor, slots: Tensor) -> Tensor:
        return score(products.to(home), slots.to(home)).to(products.device)

    captured = [each.to(device) for each in problem.captured]
    return replace(problem, **moved, captured=captured, extra=extra, score=scored)


@dataclass
class Read:
    """Choices of the kernels in one step."""

    output: Tensor
    slots: Tensor
    """Slots read, bool [B, Hkv, T, L]."""
    made: Mapping[str, Tensor]
    """Scratch memory that the kernels have left, by name."""
    missed: Tensor | None
    """Certificates, float32 [B, Hq, T], if there are any."""


@dataclass
class Asked:
    """Choice of the plain form in one step, and the question that it was asked."""

    slots: Tensor
    """Slots read, bool [B, Hkv, T, L]."""
    question: Question | None
    """None: everything fits into the budget."""
    inputs: ScoreInputs
    """Queries, keys and mask of the step."""
    index: KVIndex


@dataclass
class Steps:
    """A cache that is written step by step, the index of the kernels, and that of the plain form.

    Rows of the mask "rows" are each 5 tokens shorter than the row before.
    """

    case: Case
    length: int
    """Number of tokens in the first row before the next step."""
    key: Tensor = field(init=False)
    value: Tensor = field(init=False)

    def __post_init__(self) -> None:
        case, self._number = self.case, 0
        problem = case.problem(self.length)
        self.key, self.value = problem.key, problem.value
        self.method = LevelMethod(case.policy)
        layout = LevelLayout.over(self.key, case.policy, case.settings)
        self.index = self.method.new_index(layout, self.key.device)
        self.plain = CacheIndex(self.key, case.config)
        self.rebuild()

    def positions(self) -> Tensor:
        """Return the slots that the next step writes, int64 [B, T]."""
        late = 5 * torch.arange(self.case.sizes.batch) if self.case.mask == "rows" else 0
        step = self.length + torch.arange(self.case.sizes.query_len)
        slots = step - torch.as_tensor(late).view(-1, 1)
        return slots.expand(self.case.sizes.batch, -1).to(self.key.device)

    def rebuild(self) -> None:
        """Index all keys anew, as after a write by somebody else."""
        ends = self.positions()[:, 0].tolist()
        self.index.build(self.case.problem(self.length).module(), self.key, ends)
        self.plain.distrust()

    def refit(self) -> None:
        """Fit the index of the kernels anew, as happens now and then."""
        ends = self.index.parts.header[1:].tolist()
        self.index.refit(self.case.problem(self.length).module(), self.key, ends)

    def problem(self) -> Problem:
        """Return the attention of the next step, with queries of its own."""
        found, self._number = self.case.problem(self.length), self._number + 1
        random = torch.Generator().manual_seed(self._number)
        found.query = 1.5 * torch.randn(found.query.shape, generator=random)
        found.query = found.query.to(self.key.device, self.key.dtype)
        found.key, found.value = self.key, self.value
        return found

    def write(self) -> None:
        """Write new keys to the slots of the next step: those of the others, in another order."""
        positions, random = self.positions(), torch.Generator().manual_seed(self._number)
        for row, slots in enumerate(positions.cpu()):
            taken = torch.randint(0, self.key.shape[2], slots.shape, generator=random)
            self.key[row, :, slots] = self.key[row, :, taken]

    def compare(self) -> None:
        """Write, choose in both ways and attend; the next step goes on behind it.

        Both choices are compared, and the output with that of eager attention.
        """
        problem, read, asked = self.step()
        assert_alike(self, problem, read, asked)
        problem.assert_as_good_as_eager(read.output, read.slots)

    def step(self) -> tuple[Problem, Read, Asked]:
        """Write, choose in both ways and attend."""
        self.write()
        problem, positions = self.problem(), self.positions()
        asked = self._ask(problem, positions)
        read = self._run(problem, positions)
        self.length += self.case.sizes.query_len
        return problem, read, asked

    def kept_slots(self, read: Read, number: int) -> Tensor:
        """Return the slots in the pages that a level lists, bool [B, Hkv, T, L]."""
        child, count = read.made[f"candidates_{number}"], read.made[f"count_{number}"]
        size = levels_of(self.case.policy).levels[number + 1].groups.size
        place = torch.arange(child.shape[1], device=child.device)
        child = torch.where(place < count[:, None], child * size, -1)
        inner = torch.arange(size, device=child.device)
        slots = torch.where(child[..., None] < 0, -1, child[..., None] + inner)
        return self.slots_of(slots.flatten(1))

    def _run(self, problem: Problem, positions: Tensor) -> Read:
        used = IndexOperands(self.index.layout, self.index.parts, positions)
        with kept_scratch(few_programs=self.key.device.type == "cpu") as made:
            output = self.method.run(problem.module(), problem.operands(), used)
        listed = made["chosen_list"].flatten(1)
        slots = self.slots_of(listed)
        assert ((listed >= 0).sum(1) == slots.transpose(1, 2).flatten(0, 2).sum(1)).all(), "twice"
        missed = missed_of(problem.operands(), made) if "missed" in made else None
        return Read(output, slots, made, missed)

    def slots_of(self, listed: Tensor) -> Tensor:
        """Return listed slots [rows, N], -1 for none, as bool [B, Hkv, T, L]."""
        heads, length = self.key.shape[1:3]
        rows = torch.zeros(len(listed), length + 1, dtype=torch.bool, device=listed.device)
        listed = torch.where((listed < 0) | (listed >= length), length, listed)
        rows.scatter_(1, listed.long(), True)
        shape = (-1, self.case.sizes.query_len, heads)
        return rows[:, :-1].unflatten(0, shape).transpose(1, 2)

    def _ask(self, problem: Problem, positions: Tensor) -> Asked:
        case, length = self.case, self.key.shape[2]
        inputs = score_inputs(problem, case)
        mask = visible_keys(inputs.mask, len(self.key), inputs.query.shape[2], length,
                            self.key.device)  # fmt: skip
        first, end = mask.first.amin(1), mask.end.amax(1)
        self.plain.update(self.key, CacheWrite(first, positions, None, end), build=True)
        share_fits(self.plain.index, self.index)
        index, asked = self.plain.index, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "choose", noting(asked, index.choose))
            slots = select(index, inputs, case.budget).token_mask()
        return Asked(slots, asked[0] if asked else None, inputs, index)


EVENTS = ("step", "rewind", "rewind far", "written by another", "refit")
"""Event that may happen to a cache before the next step."""


def follow(steps: Steps, history: list[str]) -> None:
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


def noting(calls: list[Question], choose: Callable[[Question], Any]) -> Callable[[Question], Any]:
    """Return `choose`, which notes what it is asked."""

    def choose_and_note(question: Question) -> Any:
        calls.append(question)
        return choose(question)

    return choose_and_note


@contextmanager
def kept_scratch(few_programs: bool) -> Iterator[dict[str, Tensor]]:
    """Give the scratch memory of the launch inside, by name; lists of slots read begin as -1.

    `few_programs` share a row if they are interpreted, one after the other.
    """
    made: dict[str, Tensor] = {}
    allocate = Scratch.allocate

    def keep(scratch: Scratch, device: torch.device) -> dict[str, Tensor]:
        made.update(allocate(scratch, device))
        made["chosen_list"].fill_(-1)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scratch, "allocate", keep)
        if few_programs:
            patch.setattr(launch_sparse, "MOST_SPARSE_SPLITS", 2)
        yield made


def score_inputs(problem: Problem, case: Case) -> ScoreInputs:
    """Return what a selection looks at: a bias by slot is a float mask."""
    length, mask = problem.key.shape[2], problem.visible
    slots = torch.arange(length, device=mask.device)
    if case.score in ("slopes", "bias"):
        zeros = torch.zeros(mask.shape, device=mask.device)
        mask = problem.score(zeros, slots).masked_fill(~mask, -torch.inf)
    cap = CAP if case.score == "soft-cap" else None
    scale = case.sizes.head_dim**-0.5
    return ScoreInputs(problem.query, problem.key, length, mask, scale, cap)
