"""What was measured, where and with what, as it goes into the JSON file."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.decode.timing import Bandwidth, Timing

MEASURED, UNAVAILABLE, SKIPPED, FAILED = "measured", "unavailable", "skipped", "failed"


@dataclass(frozen=True)
class Record:
    """One variant at one context length and batch."""

    variant: str
    batch: int
    context: int
    status: str = MEASURED
    """Measured; unavailable: there is no such variant; skipped: it does not fit; failed."""
    note: str = ""
    """Why there is no number."""
    form: str = ""
    """The fastest of the variant's forms."""
    microseconds: float | None = None
    """Of one attention: the median of the fastest form."""
    timings: dict[str, Timing] = field(default_factory=dict)
    """Of every form."""
    bytes_read: int | None = None
    """Bytes that one call has to read, by formula."""
    error: float | None = None
    """Norm of the difference from float64 attention over all keys, over its norm."""
    buffers: int | None = None
    """Caches that are rotated."""
    l2_passes: float | None = None
    """Bytes read from all buffers over the size of the L2 cache; near 1 the cache may help."""

    def share(self, bandwidth: Bandwidth) -> float | None:
        """Part of the read bandwidth that was reached."""
        if self.bytes_read is None or self.microseconds is None:
            return None
        return 1e6 * self.bytes_read / self.microseconds / bandwidth.read


@dataclass
class Report:
    """A run of the benchmark."""

    device: str
    device_bytes: int
    l2_bytes: int
    versions: dict[str, str | None]
    commit: str | None
    command: str
    shape: dict[str, int | str]
    """Heads, KV heads, head_dim, dtype and budget."""
    bandwidth: Bandwidth
    records: list[Record] = field(default_factory=list)

    def find(self, variant: str, batch: int, context: int) -> Record | None:
        """The record of one variant in one cell."""
        wanted = (variant, batch, context)
        known = (
            each for each in self.records if wanted == (each.variant, each.batch, each.context)
        )
        return next(known, None)

    def speedup(self, record: Record, baseline: str) -> float | None:
        """How many times faster than `baseline` in the same cell."""
        other = self.find(baseline, record.batch, record.context)
        if other is None or other.microseconds is None or record.microseconds is None:
            return None
        return other.microseconds / record.microseconds

    @property
    def batches(self) -> list[int]:
        """In the order in which they were measured."""
        return _unique(record.batch for record in self.records)

    @property
    def contexts(self) -> list[int]:
        """From the shortest."""
        return sorted(_unique(record.context for record in self.records))

    @property
    def variants(self) -> Sequence[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(record.variant for record in self.records))

    def save(self, path: Path) -> None:
        """Write everything as JSON; each record also with its share of bandwidth."""
        made = asdict(self)
        for given, record in zip(made["records"], self.records, strict=True):
            given["bandwidth_share"] = record.share(self.bandwidth)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def length_name(tokens: int) -> str:
    """131072 as "128k"."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else f"{tokens:,}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str | None]:
    """Of what the times depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "lychee_compile": _version("lychee_compile"),
    }


def commit() -> str | None:
    """The commit of this checkout, "-dirty" if files differ from it; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _unique(numbers: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(numbers))
