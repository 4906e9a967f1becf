"""The passes over one graph, in their order. `PASSES` is the list to read.

`TORCH_LOGS="+lychee_compile"` logs the graph before and after each pass that changes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import Tensor

from lychee_compile import torch_private
from lychee_compile.kernels.policies.registry import has_index
from lychee_compile.options import Options
from lychee_compile.passes.absorb.absorb import absorb
from lychee_compile.passes.decide import Plan, decide
from lychee_compile.passes.detect.attention import Attention, Rejected, Unread
from lychee_compile.passes.detect.caching.parts import separate_parts
from lychee_compile.passes.detect.detect import find_attention
from lychee_compile.passes.graph.append import append_in_place, settled
from lychee_compile.passes.graph.check import check_graph, output_count
from lychee_compile.passes.graph.host_integers import HostIntegers, take_out_integers
from lychee_compile.passes.graph.normalise import normalise
from lychee_compile.passes.layer_numbers import ATTRIBUTES
from lychee_compile.passes.lower.context import LoweringContext
from lychee_compile.passes.lower.kernel_support import runs_kernels
from lychee_compile.passes.outcomes import (
    Generated,
    KeepAsIs,
    OneSdpa,
    PrefillKernels,
    PrefillReference,
    ReferenceSparse,
    SparseDecodeKernel,
)
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.rewrite import note_prefill, rewrite
from lychee_compile.torch_private import FakeTensorMode

logger = logging.getLogger(__name__)


@dataclass
class Compilation:
    """One graph on its way through the passes, and what they found."""

    gm: torch.fx.GraphModule
    """The graph, traced again: what Dynamo gave stays as it is."""
    fakes: list[Any]
    """Fake inputs to compile `gm` with, one for each of Dynamo's."""
    options: Options
    needs_gradients: bool
    context: LoweringContext
    outputs: int
    """Number of outputs."""
    written: frozenset[torch.fx.Node] = frozenset()
    """Tensors made in the graph that are written later, and keep no value."""
    attentions: list[Attention | Unread] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    appends: bool = False
    """True if caches keep room behind them, so that their strides are known at a call only."""
    integers: HostIntegers | None = None
    """Integers that are left to the host; None if there are none."""

    @property
    def mode(self) -> FakeTensorMode:
        """The fake mode of the graph's values."""
        return self.context.emit.mode

    @property
    def is_changed(self) -> bool:
        """True if anything of this backend was put into the graph."""
        kept = all(isinstance(plan.outcome, KeepAsIs) for plan in self.plans)
        return bool(self.context.index_inputs.added) or not kept

    @property
    def awaits_kernels(self) -> bool:
        """True if a kernel was decided on that is not generated yet."""
        outcomes = [plan.outcome for plan in self.plans]
        return any(isinstance(each, Generated) and not each.module for each in outcomes)

    def keep_all(self, reason: Reason) -> None:
        """Plan to leave every attention as it is, since the graph could not be rewritten."""
        self.plans = [
            plan if isinstance(plan.outcome, KeepAsIs) else plan.kept(reason) for plan in self.plans
        ]


def _normalise(compilation: Compilation) -> None:
    compilation.written = normalise(compilation.gm, compilation.mode)
    separate_parts(compilation.gm.graph)


def _detect(compilation: Compilation) -> None:
    for each in find_attention(compilation.gm, compilation.written):
        if isinstance(each, Rejected):
            compilation.rejected.append(each)
        else:
            compilation.attentions.append(each)


def _decide(compilation: Compilation) -> None:
    compilation.plans = _plans(compilation, compilation.gm.graph, compilation.attentions)


def _plans(
    compilation: Compilation, graph: torch.fx.Graph, attentions: Sequence[Attention | Unread]
) -> list[Plan]:
    return decide(
        graph,
        attentions,
        compilation.context.config,
        compilation.needs_gradients,
        frozenset(torch_private.guarded_integers(ATTRIBUTES)),
    )


