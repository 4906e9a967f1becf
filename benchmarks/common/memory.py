"""Memory of a device: free bytes, the size of its L2 cache, and its bandwidth."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.timing import time_calls

BANDWIDTH_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
"""Bytes of the tensors that bandwidth is measured with, far more than a hardware cache holds."""
CPU_BYTES = 4 << 30
"""Bytes of memory that a trial on a CPU may take."""


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of the device's memory."""

    read: float
    """Bytes that a sum reads; shares of bandwidth are shares of this number."""
    copy: float
    """Bytes that a copy reads and writes, together."""


def measure_bandwidth(device: torch.device, seconds: float) -> Bandwidth:
    """Return the bandwidth that a large copy and the faster of two large sums reach."""
    numbers = min(BANDWIDTH_BYTES[device.type], free_bytes(device) // 4) // 4
    rows = max(numbers >> 16, 1)
    source = torch.randn(rows, numbers // rows, device=device)
    target = torch.empty_like(source)
    moved = source.numel() * source.element_size()

    def rate(call: Callable[[], Tensor], size: int) -> float:
        timing, _ = time_calls([call], device, seconds)
        return 1e6 * size / timing.microseconds

    sums: tuple[Callable[[], Tensor], ...] = (source.sum, lambda: source.sum(1))
    read = max(rate(call, moved) for call in sums)
    copy = rate(lambda: target.copy_(source), 2 * moved)
    return Bandwidth(read, copy)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU; on a CPU the memory that a trial may take."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else CPU_BYTES


def l2_bytes(device: torch.device) -> int:
    """Return the size of a GPU's L2 cache; 0 on a CPU, whose caches do not matter to a trial."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def release() -> None:
    """Free unused memory, also that of failures' frames. It is slow: not for every measurement."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
