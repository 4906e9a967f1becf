"""Time and error of one causal attention over a whole sequence on a GPU, against PyTorch's best.

    python -m benchmarks.prefill.gpu --tensors FILE [--contexts 8k 32k 128k] [--shares 0.05 0.1 0.2]
        [--json PATH] [--breakdown] [--tune]

Llama-3.1-8B's attention, 32 query heads and 8 KV heads of 128, on queries and keys of a real model
(`prefill_tensors.py` makes the file); batch 1, bfloat16. Beside SDPA's flash kernel stands what
FlexAttention makes of a BlockMask: as many pairs as lychee reads, in the blocks of 128 x 128 that
hold most by lychee's own estimate. Times are medians of calls, choosing included; errors, relative
to float64 attention over all keys, are means over sampled queries of every head. Without a file of
tensors they are random, and errors mean nothing. `--device cpu --contexts 512` tries it out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.decode.options import tokens
from benchmarks.decode.records import commit, device_name, length_name, versions
from benchmarks.decode.timing import milliseconds
from benchmarks.prefill.tensors import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    extended,
    random_tensors,
    read_tensors,
)
from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import KV, AttentionSpec, Q, S, TileSpec
from lychee_compile.kernels.gpu.common import module_cache
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import PREFILL, TileTuning, candidates
from lychee_compile.kernels.gpu.prefill.launch import PrefillBudget, PrefillLaunch, run_prefill
from lychee_compile.kernels.sizes import QUERY_TILE

SINKS, RECENT = 16, 64
SAMPLED = 32
"""Queries of each head whose error is measured, spread over the sequence."""
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True)
class Result:
    """One way of attention at one length."""

    way: str
    context: int
    milliseconds: float
    speedup: float
    """Over SDPA's flash kernel in the same run."""
    error: float
    """Mean of |o - o_dense| / |o_dense| over sampled queries."""
    pairs: float
    """Share of the pairs of a query and a key it sees that is computed."""
    parts: dict[str, float] | None = None
    """Milliseconds of each kernel."""


