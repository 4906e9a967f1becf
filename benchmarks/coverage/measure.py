"""One combination of the coverage table: attentions there, and attentions that we find."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import lychee_compile
from benchmarks.coverage.calls import Arguments, arguments, phases
from benchmarks.coverage.models import Architecture
from benchmarks.coverage.truth import Truth, count_attentions, count_in_graphs, uncompiled_flex

IMPLEMENTATIONS = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}
"""Our names for transformers' attention implementations."""


@dataclass(frozen=True)
class Result:
    """What became of one phase of an architecture with one attention implementation."""

    architecture: str
    implementation: str
    phase: str
    there: int = 0
    """Attentions that the call runs; 0 where it cannot be made without us, either."""
    unseen: int = 0
    """Those of them in which Dynamo breaks the graph, so that no backend sees them."""
    found: int = 0
    """Attentions that `explain` finds."""
    note: str = ""
    """Why the call cannot be made, or not be seen in whole."""
    failure: str = ""
    """What went wrong, other than a miss."""
    details: str = ""
    """For a miss: the names of the attentions there, and the report of those found."""

    @property
    def seen(self) -> int:
        """How many attentions there are to find."""
        return self.there - self.unseen

    @property
    def complete(self) -> bool:
        """Whether all that can be found is found, and no more."""
        return self.found == self.seen and not self.failure

    @property
    def remark(self) -> str:
        """In words, what there is to say beyond a full count."""
        miss = f"{self.found} found of {self.seen}" if self.found != self.seen else ""
        return "; ".join(filter(None, (miss, self.failure, self.note)))


@torch.no_grad()
def measure(architecture: Architecture, implementation: str) -> list[Result]:
    """The results of all phases, whatever goes wrong in one of them."""
    empty = [Result(architecture.name, implementation, phase) for phase in phases(architecture)]
    try:
        model = architecture.build(IMPLEMENTATIONS[implementation])
    except Exception as error:  # noqa: BLE001  transformers has many ways to say no
        return [replace(each, note=_brief(error, architecture)) for each in empty]
    return [_measure_phase(model, architecture, each) for each in empty]


def _measure_phase(model: nn.Module, architecture: Architecture, empty: Result) -> Result:
    def given() -> Arguments:
        torch._dynamo.reset()
        with uncompiled_flex():
            return arguments(model, architecture, empty.phase)

    try:
        truth = count_attentions(model, **given())
    except Exception as error:  # noqa: BLE001
        return replace(empty, note=_brief(error, architecture))
    result = replace(empty, there=len(truth.names), failure=truth.dispute)
    try:
        report = lychee_compile.explain(model, **given())
    except Exception as error:  # noqa: BLE001
        refusal = _why_dynamo_fails(model, given)
        if refusal is not None:
            return replace(empty, note=f"Dynamo: {_brief(refusal, architecture)}")
        trace = "".join(traceback.format_exception(_cause(error), limit=-6))
        return replace(result, failure=_brief(error, architecture), details=trace)
    result = replace(result, found=len(report.sites))
    if result.complete:
        return result
    return _with_unseen(replace(result, details=_details(truth, report)), model, given)


def _why_dynamo_fails(model: nn.Module, given: Callable[[], Arguments]) -> Exception | None:
    """The error with a backend that does nothing; None where there is none, so that it is ours."""
    try:
        torch.compile(model, backend="eager")(**given())
    except Exception as error:  # noqa: BLE001
        return error
    return None


def _with_unseen(result: Result, model: nn.Module, given: Callable[[], Arguments]) -> Result:
    """`result`, less what is not found because Dynamo gives it to no backend."""
    unseen = result.there - max(result.found, count_in_graphs(model, **given()))
    if unseen <= 0:
        return result
    note = "Dynamo breaks the graph within the attention, so that no backend sees it"
    return replace(result, unseen=unseen, note=note)


def _details(truth: Truth, report: Any) -> str:
    missing = Counter(truth.names) - Counter(site.name for site in report.sites)
    lines = [f"there: {', '.join(truth.names)}", f"not found by name: {', '.join(missing)}"]
    return "\n".join([*lines, str(report)])


def _cause(error: Exception) -> Exception:
    """What a backend raised, where `error` is Dynamo's wrapping of it."""
    return getattr(error, "inner_exception", error)


def _brief(error: Exception, architecture: Architecture) -> str:
    """The first sentence, without the name of the class, so that equal reasons are equal."""
    cause = _cause(error)
    lines = str(cause).strip().splitlines() or [""]
    sentence = lines[0].split(". ")[0].rstrip(".") or type(cause).__name__
    sentence = sentence.replace(architecture.model_class, "the class")
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", sentence)
