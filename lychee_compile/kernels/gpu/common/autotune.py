"""Measure the tunings of an attention kernel on the operands of its first call, where asked to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.tuning import candidates, is_tuned, remember

logger = logging.getLogger(__name__)


def autotune(
    module: ModuleType,
    mode: str,
    run: Callable[[Any], object],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    header: Tensor | None = None,
) -> None:
    """Find the fastest tuning for `run`, a call of this mode, and use it from now on.

    `mode` is "exact", "sparse" or, for whole sequences, `TILES`; `run` takes a tuning of its kind.
    Once for each module and size of operands. Nothing happens where a module was not generated for
    it (`AUTOTUNE`), on a CPU, or within the capture of a CUDA graph: what was not found before is
    then chosen by rule. `header` is that of the index, trusted while it is measured: what counts
    is the time of steps that select.
    """
    if not module.AUTOTUNE or query.device.type != "cuda" or is_tuned(module, mode, query, key):
        return
    if torch.cuda.is_current_stream_capturing():
        return
    from triton.testing import do_bench

    with _trusted(header):
        times = {each: _time(do_bench, run, each) for each in candidates(mode, key, value)}
    best = min(times, key=lambda each: times[each])
    remember(module, mode, query, key, best)
    logger.info(
        "tuned %s for %d slots: %s, %.1f us", module.__name__, key.shape[2], best, 1e3 * times[best]
    )


@contextmanager
def _trusted(header: Tensor | None) -> Iterator[None]:
    if header is None:
        yield
        return
    before = header[0].clone()
    header[0].fill_(1)
    try:
        yield
    finally:
        header[0].copy_(before)


def _time(do_bench: Callable[..., float], run: Callable[[Any], object], tuning: object) -> float:
    """Milliseconds of one call; infinite where the device refuses such tiles."""
    try:
        return do_bench(lambda: run(tuning), warmup=5, rep=20, return_mode="median")
    except Exception:
        logger.debug("%s cannot be run", tuning, exc_info=True)
        return float("inf")
