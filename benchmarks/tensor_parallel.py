"""Time per decoded token of a model that several devices share by its heads.

    torchrun --nproc-per-node 2 -m benchmarks.tensor_parallel [--context 65536] [--json PATH]

A Llama of Llama-3.1-8B's shape with random weights, sharded by transformers' own tensor parallel
plan: over GPUs with nccl in bfloat16, or, where there are too few, over CPU processes with gloo in
float32, where everything is tiny by default. Inductor's dense attention and the lychee backend
decode over a StaticCache whose keys are random. The median step of the slowest rank counts.
"""

from __future__ import annotations

import argparse
import gc
import json
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
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.distributed import DistributedConfig

import lychee_compile
from benchmarks.common.llama_model import filled_cache, llama_config

WARM_UP, STEPS = 8, 32


@dataclass
class Outcome:
    """What one rank saw of one way to decode."""

    rank: int
    milliseconds: float  # median of the steps
    first_step: float  # longest step of the warm-up, which compiles, in seconds
    peak_gib: float | None  # most memory held on this rank's GPU
    tokens: list[int]  # of the first row, at every step
    sites: str  # what became of the attentions


def arguments(on_gpu: bool) -> argparse.Namespace:
    """The command's; defaults are tiny on CPUs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=65536 if on_gpu else 2048)
    parser.add_argument("--layers", type=int, default=8 if on_gpu else 2)
    parser.add_argument("--hidden", type=int, default=4096 if on_gpu else 512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=int, default=1024 if on_gpu else 256)
    parser.add_argument("--mode", default="reduce-overhead" if on_gpu else "default")
    parser.add_argument("--json", type=Path, help="where to write everything measured")
    return parser.parse_args()


def joined() -> torch.device:
    """Meet the other ranks that torchrun started; this rank's device."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit(f"start it with torchrun --nproc-per-node 2 {sys.argv[0]}")
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def sharded(config: LlamaConfig, device: torch.device) -> Any:
    """Random weights that the first rank saves, and each rank loads its share of."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as mine:
        folder = [mine]
        dist.broadcast_object_list(folder, src=0, device=device)
        if dist.get_rank() == 0:
            torch.manual_seed(0)
            with device:
                LlamaForCausalLM(config).to(dtype).save_pretrained(mine)
        dist.barrier()
        plan = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
        model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=plan, dtype=dtype)
        dist.barrier()
    return model.eval()


def decoded(
    forward: Callable[..., Any], cache: StaticCache, batch: int, device: torch.device
) -> Outcome:
    """Decode greedily, and time every step."""
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)
    times, tokens = [], []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        token = forward(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(int(token[0]))  # which waits for the device
        times.append(time.perf_counter() - started)
    return Outcome(
        rank=dist.get_rank(),
        milliseconds=1e3 * statistics.median(times[WARM_UP:]),
        first_step=max(times[:WARM_UP]),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        tokens=tokens,
        sites="; ".join(map(_in_words, lychee_compile.reports())) or "–",
    )


def _in_words(report: Any) -> str:
    heads = {f"{site.query_heads} q, {site.kv_heads} kv heads" for site in report.sites}
    return f"{report.summary()} ({', '.join(heads)})"


def measured(model: Any, chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The outcomes of all ranks, by the way to decode."""
    options = {"budget": chosen.budget, "mode": chosen.mode}
    dense = torch.compile(model, mode=chosen.mode)
    sparse = torch.compile(model, backend="lychee", options=options)
    found: dict[str, Any] = {}
    for name, forward in {"dense": dense, "lychee": sparse}.items():
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(dist.get_rank())  # each has heads of its own
        cache = filled_cache(model, chosen.batch, chosen.context, chosen.context + WARM_UP + STEPS)
        found[name] = [None] * dist.get_world_size()
        dist.all_gather_object(found[name], decoded(forward, cache, chosen.batch, device))
    return found


def show(found: dict[str, Any], chosen: argparse.Namespace, device: torch.device) -> None:
    """A table of all ways, and what the backend did on each rank."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    heading = f"torch {torch.__version__}, {dist.get_world_size()} × {name}, {chosen.layers} layers"
    table = Table("", "ms per token", "first step, s", "peak, GiB", "tokens of ranks")
    for way, outcomes in found.items():
        slowest = max(each.milliseconds for each in outcomes)
        first = max(each.first_step for each in outcomes)
        peak = f"{max(each.peak_gib for each in outcomes):.1f}" if outcomes[0].peak_gib else "–"
        agree = all(each.tokens == outcomes[0].tokens for each in outcomes)
        tokens = "the same" if agree else "DIFFERENT"
        table.add_row(way, f"{slowest:.2f}", f"{first:.1f}", peak, tokens)
    console = Console()
    console.print(f"{heading}, batch {chosen.batch}, context {chosen.context:,}", table)
    for each in found["lychee"]:
        console.print(f"rank {each.rank}: {each.sites}", soft_wrap=True)


@torch.no_grad()
def main() -> int:
    """Run the benchmark; the exit status."""
    device = joined()
    try:
        chosen = arguments(device.type == "cuda")
        model = sharded(llama_config(chosen.layers, chosen.hidden, dist.get_world_size()), device)
        found = measured(model, chosen, device)
        if dist.get_rank() == 0:
            show(found, chosen, device)
            if chosen.json:
                ways = {way: [asdict(each) for each in ranks] for way, ranks in found.items()}
                chosen.json.write_text(json.dumps(vars(chosen) | {"ways": ways}, default=str))
        return 0
    finally:
        torch.compiler.reset()  # NCCL waits for CUDA graphs that hold its collectives
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
