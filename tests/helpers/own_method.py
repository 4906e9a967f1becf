"""A policy with kernels of its own, by `lychee_compile.extend` alone: a GPU method in one file.

The policy "mean-pages" reads sinks, recent tokens, and the pages of 16 whose mean key has the
largest product with the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lychee_compile.extend import (
    PAGE,
    SCAN_SLOTS,
    AttentionOperands,
    AttentionSpec,
    DeviceIndex,
    GroupedIndex,
    IndexLayout,
    IndexOperands,
    Part,
    SparseStep,
    Tuning,
    bytes_of,
    emit_selection,
    fill_text,
    header_part,
    launch,
    register_emitter,
    register_policy,
    sees_range,
    views_of,
    whole_scans,
)

NAME = "mean-pages"


# In plain PyTorch, on any device.


class MeanPages(GroupedIndex):
    """Pages, ranked by the mean of their keys."""

    @property
    def group_range(self) -> tuple[int, int]:
        """Shortest and longest group: all pages have one length."""
        return PAGE, PAGE

    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Return the mean key of each page, [B, Hkv, M, D]: pages are full."""
        return {"mean": keys.sum(3) / PAGE}

    def log_estimate(self, query: Tensor, scale: float) -> Tensor:
        """Return the score of each mean key, [B, Hkv, R, C]."""
        return scale * query @ self.summaries["mean"].transpose(-1, -2)

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Count a vector for each page."""
        return 2 * self.head_dim * tokens // PAGE


# The index that kernels read.


class MeanState(NamedTuple):
    """The parts of an index. Kernels take them by these names."""

    header: Tensor
    """int32 [1 + B]: 1 if the index may be trusted, then the last written slot + 1 of each row."""
    mean: Tensor
    """Mean key of each page, in the keys' dtype [B, Hkv, pages, D]."""


@dataclass(frozen=True)
class MeanLayout:
    """Sizes of the parts of an index over `slots` slots."""

    batch: int
    kv_heads: int
    head_dim: int
    slots: int
    dtype: torch.dtype
    policy: str = NAME

    @classmethod
    def of(cls, key: Tensor) -> MeanLayout:
        """Return the layout for a cache `key` [B, Hkv, L, D]."""
        batch, heads, length, head_dim = key.shape
        return cls(batch, heads, head_dim, whole_scans(length), key.dtype)

    def resized(self, slots: int, batch: int | None = None) -> MeanLayout:
        """Return the layout with other `slots`, and another `batch` if one is given."""
        return replace(self, slots=slots, batch=self.batch if batch is None else batch)

    def grows_to(self, slots: int) -> bool:
        """Return True: means stay as they are in an index of any size."""
        return True

    @property
    def size(self) -> int:
        """Number of bytes in all."""
        return bytes_of(self._parts())

    def views(self, memory: Tensor) -> MeanState:
        """Return the parts of `memory`, uint8 [size]."""
        return MeanState(**views_of(memory, self._parts()))

    def _parts(self) -> tuple[Part, ...]:
        shape = self.batch, self.kv_heads, self.slots // PAGE, self.head_dim
        return header_part(self.batch), ("mean", shape, self.dtype)


