"""Observers: functions that the operators call with what they read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from threading import Event

from torch import Tensor

from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import PrefillResult
from lychee_compile.kernels.reference.selection import Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparseCall:
    """One run of the sparse decode operator. An observer must not keep the operands."""

    site: str
    """Module path of the attention."""
    operands: Operands
    """Operands of the attention, over all keys of the cache."""
    index: KVIndex
    """The index that the selection was made from."""
    selection: Selection
    """The tokens read."""
    certificate: Tensor | None
    """Upper bound of the share of the softmax mass not read, float32 [B, Hq, Tq]; None without the
    option `epsilon`."""


observers: list[Callable[[SparseCall], None]] = []
"""Functions called with each run of the sparse decode operator, in order."""


@dataclass(frozen=True)
class KernelCall:
    """One run of generated kernels that chose keys to decode with."""

    site: str
    """Module path of the attention."""
    tokens: Tensor
    """Slots read, int64 [B, Hkv, T, S]; -1 pads rows that read fewer. A row that reads all visible
    keys has all slots up to the last one written. Hidden slots among those always read count."""
    log_read: Tensor
    """log2 of the sum of exp(score) over the keys read, each once, float32 [B, Hq, T]."""
    log_all: Callable[[], Tensor]
    """Function that computes the same over all visible keys."""
    certificate: Tensor | None = None
    """Upper bound of the share of the softmax mass not read, float32 [B, Hq, T]; None without the
    option `epsilon`."""


kernel_observers: list[Callable[[KernelCall], None]] = []
"""Functions called with each run of generated kernels that chose keys to decode with, in order.

A replay of a CUDA graph runs kernels without the operator: nobody is called.
"""
kernels_told = Event()
"""Set by every run of an operator with generated kernels while there are `kernel_observers`."""


@dataclass(frozen=True)
class PrefillCall:
    """One run of the sparse prefill operator. An observer must not keep the operands."""

    site: str
    """Module path of the attention."""
    operands: Operands
    """Operands of the attention, without the causal mask."""
    causal: bool
    """True if PyTorch's own causal mask, aligned to the first key, applies as well."""
    order: Tensor | None
    """Permutation of the queries, int64 [T], that decides which share a tile; None: none."""
    result: PrefillResult
    """Output of the attention, and what it read."""


prefill_observers: list[Callable[[PrefillCall], None]] = []
"""Functions called with each run of the sparse prefill operator that left keys out, in order."""


@cache
def warn_of_recording() -> None:
    """Warn, once per process, that nobody sees what some generated kernels read."""
    logger.warning(
        "These generated kernels do not report which keys they read, so nothing of them is "
        'recorded: compile with options={"reference": True} to study what is read.'
    )


@cache
def warn_of_replays() -> None:
    """Warn, once per process, that replays of CUDA graphs are not recorded."""
    logger.warning(
        "Kernels in a CUDA graph do not report which keys they read, so nothing of them is "
        'recorded: compile without mode="reduce-overhead" to study what is read.'
    )
