"""Picture of the results: time per step against context."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.lengths import length_name
from benchmarks.tpot.records import Report
from benchmarks.tpot.ways import WAYS

TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Milliseconds that the picture's axis names."""


def save_plot(report: Report, path: Path) -> None:
    """Draw milliseconds per step against context into `path`, one panel a batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(report.batches), 3.8), layout="constrained")
    panels = figure.subplots(1, len(report.batches), squeeze=False, sharey="row")[0]
    for axes, batch in zip(panels, report.batches, strict=True):
        for number, (name, way) in enumerate(WAYS.items()):
            records = [report.find(name, batch, each) for each in report.contexts(batch)]
            points = [(r.context, r.milliseconds) for r in records if r and r.milliseconds]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, "os^Dv"[number] + "-", color=f"C{number}", label=way.label)
        axes.set(title=f"batch {batch}", xlabel="context, tokens", xscale="log", yscale="log")
        contexts = report.contexts(batch)
        axes.set_xticks(contexts, [length_name(each) for each in contexts])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time per step, ms")
    low, high = panels[0].get_ylim()
    panels[0].set_yticks([each for each in TICKS if low <= each <= high])
    panels[0].legend(fontsize="small")
    shape = ", ".join(f"{name} {size:,}" for name, size in report.shape.items())
    figure.suptitle(f"{report.device}: Llama, {shape}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