def main(given: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    given = sys.argv[1:] if given is None else given
    chosen = parse(given)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    device = torch.device(chosen.device)
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
            save(chosen.json, results, given, device)


@torch.no_grad()
def measure(
    operands: tuple[Tensor, Tensor, Tensor], context: int, chosen: Any, console: Console
) -> list[Result]:
    """All ways at one length, dense attention first."""
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

            def sparse(share: float = share) -> Tensor:
                return run_prefill(module, AttentionOperands(*operands), PrefillBudget(share))[0]

            took = milliseconds(sparse)
            blocks, pairs = read_by_tiles(module, operands, share)
            parts = breakdown(module, operands, share) if chosen.breakdown else None
            error = error_at(sparse(), truth, sample)
            name = f"lychee {share:g}"
            results.append(Result(name, context, took, baseline / took, error, pairs, parts))
            if chosen.flex:
                flex = flex_attention(query, key, value, blocks, pairs)
                took, error = milliseconds(flex), error_at(flex(), truth, sample)
                name = f"flex, best blocks {share:g}"
                results.append(Result(name, context, took, baseline / took, error, pairs))
    return results


def kernels(query: Tensor) -> ModuleType:
    """The generated module for causal attention of this shape."""
    dtype = str(query.dtype).removeprefix("torch.")
    group, tiles = HEADS // KV_HEADS, TileSpec("lychee", SINKS, RECENT)
    spec = AttentionSpec(dtype, group, HEAD_DIM, HEAD_DIM, SCALE * S, KV <= Q, tiles=tiles)
    return module_cache.load(module_cache.store(emit_module(spec), spec.name).stem)


def read_by_tiles(
    module: ModuleType, operands: tuple[Tensor, Tensor, Tensor], share: float
) -> tuple[Tensor, float]:
    """Keys that each tile chose in each block of 128, int32 [Hq, tiles, blocks]; share of pairs."""
    query, key, _ = operands
    launch = PrefillLaunch(module, AttentionOperands(*operands), PrefillBudget(share))
    context, heads = key.shape[2], query.shape[1]
    tiles, blocks = launch.tiles, -(-context // QUERY_TILE)
    held = torch.zeros(heads * tiles, blocks, dtype=torch.int32, device=query.device)
    read = 0
    for first_row, count in launch.slices():
        launch.select(first_row, count)
        counts, edge = (launch.scratch[name][:count].long() for name in ("counts", "edge"))
        always = edge[:, 1] - edge[:, 0] + edge[:, 3] - edge[:, 2] + edge[:, 5] - edge[:, 4]
        read += int((counts + always).sum())
        for place in range(count):
            block = launch.scratch["chosen"][place, : int(counts[place])].long() // QUERY_TILE
            held[first_row + place].scatter_add_(0, block, torch.ones_like(block).int())
    seen = heads * sum(min((tile + 1) * QUERY_TILE, context) for tile in range(blocks))
    return held.view(heads, tiles, blocks)[:, :blocks], read / seen


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, held: Tensor, pairs: float
) -> Callable[[], Tensor]:
    """FlexAttention over as many pairs, in the blocks that hold most of lychee's keys."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    heads, tiles, blocks = held.shape
    number = torch.arange(blocks, device=held.device)
    causal = number <= torch.arange(tiles, device=held.device)[:, None]
    room = (pairs * causal.sum(-1)).ceil().long()
    near = (number == 0) | (number == torch.arange(tiles, device=held.device)[:, None])
    rank = held.float().masked_fill(near, torch.inf).masked_fill(~causal, -1)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    taken = number < room.clamp(min=2)[:, None]
    chosen = torch.zeros_like(causal.expand(heads, -1, -1)).scatter(
        -1, order, taken.expand_as(order)
    )
    chosen &= causal
    diagonal = number == torch.arange(tiles, device=held.device)[:, None]

    def listed(blocks_read: Tensor) -> tuple[Tensor, Tensor]:
        counts = blocks_read.sum(-1, dtype=torch.int32)[None]
        indices = blocks_read.int().argsort(dim=-1, descending=True, stable=True).int()[None]
        return counts, indices

    mask = BlockMask.from_kv_blocks(
        *listed(chosen & diagonal), *listed(chosen & ~diagonal), BLOCK_SIZE=QUERY_TILE,
        mask_mod=lambda _b, _h, q, kv: q >= kv, seq_lengths=(query.shape[2], key.shape[2]),
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=True)


def breakdown(
    module: ModuleType, operands: tuple[Tensor, Tensor, Tensor], share: float
) -> dict[str, float]:
    """Milliseconds of each kernel, by a profile of one call; empty off a GPU."""
    if operands[0].device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run_prefill(module, AttentionOperands(*operands), PrefillBudget(share))
        torch.cuda.synchronize()
    names = ("ask", "scan", "choose", "attend")
    times = {each.key: each.device_time_total / 1e3 for each in found.key_averages()}
    return {name: times[name] for name in names if name in times}


def table_of_tunings(
    module: ModuleType, operands: tuple[Tensor, Tensor, Tensor], share: float
) -> Table:
    """Milliseconds of `attend` with each tuning, over the tiles that are done first."""
    given, budget = AttentionOperands(*operands), PrefillBudget(share)
    table = Table(
        "queries", "keys", "warps", "stages", "registers", "ms", title=f"attend, share {share:g}"
    )
    for tuning in candidates(PREFILL, given):
        assert isinstance(tuning, TileTuning)
        launch = PrefillLaunch(module, given, budget, tuning)
        first = next(launch.slices())
        launch.select(*first)
        try:
            took = f"{milliseconds(partial(launch.attend, *first)):.2f}"
        except Exception as error:  # noqa: BLE001  the device refuses such tiles
            took = type(error).__name__
        table.add_row(*map(str, astuple(tuning)), took)
    return table


def dense_at(query: Tensor, key: Tensor, value: Tensor, sample: Tensor) -> Tensor:
    """Causal attention in float64 of the queries at `sample`, int64 [N]: [Hq, N, Dv]."""
    outputs = []
    group = query.shape[1] // key.shape[1]
    slot = torch.arange(key.shape[2], device=key.device)
    for head in range(query.shape[1]):
        asking = query[0, head, sample].double()
        score = SCALE * (asking @ key[0, head // group].double().T)
        share = score.masked_fill(slot > sample[:, None], -torch.inf).softmax(-1)
        outputs.append(share @ value[0, head // group].double())
    return torch.stack(outputs)


def error_at(output: Tensor, truth: Tensor, sample: Tensor) -> float:
    """Mean relative error of the queries at `sample`."""
    off = (output[0, :, sample].double() - truth).norm(dim=-1) / truth.norm(dim=-1)
    return off.mean().item()


def table_of(results: Sequence[Result]) -> Table:
    """One length."""
    title = f"{length_name(results[0].context)} tokens, causal, one layer"
    table = Table(
        "way", "ms", "times flash", "error", "pairs", "kernels", title=title, box=SIMPLE_HEAD
    )
    for each in results:
        parts = ", ".join(f"{name} {took:.1f}" for name, took in (each.parts or {}).items())
        table.add_row(
            each.way, f"{each.milliseconds:.2f}", f"{each.speedup:.2f}", f"{each.error:.4f}",
            f"{each.pairs:.3f}", parts,
        )  # fmt: skip
    return table


def save(path: Path, results: Sequence[Result], given: Sequence[str], device: torch.device) -> None:
    """All that was measured, and with what."""
    made = {
        "device": device_name(device),
        "command": shlex.join(["python", "-m", "benchmarks.prefill.gpu", *given]),
        "commit": commit(),
        "versions": versions(),
        "results": [asdict(each) for each in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def parse(given: Sequence[str]) -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tensors", type=Path, metavar="FILE", help="made by prefill_tensors.py (random ones)")
    add("--contexts", type=tokens, nargs="+", default=[8192, 32768, 131072], metavar="N")
    add("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2], metavar="SHARE")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--breakdown", action="store_true", help="also the time of each kernel")
    add("--tune", action="store_true", help="also the time of attend with other tile sizes")
    add("--no-flex", dest="flex", action="store_false", help="leave out FlexAttention")
    add("--json", type=Path, metavar="PATH", help="write what was measured")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
