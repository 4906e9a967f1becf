"""One model class: what it computes and which attentions run, with the backend and without it."""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._pytree import tree_leaves

from benchmarks.coverage.dataflow import Dataflow
from benchmarks.coverage.libraries.entries import Entry
from lychee_compile import backend, torch_private

READ_ALL = {"prefill": "sparse", "prefill_from": 0, "prefill_budget": 2**30}
"""Options with which attentions are rewritten, and read all keys."""
TOLERANCE = 1e-4
"""Largest error of an output, as a share of its largest value; 1 at least."""


@dataclass(frozen=True)
class Trial:
    """Outcome of a model class; attentions are counted each time that they run."""

    library: str
    name: str
    there: int = 0
    """Number of attentions with more than one key that run uncompiled, counted without us."""
    single: int = 0
    """Number of attentions with a single key that run uncompiled."""
    unseen: int = 0
    """Number of attentions with several keys that no graph of Dynamo holds whole."""
    found: int = 0
    """Number of attentions with more than one key in our reports."""
    rewritten: int = 0
    """Number of attentions, of those found, that are sparse or exact by another operator."""
    kept: dict[str, int] = field(default_factory=dict)
    """Reasons why the other ones stay as they are, with their numbers."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Reasons why softmaxes are no attention, with their numbers."""
    breaks: int = 0
    """Number of graphs with the backend, less those with a backend that does nothing."""
    error: float = 0.0
    """Largest error of an output, as a share of its largest value."""
    failure: str = ""
    """Exception that the backend raised, or warning that it gave up on a graph."""
    note: str = ""
    """Explanation of why the class cannot be tried."""

    @property
    def missed(self) -> int:
        """Number of attentions with several keys that are in a graph and not in the report."""
        return max(self.there - self.unseen - self.found, 0)

    @property
    def wrong(self) -> bool:
        """True if an output differs from that of the uncompiled model."""
        return not self.error <= TOLERANCE

    @property
    def good(self) -> bool:
        """True if nothing is missed, wrong, raised or broken."""
        return not (self.missed or self.wrong or self.failure or self.breaks > 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in types that JSON knows."""
        return asdict(self)


@torch.no_grad()
def attempt(library: str, entry: Entry, *, inductor: bool = False) -> Trial:
    """Return the outcome of a model class; no error is raised.

    Without `inductor` the graphs run through AOTAutograd alone, which compiles quickly.
    """
    trial = Trial(library, entry.name)
    try:
        model = entry.build()
        expected, key_counts = _uncompiled(model, entry)
    except Exception as error:  # noqa: BLE001  a library may raise anything
        return replace(trial, note=_brief(error))
    several = sum(keys > 1 for keys in key_counts) - entry.not_attentions
    single = sum(keys == 1 for keys in key_counts)
    trial = replace(trial, there=several, single=single)
    try:
        graphs, seen = _with_dynamo(model, entry)
    except Exception as error:  # noqa: BLE001
        return replace(trial, there=0, single=0, note=f"Dynamo: {_brief(error)}")
    trial = replace(trial, unseen=max(several + entry.not_attentions - seen, 0))
    try:
        trial, output = _with_us(model, entry, trial, graphs, inductor)
    except Exception as error:  # noqa: BLE001
        trace = traceback.format_exception(error, limit=-4)
        return replace(trial, failure="".join(trace)[-2000:])
    error = _error(expected, output)
    if not error <= TOLERANCE and (reason := _unstable(model, entry, expected)):
        return replace(trial, note=reason)
    return replace(trial, error=error)


def _run(model: nn.Module, entry: Entry, compiled: Callable[[nn.Module], Any]) -> list[Tensor]:
    """Return all tensors that a call of a copy of the model gives."""
    torch._dynamo.reset()
    called = compiled(copy.deepcopy(model))
    args, kwargs = entry.arguments()
    torch.manual_seed(2)
    output = entry.drive(called, args, kwargs)
    return [each.detach().clone() for each in _tensors(output)]


def _tensors(output: Any) -> list[Tensor]:
    leaves = tree_leaves(output)
    held = [vars(each) for each in leaves if not isinstance(each, Tensor) and _holds(each)]
    return [each for each in (*leaves, *tree_leaves(held)) if isinstance(each, Tensor)]


def _holds(leaf: Any) -> bool:
    return hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module))


def _uncompiled(model: nn.Module, entry: Entry) -> tuple[list[Tensor], list[int]]:
    """Return the outputs of the model, and the number of keys of each attention that runs."""
    expected = _run(model, entry, lambda model: model)
    counters: list[Dataflow] = []

    def counted(model: nn.Module) -> nn.Module:
        forward = model.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            counters.append(Dataflow(model, by_hand=True))
            # A model that compiles a part of itself must not do so here.
            with torch.compiler.set_stance("force_eager"), counters[-1]:
                return forward(*args, **kwargs)

        model.forward = run
        return model

    _run(model, entry, counted)
    return expected, [keys for each in counters for keys in each.key_counts]


def _with_dynamo(model: nn.Module, entry: Entry) -> tuple[int, int]:
    """Return how many graphs Dynamo makes, and how many attentions of several keys are in them."""
    key_counts: list[int] = []
    graphs: list[torch.fx.GraphModule] = []

    def compiled(model: nn.Module) -> Any:
        def watched(graph: torch.fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
            graphs.append(graph)

            def run(*inputs: Any) -> Any:
                with Dataflow(model, by_hand=True) as dataflow:
                    output = graph(*inputs)
                key_counts.extend(dataflow.key_counts)
                return output

            return run

        return torch.compile(model, backend=watched)

    _run(model, entry, compiled)
    return len(graphs), sum(keys > 1 for keys in key_counts)


def _with_us(
    model: nn.Module, entry: Entry, trial: Trial, graphs: int, inductor: bool
) -> tuple[Trial, list[Tensor]]:
    """Return the trial with what the reports of all graphs that run say, and the outputs."""
    ran: list[Any] = []
    made = 0
    failures: list[str] = []

    def watched(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal made
        made += 1
        before = len(backend.compiled_reports)
        compiled = backend.lychee(graph, inputs, options=READ_ALL)
        reports = backend.compiled_reports[before:]

        def run(*inputs: Any) -> Any:
            ran.extend(reports)
            return compiled(*inputs)

        return run

    def warned(message: str, *args: Any, **_: Any) -> None:
        failures.append(message % args)

    with _compiler(inductor), patch.object(backend.logger, "warning", warned):
        output = _run(model, entry, lambda model: torch.compile(model, backend=watched))
    sites = [site for report in ran for site in report.sites]
    kept = Counter(str(site.reason) for site in sites if site.decision == "kept")
    rejected = Counter(str(each.reason) for report in ran for each in report.rejected)
    found = replace(
        trial,
        found=sum(site.kv_len != 1 for site in sites),
        rewritten=sum(site.decision != "kept" for site in sites),
        kept=dict(kept),
        rejected=dict(rejected),
        breaks=made - graphs,
        failure="; ".join(dict.fromkeys(failures)),
    )
    return found, output


def _compiler(inductor: bool) -> AbstractContextManager[Any]:
    """Return a context in which graphs are compiled by Inductor, or by AOTAutograd alone."""
    if inductor:
        return nullcontext()
    return patch.object(
        torch_private, "inductor", lambda gm, inputs, _mode, _patches: aot_eager(gm, list(inputs))
    )


def _unstable(model: nn.Module, entry: Entry, expected: list[Tensor]) -> str:
    """Return words if the outputs differ without us, too; empty if the difference is our own."""
    ways = {
        "uncompiled": lambda model: model,
        "with AOTAutograd alone": lambda model: torch.compile(model, backend="aot_eager"),
    }
    for way, compiled in ways.items():
        try:
            same = _error(expected, _run(model, entry, compiled)) <= TOLERANCE
        except Exception as error:  # noqa: BLE001
            return f"fails {way}: {_brief(error)}"
        if not same:
            return f"a second call {way} has other outputs"
    return ""


def _error(expected: list[Tensor], output: list[Tensor]) -> float:
    """Return the largest error, as a share of the largest value; infinity for other shapes."""
    if [each.shape for each in expected] != [each.shape for each in output]:
        return float("inf")
    return max((_error_of(*pair) for pair in zip(expected, output, strict=True)), default=0.0)


def _error_of(expected: Tensor, output: Tensor) -> float:
    if not expected.numel():
        return 0.0
    kind = torch.complex128 if expected.is_complex() else torch.float64
    expected, output = expected.to(kind), output.to(kind)
    same = (expected == output) | (expected.isnan() & output.isnan())
    difference = torch.where(same, 0, expected - output).abs().max()
    finite = expected[expected.isfinite()].abs()
    scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
    return difference.item() / scale if difference.isfinite() else float("inf")


def _brief(error: Exception) -> str:
    """Return the type of an error and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
