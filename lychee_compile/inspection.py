"""What the backend found in a model, and what it would do or did with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.fx

from lychee_compile import torch_private
from lychee_compile.backend import analyse, compiled_reports
from lychee_compile.options import Options
from lychee_compile.report.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Options | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Every attention in `model(*args, **kwargs)` and what the backend would make of it.

    Traces the call and runs it once, uncompiled, as it is: a cache among the arguments is written
    as any call would. `options` are those of the backend; without them, those that a module was
    compiled with. Raises `OptionError` for wrong ones.
    """
    if isinstance(options, Options):
        chosen = options
    elif options is None:
        chosen = Options.parse(**torch_private.options_compiled_with(model, "lychee"))
    else:
        chosen = Options.parse(None, options)
    found: list[Report] = []

    def inspect(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(analyse(gm, example_inputs, chosen).report)
        return gm.forward

    with torch_private.unlimited_recompiles():
        torch.compile(_unseen_call(), backend=inspect)(model, *args, **kwargs)
    sites = [site for report in found for site in report.sites]
    notes = [f"{len(found)} graphs: the model breaks the graph"] if len(found) > 1 else []
    notes += dict.fromkeys(note for report in found for note in report.notes)
    rejected = [each for report in found for each in report.rejected]
    return Report(sites, notes=notes, rejected=rejected)


def _call(self: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return self(*args, **kwargs)  # "self", as module paths begin there


def _unseen_call() -> FunctionType:
    """A copy of `_call` that Dynamo takes for another function.

    Dynamo keeps what it compiled, and the sizes it saw change, by the code that was called. So the
    model's own code neither runs into its recompile limit nor turns dynamic for being inspected.
    """
    name = f"{_call.__name__}_{next(_copies)}"
    return FunctionType(_call.__code__.replace(co_name=name), globals(), name)


_copies = itertools.count()


def reports() -> list[Report]:
    """A report of each graph that was compiled through the backend since the last reset."""
    return list(compiled_reports)
