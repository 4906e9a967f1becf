"""Time per token of a whole model, by context length and batch, against what users have.

    python -m benchmarks.tpot [--contexts 8k 64k 128k 512k] [--batches 1 4 8]
        [--ways eager inductor flash exact sparse] [--cells sparse:1:128k ...]
        [--json PATH] [--plot PATH]

transformers' Llama of Llama-3.1-8B's shape with random weights decodes greedily over a StaticCache
of `context` slots whose keys are random. Everything that is compiled runs in CUDA graphs. `flash`
reads the whole buffer by `enable_gqa`, without `repeat_kv` and without a mask: the fastest that
dense attention gets. With --json cells are added to those that an earlier run left in the file.
`--device cpu --layers 2 --hidden 256` tries the benchmark out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common.lengths import length_name, positive, tokens
from benchmarks.common.provenance import command_line, commit, device_name, versions
from benchmarks.common.status import FAILED, MEASURED
from benchmarks.tpot.measure import llama, measure
from benchmarks.tpot.plot import save_plot
from benchmarks.tpot.records import Report
from benchmarks.tpot.table import tables
from benchmarks.tpot.ways import WAYS
from lychee_compile.cli.bench.whole_buffer import register


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options with their defaults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    lengths = [8192, 65536, 131072, 524288]
    add("--contexts", type=tokens, nargs="+", default=lengths, help="8k 64k 128k 512k by default")
    add("--batches", type=positive, nargs="+", default=[1, 4, 8], help="1 4 8 by default")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="all by default")
    add("--cells", type=_cell, nargs="+", help="WAY:BATCH:CONTEXT, instead of all combinations")
    add("--budget", type=tokens, default=1024, help="tokens read by lychee sparse; 1024 by default")
    add("--layers", type=positive, default=32, help="32 by default")
    add("--hidden", type=positive, default=4096, help="hidden size, 4096 by default")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--json", type=Path, help="file to keep the figures in")
    add("--plot", type=Path, help="picture to draw")
    return parser.parse_args(arguments)


def _cell(text: str) -> tuple[str, int, int]:
    try:
        way, batch, context = text.split(":")
        if way in WAYS:
            return way, int(batch), tokens(context)
    except (ValueError, argparse.ArgumentTypeError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no WAY:BATCH:CONTEXT, as sparse:1:128k is")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return 1 if a way failed; a cache that does not fit is no failure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parse(arguments)
    console, device = Console(highlight=False), torch.device(chosen.device)
    report = Report(
        device_name(device),
        versions(),
        commit(),
        [command_line("benchmarks.tpot", arguments)],
        {name: getattr(chosen, name) for name in ("layers", "hidden", "budget")},
    )
    if chosen.json:
        report.take_over(chosen.json)
    register()
    model = llama(chosen.layers, chosen.hidden, device)
    cells = chosen.cells or list(product(chosen.ways, chosen.batches, chosen.contexts))
    for way, batch, context in cells:
        name = f"{WAYS[way].label}, batch {batch}, context {length_name(context)}"
        with console.status(name):
            record = measure(model, way, batch, context, chosen.budget)
        measured = record.status == MEASURED
        console.print(name, f"{record.milliseconds:.2f} ms" if measured else record.note)
        report.add(record)
        if chosen.json:
            report.save(chosen.json)
    for table in tables(report):
        console.print(table)
    if chosen.plot:
        save_plot(report, chosen.plot)
    return 1 if any(record.status == FAILED for record in report.records) else 0


if __name__ == "__main__":
    sys.exit(main())
