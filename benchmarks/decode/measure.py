"""Time, bytes and error of all variants at one context length and batch."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.memory import free_bytes, l2_bytes, release
from benchmarks.common.problem import (
    Inputs,
    Problem,
    buffer_count,
    checked_rows,
    make_inputs,
    reference,
    relative_error,
)
from benchmarks.common.status import FAILED, SKIPPED, UNAVAILABLE
from benchmarks.common.timing import Timing, time_calls
from benchmarks.decode.baselines import Forms
from benchmarks.decode.records import Record
from benchmarks.decode.variants import Variant

TOLERANCE = 2e-2
"""Largest relative error of a right exact variant; the time of a wrong one says nothing."""
NOTE = 160
"""Number of characters of an error that a record keeps."""


@dataclass(frozen=True)
class Setup:
    """Settings of all measurements."""

    device: torch.device
    budget: int
    """Tokens that sparse variants read."""
    most_buffers: int
    """Largest number of caches to rotate."""
    seconds: float
    """Time for the replays of each form of a variant."""


@dataclass(frozen=True)
class Cell:
    """Inputs and the exact answer that variants share at one context length and batch."""

    problem: Problem
    setup: Setup
    buffers: list[Inputs]
    rows: list[int]
    """Rows of the batch in which outputs are checked."""
    exact: Tensor
    """Float64 attention over the first buffer, [R, Hq, 1, D]."""


class TooLargeError(RuntimeError):
    """There is too little memory for a measurement."""


class UnavailableError(RuntimeError):
    """There is no such variant on this device."""


class WrongError(RuntimeError):
    """The output of a variant is wrong."""


def measure(problem: Problem, variants: Sequence[Variant], setup: Setup) -> list[Record]:
    """Return one record for each variant; an error becomes a record, too."""
    try:
        cell = make_cell(problem, variants, setup)
    except Exception as error:  # noqa: BLE001  other cells are still to be measured
        return [_without_number(variant, problem, error) for variant in variants]
    return [_record(variant, cell) for variant in variants]


def make_cell(problem: Problem, variants: Sequence[Variant], setup: Setup) -> Cell:
    """Return inputs and the exact answer. Raise `TooLargeError` if not even one cache fits."""
    torch.compiler.reset()  # every shape is compiled for itself, without a limit of shapes
    release()
    least = min(variant.bytes_read(problem, setup.budget) for variant in variants)
    size, free = problem.cache_bytes(), free_bytes(setup.device)
    count = buffer_count(size, least, l2_bytes(setup.device), free, setup.most_buffers)
    if not count:
        raise TooLargeError(f"keys and values are {_gigabytes(size, free)}")
    buffers = [make_inputs(problem, setup.device, seed) for seed in range(count)]
    rows = checked_rows(problem)
    return Cell(problem, setup, buffers, rows, reference(buffers[0], rows))


def _record(variant: Variant, cell: Cell) -> Record:
    try:
        return _measured(variant, cell)
    except Exception as error:  # noqa: BLE001  other variants are still to be measured
        record = _without_number(variant, cell.problem, error)
    gc.collect()  # the frames of a failure hold tensors
    return record


def _measured(variant: Variant, cell: Cell) -> Record:
    torch.cuda.empty_cache()
    problem, setup = cell.problem, cell.setup
    extra, free = variant.extra_bytes(problem), free_bytes(setup.device)
    if extra > 0.9 * free:
        raise TooLargeError(f"copies of keys and values are {_gigabytes(extra, free)}")
    try:
        forms = variant.prepare(cell.buffers, setup.budget)
    except NotImplementedError as error:
        raise UnavailableError(error) from error
    timings, outputs = _time_forms(forms, setup)
    best = min(timings, key=lambda form: timings[form].microseconds)
    error = relative_error(outputs[best], cell.exact, cell.rows)
    if not error <= (TOLERANCE if variant.exact else float("inf")):  # NaN is wrong for all
        raise WrongError(f"the output is off by {error:.2g} of its norm")
    read, l2 = variant.bytes_read(problem, setup.budget), l2_bytes(setup.device)
    return Record(
        variant.name,
        problem.batch,
        problem.context,
        form=best,
        microseconds=timings[best].microseconds,
        timings=timings,
        bytes_read=read,
        error=error,
        buffers=len(cell.buffers),
        l2_passes=len(cell.buffers) * read / l2 if l2 else None,
    )


def _time_forms(forms: Forms, setup: Setup) -> tuple[dict[str, Timing], dict[str, Tensor]]:
    """Return time and first output of each form that runs. Raise the last error if none runs."""
    timings, outputs = {}, {}
    failure: Exception | None = None
    for form, calls in forms.items():
        try:
            timings[form], outputs[form] = time_calls(calls, setup.device, setup.seconds)
        except Exception as error:  # noqa: BLE001  the other form may still run
            failure = error
    if failure is not None and not timings:
        raise failure
    return timings, outputs


def _without_number(variant: Variant, problem: Problem, error: Exception) -> Record:
    lines = str(error).strip().splitlines() or [""]
    status, note = FAILED, f"{type(error).__name__}: {lines[0]}"
    if isinstance(error, UnavailableError):
        status, note = UNAVAILABLE, lines[0]
    elif isinstance(error, TooLargeError | torch.OutOfMemoryError):
        status, note = SKIPPED, lines[0]
    return Record(variant.name, problem.batch, problem.context, status, note[:NOTE])


def _gigabytes(size: float, free: float) -> str:
    return f"{size / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"
