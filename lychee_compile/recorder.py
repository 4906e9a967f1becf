"""Record what sparse attention reads while a model runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor

from lychee_compile.kernels.operators.observe import (
    KernelCall,
    PrefillCall,
    SparseCall,
    kernel_observers,
    observers,
    prefill_observers,
)
from lychee_compile.kernels.reference.prefill_attention import PrefillConfig, prefill_attention
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.reference.question import query_rows
from lychee_compile.kernels.reference.softcap import capped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One sparse attention of one decoding step."""

    site: str
    """Module path of the attention."""
    kv_len: int
    """Number of keys that the longest row of the batch could have read. On a GPU: slots up to the
    last one that a row has read."""
    tokens: Tensor
    """Slots read, int64 [B, Hkv, Tq, S]; -1 pads heads that read fewer than S."""
    chunk_starts: Tensor
    """First slot of every chunk of the index at that step, int64 [B, C]. The tail of a row, which
    is not cut yet, counts as a chunk. Generated kernels tell none."""
    chunk_lengths: Tensor
    """Number of tokens of every chunk, int64 [B, C]; 0: no chunk."""
    mass: Tensor | None
    """Share of the dense softmax mass on the slots read, float32 [B, Hq, Tq]; None if not asked
    for, and if generated kernels draw tokens (option `draw`)."""
    certificate: Tensor | None = None
    """Upper bound of the share of the softmax mass not read, float32 [B, Hq, Tq]; None without the
    option `epsilon`."""

    @property
    def tokens_read(self) -> Tensor:
        """Number of slots read per row, KV head and query position, int64 [B, Hkv, Tq]."""
        return (self.tokens >= 0).sum(-1)


@dataclass(frozen=True)
class RecordedPrefill:
    """One sparse attention of a prefill, which left keys out."""

    site: str
    """Module path of the attention."""
    query_len: int
    """Number of queries, T."""
    kv_len: int
    """Number of keys, L."""
    tokens_read: Tensor
    """Number of keys that each tile of 128 queries read, int64 [B, Hq, tiles]."""
    mass: Tensor | None
    """Share of the dense softmax mass on the keys read, float32 [B, Hq, T]; None if not asked
    for."""
    certificate: Tensor
    """Upper bound of the share not read, float32 [B, Hq, T]; 1 without the option `epsilon`."""


Read = TypeVar("Read", Call, RecordedPrefill)


class Recorder:
    """Collects a record of each sparse attention: decoding in `calls`, prefill in `whole`.

    Printed, it has a line for each attention.
    """

    def __init__(self, mass: bool) -> None:
        self.calls: list[Call] = []
        self.whole: list[RecordedPrefill] = []
        self._mass = mass

    def __str__(self) -> str:
        """Return a line for each attention: how much it read, mean over calls, rows and heads."""
        steps = [_line(calls, "step") for calls in _by_site(self.calls)]
        prefills = [_line(calls, "prefill") for calls in _by_site(self.whole)]
        return "\n".join([*steps, *prefills]) or "no sparse attention was recorded"

    def observe_prefill(self, call: PrefillCall) -> None:
        """Record how much `call` read, without keeping its operands."""
        assert call.result.read is not None, "the operator keeps it while somebody observes"
        self.whole.append(
            RecordedPrefill(
                site=call.site,
                query_len=call.operands.query.shape[2],
                kv_len=call.operands.kv_len,
                tokens_read=call.result.read.sum(-1),
                mass=prefill_mass(call) if self._mass else None,
                certificate=call.result.certificate,
            )
        )

    def observe(self, call: SparseCall) -> None:
        """Record what `call` read, without keeping its operands."""
        visible = call.selection.visible
        starts, lengths = call.index.partition()
        tokens = call.selection.tokens()
        self.calls.append(
            Call(
                site=call.site,
                kv_len=int((visible.end - visible.first).max()),
                tokens=tokens,
                chunk_starts=starts,
                chunk_lengths=lengths,
                mass=captured_mass(call, tokens) if self._mass else None,
                certificate=call.certificate,
            )
        )

    def observe_kernels(self, call: KernelCall) -> None:
        """Record what generated kernels have read."""
        no_chunks = call.tokens.new_zeros(call.tokens.shape[0], 0)
        mass = None
        if self._mass:  # who sees nothing misses nothing
            share = (call.log_read - call.log_all()).exp2()
            mass = share.nan_to_num(nan=1.0).clamp(max=1)
        self.calls.append(
            Call(
                site=call.site,
                kv_len=int(call.tokens.max()) + 1,
                tokens=call.tokens,
                chunk_starts=no_chunks,
                chunk_lengths=no_chunks,
                mass=mass,
                certificate=call.certificate,
            )
        )


