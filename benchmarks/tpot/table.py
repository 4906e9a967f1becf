"""Tables of the results for the terminal, one row a context length."""

from __future__ import annotations

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.common.lengths import length_name
from benchmarks.common.status import SKIPPED
from benchmarks.tpot.records import Record, Report
from benchmarks.tpot.ways import WAYS


def tables(report: Report) -> list[Table]:
    """Return two tables for each batch: times, then memory and the first step."""
    return [table for batch in report.batches for table in _tables(report, batch)]


def _tables(report: Report, batch: int) -> list[Table]:
    def speed(record: Record) -> str:
        if record.milliseconds is None:
            return record.note if record.status == SKIPPED else record.status
        rate = 1e3 * record.batch / record.milliseconds
        return f"{record.milliseconds:.2f}  {rate:,.0f}/s"

    def costs(record: Record) -> str:
        if record.milliseconds is None:
            return ""
        memory = "" if record.peak_gigabytes is None else f"{record.peak_gigabytes:.1f} GB"
        own, kernels = record.lychee_seconds or 0.0, record.kernel_seconds or 0.0
        share = f", ours {own:.1f}, of it kernels {kernels:.1f}" if record.inductor_seconds else ""
        return f"{memory}, {record.first_step_seconds:.0f} s{share}"

    titles = {
        f"Batch {batch}: ms per step, tokens per second": speed,
        f"Batch {batch}: peak memory, first step with compilation": costs,
    }
    return [_table(report, batch, title, cell) for title, cell in titles.items()]


def _table(report: Report, batch: int, title: str, cell: Callable[[Record], str]) -> Table:
    ways = [name for name in WAYS if any(each.way == name for each in report.records)]
    table = Table("context", *(WAYS[name].label for name in ways), title=title, box=SIMPLE_HEAD)
    for context in report.contexts(batch):
        records = [report.find(name, batch, context) for name in ways]
        cells = ("" if each is None else cell(each) for each in records)
        table.add_row(length_name(context), *cells)
    return table
