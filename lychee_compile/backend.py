"""The backend that `torch.compile(model, backend="lychee")` calls with each graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from lychee_compile import torch_private
from lychee_compile.option_devices import OptionDevice, without_effect
from lychee_compile.options import Options
from lychee_compile.passes import reasons
from lychee_compile.passes.decide import Plan
from lychee_compile.passes.describe import describe_rejected
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.dataflow import value_of
from lychee_compile.passes.lower.kernel_support import runs_kernels
from lychee_compile.passes.pipeline import FINISHING, REWRITING, Compilation, analyse, run
from lychee_compile.report.grouping import reason_lines
from lychee_compile.report.report import Report
from lychee_compile.runtime.cache_registry import registry
from lychee_compile.runtime.host_caches import Inputs, inputs_of_keys, told_of_host_caches
from lychee_compile.runtime.stateful_graph import StatefulGraph

logger = logging.getLogger(__name__)

compiled_reports: list[Report] = []
"""Reports of the graphs compiled since the last reset, one for each."""


class StrictError(RuntimeError):
    """An attention had to stay as it is, and `options={"strict": True}` forbids that."""


def lychee(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's: sparse attention where it pays, Inductor for the rest.

    `mode` and `options` are those of `torch.compile`; see `Options`. Raises `OptionError` for
    options that do not exist, and `StrictError` if `strict` asks for it. If anything else goes
    wrong here, the graph goes to Inductor as it came, with a warning.
    """
    chosen = Options.parse(mode, options)
    compilation = None
    keys: list[Inputs] = []
    try:
        compilation = analyse(gm, example_inputs, chosen)
        keys = inputs_of_keys(compilation.plans, compilation.gm.graph)
        run(REWRITING, compilation)
        _announce(report_of(compilation))
        _refuse_if_strict(compilation)
        compiled = _compile_rewritten(compilation) if compilation.is_changed else None
    except (StrictError, torch_private.RestartAnalysis):
        raise  # at a restart Dynamo comes again with a graph that is less general
    except Exception as error:  # noqa: BLE001  whatever it is, the model must run
        compiled = None
        _leave_unchanged(compilation, chosen, error)
    if compiled is None:
        compiled = torch_private.inductor(gm, example_inputs, chosen.mode, dict(chosen.inductor))
    if compilation is not None:
        report = _record(compilation)
        if report is not None and isinstance(compiled, StatefulGraph):
            compiled.new_caches.tell = report.notes.append
        compiled = told_of_host_caches(compiled, compilation.plans, keys)
    return compiled


def reset() -> None:
    """Forget every index and report. `torch.compiler.reset()` calls this."""
    registry.clear()
    compiled_reports.clear()


lychee.reset = reset  # type: ignore[attr-defined]


def report_of(compilation: Compilation) -> Report:
    """Return a new report of what was found in a graph and decided, or done by now."""
    plans, options = compilation.plans, compilation.options
    devices = set().union(*(_option_devices(plan, options) for plan in plans))
    return Report(
        [plan.site for plan in plans],
        notes=list(without_effect(options, devices)),
        rejected=[describe_rejected(each) for each in compilation.rejected],
    )


def _option_devices(plan: Plan, options: Options) -> set[OptionDevice]:
    """Return the kinds of devices whose options an attention uses; none if it was not read."""
    if not isinstance(plan.attention, Attention):
        return set()
    if runs_kernels(plan.attention, options):
        return {"cuda"}
    on_cpu = value_of(plan.attention.query.node).device.type == "cpu"
    return {"cpu"} if on_cpu else {"cpu", "cuda"}


def _compile_rewritten(compilation: Compilation) -> Callable[..., Any]:
    """Compile a graph that was changed, and give it the indexes of its caches at each call."""
    run(FINISHING, compilation)
    options, integers = compilation.options, compilation.integers
    indexes = compilation.context.index_inputs.added
    examples = [*compilation.fakes, *(each.fake for each in indexes)]
    if integers is not None:
        examples = [examples[position] for position in integers.kept]
    patches = dict(options.inductor)
    if compilation.appends:
        patches.setdefault("size_asserts", False)
    compiled = torch_private.inductor(compilation.gm, examples, options.mode, patches)
    if integers is not None:
        compiled = integers.around(compiled)
    if not indexes:
        return compiled
    table = options.boundary_table()
    arguments = [each.cache for each in indexes]
    lookup = None if table is None else table.lookup
    return StatefulGraph(compiled, arguments, compilation.context.config, lookup)


def _announce(report: Report) -> None:
    """Log what becomes of the attentions of a graph, before it is compiled."""
    for note in report.notes:
        logger.info("%s", note)
    if not report.sites:
        logger.info("no attention in this graph: compiled by Inductor alone")
        return
    logger.info("%d attentions: %s", len(report.sites), report.counts())
    logger.debug("%s", report)
    torch_private.trace_artifact("lychee_report", report.to_dict())
    for line in reason_lines(report.unsupported()):
        logger.info("kept: %s", line)


def _refuse_if_strict(compilation: Compilation) -> None:
    """Raise `StrictError` if `strict` forbids that an attention stays as it is."""
    report = report_of(compilation)
    unsupported = report.unsupported()
    if compilation.options.strict and unsupported:
        _record(compilation)
        lines = "\n".join(f"  {line}" for line in reason_lines(unsupported))
        raise StrictError(
            f"options['strict'] is set, but some attention ({len(unsupported)} of "
            f"{len(report.sites)}) would stay as it is:\n{lines}"
        )


def _leave_unchanged(compilation: Compilation | None, options: Options, error: Exception) -> None:
    """Plan to leave all attentions of a graph as they are, and say why.

    Raises `StrictError` if `strict` forbids it.
    """
    brief = reasons.brief(error)
    if compilation is not None:
        compilation.keep_all(reasons.REWRITE_FAILED(error=brief))
    if options.strict:
        if compilation is not None:
            _record(compilation)
        raise StrictError(f"the graph could not be analysed or rewritten: {error}") from error
    logger.warning(
        "a graph goes to Inductor unchanged, because lychee failed on it: %s",
        brief,
        exc_info=logger.isEnabledFor(logging.DEBUG),
    )


def _record(compilation: Compilation) -> Report | None:
    """Keep and return the report of a graph, and count what became of its attentions.

    A graph that cannot be reported on is compiled all the same, with a warning.
    """
    try:
        report = report_of(compilation)
    except Exception:  # whatever it is, the model must run
        logger.warning("there is no report of a graph, because lychee failed on it", exc_info=True)
        return None
    compiled_reports.append(report)
    torch_private.count("found", len(report.sites))
    for site in report.sites:
        torch_private.count(site.decision, 1)
    return report
