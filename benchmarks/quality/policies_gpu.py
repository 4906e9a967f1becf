"""Error against microseconds of every policy that has kernels, on the tensors of a real model.

    python -m lychee_compile evaluate fidelity --model DIR --save-captures --out results
    python -m benchmarks.quality.policies_gpu CAPTURE ... [--budgets 256 1024] [--plot PATH]

The kernels of each policy attend from the last queries of a capture to its keys, layer by layer.
The error is that of the output against float64 attention over all keys, by norm, the mean over
layers and queries. A policy is left out at budgets that it cannot have. The time is that of one
attention, choosing included, in a CUDA graph that takes the layers in turn. Dense attention is the
fastest that PyTorch has. "lychee-flat", "lychee-pages" and "lychee-chunks" are ways in which lychee
looks for tokens, whatever the context. `--device cpu` tries the benchmark out, by the clock, after
`TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.common.decode_kernels import (
    LYCHEE_WAYS,
    decode_module,
    sketch_layout,
    sparse_spec,
    way_spec,
)
from benchmarks.common.lengths import length_name, positive, tokens
from benchmarks.common.provenance import provenance
from benchmarks.common.timing import time_calls
from lychee_compile.evaluate.tensors import Capture, SiteTensors
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.methods import gpu_method, policies_with_kernels
from lychee_compile.options import OptionError, Options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE = "dense"
MARKERS = "osD^vP*Xhd<>"


@dataclass(frozen=True)
class Point:
    """One policy at one budget, over one capture."""

    policy: str
    budget: int
    """Tokens read, at most; of dense attention all."""
    context: int
    """Number of keys of the capture."""
    error: float
    """Error of the output, relative to its norm."""
    microseconds: float
    """Time of one attention."""


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = _parser().parse_args(arguments)
    console, points = Console(width=120), []
    device = torch.device(chosen.device)
    for path in chosen.captures:
        capture = Capture.load(path, device)
        points += measure(capture, chosen)
    console.print(table(points))
    record = provenance("benchmarks.quality.policies_gpu", arguments, device)
    if chosen.json:
        chosen.json.write_text(json.dumps({**record, "points": [asdict(each) for each in points]}))
    if chosen.plot:
        draw(points).savefig(chosen.plot, dpi=130)
    return 0


def measure(capture: Capture, chosen: argparse.Namespace) -> list[Point]:
    """Return the points of all policies and budgets over one capture."""
    context = capture.sites[0].key.shape[2]
    layers = [_Layer(site, capture.positions, chosen) for site in capture.sites]
    cases = [(DENSE, context)]
    cases += [each for each in itertools.product(chosen.policies, chosen.budgets) if _fits(*each)]
    points = []
    for policy, budget in track(cases, f"{length_name(context)} keys", disable=chosen.quiet):
        calls = [layer.calls(policy, budget) for layer in layers]
        outputs = [[call() for call in of_layer] for of_layer in calls]
        errors = [layer.error(each) for layer, each in zip(layers, outputs, strict=True)]
        newest = [of_layer[-1] for of_layer in calls]
        timing, _ = time_calls(newest, layers[0].query.device, chosen.seconds)
        error = sum(errors) / len(errors)
        points.append(Point(policy, budget, context, error, timing.microseconds))
    return points


def _fits(policy: str, budget: int) -> bool:
    """Return True if the policy can have this budget."""
    try:
        Options(policy=_policy(policy), budget=budget)
    except OptionError:
        return False
    return True


def _policy(name: str) -> str:
    """Return the policy of a line of the table: that of `LYCHEE_WAYS` is "lychee"."""
    return "lychee" if name in LYCHEE_WAYS else name


class _Layer:
    """The last queries of one attention, and all of its keys and values."""

    def __init__(self, site: SiteTensors, positions: Tensor, chosen: argparse.Namespace) -> None:
        if site.softcap is not None or abs(site.scale * site.key.shape[3] ** 0.5 - 1) > 1e-6:
            raise SystemExit(f"{site.name}: only scores of 1 / sqrt(head_dim) are measured here")
        dtype = getattr(torch, chosen.dtype)
        self.positions = positions[-chosen.queries :].to(site.key.device)
        self.query = site.query[:, :, -chosen.queries :].to(dtype)
        self.key, self.value = site.key.to(dtype).contiguous(), site.value.to(dtype).contiguous()
        self.ends = [int(position) + 1 for position in self.positions]
        self.truth = [self._attend(number, torch.float64) for number in range(len(self.positions))]

    def calls(self, policy: str, budget: int) -> list[Callable[[], Tensor]]:
        """Return one call for each query: attention by the kernels of `policy`, or by PyTorch."""
        numbers = range(len(self.positions))
        if policy == DENSE:
            return [functools.partial(self._attend, number) for number in numbers]
        is_way = policy in LYCHEE_WAYS
        sparse = way_spec(policy, budget) if is_way else sparse_spec(policy, budget)
        module = decode_module(self.query[:, :, :1], self.key, self.value, sparse)
        method = gpu_method(_policy(policy))
        layout = sketch_layout(self.key, policy) if is_way else method.layout_of(self.key)
        index = method.new_index(layout, self.key.device)
        index.build(module, self.key, [self.key.shape[2]])
        used = IndexOperands(index.layout, index.parts)
        return [
            functools.partial(method.run, module, self._operands(number), used)
            for number in numbers
        ]

    def error(self, outputs: Iterable[Tensor]) -> float:
        """Return the mean over queries of the relative error of outputs [1, Hq, 1, Dv]."""
        errors = [
            float((output.double() - truth).norm() / truth.norm())
            for output, truth in zip(outputs, self.truth, strict=True)
        ]
        return sum(errors) / len(errors)

    def _operands(self, number: int) -> AttentionOperands:
        query = self.query[:, :, number : number + 1].contiguous()
        return AttentionOperands(query, self.key, self.value, [self.positions[number]])

    def _attend(self, number: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return attention from one query to all keys that it sees, by PyTorch."""
        end = self.ends[number]
        each = (self.query[:, :, number : number + 1], self.key[:, :, :end], self.value[:, :, :end])
        query, key, value = (tensor.to(dtype or tensor.dtype) for tensor in each)
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def table(points: Sequence[Point]) -> Table:
    """Return a table of all points, a line each."""
    shown = Table("keys", "policy", "budget", "error", "µs", title="Error and time of a step")
    for point in points:
        budget = "all" if point.policy == DENSE else f"{point.budget:,}"
        context = length_name(point.context)
        shown.add_row(
            context, point.policy, budget, f"{point.error:.4f}", f"{point.microseconds:.1f}"
        )
    return shown


