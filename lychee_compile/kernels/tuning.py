"""How large the tiles of an attention kernel are, and how many programs share its work.

Measured on one H100 (benchmarks/RESULTS.md); a rule for what was not measured: as many programs
for each multiprocessor, and tiles that leave room in shared memory for three programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

MOST_SPLITS = 128
"""Programs that may share one row, at most: one more kernel sums up what they leave."""
TILE_BYTES = 100_000
"""Shared memory that the tiles in flight of one program may take."""


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


def tuning_for(module: ModuleType, mode: str, query: Tensor, key: Tensor, value: Tensor) -> Tuning:
    """The tuning of a site for these operands: "exact" or "sparse"; what `autotune` found first."""
    found = _tuned.get(_problem(module, mode, query, key))
    if found is not None:
        return found
    row = (key.shape[-1] + value.shape[-1]) * key.element_size()
    return _by_rule(mode, row, _multiprocessors(query.device))


def is_tuned(module: ModuleType, mode: str, query: Tensor, key: Tensor) -> bool:
    """Whether a tuning was found for operands of these sizes."""
    return _problem(module, mode, query, key) in _tuned


def remember(module: ModuleType, mode: str, query: Tensor, key: Tensor, tuning: Tuning) -> None:
    """Use `tuning` from now on for operands of these sizes."""
    _tuned[_problem(module, mode, query, key)] = tuning


def candidates(mode: str, key: Tensor, value: Tensor) -> list[Tuning]:
    """Tunings worth trying, the rule's among them."""
    row = (key.shape[-1] + value.shape[-1]) * key.element_size()
    usual = _by_rule(mode, row, _multiprocessors(key.device))
    found = [usual]
    for keys in (32, 64, 128):
        for warps in (4, 8):
            for programs in (usual.programs // 2, usual.programs):
                stages = max(2, min(4, TILE_BYTES // (keys * row)))
                if keys * row * (stages - 1) <= TILE_BYTES:
                    found.append(Tuning(programs, keys, warps, stages))
    return list(dict.fromkeys(found))


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


_tuned: dict[tuple[object, ...], Tuning] = {}
