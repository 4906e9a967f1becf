"""What the backend found in a model, and what it would do or did with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from lychee_compile.backend import analyse, compiled_reports
from lychee_compile.options import Options
from lychee_compile.passes import torch_private
from lychee_compile.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Options | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Every attention in `model(*args, **kwargs)` and what the backend would make of it.

    Traces the call and runs it once, uncompiled, as it is: a cache among the arguments is written
    as any call would. `options` are those of the backend. Raises `OptionError` for wrong ones.
    """
    chosen = options if isinstance(options, Options) else Options.parse(None, options)
    found: list[Report] = []

    def inspect(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(analyse(gm, example_inputs, chosen).report)
        return gm.forward

    with torch_private.unlimited_recompiles():
        torch.compile(model, backend=inspect)(*args, **kwargs)
    sites = [site for report in found for site in report.sites]
    notes = [f"{len(found)} graphs: the model breaks the graph"] if len(found) > 1 else []
    return Report(sites, notes=notes)


def reports() -> list[Report]:
    """A report of each graph that was compiled through the backend since the last reset."""
    return list(compiled_reports)
