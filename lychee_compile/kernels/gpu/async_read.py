"""Numbers that come from the device while nobody waits for them."""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncRead:
    """A copy of numbers from the device to the host that nobody waits for."""

    def __init__(self, numbers: Tensor, calls: int) -> None:
        self.calls = calls
        """Number of the call after which the copy began."""
        self.written = 0
        """Largest number of tokens written since the copy began."""
        self._host = torch.empty(
            numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=numbers.is_cuda
        )
        self._host.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event() if numbers.is_cuda else None
        if self._event is not None:
            self._event.record()

    def has_arrived(self) -> bool:
        """True if the numbers can be read."""
        return self._event is None or self._event.query()

    def values(self) -> list[int]:
        """Return the numbers."""
        return self._host.tolist()
