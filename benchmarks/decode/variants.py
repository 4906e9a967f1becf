"""Variants of attention that are compared: name, bytes read and calls of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.common.problem import Inputs, Problem
from benchmarks.decode import baselines, ours
from benchmarks.decode.baselines import Forms


@dataclass(frozen=True)
class Variant:
    """A column of the comparison."""

    name: str
    """Name that options use."""
    label: str
    """Name that tables show."""
    forms: Callable[[Sequence[Inputs]], Forms] | None = None
    """Equivalent calls, one per buffer, of which the fastest counts; None for our own variants."""
    copies: bool = False
    """True if a call writes keys and values out once for every query head."""
    exact: bool = True
    """True if all keys are attended to."""

    def prepare(self, buffers: Sequence[Inputs], budget: int) -> Forms:
        """Return the calls of each form. Raise NotImplementedError if there is no such variant."""
        if self.forms is not None:
            return self.forms(buffers)
        calls = [
            ours.prepare(self.name, each.query, each.key, each.value, budget) for each in buffers
        ]
        return {"generated kernels": calls}

    def bytes_read(self, problem: Problem, budget: int) -> int:
        """Return the bytes that a call has to read; for dense attention all keys and values."""
        if self.forms is not None:
            return problem.cache_bytes()
        return ours.bytes_read(self.name, problem, budget)

    def extra_bytes(self, problem: Problem) -> int:
        """Return the bytes of memory that a call needs besides its inputs."""
        return problem.group * problem.cache_bytes() if self.copies and problem.group > 1 else 0


VARIANTS = (
    Variant("sdpa-flash", "sdpa flash", baselines.flash_forms),
    Variant("sdpa-gqa", "sdpa enable_gqa", baselines.gqa_forms),
    Variant("flex", "flex attention", baselines.flex_forms),
    Variant("sdpa-mask", "sdpa + mask, repeat_kv", baselines.masked_forms, copies=True),
    Variant("lychee-exact", "lychee exact"),
    Variant("lychee-sparse", "lychee sparse", exact=False),
    Variant("lychee-pages", "lychee by pages", exact=False),
    Variant("lychee-chunks", "lychee by chunks", exact=False),
    *(Variant(policy, f"{policy} (ours)", exact=False) for policy in ours.OTHERS),
)
FORCED = ("lychee-pages", "lychee-chunks")
"""Variants in which "lychee" looks for tokens in a way that sizes might not choose; by default they
are left out."""
LABELS = {variant.name: variant.label for variant in VARIANTS}
BASELINES = tuple(variant.name for variant in VARIANTS if variant.forms is not None)
"""Names of the dense variants; speed-ups are against the fastest of them in each cell."""
