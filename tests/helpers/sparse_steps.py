"""Steps of sparse decode kernels: what they read, against what the reference would select."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from decode_problems import Problem
from sketch_spec import (
    SelectionSizes,
    log_denominator,
    missed_share,
    page_scores,
    select_slots,
    token_scores,
)
from torch import Tensor

from lychee_compile.codegen.parts.decode import LARGEST
from lychee_compile.codegen.parts.lychee import PROBES
from lychee_compile.codegen.specification import KV
from lychee_compile.kernels.gpu.common.launch_common import Scratch
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_lychee
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout, SketchState
from lychee_compile.kernels.sizes import BINS, PAGE

SMALLEST = 100
"""Minus log2 of shares that may be lost to underflow."""


def built(problem: Problem, end: int, slots: int | None = None) -> SketchIndex:
    """Return an index of the keys in the slots [0, end), with room for `slots`."""
    layout = layout_of(problem)
    if slots is not None:
        layout = layout.resized(slots)
    index = SketchIndex(layout, problem.key.device)
    index.build(problem.module(), problem.key, [end] * problem.key.shape[0])
    return index


def layout_of(problem: Problem) -> SketchLayout:
    """Return the layout of an index for a problem, which certificates need measured."""
    certified = problem.spec.sparse is not None and problem.spec.sparse.epsilon is not None
    return SketchLayout.over(problem.key, measured=certified)


def copied(state: SketchState) -> SketchState:
    """Return the parts of an index as they are now."""
    own = {name: part.clone() for name, part in state._asdict().items() if hasattr(state, name)}
    return SketchState(**own, chunks={name: part.clone() for name, part in state.chunks.items()})


@dataclass
class Step:
    """One step of decoding: what the kernels were given, made and left behind."""

    problem: Problem
    index: SketchIndex
    state: SketchState
    """The index before the step."""
    fresh: Tensor
    """First slot that is new to each query, int64 [B, Hkv, T]."""
    output: Tensor
    scratch: dict[str, Tensor]

    @classmethod
    def run(
        cls,
        problem: Problem,
        index: SketchIndex,
        positions: Tensor | None,
        tuning: Tuning | None = None,
    ) -> Step:
        """Decode, out of scratch memory that holds nothing but NaN."""
        state, kept = copied(index.parts), {}
        batch, kv_len = problem.key.shape[0], problem.key.shape[2]
        allocate = Scratch.allocate

        def allocate_and_keep(self: Scratch, device: torch.device) -> dict[str, Tensor]:
            made = allocate(self, device)
            for each in made.values():
                each.view(torch.uint8).fill_(255)
            kept.update(made)
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scratch, "allocate", allocate_and_keep)
            used = IndexOperands(index.layout, index.parts, positions)
            output = run_lychee(problem.module(), problem.operands(), used, tuning)
        if positions is None:
            fresh = state.header[1 : 1 + batch].long()[:, None, None]
            fresh = fresh.expand(-1, problem.key.shape[1], problem.query.shape[2])
        else:
            fresh = first_new(problem, (positions.long() % kv_len).expand(batch, -1))
        return cls(problem, index, state, fresh, output, kept)

    def check(self) -> None:
        """Check everything that can be said of a step of a trusted index."""
        read = self.assert_selection()
        self.problem.assert_as_good_as_eager(self.output, read)

    @property
    def reads_everything(self) -> bool:
        """True if no program has selected anything."""
        return bool((self.scratch["chosen_list"] == -1).all())

    @property
    def paged(self) -> bool:
        return "page_bins" in self.scratch

    @property
    def narrowed(self) -> bool:
        return "candidates_2" in self.scratch

    def slots_read(self) -> Tensor:
        """Return the slots read, bool [B, Hkv, T, L], after checking that none is read twice."""
        batch, heads, kv_len, _ = self.problem.key.shape
        chosen = self.scratch["chosen_list"].flatten(1).long()
        counts = torch.zeros(len(chosen), kv_len + 1).int()
        assert chosen.max() < kv_len
        counts.scatter_add_(1, chosen % (kv_len + 1), torch.ones_like(chosen).int())
        assert counts[:, :kv_len].max() <= 1, "a slot is read twice"
        rows = counts[:, :kv_len].bool().view(batch, -1, heads, kv_len)
        return rows.transpose(1, 2)

    def assert_selection(self) -> Tensor:
        """Return the slots read, bool [B, Hkv, T, L], checked to be sinks, recent and best ones.

        The bins of the shares decide which are best, and are the reference's but for rounding.
        """
        always, rank, room = self._reference()
        if self.narrowed:
            bins = self._looked_at(-(-rank.shape[-1] // PAGE))[..., : rank.shape[-1]].clamp(min=0)
        else:
            bins = self._paged_bins() if self.paged else self._by_row(self.scratch["bins"])
        bins = bins[..., : rank.shape[-1]].int().masked_fill(rank == -torch.inf, 0)
        possible = bins > 0
        assert_near(bins[possible], rank[possible])
        if not (self.paged or self.narrowed):
            assert (possible | (rank < -SMALLEST)).all(), "some are left out of the ranking"
        read = self.slots_read()
        assert (read | ~always).all(), "sinks or recent tokens are left out"
        selected = read & ~always
        wanted = torch.minimum(room, selected.sum(-1)) if self.by_mass else room
        cut = best_left_out(bins, wanted)
        assert (selected | ~(bins > cut)).all(), "one of the best is left out"
        assert not (selected & ((bins < cut) | ~possible)).any(), "a better one is left out for it"
        count, due = selected.sum(-1), torch.minimum(room, possible.sum(-1))
        assert (count <= room).all(), "more than the budget"
        # Every program takes its part of those at the cut, rounded down.
        turns = self.scratch["chosen_list"].shape[1] * -(-rank.shape[-1] // 256)
        used_up = count > due - turns
        if self.by_mass:
            self._assert_covered(selected, bins, always, used_up)
            return read
        assert used_up.all(), "less than the budget"
        assert ((count == due) | (due < room) | (cut[..., 0] > 0)).all(), "less than there is"
        return read

    @property
    def by_mass(self) -> bool:
        sparse = self.problem.spec.sparse
        return sparse is not None and sparse.coverage is not None

    def _assert_covered(
        self, selected: Tensor, bins: Tensor, always: Tensor, used_up: Tensor
    ) -> None:
        """Check that the selection covers its share unless the budget is used up, and hardly more.

        `selected`, `bins` and `always` are [B, Hkv, T, L], `used_up` is [B, Hkv, T].
        """
        sparse = self.problem.spec.sparse
        assert sparse is not None
        assert sparse.coverage is not None
        least, may_miss = (
            bins.masked_fill(~selected, BINS).amin(-1, keepdim=True),
            1 - sparse.coverage,
        )
        missed = self._missed(bins, ~selected, always)
        assert (used_up | (missed <= 1.1 * may_miss + 0.002)).all(), "more than allowed is left out"
        without = self._missed(bins, ~selected | (bins == least), always)
        some = selected.any(-1)
        assert (~some | (without >= 0.9 * may_miss - 0.002)).all(), "more is read than it takes"
        whole = (selected | (bins != least)).all(-1)
        assert (used_up | ~some | whole).all(), "a bin is cut without need"

    def _missed(self, bins: Tensor, left_out: Tensor, always: Tensor) -> Tensor:
        """Return what `missed_share` says of slots left out, [B, Hkv, T, L], pages included."""
        share, _ = self._token_shares()
        share = share.masked_fill(bins == 0, -torch.inf)
        if self.paged:
            pages, held = self._page_shares()
            looked_at = self._looked_at(pages.shape[-1]) >= 0
            held = held & ~looked_at.unflatten(-1, (-1, PAGE)).any(-1)
            share = torch.cat((share, (pages + math.log2(PAGE)).masked_fill(~held, -torch.inf)), -1)
            left_out = torch.cat((left_out, torch.ones_like(held)), -1)
        score = self.problem.finish_scores().unflatten(1, (-1, self.problem.spec.group))
        read = self._visible() & always[:, :, None]
        log_always = score.masked_fill(~read, -torch.inf).logsumexp(-1).float()
        by_head = self._by_row(self.scratch["head_mass"])[..., : self.problem.spec.group]
        by_head = by_head.transpose(-1, -2).float()
        return missed_share(share, by_head, log_always, self._total(), left_out)

    def _looked_at(self, pages: int) -> Tensor:
        """Return the bins of the slots looked into, int64 [B, Hkv, T, pages * PAGE]; -1: not."""
        listed = "candidates_2" if self.narrowed else "candidates"
        candidates, bins = self.scratch[listed].long(), self.scratch["bins"].long()
        count, nothing = self.scratch["candidate_count"][:, None], pages * PAGE
        slots = torch.where(torch.arange(candidates.shape[-1]) < count, candidates, nothing)
        by_slot = torch.full((len(slots), nothing + 1), -1).scatter(1, slots, bins)
        return self._by_row(by_slot[:, :-1])

    def _paged_bins(self) -> Tensor:
        """Return the bins of the tokens in the best pages, uint8 [B, Hkv, T, L]."""
        share, held = self._page_shares()
        page_bins = self._by_row(self.scratch["page_bins"])[..., : share.shape[-1]].int()
        page_bins = page_bins.masked_fill(~held, 0)
        assert_near(page_bins[held], share[held])
        by_slot, count = self._looked_at(share.shape[-1]), self.scratch["candidate_count"][:, None]
        looked_at = (by_slot >= 0).unflatten(-1, (-1, PAGE)).all(-1)
        module, seen = self.problem.module(), (page_bins > 0).sum(-1)
        few = seen <= module.FLAT_PAGES.value
        room = torch.where(few, seen, module.PAGE_ROOM.value)
        cut = best_left_out(page_bins, room)
        assert (looked_at | ~(page_bins > cut)).all(), "one of the best pages is left out"
        assert not (looked_at & (page_bins < cut.clamp(min=1))).any(), "one of the worst is not"
        number = looked_at.sum(-1)
        assert torch.equal(number, self._by_row(count)[..., 0] // PAGE), "a page is listed twice"
        # Every block takes its part of those at the cut, rounded down.
        due = torch.minimum(room, (page_bins > 0).sum(-1))
        assert ((number <= room) & (number > due - self.index.layout.blocks)).all(), "not as many"
        return by_slot[..., : self.problem.key.shape[2]].clamp(min=0)

    def _by_row(self, scratch: Tensor) -> Tensor:
        """Scratch memory [rows, ...] as [B, Hkv, T, ...]."""
        batch, heads = self.problem.key.shape[:2]
        return scratch.unflatten(0, (batch, -1, heads)).transpose(1, 2)

    def _query(self) -> Tensor:
        return self.problem.query.unflatten(1, (-1, self.problem.spec.group))

    def _visible(self) -> Tensor:
        """Return the visible slots, bool [B, Hkv, G, T, L]."""
        return self.problem.visible.unflatten(1, (-1, self.problem.spec.group))

    def _finish(self, products: Tensor) -> Tensor:
        """Return scores of tokens, pages or blocks."""
        count, kv_len = products.shape[-1], self.problem.key.shape[2]
        if count == self.index.layout.blocks:
            return torch.cat(
                [self._of_block(*each) for each in enumerate(products.split(1, -1))], -1
            )
        return self.problem.finish(products, torch.arange(count) * (1 if count == kv_len else PAGE))

    def _of_block(self, block: int, products: Tensor) -> Tensor:
        """Return the mean score, as a logarithm, over some of the slots that a block holds."""
        result, size = torch.zeros_like(products), self.index.layout.block
        for fresh in self.fresh.unique().tolist():
            held = max(min(fresh - block * size, size), 1)
            slots = block * size + (torch.arange(1, PROBES + 1) * held // PROBES - 1).clamp(min=0)
            slots = slots.clamp(max=self.problem.key.shape[2] - 1)
            score = self.problem.finish(products.expand(*products.shape[:-1], PROBES), slots)
            if KV in self.problem.spec.score.free_symbols:
                score = score.masked_fill(~self._visible()[..., slots], -1e30)
            mean = score.logsumexp(-1, keepdim=True) - math.log(PROBES)
            result = torch.where((self.fresh == fresh)[:, :, None, :, None], mean, result)
        return result

    @property
    def _scale(self) -> float:
        return 1 / math.sqrt(self.problem.spec.head_dim)

    def _total(self) -> Tensor:
        return log_denominator(self._query(), self.state, self.fresh, self._finish, self._scale)

    def _token_shares(self) -> tuple[Tensor, Tensor]:
        """Return log2 shares of tokens [B, Hkv, T, L], and which of them have one."""
        kv_len = self.problem.key.shape[2]
        known = self._visible() & (torch.arange(kv_len) < self.fresh[:, :, None, :, None])
        score = self._finish(token_scores(self._query(), self.state)[..., :kv_len])
        share = (score - self._total()).masked_fill(~known, -torch.inf).logsumexp(2)
        return share / math.log(2), known.any(2)

    def _page_shares(self) -> tuple[Tensor, Tensor]:
        """Return log2 shares of pages [B, Hkv, T, P], and which of them hold a key to choose."""
        mass = self._finish(page_scores(self._query(), self.state, self._scale))
        share = (mass - self._total()).logsumexp(2) / math.log(2)
        _, known = self._token_shares()
        room = share.shape[-1] * PAGE - known.shape[-1]
        return share, torch.nn.functional.pad(known, (0, room)).unflatten(-1, (-1, PAGE)).any(-1)

    def may_be_chosen(self, pages: int | None, flat_pages: int) -> Tensor:
        """Return what the reference may choose, bool [B, Hkv, T, L], by `SelectionSizes`."""
        return self._reference(pages, flat_pages)[1] > -torch.inf

    def _reference(
        self, pages: int | None = None, flat_pages: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        sparse = self.problem.spec.sparse
        assert sparse is not None
        return select_slots(
            self._query(), self.state, self._visible(), self.fresh, self._finish, self._scale,
            SelectionSizes(sparse.budget, sparse.sinks, sparse.recent, pages, flat_pages),
        )  # fmt: skip


def first_new(problem: Problem, written: Tensor) -> Tensor:
    """Return the first of the slots `written`, [B, N], that each query sees: int64 [B, Hkv, T].

    All that follow the first one are new to a query that sees none of them.
    """
    seen = problem.visible.unflatten(1, (-1, problem.spec.group)).any(2)
    at = written[:, None, None].expand(*seen.shape[:3], -1)
    own = torch.where(seen.gather(-1, at), at, seen.shape[-1]).amin(-1)
    return torch.where(own < seen.shape[-1], own, at.amin(-1))


def best_left_out(bins: Tensor, room: Tensor) -> Tensor:
    """Return the bin of the best item of [..., N] for which there is no `room`, [...]: [..., 1]."""
    order = torch.nn.functional.pad(bins, (0, 1)).sort(-1, descending=True).values
    return order.gather(-1, room.clamp(max=bins.shape[-1])[..., None])


def assert_near(bins: Tensor, share: Tensor) -> None:
    """Check that bins are those of the reference's log2 shares, or next to those, by rounding."""
    apart = (bins - bin_of(share)).abs()
    assert apart.numel() == 0 or apart.max() <= 1, f"{apart.max()} bins apart"


def bin_of(share: Tensor) -> Tensor:
    """Return bins, int32, of log2 shares: eighths of a float's octaves, up to that of 2^LARGEST."""
    place = (share.exp2().float().view(torch.int32) >> 20) - ((127 + LARGEST) * 8 - BINS + 1)
    return place.clamp(1, BINS - 1)
