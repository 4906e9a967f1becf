"""Options of `benchmarks.decode.gpu`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.lengths import positive, tokens
from benchmarks.decode.variants import FORCED, VARIANTS

SHAPE = ("heads", "kv_heads", "head_dim", "dtype", "budget")
"""Options that shape the attention, besides context and batch."""
DTYPES = ("bfloat16", "float16", "float32")
CONTEXTS = {"cuda": [1024 << power for power in range(3, 10)], "cpu": [512, 1024]}
QUICK_CONTEXTS = {"cuda": [8192, 32768, 131072], "cpu": [512]}
BATCHES = {"cuda": [1, 4, 16], "cpu": [1, 2]}
SECONDS, QUICK_SECONDS = 0.15, 0.05


def parse(arguments: Sequence[str], page: str | None) -> argparse.Namespace:
    """Return the options with their defaults; exit with a message if they make no sense.

    The first line of `page` describes the command.
    """
    parser = _parser(page)
    chosen = parser.parse_args(arguments)
    if chosen.heads % chosen.kv_heads:
        parser.error(f"--heads {chosen.heads} is no multiple of --kv-heads {chosen.kv_heads}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here; --device cpu tries the benchmark out")
    contexts = QUICK_CONTEXTS if chosen.quick else CONTEXTS
    chosen.contexts = chosen.contexts or contexts[chosen.device]
    chosen.batches = chosen.batches or ([1] if chosen.quick else BATCHES[chosen.device])
    chosen.seconds = chosen.seconds or (QUICK_SECONDS if chosen.quick else SECONDS)
    return chosen


def _parser(page: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=page.splitlines()[0] if page else None)
    add, names = parser.add_argument, [variant.name for variant in VARIANTS]
    usual = [name for name in names if name not in FORCED]
    add(
        "--contexts",
        type=tokens,
        nargs="+",
        metavar="L",
        help="as 8192, 8k or 2m; by default 8k to 512k",
    )
    add("--batches", type=positive, nargs="+", metavar="B", help="1, 4 and 16 by default")
    choices = f"some of {', '.join(names)}; by default all that sizes may choose"
    add("--variants", nargs="+", choices=names, default=usual, metavar="NAME", help=choices)
    add("--heads", type=positive, default=32, metavar="N", help="query heads, 32 by default")
    add("--kv-heads", type=positive, default=8, metavar="N", help="8 by default")
    add("--head-dim", type=positive, default=128, metavar="N", help="128 by default")
    add("--dtype", choices=DTYPES, default="bfloat16", help="bfloat16 by default")
    add("--budget", type=tokens, default=1024, help="tokens that sparse ones read; 1024 by default")
    add("--buffers", type=positive, default=32, help="most caches to rotate; 32 by default")
    add("--seconds", type=_seconds, help=f"replays of one measurement; {SECONDS} by default")
    add("--device", choices=sorted(CONTEXTS), default="cuda", help="cpu tries the benchmark out")
    add("--quick", action="store_true", help="8k, 32k and 128k, batch 1, fewer replays")
    add("--json", type=Path, metavar="PATH", help="write everything that was measured")
    add("--plot", type=Path, metavar="PATH", help="draw times and speed-ups")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 60:
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds between 0 and 60")
    return value
