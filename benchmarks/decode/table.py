"""Tables of the results for the terminal, one row a context length."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.common.lengths import length_name
from benchmarks.common.status import FAILED, MEASURED, SKIPPED, UNAVAILABLE
from benchmarks.decode.records import Record, Report
from benchmarks.decode.variants import BASELINES, LABELS

NO_NUMBER = {UNAVAILABLE: "not available", SKIPPED: "does not fit", FAILED: "failed"}
L2_PASSES = 2
"""Passes over the L2 cache under which a time is marked, as L2 may have served part of it."""


def heading(report: Report) -> str:
    """Return two lines that name the device, the versions, and the attention's shape."""
    shape, used = report.shape, report.versions
    return (
        f"{report.device}, torch {used['torch']}, triton {used['triton']}, commit {report.commit}; "
        f"reads {report.bandwidth.read / 1e9:,.0f} GB/s, copies {report.bandwidth.copy / 1e9:,.0f} "
        f"GB/s (bytes read and written)\n{shape['heads']} query heads, {shape['kv_heads']} KV "
        f"heads, head_dim {shape['head_dim']}, {shape['dtype']}, budget {shape['budget']:,}"
    )


def tables(report: Report, batch: int) -> Group:
    """Return the tables of one batch: times, then bytes, shares of bandwidth and errors."""
    against = "times faster than the fastest dense attention"
    parts = [
        Text(f"Batch {batch}: microseconds for one attention, {against}", "bold"),
        _table(report, batch, lambda record: time_cell(report, record)),
        Text("MB to read, share of the read bandwidth, error against float64", "bold"),
        _table(report, batch, lambda record: reading_cell(report, record)),
    ]
    return Group(*parts, *(Text(note) for note in notes(report, batch)))


def time_cell(report: Report, record: Record) -> str:
    """Return "38.5  3.1x", with "~" if the L2 cache may have helped; or why there is no number."""
    if record.microseconds is None:
        return NO_NUMBER[record.status]
    digits = 1 if record.microseconds < 1000 else 0
    mark = "~" if record.l2_passes is not None and record.l2_passes < L2_PASSES else ""
    speedup = report.speedup(record, BASELINES)
    times = "" if speedup is None else f"  {speedup:.2f}x"
    return f"{mark}{record.microseconds:,.{digits}f}{times}"


def reading_cell(report: Report, record: Record) -> str:
    """Return "134  81%  2.1e-03": megabytes, share and error; or why there is no number."""
    share = record.share(report.bandwidth)
    if record.bytes_read is None or share is None:
        return NO_NUMBER[record.status]
    error = "" if record.error is None else f"  {record.error:.1e}"
    megabytes = record.bytes_read / 1e6
    digits = 0 if megabytes >= 100 else 1
    return f"{megabytes:,.{digits}f}  {share:.0%}{error}"


def notes(report: Report, batch: int) -> Iterable[str]:
    """Yield why numbers are missing or marked: each reason once, with its contexts."""
    reasons: dict[str, list[str]] = {}
    for record in report.records:
        if record.batch == batch and record.status != MEASURED:
            reason = f"{LABELS[record.variant]} {NO_NUMBER[record.status]}: {record.note}"
            reasons.setdefault(reason, []).append(length_name(record.context))
        elif record.batch == batch and (record.l2_passes or L2_PASSES) < L2_PASSES:
            reason = f"~ {LABELS[record.variant]}: its reads of all buffers may stay in L2"
            reasons.setdefault(reason, []).append(length_name(record.context))
    for reason, contexts in reasons.items():
        yield f"{reason} ({', '.join(contexts)})"


def _table(report: Report, batch: int, cell: Callable[[Record], str]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("context", justify="right", no_wrap=True)
    for name in report.variants:
        table.add_column(LABELS[name], justify="right")
    for context in report.contexts:
        known = [report.find(name, batch, context) for name in report.variants]
        if any(known):
            cells = ("" if record is None else cell(record) for record in known)
            table.add_row(length_name(context), *cells)
    return table
