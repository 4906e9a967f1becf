"""Time per token of one way to decode, at one context length and batch."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch._dynamo.utils import counters

from lychee_compile.cli.bench.filled_cache import filled_cache
from lychee_compile.cli.bench.memory import cache_bytes, free_bytes
from lychee_compile.cli.bench.steps import ROUNDS, WARM_UP, greedy_step, seconds_per_step
from lychee_compile.cli.bench.ways import Way
from lychee_compile.cli.bench.whole_buffer import register
from lychee_compile.cli.errors import one_line
from lychee_compile.cli.lengths import length_name
from lychee_compile.cli.units import size_name

MEASURED, SKIPPED, FAILED = "measured", "skipped", "failed"
"""Outcomes of a cell: there is a number; it cannot be run here; it raised an error."""


@dataclass
class Cell:
    """One way to decode at one context length and batch."""

    way: str
    batch: int
    context: int
    status: str = MEASURED
    note: str = ""
    """Explanation if there is no number, in a line."""
    milliseconds: float | None = None
    """Time per step of the whole batch: the median of rounds."""
    first_step_seconds: float | None = None
    """Time of the first step, with compilation and without an index."""
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    """Most memory of the GPU in use, weights, cache and index included; None on a CPU."""
    attentions: dict[str, int] = field(default_factory=dict)
    """Number of attentions by decision, of this backend."""

    @property
    def name(self) -> str:
        """Way, batch and context in words."""
        return f"{self.way}, batch {self.batch}, context {length_name(self.context)}"

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all rows together."""
        return None if self.milliseconds is None else 1e3 * self.batch / self.milliseconds

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as plain values, for JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def room_for(new_tokens: int) -> int:
    """Return the number of slots that must be empty at first, to decode so many timed tokens."""
    return 2 + WARM_UP + ROUNDS * steps_of(new_tokens)


def steps_of(new_tokens: int) -> int:
    """Return the number of steps of a round, if all rounds together have `new_tokens` or more."""
    return -(-new_tokens // ROUNDS)


def measure(model: Any, way: Way, batch: int, context: int, new_tokens: int) -> Cell:
    """Return the cell of one way; an error becomes a note, so that others can still be measured."""
    cell = Cell(way.label, batch, context)
    _start_afresh(model)
    cell.cache_bytes = cache_bytes(model, batch, context)
    free = free_bytes(model.device)
    if free is not None and cell.cache_bytes > free:
        cell.status = SKIPPED
        needed, left = size_name(cell.cache_bytes), size_name(free)
        cell.note = f"a cache of {needed} does not fit into the {left} that are free"
        return cell
    usual = model.config._attn_implementation
    try:
        _measure(model, way, cell, steps_of(new_tokens))
    except Exception as error:  # noqa: BLE001  other cells are still to be measured
        cell.milliseconds = None
        cell.status, cell.note = _told(error)
    finally:
        model.set_attn_implementation(usual)
    if model.device.type == "cuda":
        cell.peak_bytes = torch.cuda.max_memory_allocated(model.device)
    return cell


def _start_afresh(model: Any) -> None:
    """Forget what was compiled, and free the memory of earlier cells."""
    torch.compiler.reset()
    counters.clear()
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)


def _told(error: Exception) -> tuple[str, str]:
    """Return status and note of a cell that raised an error."""
    words = one_line(error)
    if isinstance(error, NotImplementedError):
        return SKIPPED, words
    if "out of memory" in words.lower() or "can't allocate memory" in words.lower():
        return SKIPPED, "out of memory"
    return FAILED, f"{type(error).__name__}: {words}"


@torch.no_grad()
def _measure(model: Any, way: Way, cell: Cell, steps: int) -> None:
    token = torch.ones(cell.batch, 1, dtype=torch.int64, device=model.device)
    filled = cell.context - room_for(steps * ROUNDS)
    cache = filled_cache(model, cell.batch, filled, cell.context)
    if way.attention is not None:
        register()
        model.set_attn_implementation(way.attention)
        greedy_step(model, model.forward, cache)(token)  # a model that it does not fit refuses here
    step = greedy_step(model, way.forward(model), cache)
    started = time.perf_counter()
    token = step(token)
    token.tolist()  # waits for the device
    cell.first_step_seconds = time.perf_counter() - started
    cell.milliseconds = 1e3 * seconds_per_step(step, token, steps)
    if way.ours:
        decided = counters["lychee"]
        kinds = ("sparse", "exact", "kept")
        cell.attentions = {kind: decided[kind] for kind in kinds if decided[kind]}