def _absorb(compilation: Compilation) -> None:
    """Attend over latents in the place of projected keys if that is sparse, and decide again."""

    def judge(gm: torch.fx.GraphModule, written: frozenset[torch.fx.Node]) -> list[Plan]:
        found = find_attention(gm, written)
        attentions = [each for each in found if not isinstance(each, Rejected)]
        return _plans(compilation, gm.graph, attentions)

    gm, mode, plans = compilation.gm, compilation.mode, compilation.plans
    if absorb(gm, mode, plans, compilation.written, judge):
        compilation.attentions, compilation.rejected = [], []
        _detect(compilation)
        _decide(compilation)


def _note_prefill(compilation: Compilation) -> None:
    """Note the tokens of a prefill if token boundaries are known and later steps read an index."""
    options = compilation.options
    decodes_later = options.budget is not None and has_index(options.policy)
    outcomes = [plan.outcome for plan in compilation.plans]
    decodes_now = any(isinstance(each, ReferenceSparse | SparseDecodeKernel) for each in outcomes)
    if options.boundary_table() is not None and decodes_later and not decodes_now:
        worth_noting = [plan for plan in compilation.plans if _is_noted(plan, options)]
        note_prefill(worth_noting, compilation.context)


def _is_noted(plan: Plan, options: Options) -> bool:
    """True for a prefill whose tokens an index will want to know: a GPU index wants none."""
    outcome = plan.outcome
    prefill = isinstance(outcome, OneSdpa | PrefillReference | PrefillKernels)
    prefill = prefill or (isinstance(outcome, KeepAsIs) and outcome.by_design)
    attention = plan.attention
    return prefill and isinstance(attention, Attention) and not runs_kernels(attention, options)


def _rewrite(compilation: Compilation) -> None:
    compilation.plans = rewrite(compilation.gm, compilation.plans, compilation.context)


def _append_in_place(compilation: Compilation) -> None:
    gm, mode, fakes = compilation.gm, compilation.mode, compilation.fakes
    compilation.appends = append_in_place(gm, mode, fakes)


def _check_graph(compilation: Compilation) -> None:
    check_graph(compilation.gm, compilation.outputs)


def _take_out_integers(compilation: Compilation) -> None:
    compilation.integers = take_out_integers(compilation.gm)


Pass = Callable[[Compilation], None]
"""A step of the pipeline; its name in logs is that of the function."""
ANALYSIS: tuple[Pass, ...] = (_normalise, _detect, _decide, _absorb)
"""Passes that find attentions and decide about each. They write no file and launch no kernel."""
REWRITING: tuple[Pass, ...] = (_note_prefill, _rewrite)
"""Passes that do what was decided. They generate kernels, store them and run each once."""
FINISHING: tuple[Pass, ...] = (_append_in_place, _check_graph, _take_out_integers)
"""Passes that prepare a graph for Inductor if it was changed."""
PASSES = (*ANALYSIS, *REWRITING, *FINISHING)


def begin(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Compilation:
    """Trace a graph of Dynamo's again to pre-dispatch ATen, for the passes to work on."""
    mode, fakes = torch_private.fake_inputs(example_inputs)
    traced = torch_private.retrace(gm, settled(gm, fakes, mode), mode)
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    autotune = "max-autotune" in (options.mode or "")
    return Compilation(
        gm=traced,
        fakes=fakes,
        options=options,
        needs_gradients=torch.is_grad_enabled() and any(each.requires_grad for each in tensors),
        context=LoweringContext(traced, mode, options.index_config(), autotune),
        outputs=output_count(traced),
    )


def name_of(step: Pass) -> str:
    """Return the name of a pass."""
    return step.__name__.removeprefix("_")


def run(passes: Sequence[Pass], compilation: Compilation) -> None:
    """Run `passes` one after the other, and log what each makes of the graph."""
    for each in passes:
        verbose = logger.isEnabledFor(logging.DEBUG)
        before = str(compilation.gm.graph) if verbose else ""
        each(compilation)
        after = str(compilation.gm.graph) if verbose else ""
        if before != after:
            logger.debug("graph before %s:\n%s", name_of(each), before)
            logger.debug("graph after %s:\n%s", name_of(each), after)


def analyse(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Compilation:
    """Find the attentions of a graph and decide about each; `gm` stays as it is."""
    compilation = begin(gm, example_inputs, options)
    run(ANALYSIS, compilation)
    return compilation
