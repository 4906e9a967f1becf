"""Time of one decode attention on a GPU, by context length and batch, against PyTorch's best.

    python -m benchmarks.decode.gpu [--contexts 8k 32k 128k] [--batches 1 4] [--budget 1024]
        [--variants sdpa-flash lychee-sparse ...] [--json PATH] [--plot PATH] [--quick]

One query token per row attends to a full cache, in Llama-3.1-8B's shape unless options say
otherwise. Every variant attends to the same random keys. A CUDA graph holds several calls that
rotate through caches of their own, so that none is served from L2; the median over replays counts.
Building an index is not part of a call, selecting from it is. Shares of bandwidth are shares of
what a large sum reads in the same run. `--device cpu` tries the benchmark out at a tiny size, by
the clock. The exit status is 1 if a variant failed or was wrong; a variant that is unavailable or
does not fit into memory is no failure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks.common.lengths import length_name
from benchmarks.common.memory import free_bytes, l2_bytes, measure_bandwidth
from benchmarks.common.problem import Problem
from benchmarks.common.provenance import provenance
from benchmarks.common.status import FAILED
from benchmarks.common.terminal import make_console
from benchmarks.decode.measure import Setup, measure
from benchmarks.decode.options import SHAPE, parse
from benchmarks.decode.plot import save_plot
from benchmarks.decode.records import Report
from benchmarks.decode.table import heading, tables
from benchmarks.decode.variants import VARIANTS

WIDTH = 160
"""Columns of the tables if the output is no terminal."""


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parse(arguments, __doc__)
    device, console = torch.device(chosen.device), make_console(WIDTH)
    report = Report(
        **provenance("benchmarks.decode.gpu", arguments, device),
        device_bytes=free_bytes(device),
        l2_bytes=l2_bytes(device),
        shape={name: getattr(chosen, name) for name in SHAPE},
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
