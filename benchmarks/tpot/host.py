"""Time per token of a Llama whose keys and values lie in memory of the host.

    python -m benchmarks.tpot.host [--context 512k] [--layers 2 8] [--storages host device]
        [--dtype int8] [--prefill 32k] [--budget 1024] [--json PATH]

Batch 1, bfloat16, random weights in Llama-3.1-8B's shape unless options say otherwise. Caches are
`LycheeCache`, filled with random keys and values: a step reads as many keys whatever they are. The
first step reads all of them, and the index is built after it; later steps are CUDA graphs. Every
layer has keys of its own, so none reads what another has read. From the last two numbers of layers
follows the time of 32, as all layers are alike; `--layers 32` measures it. "same" tells if the
first tokens are those of the storage before. A prefill is that of transformers, in one piece, into
buffers that exist. `--device cpu --context 512 --hidden 256 --layers 1 2` tries it out.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common.lengths import length_name, positive, tokens
from benchmarks.common.provenance import device_name, provenance, write_json
from benchmarks.common.terminal import make_console
from benchmarks.tpot.measure import llama
from benchmarks.tpot.ways import WAYS
from lychee_compile import LycheeCache
from lychee_compile.cache.number_formats import FORMATS
from lychee_compile.cache.storage import STORAGES
from lychee_compile.cli.bench.steps import greedy_step, seconds_per_step, synchronise
from lychee_compile.evaluate.cache_argument import cache_argument

WHOLE = 32
"""Number of layers of the model whose time is told."""
STEPS, ROUNDS = 16, 3
ROOM = 512
"""Number of slots of a cache that are empty at first."""


@dataclass
class Run:
    """Measurements of one storage and number of layers. Times are in seconds."""

    storage: str
    layers: int
    filled: float
    """Time to allocate the cache and to fill it."""
    first: float
    """Time of the first step, which compiles, reads all keys and builds the index."""
    step: float
    peak: float
    """Most bytes of the device that were in use in later steps."""
    held: float
    """Bytes of keys and values."""
    prefill: float | None = None
    same: bool | None = None
    """True if the first tokens are those of the storage before."""


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and show all storages and numbers of layers."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parse(arguments)
    device, console = torch.device(chosen.device), make_console()
    runs: list[Run] = []
    for layers in chosen.layers:
        torch.manual_seed(0)
        model = llama(layers, chosen.hidden, device)
        heard: list[int] = []
        for storage in chosen.storages:
            with console.status(f"{layers} layers, {storage}"):
                run, heard = measure(model, storage, chosen, heard)
            runs.append(run)
        del model
    console.print(device_name(device), table_of(runs, chosen))
    for storage in chosen.storages:
        print(whole_model([run for run in runs if run.storage == storage]))
    if chosen.json:
        content = provenance("benchmarks.tpot.host", arguments, device)
        write_json(chosen.json, content | {"runs": [asdict(each) for each in runs]})
    return 0


def measure(
    model: Any, storage: str, chosen: argparse.Namespace, heard: list[int]
) -> tuple[Run, list[int]]:
    """Return what one storage takes, and its first tokens; `heard` are those of another."""
    torch.compiler.reset()
    gc.collect()
    started = time.perf_counter()
    cache = filled_cache(model, storage, chosen)
    filled = time.perf_counter() - started
    prefill = prefill_time(model, cache, chosen.prefill) if chosen.prefill else None
    note_filled(cache, chosen.context)
    cache.reserve(ROOM // 2)
    forward = WAYS["sparse"].compiled(model.forward, chosen.budget)
    step = greedy_step(model, forward, cache)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        started = time.perf_counter()
        said = [step(torch.ones(1, 1, dtype=torch.int64, device=model.device))]
        synchronise(said[0])
        first = time.perf_counter() - started
        for _ in range(7):
            said.append(step(said[-1]))
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_per_step(step, said[-1], STEPS, ROUNDS)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    held = sum(each.nbytes for layer in cache.layers for each in layer.buffers())
    now = torch.cat(said).flatten().tolist()
    same = now == heard if heard else None
    return Run(storage, len(cache.layers), filled, first, seconds, peak, held, prefill, same), now


def filled_cache(model: Any, storage: str, chosen: argparse.Namespace) -> LycheeCache:
    """Return a cache whose slots are full of random keys and values."""
    torch.manual_seed(1)
    cache = LycheeCache(model.config, chosen.context + ROOM, storage, chosen.dtype)
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    model(token, **{cache_argument(model): cache})
    for layer in cache.layers:
        for buffer in layer.buffers():
            draw(buffer)
    synchronise(cache.layers[0].keys)
    return cache


def draw(buffer: Tensor) -> None:
    """Fill a buffer in place with random numbers; those of 8 bits are no NaN in any form."""
    if buffer.dtype.itemsize == 1:
        buffer.view(torch.uint8).random_(0, 120)
    else:
        buffer.normal_()


def prefill_time(model: Any, cache: LycheeCache, count: int) -> float:
    """Return the seconds of a prefill of `count` tokens, the second of two."""
    ids = torch.randint(model.config.vocab_size, (1, count), device=model.device)
    for _ in range(2):
        note_filled(cache, 0)
        synchronise(ids)
        started = time.perf_counter()
        model(ids, logits_to_keep=1, **{cache_argument(model): cache})
        synchronise(ids)
    return time.perf_counter() - started


def note_filled(cache: LycheeCache, filled: int) -> None:
    """Let all layers count `filled` tokens."""
    for layer in cache.layers:
        layer.length = filled
        layer.cumulative_length.fill_(filled)


def table_of(runs: Sequence[Run], chosen: argparse.Namespace) -> Table:
    """Return a table of all runs."""
    table = Table(title=f"{length_name(chosen.context)} tokens, dtype {chosen.dtype}")
    for name in ("storage", "layers", "K+V, GB", "fill, s", "first step, s", "ms / token",
                 "device peak, GB", "prefill, s", "same"):  # fmt: skip
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(
            run.storage,
            str(run.layers),
            f"{run.held / 1e9:.2f}",
            f"{run.filled:.1f}",
            f"{run.first:.1f}",
            f"{1e3 * run.step:.3f}",
            f"{run.peak / 1e9:.2f}",
            "" if run.prefill is None else f"{run.prefill:.2f}",
            "" if run.same is None else str(run.same),
        )
    return table


def whole_model(runs: Sequence[Run]) -> str:
    """Return what the runs of one storage say of `WHOLE` layers."""
    last = runs[-1]
    if last.layers == WHOLE or len(runs) < 2:
        return f"{last.storage}: {1e3 * last.step:.2f} ms a token with {last.layers} layers"
    before = runs[-2]
    slope = (last.step - before.step) / (last.layers - before.layers)
    slope_of_peak = (last.peak - before.peak) / (last.layers - before.layers)
    rest = WHOLE - last.layers
    return (
        f"{last.storage}, {WHOLE} layers by extrapolation: {1e3 * (last.step + rest * slope):.2f} "
        f"ms a token, {(last.peak + rest * slope_of_peak) / 1e9:.1f} GB of the device"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--context", type=tokens, default=524288, metavar="N")
    add("--layers", type=positive, nargs="+", default=[2, 8], metavar="N")
    add("--storages", nargs="+", choices=STORAGES, default=["host"])
    add("--dtype", choices=[name for name in FORMATS if name], help="form of the numbers")
    add("--prefill", type=tokens, metavar="N", help="also time a prefill of so many tokens")
    add("--budget", type=tokens, default=1024, help="tokens that a step reads; 1024 by default")
    add("--hidden", type=positive, default=4096, help="hidden size, 4096 by default")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--json", type=Path, metavar="PATH", help="write what was measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
