"""Time to the first token of `generate()`, and of the steps behind it, plain and prepared.

    python -m benchmarks.first_token [--contexts 16k 64k] [--layers 32] [--ways plain dense sparse]

A Llama of random weights, batch 1, bfloat16. Each way generates twice: the first time compiles, the
second is measured. `--device cpu --contexts 512 --layers 2 --hidden 256` tries the benchmark out.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.generation import BaseStreamer

import lychee_compile
from benchmarks.common.lengths import length_name, positive, tokens
from benchmarks.common.llama_model import llama_config
from benchmarks.common.provenance import device_name
from benchmarks.common.terminal import make_console

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense": {"prefill": "dense"},
    "chunks": {"prefill_chunk": 4096},
    "sparse": {"prefill": "sparse"},
    "static": {"cache": "static"},
}
"""Ways to generate, and what `prepare` is given for each but "plain"."""


class Stopwatch(BaseStreamer):
    """Streamer that keeps the time at which each token came, the prompt first."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time; the streamed tokens are on the host already."""
        del value
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--contexts", type=tokens, nargs="+", default=[16384, 65536], metavar="N")
    add("--ways", nargs="+", choices=WAYS, default=["plain", "dense", "sparse"])
    add("--layers", type=positive, default=32, help="%(default)s")
    add("--hidden", type=positive, default=4096, help="width of the model (%(default)s)")
    add("--budget", type=positive, default=1024, help="tokens that a step reads (%(default)s)")
    add("--new-tokens", type=positive, default=24, help="%(default)s")
    add("--device", default=device, help="cpu or cuda (%(default)s)")
    return parser.parse_args(arguments)


def times(model: Any, ids: Tensor, new_tokens: int) -> tuple[list[float], float]:
    """Return seconds to the first token and of each step behind it, and the peak memory in GB."""
    watch, cuda = Stopwatch(), ids.is_cuda
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=new_tokens, do_sample=False, streamer=watch)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
    ticks = [begin, *watch.ticks[1:]]
    return [after - before for before, after in pairwise(ticks)], peak


def measured(way: str, model: Any, ids: Tensor, chosen: argparse.Namespace) -> list[str]:
    """Return the cells of one row: context, way, milliseconds and memory."""
    if way != "plain":
        lychee_compile.prepare(model, budget=chosen.budget, **WAYS[way])
    for _ in range(2):
        seconds, peak = times(model, ids, chosen.new_tokens)
    lychee_compile.restore(model)
    first, second, *later = (f"{1000 * each:,.1f}" for each in (*seconds[:2], median(seconds[2:])))
    return [length_name(ids.shape[1]), way, first, second, *later, f"{peak:.1f}"]


def main(arguments: Sequence[str] = ()) -> None:
    """Measure each way at each context, and print a table."""
    chosen = parse(arguments)
    device = torch.device(chosen.device)
    config = llama_config(chosen.layers, chosen.hidden)
    config.eos_token_id = None
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    names = ("context", "way", "first token ms", "next ms", "later ms", "peak GB")
    table = Table(*names, title=f"generate() on {device_name(device)}")
    for context in chosen.contexts:
        ids = torch.randint(1, 1000, (1, context), device=device)
        for way in chosen.ways:
            table.add_row(*measured(way, model, ids, chosen))
    make_console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
