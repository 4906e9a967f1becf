"""One architecture and implementation: the attentions that run, and those that we find."""

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
"""Names of transformers' attention implementations, by our names."""


@dataclass(frozen=True)
class Result:
    """Result of one phase of an architecture with one attention implementation."""

    architecture: str
    implementation: str
    phase: str
    there: int = 0
    """Number of attentions that the call runs; 0 if it cannot be made without us, either."""
    unseen: int = 0
    """Number of attentions within which Dynamo breaks the graph, so that no backend sees them."""
    found: int = 0
    """Number of attentions that `explain` finds."""
    note: str = ""
    """Explanation if the call cannot be made, or a backend does not see all of it."""
    failure: str = ""
    """Error other than a miss."""
    details: str = ""
    """Details of a miss: the names of attentions that run, and the report of those found."""

    @property
    def seen(self) -> int:
        """Number of attentions that a backend can find."""
        return self.there - self.unseen

    @property
    def complete(self) -> bool:
        """True if all that can be found is found, and no more."""
        return self.found == self.seen and not self.failure

    @property
    def remark(self) -> str:
        """Words on a miss, an error or a note; empty for a full count."""
        miss = f"{self.found} found of {self.seen}" if self.found != self.seen else ""
        return "; ".join(filter(None, (miss, self.failure, self.note)))


@torch.no_grad()
def measure(architecture: Architecture, implementation: str) -> list[Result]:
    """Return the results of all phases; an error in one of them becomes a result, too."""
    empty = [Result(architecture.name, implementation, phase) for phase in phases(architecture)]
    try:
        model = architecture.build(IMPLEMENTATIONS[implementation])
    except Exception as error:  # noqa: BLE001  transformers has many ways to say no
        return [replace(each, note=_brief(error, architecture)) for each in empty]
    return [_measure_phase(model, architecture, each) for each in empty]


def _measure_phase(model: nn.Module, architecture: Architecture, empty: Result) -> Result:
    def new_arguments() -> Arguments:
        torch._dynamo.reset()
        with uncompiled_flex():
            return arguments(model, architecture, empty.phase)

    try:
        truth = count_attentions(model, **new_arguments())
    except Exception as error:  # noqa: BLE001
        return replace(empty, note=_brief(error, architecture))
    result = replace(empty, there=len(truth.names), failure=truth.dispute)
    try:
        report = lychee_compile.explain(model, **new_arguments())
    except Exception as error:  # noqa: BLE001
        refusal = _why_dynamo_fails(model, new_arguments)
        if refusal is not None:
            return replace(empty, note=f"Dynamo: {_brief(refusal, architecture)}")
        trace = "".join(traceback.format_exception(_cause(error), limit=-6))
        return replace(result, failure=_brief(error, architecture), details=trace)
    result = replace(result, found=len(report.sites))
    if result.complete:
        return result
    return _with_unseen(replace(result, details=_details(truth, report)), model, new_arguments)


def _why_dynamo_fails(model: nn.Module, new_arguments: Callable[[], Arguments]) -> Exception | None:
    """Return the error with a backend that does nothing; None if the error is our own."""
    try:
        torch.compile(model, backend="eager")(**new_arguments())
    except Exception as error:  # noqa: BLE001
        return error
    return None


def _with_unseen(
    result: Result, model: nn.Module, new_arguments: Callable[[], Arguments]
) -> Result:
    """Return `result` less the attentions that Dynamo gives to no backend."""
    unseen = result.there - max(result.found, count_in_graphs(model, **new_arguments()))
    if unseen <= 0:
        return result
    note = "Dynamo breaks the graph within the attention, so that no backend sees it"
    return replace(result, unseen=unseen, note=note)


def _details(truth: Truth, report: Any) -> str:
    missing = Counter(truth.names) - Counter(site.name for site in report.sites)
    lines = [f"there: {', '.join(truth.names)}", f"not found by name: {', '.join(missing)}"]
    return "\n".join([*lines, str(report)])


def _cause(error: Exception) -> Exception:
    """Return the error that a backend raised if `error` is Dynamo's wrapping of it, or `error`."""
    return getattr(error, "inner_exception", error)


def _brief(error: Exception, architecture: Architecture) -> str:
    """Return the first sentence without the model class's name, so that equal reasons are equal."""
    cause = _cause(error)
    lines = str(cause).strip().splitlines() or [""]
    sentence = lines[0].split(". ")[0].rstrip(".") or type(cause).__name__
    sentence = sentence.replace(architecture.model_class, "the class")
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", sentence)
