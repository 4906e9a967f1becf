"""Time per decoded token of a model that several devices share by its heads.

    torchrun --nproc-per-node 2 -m benchmarks.tensor_parallel [--context 65536] [--json PATH]

A Llama of Llama-3.1-8B's shape with random weights is sharded by transformers' own tensor parallel
plan: over GPUs with nccl in bfloat16 or, if there are too few, over CPU processes with gloo in
float32, with tiny sizes by default. Inductor's dense attention and the lychee backend decode over a
StaticCache whose keys are random. The median step of the slowest rank counts.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.distributed import DistributedConfig

import lychee_compile
from benchmarks.common.lengths import positive, tokens
from benchmarks.common.llama_model import llama_config
from benchmarks.common.provenance import device_name, provenance, write_json
from lychee_compile.cli.bench.filled_cache import filled_cache
from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.report.report import Report

WARM_UP, STEPS = 8, 32


@dataclass
class Outcome:
    """Figures of one rank and one way to decode."""

    rank: int
    milliseconds: float
    """Median of the steps."""
    first_step: float
    """Longest step of the warm-up, which compiles, in seconds."""
    peak_gib: float | None
    """Peak memory of this rank's GPU; None on a CPU."""
    tokens: list[int]
    """Token of the first row at every step."""
    sites: str
    """Summary of the backend's reports."""


def options(on_gpu: bool) -> argparse.Namespace:
    """Return the options of the command; defaults are tiny on CPUs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--context", type=tokens, default=65536 if on_gpu else 2048)
    add("--layers", type=positive, default=8 if on_gpu else 2)
    add("--hidden", type=positive, default=4096 if on_gpu else 512)
    add("--batch", type=positive, default=1)
    add("--budget", type=tokens, default=1024 if on_gpu else 256)
    add("--mode", default="reduce-overhead" if on_gpu else "default")
    add("--json", type=Path, help="file for everything that was measured")
    return parser.parse_args()


def enough_gpus() -> bool:
    """True if each rank on this host has a GPU of its own."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return torch.cuda.device_count() >= ranks


def joined() -> torch.device:
    """Meet the other ranks that torchrun started, and return this rank's device."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start it with torchrun --nproc-per-node 2 -m benchmarks.tensor_parallel")
    if not enough_gpus():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def sharded(config: LlamaConfig, device: torch.device) -> Any:
    """Return this rank's shard of a random model, which the first rank saves in a folder."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder, src=0, device=device)
        if dist.get_rank() == 0:
            torch.manual_seed(0)
            with device:
                LlamaForCausalLM(config).to(dtype).save_pretrained(own)
        dist.barrier()
        plan = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
        model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=plan, dtype=dtype)
        dist.barrier()
    return model.eval()


def decoded(step: Callable[[Tensor], Tensor], token: Tensor) -> Outcome:
    """Decode greedily from `token` [B, 1], and time every step."""
    times, tokens_of_row = [], []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        token = step(token)
        tokens_of_row.append(int(token[0]))  # waits for the device
        times.append(time.perf_counter() - started)
    return Outcome(
        rank=dist.get_rank(),
        milliseconds=1e3 * statistics.median(times[WARM_UP:]),
        first_step=max(times[:WARM_UP]),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if token.is_cuda else None,
        tokens=tokens_of_row,
        sites="; ".join(map(_in_words, lychee_compile.reports())) or "–",
    )


def greedy_step(
    model: Any, forward: Callable[..., Any], cache: StaticCache
) -> Callable[[Tensor], Tensor]:
    """Return a step of `forward`, that of `model` compiled: the next token [B, 1] after one."""
    argument = {cache_argument(model): cache}
    return lambda token: forward(token, **argument).logits[:, -1:].argmax(-1)


def _in_words(report: Report) -> str:
    heads = {f"{site.query_heads} q, {site.kv_heads} kv heads" for site in report.sites}
    return f"{report.summary()} ({', '.join(heads)})"


def measured(model: Any, chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the outcomes of all ranks, by the way to decode."""
    lychee_options = {"budget": chosen.budget, "mode": chosen.mode}
    dense = torch.compile(model, mode=chosen.mode)
    sparse = torch.compile(model, backend="lychee", options=lychee_options)
    ways: dict[str, Any] = {}
    for name, forward in {"dense": dense, "lychee": sparse}.items():
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(dist.get_rank())  # each has heads of its own
        cache = filled_cache(model, chosen.batch, chosen.context, chosen.context + WARM_UP + STEPS)
        token = torch.ones(chosen.batch, 1, dtype=torch.int64, device=device)
        ways[name] = [None] * dist.get_world_size()
        outcome = decoded(greedy_step(model, forward, cache), token)
        dist.all_gather_object(ways[name], outcome)
    return ways


def show(ways: dict[str, Any], chosen: argparse.Namespace, device: torch.device) -> None:
    """Print a table of all ways, and what the backend did on each rank."""
    name = device_name(device)
    heading = f"torch {torch.__version__}, {dist.get_world_size()} × {name}, {chosen.layers} layers"
    table = Table("", "ms per token", "first step, s", "peak, GiB", "tokens of ranks")
    for way, outcomes in ways.items():
        slowest = max(each.milliseconds for each in outcomes)
        first = max(each.first_step for each in outcomes)
        peak = f"{max(each.peak_gib for each in outcomes):.1f}" if outcomes[0].peak_gib else "–"
        agree = all(each.tokens == outcomes[0].tokens for each in outcomes)
        table.add_row(
            way, f"{slowest:.2f}", f"{first:.1f}", peak, "the same" if agree else "DIFFERENT"
        )
    console = Console()
    console.print(f"{heading}, batch {chosen.batch}, context {chosen.context:,}", table)
    for each in ways["lychee"]:
        console.print(f"rank {each.rank}: {each.sites}", soft_wrap=True)


@torch.no_grad()
def main() -> int:
    """Run the benchmark and return its exit status."""
    chosen = options(enough_gpus())
    device = joined()
    try:
        model = sharded(llama_config(chosen.layers, chosen.hidden, dist.get_world_size()), device)
        ways = measured(model, chosen, device)
        if dist.get_rank() == 0:
            show(ways, chosen, device)
            if chosen.json:
                content = provenance("benchmarks.tensor_parallel", sys.argv[1:], device)
                outcomes = {way: [asdict(each) for each in ranks] for way, ranks in ways.items()}
                write_json(chosen.json, content | {"ways": outcomes})
        return 0
    finally:
        torch.compiler.reset()  # NCCL waits for CUDA graphs that hold its collectives
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
