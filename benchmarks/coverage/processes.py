"""Processes that measure architectures.

They are spawned, and import the module of what they run. The file that runs a package is no module
that they can import.
"""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.coverage.calls import phases
from benchmarks.coverage.measure import Result, measure
from benchmarks.coverage.models import Architecture


def in_processes(tasks: Sequence[tuple[Architecture, str]], jobs: int) -> Iterator[list[Result]]:
    """Yield the results of each task as they come. A process that dies is a failed result."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_quiet)
    try:
        futures = {pool.submit(measure, *task): task for task in tasks}
        for future in as_completed(futures):
            yield _outcome(future, *futures[future])
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(
    future: Future[list[Result]], architecture: Architecture, implementation: str
) -> list[Result]:
    error = future.exception()
    if error is None:
        return future.result()
    failure = f"{type(error).__name__}: {error}"
    return [
        Result(architecture.name, implementation, phase, failure=failure)
        for phase in phases(architecture)
    ]


def _quiet() -> None:
    """Use one thread a process and silence libraries: results carry every message."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
