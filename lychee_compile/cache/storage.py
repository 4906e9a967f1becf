"""Memory and form in which the layers of a cache hold their keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lychee_compile.cache.number_formats import FORMATS, NumberFormat
from lychee_compile.kernels.host_memory import zeros_on_host
from lychee_compile.options import one_of

STORAGES = ("device", "host")
"""Values of `LycheeCache(storage=...)`; without a GPU both are the same."""


@dataclass(frozen=True)
class Storage:
    """Memory and form in which the layers of a cache hold their keys and values."""

    memory: str = "device"
    """"device", or "host": memory of the host that kernels of a GPU read over the link."""
    dtype: str | None = None
    """Name of the format of the numbers."""

    def __post_init__(self) -> None:
        """Raise `OptionError` (a ValueError) for values that do not exist."""
        one_of("storage", self.memory, STORAGES)
        one_of("dtype", self.dtype, tuple(FORMATS))

    @property
    def format(self) -> NumberFormat:
        """Format of the numbers."""
        return FORMATS[self.dtype]

    @property
    def is_usual(self) -> bool:
        """True if buffers hold what attention reads, in the memory of the device."""
        return self == Storage()

    def zeros(self, like: Tensor, slots: int) -> Tensor:
        """Return a buffer [B, H, slots, N] of zeros for tokens such as `like` [B, H, T, N]."""
        shape = (*like.shape[:2], slots, like.shape[3])
        if self.memory == "host" and like.is_cuda and not torch.compiler.is_compiling():
            return zeros_on_host(shape, like.dtype, like.device)
        return like.new_zeros(shape)