def _by_site(calls: Sequence[Read]) -> list[list[Read]]:
    """Return the calls of each attention."""
    sites = dict.fromkeys(each.site for each in calls)
    return [[each for each in calls if each.site == site] for site in sites]


def _line(calls: Sequence[Read], noun: str) -> str:
    """Return what the calls of one attention read, in words."""
    count = f"{len(calls)} {noun}{'s' if len(calls) > 1 else ''}"
    read = fmean(each.tokens_read.float().mean().item() for each in calls)
    length = fmean(each.kv_len for each in calls)
    shares = [each.mass.mean().item() for each in calls if each.mass is not None]
    held = f", which hold {fmean(shares):.3f} of the softmax" if shares else ""
    name = calls[0].site or "(unnamed)"
    return f"{name}: {count} read {read:,.0f} of {length:,.0f} tokens{held}"


@contextmanager
def record(*, mass: bool = False) -> Iterator[Recorder]:
    """Record every sparse attention that runs within the context.

    With `mass` each call also scores all keys, to tell what share of the dense softmax mass was
    read: this is slow, for study alone. Generated kernels that draw tokens do not tell the share.
    Generated kernels that decode tell the slots that they read; each recorded call then waits for
    the device. Replays of a CUDA graph run no operator: they are not recorded, nor is the call that
    captures the graph, with a warning. Generated kernels of a prefill report nothing, with a
    warning; the option `reference` makes the plain PyTorch operators run on a GPU too. A warning is
    logged if nothing at all was recorded.
    """
    recorder = Recorder(mass)
    observers.append(recorder.observe)
    prefill_observers.append(recorder.observe_prefill)
    kernel_observers.append(recorder.observe_kernels)
    try:
        yield recorder
    finally:
        kernel_observers.remove(recorder.observe_kernels)
        observers.remove(recorder.observe)
        prefill_observers.remove(recorder.observe_prefill)
    if not recorder.calls and not recorder.whole:
        logger.warning(
            "Nothing was recorded: no sparse attention ran as an operator. Calls that read all "
            "keys and replays of CUDA graphs are not recorded."
        )


def prefill_mass(call: PrefillCall) -> Tensor:
    """Return the share of the dense softmax on the keys that `call` read: float32 [B, Hq, T]."""
    config = PrefillConfig(_all_candidates, budget=call.operands.kv_len)
    everything = prefill_attention(call.operands, config, call.causal, call.order)
    read, dense, extra = call.result.log_read, everything.log_sum, call.operands.extra
    if extra is not None:  # an extra logit belongs to no key
        read, dense = (_without(each, extra) for each in (read, dense))
    return (read - dense).exp().nan_to_num(nan=1.0).clamp(max=1)  # who sees nothing misses nothing


def _all_candidates(question: PrefillQuestion) -> Tensor:
    """Choose every key that may be chosen."""
    return question.candidates


def _without(log_sum: Tensor, extra: Tensor) -> Tensor:
    """Return the log-sum-exp `log_sum` without one of its scores, `extra`."""
    return log_sum + (-(extra.float() - log_sum).exp()).log1p()


def captured_mass(call: SparseCall, tokens: Tensor) -> Tensor:
    """Return the share of dense softmax mass on the slots `tokens` [B, Hkv, Tq, S].

    The result is float32 [B, Hq, Tq].
    """
    operands = call.operands
    batch, query_heads, query_len, _ = operands.query.shape
    heads, kv_len = operands.key.shape[1], operands.kv_len
    grouped = query_rows(operands.query, heads)
    score = grouped @ operands.key.float().transpose(-1, -2)
    score = capped(score * operands.scale, operands.softcap)
    score = score.view(batch, query_heads, query_len, kv_len)
    visible = operands.score_inputs.visible()
    if visible.bias is not None:
        score = score + visible.bias.float()
    if visible.mask is not None:
        score = score.masked_fill(~visible.mask, -torch.inf)
    share = score.softmax(-1).view(batch, heads, -1, query_len, kv_len)
    read = torch.zeros(batch, heads, query_len, kv_len + 1, device=share.device)
    read.scatter_(-1, torch.where(tokens < 0, kv_len, tokens), 1.0)
    return (share * read[:, :, None, :, :kv_len]).sum(-1).flatten(1, 2)
