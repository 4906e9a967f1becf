"""What was measured, as it goes into the JSON file; tables and a picture of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.decode.records import length_name
from benchmarks.tpot.ways import WAYS

TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Milliseconds that a picture names."""
MEASURED, SKIPPED, FAILED = "measured", "skipped", "failed"


@dataclass
class Record:
    """One way to decode at one context length and batch."""

    way: str
    batch: int
    context: int
    status: str = MEASURED
    note: str = ""
    """Why there is no number."""
    milliseconds: float | None = None
    """Per step of the whole batch: the median of rounds."""
    peak_gigabytes: float | None = None
    """Of GPU memory: weights, cache and index included."""
    first_step_seconds: float | None = None
    """With its compilation."""
    inductor_seconds: float | None = None
    """Of the backend's calls of Inductor."""
    lychee_seconds: float | None = None
    """In our passes: tracing, detection, rewriting, generating kernels, and trying them."""
    kernel_seconds: float | None = None
    """Of these in trying them, most of which is Triton compiling them."""
    graph_skips: int = 0
    """CUDA graphs that Inductor did not make."""
    sites: dict[str, int] = field(default_factory=dict)
    """What became of the attentions."""

    @property
    def cell(self) -> tuple[str, int, int]:
        """Way, batch and context."""
        return self.way, self.batch, self.context


@dataclass
class Report:
    """Runs of the benchmark on one device."""

    device: str
    versions: dict[str, Any]
    commit: str | None
    commands: list[str]
    shape: dict[str, int]
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """A record takes the place of an older one of the same cell."""
        self.records = [each for each in self.records if each.cell != record.cell] + [record]

    def find(self, way: str, batch: int, context: int) -> Record | None:
        """The record of one way in one cell."""
        known = {each.cell: each for each in self.records}
        return known.get((way, batch, context))

    @property
    def batches(self) -> list[int]:
        """From the smallest."""
        return sorted({each.batch for each in self.records})

    def contexts(self, batch: int) -> list[int]:
        """Of one batch, from the shortest."""
        return sorted({each.context for each in self.records if each.batch == batch})

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def take_over(self, path: Path) -> None:
        """Keep what an earlier run left in a file, if it was of the same device and model."""
        if not path.exists():
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        if (known["device"], known["shape"]) == (self.device, self.shape):
            self.commands = [*known["commands"], *self.commands]
            self.records = [Record(**each) for each in known["records"]]


def tables(report: Report) -> list[Table]:
    """Milliseconds and tokens per second, and what it took, for each batch."""
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
        found = [report.find(name, batch, context) for name in ways]
        cells = ("" if each is None else cell(each) for each in found)
        table.add_row(length_name(context), *cells)
    return table


def save_plot(report: Report, path: Path) -> None:
    """Milliseconds per step against context, one panel a batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(report.batches), 3.8), layout="constrained")
    panels = figure.subplots(1, len(report.batches), squeeze=False, sharey="row")[0]
    for axes, batch in zip(panels, report.batches, strict=True):
        for number, (name, way) in enumerate(WAYS.items()):
            found = [report.find(name, batch, each) for each in report.contexts(batch)]
            points = [(r.context, r.milliseconds) for r in found if r and r.milliseconds]
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