class MeanIndex(DeviceIndex):
    """Mean keys of the full pages of one cache."""

    layout: MeanLayout
    parts: MeanState

    def build(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Take the mean of each full page in the slots [0, ends[b]) of `key` [B, Hkv, L, D]."""
        full = max(ends) // PAGE
        pages = key[:, :, : full * PAGE].unflatten(2, (full, PAGE))
        self.parts.mean[:, :, :full] = pages.mean(3)
        self.trust(ends)

    def refit(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Do nothing: the keys of a page alone decide its mean."""


# Kernels.

KERNELS = """
@triton.jit
def score_pages(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    mean, scores, totals, histogram, slots, kv_heads, query_len, tiles, header{{ captured }},
    AT_ONCE: tl.constexpr,
):
    \"\"\"Store log2 of the weight of AT_ONCE pages for each head, and of its sum.\"\"\"
    {{ row_of_program("tile") | indent }}
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    page, d, g = tile * AT_ONCE + tl.arange(0, AT_ONCE), tl.arange(0, DIM), tl.arange(0, ROWS)
    held = page * PAGE + PAGE <= tl.load(header + 1 + b)
    place = (b * kv_heads + kv_head).to(tl.int64) * (slots // PAGE) + page
    means = tl.load(
        mean + place[:, None] * HEAD_DIM + d[None, :],
        mask=held[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
    )
    s = tl.dot(queries, tl.trans(means){{ precision }})
    bits = score(s, b, heads[:, None], t, (page * PAGE)[None, :], held[None, :]{{ captured }})
    bits = tl.where(held[None, :], bits, -1e30)
    into = (head_row.to(tl.int64) * ROWS + g)[:, None] * (slots // PAGE) + page[None, :]
    tl.store(scores + into, bits)
    top = tl.max(bits, 1)
    whole = top + tl.log2(tl.sum(tl.exp2(bits - top[:, None]), 1))
    tl.store(totals + (head_row.to(tl.int64) * tiles + tile) * ROWS + g, whole)
    if tile == 0:
        entry = tl.arange(0, 2 * BINS)
        tl.store(histogram + head_row * (2 * BINS) + entry, tl.zeros([2 * BINS], tl.int32))


@triton.jit
def bin_tokens(
    scores, totals, histogram, bins, bin_room, slots, kv_len, kv_heads, query_len, tiles,
    positions, position_stride_b, position_stride_t, written, header{{ captured }},
    AT_ONCE: tl.constexpr, TILES: tl.constexpr,
):
    \"\"\"Store the bin of each token of AT_ONCE pages: its page's share of the softmax.\"\"\"
    {{ row_of_program("tile") | indent }}
    slot = tile * (AT_ONCE * PAGE) + tl.arange(0, AT_ONCE * PAGE)
    g = tl.arange(0, ROWS)
    into = (head_row.to(tl.int64) * ROWS + g)[:, None] * (slots // PAGE) + (slot // PAGE)[None, :]
    value = tl.load(scores + into)
    fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
    first, end = seen_range(b, t, kv_len{{ captured }})
    stop = tl.minimum(end - RECENT, fresh // PAGE * PAGE)
    possible = (slot >= first + SINKS) & (slot < stop)
    entry = bins_of(value, denominators(totals, head_row, tiles, TILES), possible)
    tl.store(bins + head_row.to(tl.int64) * bin_room + slot, entry.to(tl.uint8))
    count_bins(histogram + head_row * (2 * BINS), entry)


@triton.jit
def mean_new(
    key, stride_b, stride_h, stride_l, stride_d,
    header, mean, positions, position_stride_b, position_stride_t, written,
    b, kv_head, slots, kv_heads, kv_len,
):
    \"\"\"Take the mean of every page whose last slot this step has written, and note the end.\"\"\"
    space = (b * kv_heads + kv_head).to(tl.int64)
    d, inner = tl.arange(0, DIM), tl.arange(0, PAGE)
    key += b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    for number in range(written):
        slot = tl.load(positions + b * position_stride_b + number * position_stride_t).to(tl.int32)
        slot = tl.where(slot < 0, slot + kv_len, slot)
        if slot % PAGE == PAGE - 1:
            place = (slot - PAGE + 1 + inner).to(tl.int64)[:, None] * stride_l
            keys = tl.load(
                key + place + d[None, :] * stride_d, mask=(d < HEAD_DIM)[None, :], other=0.0
            )
            middle = tl.sum(keys.to(tl.float32), 0) / PAGE
            into = (space * (slots // PAGE) + slot // PAGE) * HEAD_DIM + d
            tl.store(mean + into, middle.to(mean.dtype.element_ty), mask=d < HEAD_DIM)
        if kv_head == 0:
            tl.store(header + 1 + b, slot + 1)
"""

IMPORTS = '{% from "decode/fragments.jinja" import row_of_program with context %}\n'

ATTEND = """
{% extends "decode/attend.py.jinja" %}
{% block index_parameters %}
    header, mean, slots,
{% endblock %}
{% block update_index %}
            mean_new(
                key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
                header, mean, positions, position_stride_b, position_stride_t, written,
                b, kv_head, slots, kv_heads, kv_len,
            )
{% endblock %}
"""


def emit(spec: AttentionSpec) -> list[str]:
    """Return the kernels. Raises ValueError for a mask with holes."""
    if not sees_range(spec):
        raise ValueError(f"{NAME} has no kernels for masks with holes")
    kernels = fill_text(IMPORTS + KERNELS, spec)
    return [*emit_selection(spec, unread="fresh // PAGE * PAGE"), kernels, fill_text(ATTEND, spec)]


# The launch.


@dataclass(frozen=True)
class MeanMethod:
    """Pages, ranked by their mean key."""

    multiple: int = 1

    def layout_of(self, key: Tensor) -> MeanLayout:
        """Return the layout of an index for a cache `key` [B, Hkv, L, D]."""
        return MeanLayout.of(key)

    def new_index(self, layout: IndexLayout, device: torch.device) -> MeanIndex:
        """Return an empty index, which is not trusted."""
        return MeanIndex(layout, device)

    def run(
        self,
        module: ModuleType,
        operands: AttentionOperands,
        index: IndexOperands,
        tuning: Tuning | None = None,
    ) -> Tensor:
        """Return attention over the best pages, [B, Hq, T, Dv]."""
        step, slots = SparseStep(module, operands, index, tuning), index.layout.slots
        tiles, heads = slots // SCAN_SLOTS, module.ROWS.value
        want = step.wanted.want
        want("scores", torch.float32, step.rows, heads, slots // PAGE)
        want("totals", torch.float32, step.rows, tiles, heads)
        want("bins", torch.uint8, step.rows, slots)
        arguments = {**step.arguments(tiles), "bin_room": slots, "AT_ONCE": SCAN_SLOTS // PAGE}
        unused = arguments["chosen_list"]  # tokens are chosen from all slots, not from a list
        arguments |= {"candidates": unused, "candidate_count": unused}
        for kernel in (module.score_pages, module.bin_tokens):
            launch(kernel, (step.rows, tiles), arguments, num_warps=4)
        return step.attend(arguments, slots, paged=False)


def register() -> None:
    """Let `options={"policy": "mean-pages"}` choose this policy."""
    words = "pages of 16, ranked by their mean key"
    register_policy(NAME, MeanPages, gpu=MeanMethod(), words=words)
    register_emitter(NAME, emit)
