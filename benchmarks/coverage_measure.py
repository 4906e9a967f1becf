"""One combination of the coverage table: attentions there, and attentions that we find."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from coverage_calls import Arguments, arguments, phases
from coverage_models import Architecture
from coverage_truth import count_attentions, uncompiled_flex
from torch import nn

import lychee_compile

IMPLEMENTATIONS = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}
"""Our names for transformers' attention implementations."""


@dataclass(frozen=True)
class Result:
    """What became of one phase of an architecture with one attention implementation."""

    architecture: str
    implementation: str
    phase: str
    there: int | None = None
    """Attentions that the call runs; None where the call cannot be made without us, either."""
    found: int = 0
    """Attentions that `explain` finds."""
    reason: str = ""
    """Why the call cannot be made, or what went wrong with it."""
    details: str = ""
    """For a miss: the names of the attentions there, and the report of those found."""

    @property
    def offered(self) -> bool:
        """Whether transformers and Dynamo can make the call at all."""
        return self.there is not None

    @property
    def complete(self) -> bool:
        """Whether what is found is what is there; nothing is missed where no call can be made."""
        return not self.offered or (self.found == self.there and not self.reason)

    @property
    def remark(self) -> str:
        """In words, what there is to say beyond a full count."""
        missed = self.offered and self.found != self.there
        return self.reason or (f"{self.found} found of {self.there}" if missed else "")


@torch.no_grad()
def measure(architecture: Architecture, implementation: str) -> list[Result]:
    """The results of all phases, whatever goes wrong in one of them."""
    try:
        model = architecture.build(IMPLEMENTATIONS[implementation])
    except Exception as error:  # noqa: BLE001  transformers has many ways to say no
        reason = _brief(error, architecture)
        return [
            Result(architecture.name, implementation, phase, reason=reason)
            for phase in phases(architecture)
        ]
    return [_measure_phase(model, architecture, implementation, p) for p in phases(architecture)]


def _measure_phase(
    model: nn.Module, architecture: Architecture, implementation: str, phase: str
) -> Result:
    names = (architecture.name, implementation, phase)

    def given() -> Arguments:
        with uncompiled_flex():
            return arguments(model, architecture, phase)

    try:
        truth = count_attentions(model, **given())
    except Exception as error:  # noqa: BLE001
        return Result(*names, reason=_brief(error, architecture))
    there = len(truth.names)
    torch._dynamo.reset()
    try:
        report = lychee_compile.explain(model, **given())
    except Exception as error:  # noqa: BLE001
        refusal = _why_dynamo_fails(model, given)
        if refusal is not None:
            return Result(*names, reason=f"Dynamo: {_brief(refusal, architecture)}")
        return Result(*names, there, reason=_brief(error, architecture), details=str(error))
    found = len(report.sites)
    reason = ""
    if there != truth.by_dataflow:
        reason = f"the two counts disagree: {there} by calls, {truth.by_dataflow} by dataflow"
    result = Result(*names, there, found, reason)
    return result if result.complete else replace(result, details=_details(truth.names, report))


def _why_dynamo_fails(model: nn.Module, given: Callable[[], Arguments]) -> Exception | None:
    """The error with a backend that does nothing; None where there is none, so that it is ours."""
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="eager")(**given())
    except Exception as error:  # noqa: BLE001
        return error
    return None


def _details(names: tuple[str, ...], report: Any) -> str:
    missing = Counter(names) - Counter(site.name for site in report.sites)
    lines = [f"there: {', '.join(names)}", f"not found under its name: {', '.join(missing)}"]
    return "\n".join([*lines, str(report)])


def _brief(error: Exception, architecture: Architecture) -> str:
    """The first sentence, without the name of the class, so that equal reasons are equal."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    sentence = lines[0].split(". ")[0].rstrip(".")
    sentence = sentence.replace(architecture.model_class, "the class")
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", sentence)
