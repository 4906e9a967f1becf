"""Tensors of a CUDA device whose memory is that of the host: kernels read them over the link.

The memory is page-locked, so that the device can address it. A context is then limited by the
memory of the host. Reading every key takes as long as the link needs for them, which is why
attention over such tensors should be sparse.
"""

from __future__ import annotations

import logging
import math
import sys
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class _LockedMemory:
    """Zeroed memory of the host that a device can address, until nothing shows it."""

    _is_locked = False
    filled: int | None = None
    """Number of first slots that hold keys and no index knows; None if nobody has told."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Lock `size` bytes. Raises `RuntimeError` if there are too few, or the driver refuses."""
        try:
            self._bytes, self._device = torch.zeros(size, dtype=torch.uint8, device="cpu"), device
            with torch.cuda.device(device):
                torch.cuda.check_error(
                    int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), size, 0))
                )
        except RuntimeError as error:
            raise RuntimeError(
                f'storage="host" could not lock {size / 1e9:.2f} GB of memory of the host: use '
                'storage="device", a shorter context, or numbers of fewer bits (dtype="int8")'
            ) from error
        self._is_locked = True
        _locked.add(self)

    def __del__(self) -> None:
        """Wait for kernels that may still read the memory, and unlock it."""
        if self._is_locked and not sys.is_finalizing():
            torch.cuda.synchronize(self._device)
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Description of the memory from which PyTorch makes a tensor of the device."""
        data = self._bytes.data_ptr(), False
        return {"shape": (len(self._bytes),), "typestr": "|u1", "data": data, "version": 2}

    def holds(self, address: int) -> bool:
        """True if an address lies in this memory."""
        return 0 <= address - self._bytes.data_ptr() < len(self._bytes)


_locked: weakref.WeakSet[_LockedMemory] = weakref.WeakSet()
"""Memory that is locked now."""


def zeros_on_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros of a CUDA device whose memory is that of the host.

    Raises `RuntimeError` if there is not enough memory, or if the driver does not lock it.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = _LockedMemory(size, device)
    with torch.cuda.device(device):
        return torch.as_tensor(memory, device=device).view(dtype).view(shape)


def any_on_host() -> bool:
    """True if any tensor lies in such memory now."""
    return bool(_locked)


def lies_on_host(tensor: Tensor) -> bool:
    """True if `tensor` is one of a CUDA device whose memory is that of the host."""
    if not _locked or tensor.device.type != "cuda":
        return False
    address = tensor.data_ptr()
    return any(memory.holds(address) for memory in _locked)


def note_filled(tensor: Tensor, slots: int) -> None:
    """Note that the first slots of a buffer of keys are written, for an index to be built."""
    for memory in _locked:
        if memory.holds(tensor.data_ptr()):
            memory.filled = slots


def filled_slots(tensor: Tensor) -> int | None:
    """Return how many first slots of a buffer were noted, and forget that; None if none were.

    Tensors that do not lie in memory of the host have none. The number may be wrong by now: whoever
    takes it must notice that a step goes on behind it.
    """
    if not _locked or tensor.device.type != "cuda":
        return None
    for memory in _locked:
        if memory.filled is not None and memory.holds(tensor.data_ptr()):
            slots, memory.filled = memory.filled, None
            return slots
    return None


def near(tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` in the memory of its device, or `tensor` itself if it lies there.

    For whoever reads it more than once. `tensor` itself is also returned if there is no memory for
    a copy, or if it is computed as it is read: then every reading goes over the link.
    """
    if type(tensor) is not Tensor or not lies_on_host(tensor):
        return tensor
    try:
        return tensor.clone(memory_format=torch.contiguous_format)
    except torch.OutOfMemoryError:
        return tensor


@cache
def warn_of_reading(what: str, remedy: str) -> None:
    """Warn, once per process for each text, that `what` reads all keys over the link."""
    logger.warning(
        "%s reads all keys and values of a LycheeCache in host memory, at each call: %s",
        what,
        remedy,
    )
