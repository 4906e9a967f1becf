"""The backend that `torch.compile(model, backend="lychee")` calls with each graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor

from lychee_compile import torch_private
from lychee_compile.kernels.gpu.lifecycle import CacheUse
from lychee_compile.kernels.policies.registry import has_index
from lychee_compile.options import Options
from lychee_compile.passes.decide import Plan, Planner
from lychee_compile.passes.describe import describe_rejected
from lychee_compile.passes.detect.attention import Attention, Rejected
from lychee_compile.passes.detect.caches import CacheBinding
from lychee_compile.passes.detect.detect import find_attention
from lychee_compile.passes.graph.append import append_in_place
from lychee_compile.passes.graph.check import check_graph
from lychee_compile.passes.graph.dataflow import operator_name, value_of
from lychee_compile.passes.graph.host_integers import take_out_integers
from lychee_compile.passes.graph.normalise import normalise
from lychee_compile.passes.lower.kernel_support import runs_kernels
from lychee_compile.passes.rewrite import note_prefill, rewrite
from lychee_compile.passes.site import RejectedSite
from lychee_compile.report.report import Report
from lychee_compile.runtime.cache_registry import registry
from lychee_compile.runtime.stateful_graph import CacheArgument, StatefulGraph

logger = logging.getLogger(__name__)

compiled_reports: list[Report] = []
"""A report of each graph compiled since the last reset."""


class StrictError(RuntimeError):
    """An attention had to stay as it is, and `options={"strict": True}` forbids that."""


@dataclass(frozen=True)
class Analysis:
    """A graph, traced again, with a plan for each attention in it."""

    gm: torch.fx.GraphModule
    fakes: list[Any]
    mode: Any
    plans: list[Plan]
    rejected: list[RejectedSite]

    @property
    def report(self) -> Report:
        """What was found and decided."""
        return Report([plan.site for plan in self.plans], rejected=list(self.rejected))


def lychee(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's: sparse attention where it pays, Inductor for the rest.

    `mode` and `options` are those of `torch.compile`; see `Options`. Raises `OptionError` for
    options it does not know and `StrictError` where `strict` asks for it; whatever else goes wrong
    here, the graph goes to Inductor as it came, with a warning.
    """
    chosen = Options.parse(mode, options)
    try:
        analysis = analyse(gm, example_inputs, chosen)
        _announce(analysis.report, chosen)
    except StrictError:
        raise
    except Exception as error:  # noqa: BLE001  whatever it is, the model must run
        return _leave_to_inductor(gm, example_inputs, chosen, error)
    try:
        compiled = _compile_rewritten(analysis, chosen)
    except torch_private.RestartAnalysis:  # Dynamo comes again with a graph that is less general
        _take_back(analysis.report)
        raise
    except Exception as error:  # noqa: BLE001
        _count_as_kept(analysis.plans, error)
        return _leave_to_inductor(gm, example_inputs, chosen, error)
    if compiled is not None:
        return compiled
    return torch_private.inductor(gm, example_inputs, chosen.mode, dict(chosen.inductor))


def reset() -> None:
    """Forget every index and report. `torch.compiler.reset()` calls this."""
    registry.clear()
    compiled_reports.clear()


lychee.reset = reset  # type: ignore[attr-defined]


