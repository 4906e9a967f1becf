"""What happens where an index finds no memory: attention over its cache reads all keys."""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory ran out. On a CPU nothing but its words does."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@cache
def warn_of_memory() -> None:
    """Say once that memory is short."""
    logger.warning(
        "Not enough memory for the index of a key cache: attention over it reads all keys. "
        "A smaller cache, or fewer of them, leaves room."
    )
