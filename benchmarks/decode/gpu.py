"""Time of one decode attention on a GPU, by context length and batch, against PyTorch's best.

    python -m benchmarks.decode.gpu [--contexts 8k 32k 128k] [--batches 1 4] [--budget 1024]
        [--variants sdpa-flash lychee-sparse ...] [--json PATH] [--plot PATH] [--quick]

One query token per row over a full cache, Llama-3.1-8B's attention unless options say otherwise.
Every variant attends to the same random keys, in a CUDA graph of several calls that rotate through
caches of their own, so that none is served from L2; the median over replays counts. Building an
index is not part of a call, selecting from it is. Shares of bandwidth are shares of what a large
sum reads in the same run. `--device cpu` tries the benchmark out at a tiny size, by the clock.
Exits 1 where a variant failed or was wrong, not where one is unavailable or does not fit in memory.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from benchmarks.decode.measure import Setup, measure
from benchmarks.decode.options import SHAPE, parse
from benchmarks.decode.plot import save_plot
from benchmarks.decode.problem import Problem
from benchmarks.decode.records import FAILED, Report, commit, device_name, length_name, versions
from benchmarks.decode.table import heading, tables
from benchmarks.decode.timing import free_bytes, l2_bytes, measure_bandwidth
from benchmarks.decode.variants import VARIANTS

WIDTH = 160
"""Columns where the output is no terminal."""


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    given = sys.argv[1:] if given is None else given
    chosen = parse(given, __doc__)
    device, shape = torch.device(chosen.device), {name: getattr(chosen, name) for name in SHAPE}
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    report = Report(
        device=device_name(device),
        device_bytes=free_bytes(device),
        l2_bytes=l2_bytes(device),
        versions=versions(),
        commit=commit(),
        command=shlex.join(["python", "-m", "benchmarks.decode.gpu", *given]),
        shape=shape,
        bandwidth=measure_bandwidth(device, chosen.seconds),
    )
    console.print(heading(report), soft_wrap=True)
    variants = [variant for variant in VARIANTS if variant.name in chosen.variants]
    setup = Setup(device, chosen.budget, chosen.buffers, chosen.seconds)
    for batch in chosen.batches:
        for context in chosen.contexts:
            sizes = (chosen.heads, chosen.kv_heads, chosen.head_dim)
            problem = Problem(batch, context, *sizes, getattr(torch, chosen.dtype))
            with console.status(f"batch {batch}, context {length_name(context)}"):
                report.records += measure(problem, variants, setup)
            if chosen.json:
                report.save(chosen.json)
        console.print(tables(report, batch))
    if chosen.plot:
        save_plot(report, chosen.plot)
    return 1 if any(record.status == FAILED for record in report.records) else 0


if __name__ == "__main__":
    sys.exit(main())