def analyse(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Analysis:
    """Find the attentions of a graph and decide about each; `gm` stays as it is."""
    mode, fakes = torch_private.fake_inputs(example_inputs)
    traced = torch_private.retrace(gm, fakes, mode)
    written = normalise(traced, mode)
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    needs_gradients = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    found = find_attention(traced, written)
    planner = Planner(
        traced.graph,
        mode,
        options.index_config(),
        needs_gradients,
        autotune="max-autotune" in (options.mode or ""),
    )
    plans = [planner.plan(each) for each in found if not isinstance(each, Rejected)]
    rejected = [describe_rejected(each) for each in found if isinstance(each, Rejected)]
    return Analysis(traced, fakes, mode, plans, rejected)


def _compile_rewritten(analysis: Analysis, options: Options) -> Callable[..., Any] | None:
    """Rewrite and compile; None where nothing in the graph is ours to change."""
    gm, plans = analysis.gm, analysis.plans
    table = options.boundary_table()
    outputs = _output_count(gm)
    inputs = _StateInputs(analysis)
    decodes_later = options.budget is not None and has_index(options.policy)
    if table is not None and decodes_later and not _any_decodes(plans):
        note_prefill(gm, _worth_noting(plans, options), inputs, analysis.mode)
    for failure in rewrite(gm, plans, inputs, analysis.mode):
        _keep(failure.plan, f"it could not be rewritten: {failure.reason}")
    if not inputs.states and all(plan.site.decision == "kept" for plan in plans):
        return None
    append_in_place(gm, analysis.mode)
    check_graph(gm, outputs)
    logger.debug("rewritten graph:\n%s", gm.graph)
    examples, taken = [*analysis.fakes, *inputs.fakes], take_out_integers(gm)
    if taken is not None:
        examples = [examples[place] for place in taken.kept]
    compiled = torch_private.inductor(gm, examples, options.mode, dict(options.inductor))
    if taken is not None:
        compiled = taken.around(compiled)
    if not inputs.states:
        return compiled
    lookup = None if table is None else table.lookup
    return StatefulGraph(compiled, inputs.states, options.index_config(), lookup)


def _worth_noting(plans: Sequence[Plan], options: Options) -> list[Plan]:
    """Prefills whose tokens an index will want to know: one by slot asks for none."""
    return [
        plan
        for plan in plans
        if (plan.site.by_design or plan.whole is not None)
        and isinstance(plan.attention, Attention)
        and not runs_kernels(plan.attention, options)
    ]


def _any_decodes(plans: Sequence[Plan]) -> bool:
    """Whether an attention reads sparsely through an index, which it updates itself."""
    return any(plan.site.decision == "sparse" and plan.whole is None for plan in plans)


class _StateInputs:
    """Adds one graph input per key cache, in the order in which they are asked for."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._placeholders = [node for node in analysis.gm.graph.nodes if node.op == "placeholder"]
        self._nodes: dict[object, torch.fx.Node] = {}
        self.states: list[CacheArgument] = []
        self.fakes: list[Tensor] = []

    def __call__(self, binding: CacheBinding, slots: CacheUse | None) -> torch.fx.Node:
        known = binding if slots is None else (binding.source, binding.output, slots.layout)
        if known not in self._nodes:
            source = binding.source
            place = None if source is None else self._placeholders.index(source)
            self.states.append(CacheArgument(place, binding.output, binding.token_dim, slots))
            self._nodes[known] = self._added(binding, slots)
        return self._nodes[known]

    def _added(self, binding: CacheBinding, slots: CacheUse | None) -> torch.fx.Node:
        """A new input: the memory of an index, or a handle, int64 [2]."""
        gm, mode = self._analysis.gm, self._analysis.mode
        name = f"lychee_index_{len(self.fakes)}"
        if slots is None or slots.layout is None:
            size, dtype, device = 2, torch.int64, torch.device("cpu")
        else:
            size, dtype, device = slots.layout.size, torch.uint8, value_of(binding.key).device
        node, fake = torch_private.add_state_input(gm, name, size, dtype, device, mode)
        self.fakes.append(fake)
        return node


def _output_count(gm: torch.fx.GraphModule) -> int:
    outputs = next(node for node in reversed(gm.graph.nodes) if node.op == "output").args[0]
    return len(outputs) if isinstance(outputs, (tuple, list)) else 1


def _announce(report: Report, options: Options) -> None:
    """Log and count what was decided; raise where `strict` forbids it."""
    compiled_reports.append(report)
    torch_private.count("found", len(report.sites))
    for site in report.sites:
        torch_private.count(site.decision, 1)
    if not report.sites:
        logger.info("no attention in this graph: compiled by Inductor alone")
        return
    logger.info("%d attentions: %s", len(report.sites), report.counts())
    logger.debug("%s", report)
    torch_private.trace_artifact("lychee_report", report.to_dict())
    unsupported = [s for s in report.sites if s.decision == "kept" and not s.by_design]
    if options.strict and unsupported:
        lines = "\n".join(f"  {site.name} ({site.source}): {site.reason}" for site in unsupported)
        raise StrictError(
            f"{len(unsupported)} attentions would stay as they are, and options['strict'] forbids "
            f"it:\n{lines}"
        )


def _take_back(report: Report) -> None:
    """Undo what `_announce` counted and kept: the graph will be compiled anew."""
    compiled_reports.pop()
    for decision, count in report.counts().items():
        torch_private.count(decision, -count)


def _count_as_kept(plans: Sequence[Plan], error: Exception) -> None:
    for plan in plans:
        if plan.site.decision != "kept":
            _keep(plan, f"the rewrite failed: {_brief(error)}")


def _keep(plan: Plan, reason: str) -> None:
    """Take back the decision to rewrite an attention."""
    torch_private.count(plan.site.decision, -1)
    torch_private.count("kept", 1)
    plan.site.decision, plan.site.reason = "kept", reason
    plan.site.kernel = operator_name(plan.node)


def _brief(error: Exception) -> str:
    """The first line: FX appends whole graphs to its messages."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _leave_to_inductor(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options, error: Exception
) -> Callable[..., Any]:
    if options.strict:
        raise StrictError(f"the graph could not be analysed or rewritten: {error}") from error
    logger.warning(
        "a graph goes to Inductor unchanged, because lychee failed on it: %s: %s",
        type(error).__name__,
        _brief(error),
        exc_info=logger.isEnabledFor(logging.DEBUG),
    )
    return torch_private.inductor(gm, example_inputs, options.mode, dict(options.inductor))
