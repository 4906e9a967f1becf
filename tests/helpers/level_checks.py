"""Comparisons of what kernels of a declared policy choose with what its plain form does.

Kernels rank by bins of an eighth of an octave. So groups whose shares lie that close to the cut may
be chosen by one and not by the other, and each of several programs rounds down what is left at the
cut. Below a coarser level both are compared within the groups that the kernels have kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from decode_problems import Problem
from torch import Tensor

from lychee_compile.codegen.parts.decode import LARGEST
from lychee_compile.codegen.parts.levels import RANKED
from lychee_compile.kernels.gpu.common import launch_sparse
from lychee_compile.kernels.levels.declaration import Pages
from lychee_compile.kernels.reference.chunk_index import ChunkIndex
from lychee_compile.kernels.reference.chunk_table import bounds_of
from lychee_compile.kernels.reference.question import Question
from lychee_compile.kernels.sizes import BINS

if TYPE_CHECKING:
    from level_steps import Asked, Read, Steps

TIE = 0.12
"""Logs of shares in the same bin differ by less."""
LOWEST = (LARGEST + 1 - BINS / 8) * math.log(2)
"""Log of the share below which all groups are in one bin."""


def same_ends(seen: Tensor) -> bool:
    """Return True if all KV heads of a row see the same first and last slot.

    `seen` is bool [B, Hkv, T, L].
    """
    ends = [each.to(torch.uint8).argmax(-1) for each in (seen, seen.flip(-1))]
    return all(bool((each == each[:, :1]).all()) for each in ends)


def assert_alike(steps: Steps, problem: Problem, read: Read, asked: Asked) -> None:
    """Check that kernels and the plain form have chosen the same, up to ties, within the budget.

    Sinks and recent tokens are those of a KV head for kernels, and those of the layer for the plain
    form. If masks by head make these differ, the budget alone is checked. So it is if the layer
    votes: the plain form may then choose a token that heads of another KV head alone see.
    """
    case, index, question = steps.case, steps.plain.index, asked.question
    seen = problem.visible.unflatten(1, (-1, problem.spec.group)).any(2)
    levels = index.stack.levels
    apart = case.mask == "mask by head" and index.stack.vote == "layer"
    if apart or not same_ends(seen):
        size = levels[-1].groups.size if levels else 1
        sinks, recent = index.always_read  # the page being written is read besides
        most = max(case.budget, sinks + max(recent, size + case.sizes.query_len))
        assert (read.slots & seen).sum(-1).max() <= most, "over the budget"
        return
    if question is None:
        assert (read.slots & seen).sum(-1).max() <= case.budget, "over the budget"
        if "mask" not in case.mask and case.score != "bias":  # else hidden slots take up room
            assert torch.equal(read.slots & seen, seen), "everything fits, and is not read"
        return
    always = always_of(question)
    assert not (seen & always[:, None] & ~read.slots).any(), "a token that is always read is not"
    own = read.slots & seen & ~always[:, None]
    tie = TIE + rounding(problem)
    if not levels:
        assert torch.equal(read.slots & seen, asked.slots & seen)
    elif not index.stack.uneven:
        check_pages(steps, question, read, seen, own, tie)
    else:
        most = torch.maximum(question.room + (seen & always[:, None]).sum(-1), question.room)
        assert ((read.slots & seen).sum(-1) <= most).all(), "over the budget"
        check = check_chunks if isinstance(index, ChunkIndex) else check_token_clusters
        check(steps, question, read, own, tie)


def check_pages(
    steps: Steps, question: Question, read: Read, seen: Tensor, own: Tensor, tie: float
) -> None:
    """Check the pages that each level keeps, and the pages or tokens that are read."""
    index, levels = steps.plain.index, steps.plain.index.stack.levels
    within: Tensor | None = None
    for number in range(len(levels) - 1):
        size, keep = levels[number].groups.size, levels[number].keep
        assert keep is not None
        kept = steps.kept_slots(read, number)
        rank = index.ranks(question, number, within)
        chosen = by_page(kept, size).any(-1)
        room = torch.full_like(question.room, keep.groups(steps.case.budget, size))
        check_best(chosen, rank, room, tie, -(-rank.shape[-1] // RANKED))
        within = kept
    rank, size = index.ranks(question, len(levels) - 1, within), levels[-1].groups.size
    most = torch.maximum(question.budget, always_count(question))
    assert (read.slots.sum(-1) <= most).all(), "over the budget"
    if not isinstance(levels[-1].groups, Pages):
        possible = question.candidates()[:, None] & (True if within is None else within)
        rank = rank.masked_fill(~possible, -torch.inf)
        rounded = launch_sparse.MOST_SPARSE_SPLITS + rank.shape[-1] // 256
        check_best(own, rank, question.room, tie, rounded)
        return
    chosen = by_page(own, size).any(-1)
    whole = (
        chosen.repeat_interleave(size, -1)[..., : own.shape[-1]] & question.candidates()[:, None]
    )
    assert torch.equal(own, whole & seen), "a page that is read in part"
    fits = (question.end - question.begin)[:, None] <= question.room
    room = torch.where(fits, rank.shape[-1], question.room // size)
    check_best(chosen, rank, room, tie, -(-rank.shape[-1] // RANKED))


def check_chunks(steps: Steps, question: Question, read: Read, own: Tensor, tie: float) -> None:
    """Check the clusters that each level keeps, and the chunks that are read."""
    index, looked = steps.plain.index, None
    levels = index.stack.levels
    for number, label in enumerate(index.above.labels):
        columns = index.above.columns[number]
        rank, possible = index.ranks(question, levels[number], columns, looked)
        marks = kept_clusters(steps, read, number, rank)
        tokens = torch.where(possible, columns["tokens"][:, :, None].long(), 0)
        room = torch.full_like(question.room, levels[number].keep.tokens(steps.case.budget))
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


def below(kept: Tensor, label: Tensor) -> Tensor:
    """Return the groups that belong to a kept cluster, or to none yet: bool [B, Hkv, Tq, N].

    `kept` is bool [B, Hkv, Tq, C]; `label`, int [B, Hkv, N], is the cluster of each group, or -1.
    """
    wide = label[:, :, None].expand(-1, -1, kept.shape[2], -1)
    return (wide < 0) | kept.gather(-1, wide.clamp(min=0).long())


def kept_clusters(steps: Steps, read: Read, number: int, rank: Tensor) -> Tensor:
    """Return the clusters whose groups a level lists, bool like `rank` [B, Hkv, T, C]."""
    named, (batch, heads, queries, clusters) = steps.index.named, rank.shape
    label = named[f"label_{number + 1}"][:, :, None].expand(-1, -1, queries, -1).long()
    listed, count = (
        each.unflatten(0, (batch, queries, heads)).transpose(1, 2)
        for each in (read.made[f"candidates_{number}"], read.made[f"count_{number}"])
    )
    inside = torch.arange(listed.shape[-1], device=rank.device) < count[..., None]
    times = torch.zeros_like(label).scatter_add(
        -1, torch.where(inside, listed, 0).long(), inside.long()
    )
    kept = torch.zeros(*rank.shape[:3], clusters + 1, dtype=torch.bool, device=rank.device)
    of_listed = torch.where(times > 0, label, 0).clamp(max=clusters)
    kept = kept.scatter(-1, of_listed, True)[..., 1:]
    order = named[f"order_{number + 1}"].long()
    begin, through = named[f"begin_{number}"], named[f"children_{number}"].cumsum(-1)
    place = torch.arange(order.shape[-1], device=rank.device) - begin[..., :1]
    owner = torch.searchsorted(through, place.contiguous(), right=True)
    owner = torch.where(place < 0, clusters, owner)
    owner = torch.empty_like(owner).scatter_(-1, order, owner)[:, :, None]
    wanted = owner < clusters
    wanted = wanted & kept.gather(-1, owner.clamp(max=clusters - 1).expand_as(label))
    assert torch.equal(times, wanted.long()), "a list that is not what the kept clusters hold"
    return kept


def check_token_clusters(
    steps: Steps, question: Question, read: Read, own: Tensor, tie: float
) -> None:
    """Check that the tokens of the best clusters are read."""
    index = steps.plain.index
    rank, possible = index.ranks(question, index.stack.levels[0], index.columns, None)
    label = index.label[:, :, None, : own.shape[-1]].expand(own.shape)
    rank = rank.masked_fill(~possible, -torch.inf).gather(-1, label.clamp(min=0))
    chosen = question.candidates()[:, None] & (label >= 0)
    rounded = launch_sparse.MOST_SPARSE_SPLITS + own.shape[-1] // 256
    check_best(own, rank.masked_fill(~chosen, -torch.inf), question.room, tie, rounded)


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
