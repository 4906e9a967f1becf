"""Time of one decode attention of rows that share a prefix, by what holds and reads the prefix.

    python -m benchmarks.shared_prefix [--prefix 32k] [--rows 16] [--own 512] [--budgets 256 1024]
        [--layers 8] [--seconds 0.5]

    copies     each row has the prefix in a cache of its own; PyTorch reads all of it
    joined     the prefix is held once, and expanded and joined with each row's own keys at each
               step; PyTorch reads all of it
    N          held once; compiled by the backend with budget N. Each row chooses N tokens, or all
               read the whole prefix once if 2 * rows * N is no less than its length

The shape is that of Llama-3.1-8B. A step has several layers, and runs as one CUDA graph; the time
is that of a step by the number of layers. `--device cpu` tries the benchmark out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.lengths import length_name, tokens
from benchmarks.common.terminal import make_console
from lychee_compile import torch_private

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
WARM_UP = 12
Layer = tuple[Tensor, ...]
"""Keys and values of the prefix, or none, and keys and values of each row's own."""


def attended(query: Tensor, layer: Layer, position: Tensor) -> Tensor:
    """Write a token of each row at `position`, int64 [1], and attend to all before it."""
    *shared, own_keys, own_values = layer
    new = query[:, :KV_HEADS]
    own_keys.index_copy_(2, position, new)
    own_values.index_copy_(2, position, new)
    keys, values, before = own_keys, own_values, 0
    if shared:
        before = shared[0].shape[2]
        keys, values = (
            torch.cat((each.expand(len(query), -1, -1, -1), own), 2)
            for each, own in zip(shared, (own_keys, own_values), strict=True)
        )
    seen = torch.arange(keys.shape[2], device=query.device) <= before + position[:, None]
    return F.scaled_dot_product_attention(query, keys, values, seen[None, None], enable_gqa=True)


def steps_over(layers: Sequence[Layer]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a step over layers, each of which asks with what the one before has given."""

    def step(query: Tensor, position: Tensor) -> Tensor:
        for layer in layers:
            query = F.rms_norm(attended(query, layer, position), (HEAD_DIM,))
        return query

    return step


def time_of(
    step: Callable[[Tensor, Tensor], Tensor], first: int, sizes: argparse.Namespace
) -> tuple[float, bool]:
    """Return the median of microseconds of a step, and if its last output was finite."""
    cuda, times = sizes.device == "cuda", []
    query = torch.randn(sizes.rows, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device=sizes.device)
    position = torch.full((1,), first, device=sizes.device)
    begin = time.perf_counter()
    while len(times) < WARM_UP + 5 or time.perf_counter() - begin < sizes.seconds:
        if cuda:
            torch.compiler.cudagraph_mark_step_begin()
            torch.cuda.synchronize()
        start = time.perf_counter()
        output = step(query, position)
        if cuda:
            torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
        if len(times) == WARM_UP:
            begin = time.perf_counter()
    return statistics.median(times[WARM_UP:]), bool(output.isfinite().all())


def filled(rows: int, slots: int, device: str) -> tuple[Tensor, Tensor]:
    """Return keys and values of `slots` slots."""
    shape = rows, KV_HEADS, slots, HEAD_DIM
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    for each in (keys, values):
        torch_private.mark_static_address(each)
    return keys, values


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefix", type=tokens, default=32768)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--own", type=tokens, default=512)
    parser.add_argument("--budgets", type=tokens, nargs="+", default=[256, 1024])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--device", default="cuda")
    sizes = parser.parse_args(arguments)
    console, mode = make_console(), "reduce-overhead" if sizes.device == "cuda" else "default"
    console.print(
        f"prefix {length_name(sizes.prefix)}, {sizes.rows} rows with {sizes.own} slots of their own"
    )
    ways: list[str | int] = ["copies", "joined", *sizes.budgets]
    for way in ways:
        torch.compiler.reset()
        copies = way == "copies"
        slots = sizes.own + (sizes.prefix if copies else 0)
        layers = [
            (*(() if copies else filled(1, sizes.prefix, sizes.device)),
             *filled(sizes.rows, slots, sizes.device))
            for _ in range(sizes.layers)
        ]  # fmt: skip
        held = sum(each.nbytes for layer in layers for each in layer) / 2**20 / sizes.layers
        if isinstance(way, int):
            options = {"budget": way, "dense_layers": 0, "mode": mode}
            step = torch.compile(steps_over(layers), backend="lychee", options=options)
        else:
            step = torch.compile(steps_over(layers), mode=mode)
        first = slots - sizes.own // 2
        microseconds, finite = time_of(step, first, sizes)
        assert finite
        console.print(f"{way!s:>8}  {microseconds / sizes.layers:9.1f} us  {held:8.0f} MiB a layer")
        del layers, step
    return 0


if __name__ == "__main__":
    sys.exit(main())
