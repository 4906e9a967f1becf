"""The console that benchmarks print their tables on."""

from __future__ import annotations

import sys

from rich.console import Console


def make_console(width: int = 120) -> Console:
    """Return a console as wide as the terminal; `width` columns if the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)
