"""Log of how long indexing a prompt takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WORTH_LOGGING = 512
"""Largest number of tokens that are indexed without a line in the log."""


@contextmanager
def indexing(key: Tensor, tokens: int) -> Iterator[None]:
    """Log how long the body takes to index `tokens` tokens of `key` [B, Hkv, L, D], if many.

    On a GPU the host waits for the index, but only if the line is really logged.
    """
    started = time.perf_counter()
    yield
    if tokens <= WORTH_LOGGING or not logger.isEnabledFor(logging.INFO):
        return
    if key.is_cuda:
        torch.cuda.synchronize(key.device)
    took = 1e3 * (time.perf_counter() - started)
    logger.info("indexed %d tokens of %d KV heads in %.0f ms", tokens, key.shape[1], took)
