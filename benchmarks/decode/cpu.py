"""Time per decoded token on a CPU, against the length of the context.

    python -m benchmarks.decode.cpu [--lengths 4096 8192 16384 32768] [--budget 1024]

A 12-layer Llama with GQA and random weights in float32, over a StaticCache whose keys are random.
Inductor's dense attention and the lychee backend decode the same tokens in the same run, and the
median of the steps counts. Random keys say nothing of quality: `benchmarks.quality` does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.common.lengths import tokens
from lychee_compile.cli.bench.filled_cache import filled_cache
from lychee_compile.evaluate.cache_argument import cache_argument

WARM_UP, STEPS = 4, 24


def decoder() -> Any:
    """Return a random Llama of 12 layers with groups of four query heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=1 << 17,
    )
    return LlamaForCausalLM(config).eval()


def seconds_per_token(
    forward: Callable[..., Any], cache: StaticCache, argument: str
) -> tuple[float, float]:
    """Return the median step after the warm-up and the longest step of the warm-up, in seconds.

    `argument` is the name by which `forward` takes `cache`.
    """
    token = torch.ones(1, 1, dtype=torch.int64)
    times = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        forward(token, **{argument: cache})
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:]), max(times[:WARM_UP])


@torch.no_grad()
def main() -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=tokens, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--budget", type=tokens, default=1024)
    arguments = parser.parse_args()
    model = decoder()
    table = Table("context", "inductor, ms", "lychee, ms", "times faster", "first step, s")
    for length in track(arguments.lengths, "Contexts"):
        torch.compiler.reset()
        dense, _ = measured(model, torch.compile(model), length)
        options = {"budget": arguments.budget}
        lychee = torch.compile(model, backend="lychee", options=options)
        sparse, first = measured(model, lychee, length)
        cells = (1e3 * dense, 1e3 * sparse, dense / sparse, first)
        table.add_row(f"{length:,}", *(f"{cell:.2f}" for cell in cells))
    table.title = f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32"
    Console().print(table)
    return 0


def measured(model: Any, forward: Callable[..., Any], length: int) -> tuple[float, float]:
    """Return `seconds_per_token` of the compiled `forward` over a new cache of `length` keys."""
    cache = filled_cache(model, 1, length, length + WARM_UP + STEPS + 1)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        return seconds_per_token(forward, cache, cache_argument(model))


if __name__ == "__main__":
    sys.exit(main())
