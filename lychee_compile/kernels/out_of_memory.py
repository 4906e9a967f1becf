"""Out-of-memory errors of an index: attention over its cache then reads all keys."""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)


def ran_out(error: BaseException) -> bool:
    """True if `error` says that memory ran out.

    A CPU allocator raises a plain RuntimeError, which only its message tells from others.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@cache
def warn_of_memory() -> None:
    """Warn, once per process, that there is no memory for an index."""
    logger.warning(
        "Not enough memory for the index of a key cache: attention over this cache reads all keys. "
        "Use a smaller cache, or fewer caches, to leave room."
    )
