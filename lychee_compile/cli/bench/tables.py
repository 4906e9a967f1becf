"""Tables of `bench` for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lychee_compile.cli.bench.measure import MEASURED, Cell
from lychee_compile.cli.bench.ways import Way
from lychee_compile.cli.lengths import length_name
from lychee_compile.cli.units import size_name, time_name


def page(title: str, facts: Sequence[str], cells: Sequence[Cell], ways: Sequence[Way]) -> Group:
    """Return a title, facts, the tables of all batches, and a line for each cell without a time."""
    parts: list[RenderableType] = [Text(title, "bold"), *map(Text, facts)]
    for batch in sorted({cell.batch for cell in cells}):
        mine = [cell for cell in cells if cell.batch == batch]
        parts.append(_table(f"batch {batch}: ms per token, and tokens per second", mine, ways))
    parts.append(_costs(cells))
    missing = [cell for cell in cells if cell.status != MEASURED]
    parts += [Text(f"  - {cell.name}: {cell.status}: {cell.note}") for cell in missing]
    return Group(*parts)


def _table(title: str, cells: Sequence[Cell], ways: Sequence[Way]) -> Group:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("context")
    for way in ways:
        table.add_column(way.label, justify="right")
    faster = any(way.ours for way in ways) and not all(way.ours for way in ways)
    if faster:
        table.add_column("times faster", justify="right")
    for context in sorted({cell.context for cell in cells}):
        row = {cell.way: cell for cell in cells if cell.context == context}
        shown = [_time(row[way.label]) for way in ways]
        table.add_row(length_name(context), *shown, *([_faster(row, ways)] if faster else []))
    return Group(Text(title, "bold"), table)


def _time(cell: Cell) -> str:
    rate = cell.tokens_per_second
    return cell.status if rate is None else f"{cell.milliseconds:,.2f}  {rate:,.0f}/s"


def _faster(row: dict[str, Cell], ways: Sequence[Way]) -> str:
    """Return how many times faster the last way is than the fastest that is not ours."""
    ours = row[ways[-1].label].milliseconds
    others = [row[way.label].milliseconds for way in ways if not way.ours]
    known = [each for each in others if each is not None]
    return f"{min(known) / ours:.2f}" if ours is not None and known else ""


def _costs(cells: Sequence[Cell]) -> Table:
    """Return a table of memory and of the first step, one row a cell."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    columns: dict[str, Callable[[Cell], str]] = {
        "first step": lambda cell: time_name(cell.first_step_seconds),
        "cache": lambda cell: size_name(cell.cache_bytes or 0),
        "peak memory": lambda cell: "" if cell.peak_bytes is None else size_name(cell.peak_bytes),
        "attentions": lambda cell: ", ".join(f"{n} {kind}" for kind, n in cell.attentions.items()),
    }
    table.add_column("cell")
    for name in columns:
        table.add_column(name, justify="right")
    for cell in cells:
        if cell.status == MEASURED:
            table.add_row(cell.name, *(show(cell) for show in columns.values()))
    return table
