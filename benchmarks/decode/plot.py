"""Picture of the results: time against context, and times faster than flash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from benchmarks.common.lengths import length_name
from benchmarks.decode.records import Record, Report
from benchmarks.decode.variants import BASELINES, LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (5.0, 3.8)
"""Width and height of a panel, in inches."""
MARKERS = "osD^vP*Xhd"


def draw(report: Report) -> Figure:
    """Return a figure with a column for each batch: microseconds above, times faster below."""
    from matplotlib.figure import Figure

    columns = len(report.batches)
    figure = Figure(figsize=(PANEL[0] * columns, 2 * PANEL[1]), layout="constrained")
    panels = figure.subplots(2, columns, squeeze=False, sharex="col", sharey="row")
    for column, batch in enumerate(report.batches):
        above, below = panels[0][column], panels[1][column]
        _lines(above, report, batch, lambda record: record.microseconds)
        _lines(below, report, batch, lambda record: report.speedup(record, BASELINES))
        above.set_title(f"batch {batch}", fontsize="medium")
        below.set_xlabel("context, tokens")
    panels[0][0].set_ylabel("one decode attention, µs")
    panels[1][0].set_ylabel("times faster than the fastest dense attention")
    if panels[0][0].lines:
        panels[0][0].legend(fontsize="small")
    figure.suptitle(fill(_title(report), 56 * columns), fontsize="medium")
    return figure


def save_plot(report: Report, path: Path) -> None:
    """Draw `report` into `path`, in the format that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(report).savefig(path, dpi=130)


def _lines(
    axes: Axes, report: Report, batch: int, height: Callable[[Record], float | None]
) -> None:
    """Draw one line for each variant that has numbers, in the variant's own colour."""
    for variant in report.variants:
        records = [report.find(variant, batch, context) for context in report.contexts]
        points = [(each.context, height(each)) for each in records if each is not None]
        known = [(context, value) for context, value in points if value is not None]
        if not known:
            continue
        number = list(LABELS).index(variant)
        color, marker = f"C{number}", MARKERS[number % len(MARKERS)]
        x, y = zip(*known, strict=True)
        size = max(9 - number, 4)  # what lies beneath another line still shows
        axes.plot(x, y, color=color, marker=marker, ms=size, lw=1.5, label=LABELS[variant])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(report.contexts, [length_name(context) for context in report.contexts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _title(report: Report) -> str:
    shape = report.shape
    return (
        f"{report.device}: {shape['heads']} query heads, {shape['kv_heads']} KV heads, head_dim "
        f"{shape['head_dim']}, {shape['dtype']}, budget {shape['budget']:,}"
    )
