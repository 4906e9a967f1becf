"""Time and error of the causal attention of a prefill on a GPU, against PyTorch's best.

    python -m benchmarks.prefill.gpu --tensors FILE [--contexts 8k 32k 128k] [--shares 0.05 0.1 0.2]
        [--policies lychee s2o compact dhsa streaming] [--json PATH] [--breakdown] [--tune]

Llama-3.1-8B's attention, 32 query heads and 8 KV heads of 128, on queries and keys of a real model
(`benchmarks.prefill.tensors` writes the file); batch 1, bfloat16. It is compared with SDPA's flash
kernel, and with FlexAttention over as many pairs as lychee reads, in the blocks of 128 x 128 that
hold most by lychee's own estimate. `--policies` adds others. Times are medians of calls, choosing
included; GiB is the peak of memory that a call takes. Errors, relative to float64 attention over
all keys, are means over sampled queries of every head. Without a file tensors are random, and
errors mean nothing. `--device cpu --contexts 512` tries it out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.lengths import length_name, tokens
from benchmarks.common.provenance import device_name, provenance, write_json
from benchmarks.common.terminal import make_console
from benchmarks.common.timing import milliseconds
from benchmarks.prefill.flex import flex_attention
from benchmarks.prefill.ours import (
    attention,
    breakdown,
    kernels,
    read_by_tiles,
    share_listed,
    table_of_tunings,
)
from benchmarks.prefill.tensors import extended, random_tensors, read_tensors
from benchmarks.prefill.truth import dense_at, error_at
from lychee_compile.kernels.policies.registry import prefill_policy_names

SAMPLED = 32
"""Number of queries of each head whose error is measured, spread over the sequence."""


@dataclass(frozen=True)
class Result:
    """Figures of one way of attention at one length."""

    way: str
    context: int
    milliseconds: float
    speedup: float
    """Times faster than SDPA's flash kernel in the same run."""
    error: float
    """Mean of |o - o_dense| / |o_dense| over sampled queries."""
    pairs: float
    """Share of the pairs of a query and a visible key that is computed."""
    parts: dict[str, float] | None = None
    """Milliseconds of each kernel, by its name."""
    memory: float = 0.0
    """Gigabytes that a call takes at most beyond its operands; 0 if not measured."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parse(arguments)
    device, console = torch.device(chosen.device), make_console()
    tensors = read_tensors(chosen.tensors) if chosen.tensors else random_tensors()
    console.print(f"{device_name(device)}, tensors: {chosen.tensors or 'random'}")
    results: list[Result] = []
    for context in chosen.contexts:
        operands = extended(tensors, context, device)
        if device.type == "cpu":
            query, key, value = (each.float() for each in operands)
            operands = query, key, value
        results += measure(operands, context, chosen, console)
        console.print(table_of([each for each in results if each.context == context]))
        if chosen.json:
            content = provenance("benchmarks.prefill.gpu", arguments, device)
            write_json(chosen.json, content | {"results": [asdict(each) for each in results]})


@torch.no_grad()
def measure(
    operands: tuple[Tensor, Tensor, Tensor],
    context: int,
    chosen: argparse.Namespace,
    console: Console,
) -> list[Result]:
    """Return the results of all ways at one length, dense attention first."""
    query, key, value = operands
    sample = torch.linspace(context // 8, context - 1, SAMPLED).long().to(query.device)
    truth = dense_at(query, key, value, sample)
    module = kernels(query)

    def flash() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    baseline = milliseconds(flash)
    if chosen.tune:
        console.print(table_of_tunings(module, operands, chosen.shares[-1]))
    results = [Result("sdpa-flash", context, baseline, 1.0, error_at(flash(), truth, sample), 1.0)]
    for share in chosen.shares:
        with console.status(f"{length_name(context)}, share {share:g}"):
            sparse = attention(module, operands, share)
            took = milliseconds(sparse)
            blocks, pairs = read_by_tiles(module, operands, share)
            parts = breakdown(module, operands, share) if chosen.breakdown else None
            error = error_at(sparse(), truth, sample)
            name, memory = f"lychee {share:g}", peak_of(sparse)
            results.append(
                Result(name, context, took, baseline / took, error, pairs, parts, memory)
            )
            if chosen.flex:
                flex = flex_attention(query, key, value, blocks, pairs)
                took, error = milliseconds(flex), error_at(flex(), truth, sample)
                name = f"flex, best blocks {share:g}"
                results.append(Result(name, context, took, baseline / took, error, pairs))
            for policy in (each for each in chosen.policies if each != "lychee"):
                other = kernels(query, policy)
                run = attention(other, operands, share)
                took, error = milliseconds(run), error_at(run(), truth, sample)
                pairs, memory = share_listed(other, operands, share), peak_of(run)
                name, speedup = f"{policy} {share:g}", baseline / took
                parts = breakdown(other, operands, share) if chosen.breakdown else None
                results.append(Result(name, context, took, speedup, error, pairs, parts, memory))
    return results


def peak_of(run: Callable[[], Tensor]) -> float:
    """Return the gigabytes that a call takes at most beyond what was there; 0 off a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def table_of(results: Sequence[Result]) -> Table:
    """Return the table of one length."""
    title = f"{length_name(results[0].context)} tokens, causal, one layer"
    table = Table(
        "way", "ms", "times flash", "error", "pairs", "GiB", "kernels", title=title, box=SIMPLE_HEAD
    )
    for each in results:
        parts = ", ".join(f"{name} {took:.1f}" for name, took in (each.parts or {}).items())
        table.add_row(
            each.way, f"{each.milliseconds:.2f}", f"{each.speedup:.2f}", f"{each.error:.4f}",
            f"{each.pairs:.3f}", f"{each.memory:.2f}", parts,
        )  # fmt: skip
    return table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tensors", type=Path, metavar="FILE", help="from benchmarks.prefill.tensors (random)")
    add("--contexts", type=tokens, nargs="+", default=[8192, 32768, 131072], metavar="N")
    add("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2], metavar="SHARE")
    add("--policies", nargs="+", default=["lychee"], choices=prefill_policy_names())
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--breakdown", action="store_true", help="also the time of each kernel")
    add("--tune", action="store_true", help="also the time of attend with other tile sizes")
    add("--no-flex", dest="flex", action="store_false", help="leave out FlexAttention")
    add("--json", type=Path, metavar="PATH", help="write what was measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
