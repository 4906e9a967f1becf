"""Every way of attending that is compared: its name, what it reads and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.decode import baselines, ours
from benchmarks.decode.baselines import Forms
from benchmarks.decode.problem import Inputs, Problem


@dataclass(frozen=True)
class Variant:
    """A row of the comparison."""

    name: str
    """As options spell it."""
    label: str
    """As people read it."""
    forms: Callable[[Sequence[Inputs]], Forms] | None = None
    """Equivalent calls, of which the fastest counts, one per buffer; None: it is ours."""
    copies: bool = False
    """Whether a call writes keys and values out once for every query head."""
    exact: bool = True
    """Whether all keys are attended to."""

    def prepare(self, buffers: Sequence[Inputs], budget: int) -> Forms:
        """The calls of each form. Raises NotImplementedError where there is none."""
        if self.forms is not None:
            return self.forms(buffers)
        calls = [
            ours.prepare(self.name, each.query, each.key, each.value, budget) for each in buffers
        ]
        return {"generated kernels": calls}

    def bytes_read(self, problem: Problem, budget: int) -> int:
        """Bytes that a call cannot do without reading: dense attention, all keys and values."""
        if self.forms is not None:
            return problem.cache_bytes()
        return ours.bytes_read(self.name, problem, budget)

    def extra_bytes(self, problem: Problem) -> int:
        """Memory that a call needs besides its inputs."""
        return problem.group * problem.cache_bytes() if self.copies and problem.group > 1 else 0


VARIANTS = (
    Variant("sdpa-flash", "sdpa flash", baselines.flash_forms),
    Variant("sdpa-gqa", "sdpa enable_gqa", baselines.gqa_forms),
    Variant("flex", "flex attention", baselines.flex_forms),
    Variant("sdpa-mask", "sdpa + mask, repeat_kv", baselines.masked_forms, copies=True),
    Variant("lychee-exact", "lychee exact"),
    Variant("lychee-sparse", "lychee sparse", exact=False),
    Variant("quest", "quest (ours)", exact=False),
)
LABELS = {variant.name: variant.label for variant in VARIANTS}
BASELINE = "sdpa-flash"
"""What speed-ups are against."""