def draw(points: Sequence[Point]) -> Figure:
    """Return a figure with a panel for each context: error against time, a line for each policy."""
    from matplotlib.figure import Figure

    contexts = sorted({point.context for point in points})
    figure = Figure(figsize=(6.0 * len(contexts), 4.6), layout="constrained")
    panels = figure.subplots(1, len(contexts), squeeze=False, sharey=True)[0]
    policies = list(dict.fromkeys(point.policy for point in points))
    for panel, context in zip(panels, contexts, strict=True):
        for number, policy in enumerate(policies):
            mine = [each for each in points if (each.policy, each.context) == (policy, context)]
            times, errors = [p.microseconds for p in mine], [max(p.error, 1e-4) for p in mine]
            marker = MARKERS[number % len(MARKERS)]
            panel.plot(times, errors, marker=marker, label=policy, color=f"C{number % 10}")
        panel.set(xscale="log", yscale="log", xlabel="one decode attention, µs")
        panel.set_title(f"{length_name(context)} keys", fontsize="medium")
    panels[0].set_ylabel("error of the output, relative")
    panels[0].legend(fontsize="small")
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add, names = parser.add_argument, policies_with_kernels()
    add("captures", type=Path, nargs="+", metavar="CAPTURE")
    add(
        "--policies",
        nargs="+",
        choices=(*names, *LYCHEE_WAYS),
        default=names,
        metavar="NAME",
        help="all but the ways of lychee by default",
    )
    add("--budgets", type=tokens, nargs="+", default=[256, 512, 1024, 2048], metavar="N")
    add("--queries", type=positive, default=8, metavar="N", help="last queries; 8 by default")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--device", default="cuda", help="cuda by default")
    add("--seconds", type=float, default=0.1, help="replays of one measurement; 0.1 by default")
    add("--json", type=Path, metavar="PATH", help="where the points go")
    add("--plot", type=Path, metavar="PATH", help="where the picture goes")
    add("--quiet", action="store_true", help="show no progress")
    return parser


if __name__ == "__main__":
    sys.exit(main())
