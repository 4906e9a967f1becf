"""Where a recorder listens to what the operators read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.prefill_attention import TileResult
from lychee_compile.kernels.reference.selection import Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparseCall:
    """One run of the sparse attention operator, with its operands. Hold on to none of them."""

    site: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None
    index: KVIndex
    selection: Selection
    certificate: Tensor | None
    """Upper bound of the share of the softmax mass not read, float32 [B, Hq, Tq], where `epsilon`
    asks for one."""


observers: list[Callable[[SparseCall], None]] = []
"""Called with each sparse attention call, in order."""


@dataclass(frozen=True)
class TileCall:
    """One run of the operator for whole sequences, with its operands. Hold on to none of them."""

    site: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    softcap: float | None
    extra: Tensor | None
    order: Tensor | None
    result: TileResult


tile_observers: list[Callable[[TileCall], None]] = []
"""Called with each attention of a whole sequence that read part of it, in order."""


@cache
def warn_of_recording() -> None:
    """Say, once, that what kernels read is not seen."""
    logger.warning(
        "Generated kernels do not tell which keys they read, so that nothing of them is recorded: "
        'compile with options={"reference": True} to study what is read.'
    )
