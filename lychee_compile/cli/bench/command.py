"""The command line of `bench`."""

from __future__ import annotations

from typing import Any

from lychee_compile.cli.parser import Commands


def add_bench(commands: Commands[Any]) -> None:
    """Add the command to those of `python -m lychee_compile`."""
