"""Measure the tunings of an attention kernel on the operands of its first call, if asked to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.layout import row_ends
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import candidates, is_tuned, remember

logger = logging.getLogger(__name__)


def autotune(
    module: ModuleType,
    mode: str,
    run: Callable[[Any], object],
    operands: AttentionOperands,
    header: Tensor | None = None,
) -> None:
    """Find the fastest tuning for `run`, a call of this mode, and use it from now on.

    `mode` is "exact", "sparse" or `PREFILL`; `run` takes a tuning of its kind. It is measured once
    for each module and size of operands. Nothing happens on a CPU, during the capture of a CUDA
    graph, or if the module was not generated for it (`AUTOTUNE`): a tuning that is not known by
    then is chosen by rule. `header` is the header of the index, which is trusted while it is
    measured: the time of steps that select counts.
    """
    on_gpu = operands.query.device.type == "cuda"
    if not module.AUTOTUNE or not on_gpu or is_tuned(module, mode, operands):
        return
    if torch.cuda.is_current_stream_capturing():
        return
    from triton.testing import do_bench

    with _trusted(header):
        times = {each: _time(do_bench, run, each) for each in candidates(module, mode, operands)}
    best = min(times, key=lambda each: times[each])
    remember(module, mode, operands, best)
    logger.info(
        "tuned %s for %d slots: %s, %.1f us",
        module.__name__,
        operands.kv_len,
        best,
        1e3 * times[best],
    )


@contextmanager
def _trusted(header: Tensor | None) -> Iterator[None]:
    """Let the index of this header be trusted for as long as the context lasts."""
    if header is None:
        yield
        return
    before, rows = header.clone(), len(header) - 1
    header[0].fill_(1)
    header[1:].copy_(row_ends(header, rows))
    try:
        yield
    finally:
        header.copy_(before)


def _time(do_bench: Callable[..., float], run: Callable[[Any], object], tuning: object) -> float:
    """Return the milliseconds of one call; infinity if the device refuses such a tuning."""
    try:
        return do_bench(lambda: run(tuning), warmup=5, rep=20, return_mode="median")
    except Exception:
        logger.debug("%s cannot be run", tuning, exc_info=True)
        return float("inf")
