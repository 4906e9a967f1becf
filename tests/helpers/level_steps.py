"""Steps of decoding by a declared policy: its kernels beside its plain form, on any device.

Kernels rank by bins of an eighth of an octave. So groups whose shares lie that close to the cut may
be chosen by one and not by the other, and each of several programs rounds down what is left at the
cut. Below a coarser level both are compared within the groups that the kernels have kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decode_problems import CAP, Problem, Sizes, make_problem
from torch import Tensor

from lychee_compile.codegen.parts.decode import LARGEST
from lychee_compile.codegen.parts.levels import RANKED
from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.common import launch_sparse
from lychee_compile.kernels.gpu.common.certificate import missed_of
from lychee_compile.kernels.gpu.common.launch_common import Scratch
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.methods import gpu_method
from lychee_compile.kernels.levels.declaration import Pages
from lychee_compile.kernels.operators.cache_index import CacheIndex, CacheWrite
from lychee_compile.kernels.policies.registry import levels_of
from lychee_compile.kernels.reference.level_index import LevelIndex
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.question import Question
from lychee_compile.kernels.reference.selection import Selection, select
from lychee_compile.kernels.reference.visible import visible_keys
from lychee_compile.kernels.sizes import BINS

TIE = 0.12
"""Logs of shares in the same bin differ by less."""
LOWEST = (LARGEST + 1 - BINS / 8) * math.log(2)
"""Log of the share below which all groups are in one bin."""


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
    epsilon: float | None = None

    @property
    def config(self) -> IndexConfig:
        """Options of the plain form's index."""
        return IndexConfig(
            budget=self.budget, sinks=self.sinks, recent=self.recent, policy=self.policy
        )

    def problem(self, length: int, sparse: bool = True) -> Problem:
        """Return the attention whose first query is at the slot `length`."""
        spec = SparseSpec(
            self.policy, self.budget, self.sinks, self.recent, 16, 65536, epsilon=self.epsilon
        )
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
    kept: list[Tensor]
    """Slots kept by each level but the last, bool [B, Hkv, T, L]."""
    missed: Tensor | None
    """Certificates, float32 [B, Hq, T], if there are any."""


@dataclass
class Asked:
    """Choices of the plain form in one step, and the question that it was asked."""

    index: LevelIndex
    selection: Selection
    slots: Tensor
    """Slots read, bool [B, Hkv, T, L]."""
    question: Question | None
    """None: everything fits into the budget."""


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
        self.method = gpu_method(case.policy)
        self.index = self.method.new_index(self.method.layout_of(self.key), self.key.device)
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

    def step(self) -> tuple[Problem, Read, Asked]:
        """Write, choose in both ways and attend; the next step goes on behind it."""
        self.write()
        problem, positions = self.problem(), self.positions()
        asked = self._ask(problem, positions)
        read = self._run(problem, positions)
        self.length += self.case.sizes.query_len
        return problem, read, asked

    def _run(self, problem: Problem, positions: Tensor) -> Read:
        used = IndexOperands(self.index.layout, self.index.parts, positions)
        with kept_scratch(few_programs=self.key.device.type == "cpu") as made:
            output = self.method.run(problem.module(), problem.operands(), used)
        heads, length = self.key.shape[1:3]

        def slots_of(listed: Tensor) -> Tensor:
            """Return listed slots [rows, N], -1 for none, as bool [B, Hkv, T, L]."""
            rows = torch.zeros(len(listed), length + 1, dtype=torch.bool, device=listed.device)
            listed = torch.where((listed < 0) | (listed >= length), length, listed)
            rows.scatter_(1, listed.long(), True)
            return rows[:, :-1].unflatten(0, (-1, problem.query.shape[2], heads)).transpose(1, 2)

        levels = levels_of(self.case.policy).levels
        kept = []
        for number in range(len(levels) - 1):
            child, count = made[f"candidates_{number}"], made[f"count_{number}"]
            size = levels[number + 1].groups.size
            place = torch.arange(child.shape[1], device=child.device)
            child = torch.where(place < count[:, None], child * size, -1)
            inner = torch.arange(size, device=child.device)
            slots = torch.where(child[..., None] < 0, -1, child[..., None] + inner)
            kept.append(slots_of(slots.flatten(1)))
        listed = made["chosen_list"].flatten(1)
        slots = slots_of(listed)
        assert ((listed >= 0).sum(1) == slots.transpose(1, 2).flatten(0, 2).sum(1)).all(), "twice"
        missed = missed_of(problem.operands(), made) if "missed" in made else None
        return Read(output, slots, kept, missed)

    def _ask(self, problem: Problem, positions: Tensor) -> Asked:
        case, length = self.case, self.key.shape[2]
        inputs = score_inputs(problem, case)
        mask = visible_keys(inputs.mask, len(self.key), inputs.query.shape[2], length,
                            self.key.device)  # fmt: skip
        first, end = mask.first.amin(1), mask.end.amax(1)
        self.plain.update(self.key, CacheWrite(first, positions, None, end), build=True)
        index, asked = self.plain.index, []
        assert isinstance(index, LevelIndex)
        if index.stack.pairs is not None:  # kernels choose channels anew between steps
            index.channels = self.index.parts.channels.long()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "choose", noting(asked, index.choose))
            selection = select(index, inputs, case.budget)
        slots = selection.token_mask()
        return Asked(index, selection, slots, asked[0] if asked else None)


EVENTS = ("step", "rewind", "rewind far", "written by another")
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
        if steps.length + case.sizes.query_len > case.sizes.kv_len:
            steps.length -= 20
        problem, read, asked = steps.step()
        assert_alike(case, problem, read, asked)
        problem.assert_as_good_as_eager(read.output, read.slots)


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


