"""Records of what was measured, as they go into the JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import write_json
from benchmarks.common.status import MEASURED


@dataclass
class Record:
    """One way to decode at one context length and batch."""

    way: str
    batch: int
    context: int
    status: str = MEASURED
    """A constant of `benchmarks.common.status`."""
    note: str = ""
    """Explanation if there is no number."""
    milliseconds: float | None = None
    """Time per step of the whole batch: the median of rounds."""
    peak_gigabytes: float | None = None
    """Peak GPU memory, weights, cache and index included."""
    first_step_seconds: float | None = None
    """Time of the first step, compilation included."""
    inductor_seconds: float | None = None
    """Time of the backend's calls of Inductor."""
    lychee_seconds: float | None = None
    """Time of our passes: tracing, detection, rewriting, generating kernels, and trying them."""
    kernel_seconds: float | None = None
    """Part of `lychee_seconds` in which kernels are tried; Triton's compiler takes most of it."""
    graph_skips: int = 0
    """Number of CUDA graphs that Inductor skipped."""
    sites: dict[str, int] = field(default_factory=dict)
    """Number of attentions by decision: sparse, exact, kept."""

    @property
    def cell(self) -> tuple[str, int, int]:
        """Way, batch and context of the record."""
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
        """Add `record` in place of an older one of the same cell."""
        self.records = [each for each in self.records if each.cell != record.cell] + [record]

    def find(self, way: str, batch: int, context: int) -> Record | None:
        """Return the record of one way in one cell, or None."""
        known = {each.cell: each for each in self.records}
        return known.get((way, batch, context))

    @property
    def batches(self) -> list[int]:
        """Batch sizes from the smallest to the largest."""
        return sorted({each.batch for each in self.records})

    def contexts(self, batch: int) -> list[int]:
        """Return the context lengths of one batch, from the shortest to the longest."""
        return sorted({each.context for each in self.records if each.batch == batch})

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        write_json(path, asdict(self))

    def take_over(self, path: Path) -> None:
        """Keep the records of an earlier run in `path`, if its device and model are the same."""
        if not path.exists():
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        if (known["device"], known["shape"]) == (self.device, self.shape):
            self.commands = [*known["commands"], *self.commands]
            self.records = [Record(**each) for each in known["records"]]
