"""Reports on a model: what the backend finds in it, and what it would do or did with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.fx

from lychee_compile import torch_private
from lychee_compile.backend import compiled_reports, report_of
from lychee_compile.options import Options
from lychee_compile.passes.pipeline import REWRITING, Compilation, analyse, run
from lychee_compile.report.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Options | Mapping[str, Any] | None = None,
    kernels: bool = False,
    **kwargs: Any,
) -> Report:
    """Return a report of every attention in `model(*args, **kwargs)` and what would become of it.

    Traces the call and runs it once, uncompiled. So a cache among the arguments is written as by
    any call. No file is written, and no kernel of this package runs: what is told is what was
    decided. A kernel that cannot be generated, or does not run on the device, shows only later.

    With `kernels=True` the rest is done as when compiling, on a copy of each graph: kernels are
    generated, stored in the kernel folder ($LYCHEE_CACHE_DIR) and run once on zeros. The report
    then names them and has their source, and an attention whose kernel fails has the reason.

    `options` are those of the backend; without them, those that a module was compiled with. Raises
    `OptionError` for wrong ones.
    """
    if isinstance(options, Options):
        chosen = options
    elif options is None:
        chosen = Options.parse(**torch_private.options_compiled_with(model, "lychee"))
    else:
        chosen = Options.parse(None, options)
    graphs: list[Compilation] = []

    def inspect(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = analyse(gm, example_inputs, chosen)
        if kernels:
            run(REWRITING, graph)
        graphs.append(graph)
        return gm.forward

    with torch_private.unlimited_recompiles():
        # A compiled model would take what follows a graph break to its own backend.
        called = torch_private.uncompiled(model)
        torch.compile(_unseen_call(), backend=inspect)(called, *args, **kwargs)
    return _joined(graphs)


def _joined(graphs: Sequence[Compilation]) -> Report:
    """Return one report of all graphs of a call."""
    reports_of_graphs = list(map(report_of, graphs))
    notes = [note for report in reports_of_graphs for note in report.notes]
    if len(graphs) > 1:
        notes.insert(0, f"{len(graphs)} graphs: the model breaks the graph")
    if any(graph.awaits_kernels for graph in graphs):
        notes.append("kernels were not generated: explain(..., kernels=True) does and tries them")
    return Report(
        [site for report in reports_of_graphs for site in report.sites],
        notes=list(dict.fromkeys(notes)),
        rejected=[each for report in reports_of_graphs for each in report.rejected],
    )


def _call(self: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return self(*args, **kwargs)  # "self", as module paths begin there


def _unseen_call() -> FunctionType:
    """Return a copy of `_call` that Dynamo takes for another function.

    Dynamo keeps what it compiled by the code that was called, and also the sizes it saw change.
    With a copy, inspecting a model neither uses up its recompile limit nor makes sizes dynamic.
    """
    name = f"{_call.__name__}_{next(_copies)}"
    return FunctionType(_call.__code__.replace(co_name=name), globals(), name)


_copies = itertools.count()


def reports() -> list[Report]:
    """Return a report of each graph that the backend has compiled since the last reset."""
    return list(compiled_reports)
