"""A process that tries model classes, so that one that crashes or hangs ends alone."""

from __future__ import annotations

import logging
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.coverage.libraries.catalogue import LIBRARIES
from benchmarks.coverage.libraries.trial import Trial, attempt

Task = tuple[str, str]
"""Names of a library and of an entry."""


def trials(tasks: Sequence[Task], folder: Path, *, inductor: bool, limit: float) -> Iterator[Trial]:
    """Yield the outcome of each task, in order, at most `limit` seconds after the one before.

    A process serves the tasks of one library. One that dies or takes longer is a failed outcome,
    and another process serves the next task.
    """
    context = multiprocessing.get_context("spawn")
    process, ours, served = None, None, ""
    for library, name in tasks:
        if process is None or ours is None or served != library:
            _end(process)
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, folder, inductor), daemon=True)
            process.start()
            theirs.close()
            served = library
        failure = f"no outcome within {limit:g} s"
        try:
            ours.send((library, name))
            if ours.poll(limit):
                yield ours.recv()
                continue
        except (EOFError, OSError):
            process.join(5)
            failure = f"the process died, with exit status {process.exitcode}"
        _end(process)
        process = None
        yield Trial(library, name, failure=failure)
    _end(process)


def _end(process: multiprocessing.process.BaseProcess | None) -> None:
    if process is not None:
        process.kill()
        process.join()


def _serve(connection: Connection, folder: Path, inductor: bool) -> None:
    _prepare(folder)
    entries = {
        (library.name, entry.name): entry for library in LIBRARIES for entry in library.entries
    }
    with suppress(EOFError):
        while True:
            task = connection.recv()
            connection.send(attempt(task[0], entries[task], inductor=inductor))


def _prepare(folder: Path) -> None:
    """Use one thread, silence libraries, and let them be imported from `folder`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("torch._dynamo", "torch", "transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.path.append(str(folder))
    _import_torchvision()


def _import_torchvision() -> None:
    """Import torchvision, also one that is built for another PyTorch.

    Its operators are then missing. No model of the table runs them, but the import describes them:
    each that it asks for is declared, and it is imported anew.
    """
    for _ in range(8):
        try:
            import torchvision  # noqa: F401
        except ImportError:
            return
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                return
            torch.library.define(missing[1], "(Tensor a, Tensor b, float c) -> Tensor")
            for name in [each for each in sys.modules if each.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return
