"""Time of calls on a device.

On a GPU a time is the median over replays of a CUDA graph that holds several calls. On a CPU, which
serves to try a benchmark out, it is the median over rounds of calls by the clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CALLS = 20
"""Least number of calls in one graph, unless they are long."""
LONG = 2e-3
"""Seconds from which a call is long: a graph then holds one call for each buffer."""
WARM_UP, LEAST_REPLAYS, MOST_REPLAYS = 3, 5, 1000
LEAST_CALLS, MOST_CALLS, CALLS_MILLISECONDS = 3, 20, 500
"""Bounds for long calls, which are timed one by one: least calls, most calls, milliseconds."""


@dataclass(frozen=True)
class Timing:
    """Time of one call, in microseconds."""

    microseconds: float
    """Median over replays."""
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""
    calls: int
    """Calls in a graph or a round."""
    replays: int
    """Replays of the graph, or rounds."""


def time_calls(
    calls: Sequence[Callable[[], Tensor]], device: torch.device, seconds: float
) -> tuple[Timing, Tensor]:
    """Return the time of one of `calls`, measured for about `seconds`, and the first one's output.

    On a GPU the output is that of a replay, not of the capture: NaN overwrites it in between.
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
    """Run the calls on another stream, so that all is compiled; return about seconds of a call."""
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
    """Return the seconds of each replay."""
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
    """Return the median time of a long call outside of CUDA graphs; on a CPU the time of one."""
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
