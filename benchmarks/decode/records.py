"""Records of what was measured, as they go into the JSON file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.common.memory import Bandwidth
from benchmarks.common.provenance import write_json
from benchmarks.common.status import MEASURED
from benchmarks.common.timing import Timing


@dataclass(frozen=True)
class Record:
    """One variant at one context length and batch."""

    variant: str
    batch: int
    context: int
    status: str = MEASURED
    """A constant of `benchmarks.common.status`."""
    note: str = ""
    """Explanation if there is no number."""
    form: str = ""
    """Name of the fastest of the variant's forms."""
    microseconds: float | None = None
    """Time of one attention: the median of the fastest form."""
    timings: dict[str, Timing] = field(default_factory=dict)
    """Times of every form."""
    bytes_read: int | None = None
    """Bytes that one call has to read, by formula."""
    error: float | None = None
    """Norm of the difference from float64 attention over all keys, over its norm."""
    buffers: int | None = None
    """Number of caches that are rotated."""
    l2_passes: float | None = None
    """Bytes read from all buffers over the size of the L2 cache; near 1 the cache may help."""

    def share(self, bandwidth: Bandwidth) -> float | None:
        """Return the part of the read bandwidth that was reached; None without a number."""
        if self.bytes_read is None or self.microseconds is None:
            return None
        return 1e6 * self.bytes_read / self.microseconds / bandwidth.read


@dataclass
class Report:
    """Records of one run of the benchmark."""

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
        """Return the record of one variant in one cell, or None."""
        wanted = (variant, batch, context)
        known = (
            each for each in self.records if wanted == (each.variant, each.batch, each.context)
        )
        return next(known, None)

    def speedup(self, record: Record, baselines: Collection[str]) -> float | None:
        """Return how many times faster `record` is than the fastest of `baselines`, or None.

        Only baselines of the same cell count, and only those that were measured.
        """
        others = (self.find(each, record.batch, record.context) for each in baselines)
        times = [each.microseconds for each in others if each is not None and each.microseconds]
        return min(times) / record.microseconds if times and record.microseconds else None

    @property
    def batches(self) -> list[int]:
        """Batch sizes in the order in which they were measured."""
        return _unique(record.batch for record in self.records)

    @property
    def contexts(self) -> list[int]:
        """Context lengths from the shortest to the longest."""
        return sorted(_unique(record.context for record in self.records))

    @property
    def variants(self) -> Sequence[str]:
        """Names of variants in the order in which they were measured."""
        return list(dict.fromkeys(record.variant for record in self.records))

    def save(self, path: Path) -> None:
        """Write everything as JSON; each record also with its share of bandwidth."""
        content = asdict(self)
        for fields, record in zip(content["records"], self.records, strict=True):
            fields["bandwidth_share"] = record.share(self.bandwidth)
        write_json(path, content)


def _unique(numbers: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(numbers))
