"""Time of calls on a device, and the bandwidth of its memory.

On a GPU: the median over replays of a CUDA graph that holds several calls. On a CPU: the median
over rounds of calls, by the clock, to try the benchmark out.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CALLS = 20
"""Calls in one graph, at least, unless they are long."""
LONG = 2e-3
"""Seconds from which a call is long: a graph holds one for each buffer."""
WARM_UP, LEAST_REPLAYS, MOST_REPLAYS = 3, 5, 1000
BANDWIDTH_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
"""Size of the tensors that bandwidth is measured with: far more than a cache holds."""
CPU_BYTES = 4 << 30
"""Memory for a trial on a CPU."""
LEAST_CALLS, MOST_CALLS, CALLS_MILLISECONDS = 3, 20, 500
"""Of long calls, timed one by one."""


@dataclass(frozen=True)
class Timing:
    """How long one call takes."""

    microseconds: float
    """Median over replays."""
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""
    calls: int
    """In a graph, or a round."""
    replays: int


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of the device's memory."""

    read: float
    """By a sum: the share of bandwidth is a share of this."""
    copy: float
    """By a copy, what is read and what is written together."""


def time_calls(
    calls: Sequence[Callable[[], Tensor]], device: torch.device, seconds: float
) -> tuple[Timing, Tensor]:
    """Time of one of `calls`, measured for about `seconds`, and what the first returned.

    The output is that of a replay, not of the capture: it was overwritten by NaN in between.
    """
    if device.type != "cuda":
        return _time_rounds(calls, seconds)
    per_call = _warm_up(calls)
    rounds = math.ceil(CALLS / len(calls)) if per_call < LONG else 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for _ in range(rounds) for call in calls]
    times = _replay(graph, seconds)
    first = outputs[0]
    first.fill_(math.nan)
    graph.replay()
    output = first.clone()
    torch.cuda.synchronize()
    return _timing(times, rounds * len(calls)), output


def _warm_up(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Compile and tune whatever has to be, on a stream beside: seconds of a call, about."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            calls[0]()
        begin, end = _events()
        begin.record()
        for call in calls:
            call()
        end.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the graph allocates from a pool of its own
    return begin.elapsed_time(end) / 1e3 / len(calls)


def _replay(graph: torch.cuda.CUDAGraph, seconds: float) -> list[float]:
    """Seconds of each replay."""
    begin, end = _events()
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    fitting = int(seconds / max(begin.elapsed_time(end) / 1e3, 1e-6))
    pairs = [_events() for _ in range(min(max(fitting, LEAST_REPLAYS), MOST_REPLAYS))]
    for begin, end in pairs:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _time_rounds(calls: Sequence[Callable[[], Tensor]], seconds: float) -> tuple[Timing, Tensor]:
    for call in calls[1:]:
        call()
    output = calls[0]().clone()
    times: list[float] = []
    while len(times) < LEAST_REPLAYS or (sum(times) < seconds and len(times) < MOST_REPLAYS):
        begin = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - begin)
    return _timing(times, len(calls)), output


def _timing(seconds: Sequence[float], calls: int) -> Timing:
    each = [1e6 * value / calls for value in seconds]
    tenths = statistics.quantiles(each, n=10, method="inclusive")
    return Timing(statistics.median(each), tenths[0], tenths[-1], calls, len(each))


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a long call, outside of CUDA graphs; on a CPU that of one."""
    call()
    if not torch.cuda.is_available():
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    call()
    times: list[float] = []
    while len(times) < LEAST_CALLS or (sum(times) < CALLS_MILLISECONDS and len(times) < MOST_CALLS):
        begin, end = _events()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure_bandwidth(device: torch.device, seconds: float) -> Bandwidth:
    """What a large copy and the faster of two large sums reach."""
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
    """Free memory of a GPU; on a CPU what a trial may take."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else CPU_BYTES


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache; a CPU's does not matter to a trial."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def release() -> None:
    """Give back memory, also what the frames of failures hold. Too slow for every measurement."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
