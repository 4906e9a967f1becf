"""Tunings: keys that an attention kernel reads at a time, and programs that share its work.

Measured on one H100 (benchmarks/results). A rule covers what was not measured: a fixed number of
programs for each multiprocessor, and keys that leave room in shared memory for three programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import ModuleType

import torch

from lychee_compile.kernels.gpu.common.device import overlaps
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.sizes import power_of_two

MOST_SPLITS = 128
"""Most programs that may share one row: one more kernel sums up what they leave."""
FLIGHT_BYTES = 100_000
"""Most bytes of shared memory for the keys and values in flight of one decode program."""
REGISTERS = 192
"""Most numbers that a thread can hold of the scores, weights and results of a tile of queries."""
SHARED_BYTES = 200_000
"""Most bytes of shared memory for a tile of queries and the keys and values in flight."""
LISTED_ROWS = 64
"""Rows from which on a kernel of its own lists the keys that a sparse step reads.

Programs that both list and attend have many registers, so that few of them run at a time. With few
rows that costs less time than a launch.
"""
PREFILL = "prefill"
"""The mode of prefill, beside "exact" and "sparse"."""


@dataclass(frozen=True)
class Tuning:
    """Choices that change the speed of a decode kernel, and nothing else."""

    programs: int
    """About how many programs there are in all."""
    keys: int
    """Number of keys read at a time."""
    warps: int
    stages: int
    """Number of such reads in flight."""


@dataclass(frozen=True)
class TileTuning:
    """Choices that change the speed of `attend` in a prefill, and nothing else."""

    rows: int
    """Number of queries of a program, a divisor of `QUERY_TILE`."""
    keys: int
    """Number of keys read at a time."""
    warps: int
    stages: int
    """Number of such reads in flight."""
    registers: int = 0
    """Most registers of a thread, so that more programs fit on a multiprocessor; 0: no limit."""


def tuning_for(module: ModuleType, mode: str, operands: AttentionOperands) -> Tuning:
    """Return the tuning for these operands, in the mode "exact" or "sparse".

    A tuning that `autotune` has found goes before the rule.
    """
    measured = _tuned.get(_problem(module, mode, operands))
    if isinstance(measured, Tuning):
        return measured
    return _usual(module, mode, operands)


def lists_apart(module: ModuleType, operands: AttentionOperands) -> bool:
    """Return True if a kernel of its own lists the keys that a sparse step reads."""
    return operands.rows >= LISTED_ROWS and hasattr(module, "choose")


def tile_tuning_for(module: ModuleType, operands: AttentionOperands) -> TileTuning:
    """Return the tuning of a prefill; one that `autotune` has found goes before the rule."""
    measured = _tuned.get(_problem(module, PREFILL, operands))
    return measured if isinstance(measured, TileTuning) else _tile_rule(operands)


def is_tuned(module: ModuleType, mode: str, operands: AttentionOperands) -> bool:
    """Return True if a tuning was measured for operands of these sizes."""
    return _problem(module, mode, operands) in _tuned


def remember(
    module: ModuleType, mode: str, operands: AttentionOperands, tuning: Tuning | TileTuning
) -> None:
    """Use `tuning` from now on for operands of these sizes."""
    _tuned[_problem(module, mode, operands)] = tuning


def candidates(
    module: ModuleType, mode: str, operands: AttentionOperands
) -> Sequence[Tuning | TileTuning]:
    """Return the tunings worth trying, that of the rule among them."""
    if mode == PREFILL:
        return _tile_candidates(operands)
    size = _entry_bytes(operands, module)
    usual = _usual(module, mode, operands)
    tunings = [usual]
    for keys in (32, 64, 128):
        for warps in (4, 8):
            for programs in (usual.programs // 2, usual.programs):
                stages = max(2, min(4, FLIGHT_BYTES // (keys * size)))
                if keys * size * (stages - 1) <= FLIGHT_BYTES:
                    tunings.append(Tuning(programs, keys, warps, stages))
    return list(dict.fromkeys(tunings))


def _tile_candidates(operands: AttentionOperands) -> list[TileTuning]:
    """Return the tunings whose scores, weights and results the threads can hold.

    A warp has sixteen queries. With fewer, warps would share queries and sum up over each other.
    """
    size, width = _entry_bytes(operands), power_of_two(operands.value.shape[-1], 16)
    tunings = [_tile_rule(operands)]
    for rows, keys, stages, registers in product((64, 128), (32, 64, 128), (2, 3), (0, 128)):
        if rows * (width + 2 * keys) > (registers or REGISTERS) * 2 * rows:
            continue
        if rows * size // 2 + stages * keys * size <= SHARED_BYTES:
            tunings.append(TileTuning(rows, keys, rows // 16, stages, registers))
    return list(dict.fromkeys(tunings))


def _tile_rule(operands: AttentionOperands) -> TileTuning:
    """Return a tuning whose two or three reads in flight fit beside the queries.

    Two programs share a multiprocessor if their registers suffice. Before Hopper the operands of
    products take more registers.
    """
    size = _entry_bytes(operands)
    if size <= 512:
        few = size <= 256 or overlaps(operands.key.device)
        return TileTuning(rows=128, keys=64, warps=8, stages=2, registers=128 if few else 0)
    if size <= 1024:
        return TileTuning(rows=64, keys=32, warps=4, stages=2)
    return TileTuning(rows=32, keys=16, warps=4, stages=2)


def _entry_bytes(operands: AttentionOperands, module: ModuleType | None = None) -> int:
    """Return the bytes of one key and its value, or of all that they are computed from."""
    key, value = operands.key, operands.value
    size = (key.shape[-1] + value.shape[-1]) * key.element_size()
    return max(size, getattr(module, "ENTRY_BYTES", 0))


def _usual(module: ModuleType, mode: str, operands: AttentionOperands) -> Tuning:
    multiprocessors = _multiprocessors(operands.query.device)
    size = _entry_bytes(operands, module)
    return _by_rule(mode, size, multiprocessors, lists_apart(module, operands))


@lru_cache(maxsize=64)
def _by_rule(mode: str, size: int, multiprocessors: int, listed: bool) -> Tuning:
    """Return the usual tuning for keys and values of `size` bytes, which may be `listed` apart."""
    keys = 64
    while keys > 16 and 2 * keys * size > FLIGHT_BYTES:
        keys //= 2
    if mode == "exact":
        return Tuning(3 * multiprocessors, keys, 4, 3 if 3 * keys * size <= FLIGHT_BYTES else 2)
    if listed:
        return Tuning(4 * multiprocessors, keys, 4, 2)
    return Tuning(2 * multiprocessors, keys, 8 if keys == 64 else 4, 2)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2


def _problem(module: ModuleType, mode: str, operands: AttentionOperands) -> tuple[object, ...]:
    """Return the sizes that a tuning is good for; a length counts by its order of magnitude."""
    length = operands.kv_len.bit_length()
    return module.__name__, mode, operands.rows, length, operands.key.device


_tuned: dict[tuple[object, ...], Tuning | TileTuning] = {}
