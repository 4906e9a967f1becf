"""How large the tiles of an attention kernel are, and how many programs share its work.

Measured on one H100 (benchmarks/results); a rule for what was not measured: as many programs
for each multiprocessor, and tiles that leave room in shared memory for three programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import overlaps, power_of_two

MOST_SPLITS = 128
"""Programs that may share one row, at most: one more kernel sums up what they leave."""
TILE_BYTES = 100_000
"""Shared memory that the tiles in flight of one program may take."""
REGISTERS = 192
"""Numbers that a thread can hold of the scores, weights and results of a tile of queries."""
SHARED_BYTES = 200_000
"""Shared memory that a tile of queries and the keys and values in flight may take."""
TILES = "tiles"
"""The mode of whole sequences, beside "exact" and "sparse"."""


@dataclass(frozen=True)
class Tuning:
    """Choices that change the speed of a kernel, and nothing else."""

    programs: int
    """Programs in all, about."""
    keys: int
    """Keys read at a time."""
    warps: int
    stages: int
    """Tiles in flight."""


@dataclass(frozen=True)
class TileTuning:
    """The same for `attend` of whole sequences."""

    rows: int
    """Queries of a program, which divide a tile."""
    keys: int
    """Keys read at a time."""
    warps: int
    stages: int
    """Blocks of keys in flight."""
    registers: int = 0
    """Of a thread, at most, so that more programs fit on a multiprocessor; 0: as it takes."""


def tuning_for(module: ModuleType, mode: str, query: Tensor, key: Tensor, value: Tensor) -> Tuning:
    """The tuning of a site for these operands: "exact" or "sparse"; what `autotune` found first."""
    found = _tuned.get(_problem(module, mode, query, key))
    if isinstance(found, Tuning):
        return found
    return _by_rule(mode, _bytes_of_a_key(key, value), _multiprocessors(query.device))


def tile_tuning_for(module: ModuleType, query: Tensor, key: Tensor, value: Tensor) -> TileTuning:
    """The tuning of a whole sequence for these operands; what `autotune` found first."""
    found = _tuned.get(_problem(module, TILES, query, key))
    return found if isinstance(found, TileTuning) else _tile_rule(key, value)


def is_tuned(module: ModuleType, mode: str, query: Tensor, key: Tensor) -> bool:
    """Whether a tuning was found for operands of these sizes."""
    return _problem(module, mode, query, key) in _tuned


def remember(
    module: ModuleType, mode: str, query: Tensor, key: Tensor, tuning: Tuning | TileTuning
) -> None:
    """Use `tuning` from now on for operands of these sizes."""
    _tuned[_problem(module, mode, query, key)] = tuning


def candidates(mode: str, key: Tensor, value: Tensor) -> Sequence[Tuning | TileTuning]:
    """Tunings worth trying, the rule's among them."""
    if mode == TILES:
        return _tile_candidates(key, value)
    row = _bytes_of_a_key(key, value)
    usual = _by_rule(mode, row, _multiprocessors(key.device))
    found = [usual]
    for keys in (32, 64, 128):
        for warps in (4, 8):
            for programs in (usual.programs // 2, usual.programs):
                stages = max(2, min(4, TILE_BYTES // (keys * row)))
                if keys * row * (stages - 1) <= TILE_BYTES:
                    found.append(Tuning(programs, keys, warps, stages))
    return list(dict.fromkeys(found))


def _tile_candidates(key: Tensor, value: Tensor) -> list[TileTuning]:
    """Those whose scores, weights and results threads can hold.

    A warp has sixteen queries: with fewer, warps would share them, and sum up over each other.
    """
    row, width = _bytes_of_a_key(key, value), power_of_two(value.shape[-1], 16)
    found = [_tile_rule(key, value)]
    for rows, keys, stages, registers in product((64, 128), (32, 64, 128), (2, 3), (0, 128)):
        if rows * (width + 2 * keys) > (registers or REGISTERS) * 2 * rows:
            continue
        if rows * row // 2 + stages * keys * row <= SHARED_BYTES:
            found.append(TileTuning(rows, keys, rows // 16, stages, registers))
    return list(dict.fromkeys(found))


def _tile_rule(key: Tensor, value: Tensor) -> TileTuning:
    """By the bytes of a key and its value: what two or three blocks of fit beside the queries.

    Two programs share a multiprocessor where their registers suffice: before Hopper, operands of
    products take more of them.
    """
    row = _bytes_of_a_key(key, value)
    if row <= 512:
        few = row <= 256 or overlaps(key.device)
        return TileTuning(rows=128, keys=64, warps=8, stages=2, registers=128 if few else 0)
    if row <= 1024:
        return TileTuning(rows=64, keys=32, warps=4, stages=2)
    return TileTuning(rows=32, keys=16, warps=4, stages=2)


def _bytes_of_a_key(key: Tensor, value: Tensor) -> int:
    """And its value."""
    return (key.shape[-1] + value.shape[-1]) * key.element_size()


@lru_cache(maxsize=64)
def _by_rule(mode: str, row: int, multiprocessors: int) -> Tuning:
    keys = 64
    while keys > 16 and 2 * keys * row > TILE_BYTES:
        keys //= 2
    if mode == "exact":
        return Tuning(3 * multiprocessors, keys, 4, 3 if 3 * keys * row <= TILE_BYTES else 2)
    return Tuning(2 * multiprocessors, keys, 8 if keys == 64 else 4, 2)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2


def _problem(module: ModuleType, mode: str, query: Tensor, key: Tensor) -> tuple[object, ...]:
    """What a tuning is good for: lengths count by their order of magnitude."""
    rows = query.shape[0] * key.shape[1] * query.shape[2]
    return module.__name__, mode, rows, key.shape[2].bit_length(), key.device


_tuned: dict[tuple[object, ...], Tuning | TileTuning] = {}
