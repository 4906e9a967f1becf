"""Progress bars over what takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def make_console() -> Console:
    """The terminal; wide enough for the tables where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


@contextmanager
def stage(console: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` parts; what it yields is called with how many are done."""
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