def same_ends(seen: Tensor) -> bool:
    """Return True if all KV heads of a row see the same first and last slot.

    `seen` is bool [B, Hkv, T, L].
    """
    ends = [each.to(torch.uint8).argmax(-1) for each in (seen, seen.flip(-1))]
    return all(bool((each == each[:, :1]).all()) for each in ends)


def assert_alike(case: Case, problem: Problem, read: Read, asked: Asked) -> None:
    """Check that kernels and the plain form have chosen the same, up to ties, within the budget.

    Sinks and recent tokens are those of a KV head for kernels, and those of the layer for the plain
    form. If masks by head make these differ, the budget alone is checked. So it is if the layer
    votes: the plain form may then choose a token that heads of another KV head alone see.
    """
    seen = problem.visible.unflatten(1, (-1, problem.spec.group)).any(2)
    question, levels = asked.question, asked.index.stack.levels
    apart = case.mask == "mask by head" and asked.index.stack.vote == "layer"
    if apart or not same_ends(seen):
        size = levels[-1].groups.size if levels else 1
        sinks, recent = asked.index.always_read  # the page being written is read besides
        most = max(case.budget, sinks + max(recent, size + case.sizes.query_len))
        assert (read.slots & seen).sum(-1).max() <= most, "over the budget"
        return
    if question is None:
        assert (read.slots & seen).sum(-1).max() <= case.budget, "over the budget"
        if "mask" not in case.mask and case.score != "bias":  # else hidden slots take up room
            assert torch.equal(read.slots & seen, seen), "everything fits, and is not read"
        return
    tie = TIE + rounding(problem)
    within: Tensor | None = None
    for number, kept in enumerate(read.kept):
        size, keep = levels[number].groups.size, levels[number].keep
        assert keep is not None
        rank = asked.index.ranks(question, number, within)
        chosen = by_page(kept, size).any(-1)
        room = torch.full_like(question.room, keep.groups(case.budget, size))
        check_best(chosen, rank, room, tie, -(-rank.shape[-1] // RANKED))
        within = kept
    always = always_of(question)
    assert not (seen & always[:, None] & ~read.slots).any(), "a token that is always read is not"
    if not levels:
        assert torch.equal(read.slots & seen, asked.slots & seen)
        return
    rank, size = asked.index.ranks(question, len(levels) - 1, within), levels[-1].groups.size
    own = read.slots & seen & ~always[:, None]
    most = torch.maximum(question.budget, always_count(question))
    assert (read.slots.sum(-1) <= most).all(), "over the budget"
    if not isinstance(levels[-1].groups, Pages):
        possible = question.candidates()[:, None] & (True if within is None else within)
        rank = rank.masked_fill(~possible, -torch.inf)
        check_best(
            own, rank, question.room, tie, launch_sparse.MOST_SPARSE_SPLITS + rank.shape[-1] // 256
        )
        return
    chosen = by_page(own, size).any(-1)
    whole = (
        chosen.repeat_interleave(size, -1)[..., : own.shape[-1]] & question.candidates()[:, None]
    )
    assert torch.equal(own, whole & seen), "a page that is read in part"
    fits = (question.end - question.begin)[:, None] <= question.room
    room = torch.where(fits, rank.shape[-1], question.room // size)
    check_best(chosen, rank, room, tie, -(-rank.shape[-1] // RANKED))


def check_best(chosen: Tensor, rank: Tensor, room: Tensor, tie: float, rounded: int) -> None:
    """Check that the `room` groups of largest rank are chosen, [B, Hkv, T, N], but for ties.

    `rounded` programs may each leave one of the last bin out.
    """
    possible = rank > -torch.inf
    assert not (chosen & ~possible).any(), "a group that may not be chosen"
    rank = rank.clamp(min=LOWEST).masked_fill(~possible, -torch.inf)
    count, room = chosen.sum(-1), torch.minimum(room, possible.sum(-1))
    assert (count <= room).all(), "too many"
    assert (count >= room - rounded).all(), "too few"
    order = F.pad(rank.sort(-1, descending=True).values, (1, 1), value=-torch.inf)
    order[..., 0] = torch.inf
    last, other = (order.gather(-1, room[..., None] + more) for more in (0, 1))
    assert (~chosen | (rank >= last - tie)).all(), "a group below the cut"
    assert (chosen | ~possible | (rank <= other + tie)).all(), "a group above the cut is left out"


def rounding(problem: Problem) -> float:
    """Bound how far logs of shares move if fields are rounded to the dtype of the keys."""
    if problem.key.dtype == torch.float32:
        return 1e-3
    heads = problem.query.float().norm(dim=-1).max() * problem.key.float().norm(dim=-1).max()
    scale = problem.spec.head_dim**-0.5
    return float(2 * scale * heads * torch.finfo(problem.key.dtype).eps / 2)


def always_of(question: Question) -> Tensor:
    """Return the slots outside of the range to choose from: bool [B, T, L]."""
    slot = torch.arange(question.visible.kv_len, device=question.begin.device)
    return (slot < question.begin[..., None]) | (slot >= question.end[..., None])


def always_count(question: Question) -> Tensor:
    """Return how many slots each query reads anyway, int64 [B, 1, T]."""
    first, end = question.visible.first, question.visible.end
    return ((question.begin - first) + (end - question.end)).clamp(min=0)[:, None]


def by_page(slots: Tensor, size: int) -> Tensor:
    """Reshape [..., L] to [..., pages, size]."""
    return F.pad(slots, (0, -slots.shape[-1] % size)).unflatten(-1, (-1, size))
