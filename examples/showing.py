"""What the examples share: their options, and what they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.recorder import Call
from lychee_compile.report.report import Report


@dataclass(frozen=True)
class Decoded:
    """What a model generated without and with lychee."""

    dense: Tensor
    sparse: Tensor
    """Token ids, int64 [B, tokens] both."""
    calls: list[Call]
    """Every sparse attention, where it was recorded."""
    reports: list[Report]
    """Of each graph that was compiled."""

    @property
    def agreeing(self) -> int:
        """Tokens until the first that differs, least of all rows."""
        return int((self.dense == self.sparse).long().cumprod(1).sum(1).min())


@dataclass(frozen=True)
class Compared:
    """The output of a model that keeps no cache, beside that of the model as it is."""

    error: float
    """Largest difference to the uncompiled model."""
    relative_error: float
    """Norm of the difference, as a share of that of the uncompiled model's output."""
    same_bits: bool
    """Whether it equals what it is compared with to the bit."""
    report: Report
    """What became of its attentions."""


def compared(
    got: Tensor, expected: Tensor, report: Report, other: Tensor | None = None
) -> Compared:
    """The output `got` beside that of the uncompiled model; its bits beside those of `other`."""
    difference = got - expected
    return Compared(
        error=difference.abs().max().item(),
        relative_error=(difference.norm() / expected.norm()).item(),
        same_bits=torch.equal(got, expected if other is None else other),
        report=report,
    )


def options(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options that all examples have."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda (default: %(default)s)")
    return parser


def decoder_options(
    description: str | None, context: int = 2000, budget: int = 512
) -> argparse.ArgumentParser:
    """Those of an example that decodes."""
    parser = options(description)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--context", type=int, default=context, metavar="N", help=f"tokens of prompt {default}")
    add("--new-tokens", type=int, default=16, metavar="N", help=f"tokens to generate {default}")
    add("--budget", type=int, default=budget, metavar="N", help=f"tokens read per step {default}")
    add(
        "--reference",
        action="store_true",
        help="on a GPU run plain PyTorch operators, which tell what they read; kernels do not",
    )
    return parser


def whole_sequence_options(description: str | None) -> argparse.ArgumentParser:
    """Those of an example that keeps no cache, and may read whole sequences in part."""
    parser = options(description)
    add, default = parser.add_argument, "(default: %(default)s)"
    add(
        "--sparse",
        type=float,
        nargs="?",
        const=IndexConfig.prefill_budget,
        metavar="SHARE",
        help="128 queries read this share of the keys, 0.2 if none is given (default: all keys)",
    )
    add("--from", type=int, default=1024, dest="prefill_from", metavar="N",
        help=f"with --sparse, fewer keys are all read {default}")  # fmt: skip
    return parser


def backend_options(given: argparse.Namespace) -> dict[str, Any]:
    """Those of lychee for such an example."""
    if given.sparse is None:
        return {}
    sizes = {"prefill_budget": given.sparse, "prefill_from": given.prefill_from}
    return {"prefill": "sparse", **sizes}


def console() -> Console:
    """The terminal; wide enough for the tables where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def show_reports(screen: Console, reports: Sequence[Report]) -> None:
    """What became of each attention; graphs with the same table are shown once."""
    for report in {str(report): report for report in reports}.values():
        screen.print(report)
        screen.print()


def show_decoded(screen: Console, decoded: Decoded) -> None:
    """The report, the tokens, and what each step read."""
    show_reports(screen, decoded.reports)
    for name, tokens in (("dense", decoded.dense), ("lychee", decoded.sparse)):
        screen.print(f"{name:7}", *tokens[0].tolist())
    screen.print(f"The first {decoded.agreeing} of {decoded.dense.shape[1]} tokens are the same.\n")
    show_reading(screen, decoded.calls)


def show_reading(screen: Console, calls: Sequence[Call]) -> None:
    """For each sparse attention what a step read of its cache, mean over steps and heads."""
    if not calls:
        screen.print("No reading was recorded: on a GPU kernels tell none, --reference does.")
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("sparse attention")
    for name in ("steps", "tokens read", "in cache", "share of the softmax"):
        table.add_column(name, justify="right")
    for site in dict.fromkeys(call.site for call in calls):
        steps = [call for call in calls if call.site == site]
        table.add_row(
            site,
            str(len(steps)),
            f"{mean_read(steps):,.0f}",
            f"{fmean(call.kv_len for call in steps):,.0f}",
            f"{mean_mass(steps):.3f}",
        )
    screen.print(table)


def mean_read(calls: Sequence[Call]) -> float:
    """Tokens read, mean over calls and KV heads."""
    return fmean(call.tokens_read.float().mean().item() for call in calls)


def mean_mass(calls: Sequence[Call]) -> float:
    """Share of the softmax on the tokens read, mean over calls and query heads."""
    return fmean(call.mass.mean().item() for call in calls if call.mass is not None)
