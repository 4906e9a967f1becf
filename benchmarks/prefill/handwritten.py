"""Time and memory of a prefill whose attention is written out by hand, by length.

    python -m benchmarks.prefill.handwritten [--device cuda] [--lengths 1024 4096 16384]

Layers of a GQA Llama with random weights have the attention of transformers' "eager"
implementation: products, a mask tensor and a softmax. Inductor compiles it as it is written. The
lychee backend finds the attention, sees that its mask is causal, and puts one scaled dot-product
attention in its place. The same model with attn_implementation="sdpa" under Inductor is measured
in the same run: the best there is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from benchmarks.common.lengths import tokens
from benchmarks.common.provenance import device_name

WARM_UP, REPEATS = 5, 20
SHAPES = {  # hidden size, layers, query heads, KV heads
    "cpu": (512, 4, 8, 2),
    "cuda": (4096, 4, 32, 8),
}
WAYS = (("eager", "inductor"), ("eager", "lychee"), ("sdpa", "inductor"))


def model_of(attention: str, device: str) -> Any:
    """Return a model of a few layers; bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    hidden, layers, heads, kv_heads = SHAPES[device]
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 17,
        attn_implementation=attention,
    )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return LlamaModel(config).eval().to(device, dtype)


def measure(forward: Callable[..., Any], ids: Tensor) -> tuple[float, float, Tensor]:
    """Return median seconds, GiB of GPU memory at the peak over those before, and hidden states."""
    on_gpu = ids.device.type == "cuda"
    output = forward(ids, use_cache=False).last_hidden_state
    for _ in range(WARM_UP):
        forward(ids, use_cache=False)
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        forward(ids, use_cache=False)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return statistics.median(times), peak / 2**30, output


@torch.no_grad()
def main() -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=sorted(SHAPES), default=default)
    parser.add_argument("--lengths", type=tokens, nargs="+", default=[512, 2048, 8192])
    arguments = parser.parse_args()
    name = device_name(torch.device(arguments.device))
    print(f"{name}, torch {torch.__version__}, {SHAPES[arguments.device]}")
    print("tokens   attention  backend    ms         GiB     largest difference")
    for length in arguments.lengths:
        ids = torch.randint(1024, (1, length), device=arguments.device)
        first = None
        for attention, backend in WAYS:
            torch.compiler.reset()
            compiled = torch.compile(model_of(attention, arguments.device), backend=backend)
            try:
                seconds, peak, output = measure(compiled, ids)
            except torch.cuda.OutOfMemoryError:
                print(f"{length:<8} {attention:<10} {backend:<10} out of memory", flush=True)
                continue
            first = output if first is None else first
            difference = (output - first).abs().max().item()
            cells = f"{1e3 * seconds:<10.1f} {peak:<7.2f} {difference:.2g}"
            print(f"{length:<8} {attention:<10} {backend:<10} {cells}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
