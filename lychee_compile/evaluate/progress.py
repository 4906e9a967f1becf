"""Console and progress bars of an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def make_console(file: TextIO | None = None) -> Console:
    """Return a console on `file`, by default stdout; 140 columns wide if it is no terminal."""
    shown = file or sys.stdout
    return Console(file=shown, width=None if shown.isatty() else 140, highlight=False)


@contextmanager
def stage(console: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar, and yield a function to call with the number of parts that are done."""
    columns = (
        TextColumn("{task.description:<52}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield partial(progress.advance, task)
        progress.update(task, completed=total)
