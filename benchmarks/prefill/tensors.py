"""Queries, keys and values of a real model, in the shape of Llama-3.1-8B's attention.

    python -m benchmarks.prefill.tensors --model DIR --out FILE [--tokens 32000]
        [--text code --text prose --text json] [--eight-bit]

The tensors are those of the global attentions of a small model in several texts: in Gemma-3-270M
three layers with four query heads over one KV head of 256. A KV head of the benchmark is a layer.
Its sequence is one text after another; the next head begins with the next text, and a sequence that
has to be longer begins again in another order. Keys and queries are rotated onto the 128 principal
axes of a layer's keys, which changes few scores by much. Values keep 128 of their components. With
`--eight-bit` the file is half as large and numbers are off by 3 %, for dense attention too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
GROUP = HEADS // KV_HEADS

Tensors = dict[str, Tensor]
"""Tensors by name: "query.<layer>.<text>" [G, L, D]; "key" and "value" [L, D] likewise."""


def main() -> None:
    """Capture the tensors and write them into a file."""
    from safetensors.torch import save_file

    from lychee_compile.evaluate.models import load
    from lychee_compile.evaluate.prefill_capture import capture_prefill
    from lychee_compile.evaluate.texts import read_text

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a causal language model with global layers")
    add("--out", required=True, type=Path, metavar="FILE", help="a safetensors file")
    add("--tokens", type=int, default=32000, metavar="N", help="of each text (%(default)s)")
    add("--text", action="append", default=[], metavar="KIND[=FILE]", help="code, prose and json")
    add("--eight-bit", action="store_true", help="store numbers as float8_e4m3fn, not bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    model, tensors = load(chosen.model, chosen.device), {}
    for number, source in enumerate(chosen.text or ["code", "prose", "json"]):
        kind, text = read_text(source)
        ids = model.encode(text[: 16 * chosen.tokens])[: chosen.tokens]
        capture = capture_prefill(model.model, ids, range(len(ids)), text=kind)
        for layer, site in enumerate(capture.sites):
            query, key = site.query[0].float(), site.key[0, 0].float()
            basis = principal_axes(key) if number == 0 else tensors[f"axes.{layer}"]
            tensors[f"axes.{layer}"] = basis
            tensors[f"query.{layer}.{number}"] = query @ basis * site.scale * HEAD_DIM**0.5
            tensors[f"key.{layer}.{number}"] = key @ basis
            tensors[f"value.{layer}.{number}"] = site.value[0, 0, :, :HEAD_DIM]
        sys.stdout.write(f"{kind}: {len(ids):,} tokens, {len(capture.sites)} attentions\n")
    dtype = torch.float8_e4m3fn if chosen.eight_bit else torch.bfloat16
    kept = {name: each.to(dtype).contiguous().cpu() for name, each in tensors.items()}
    save_file({name: each for name, each in kept.items() if name[:4] != "axes"}, chosen.out)


def principal_axes(key: Tensor) -> Tensor:
    """Return the directions of most variance of keys [L, D'], the mean's among them: [D', 128]."""
    return torch.linalg.svd(key, full_matrices=False).Vh[:HEAD_DIM].T


def read_tensors(path: Path) -> Tensors:
    """Return the tensors that `main` wrote, as bfloat16."""
    from safetensors.torch import load_file

    return {name: each.bfloat16() for name, each in load_file(path).items()}


def random_tensors(layers: int = 2, texts: int = 2, tokens: int = 4096) -> Tensors:
    """Return random tensors of the same shapes, to try benchmarks out."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "query": (GROUP, tokens, HEAD_DIM),
        "key": (tokens, HEAD_DIM),
        "value": (tokens, HEAD_DIM),
    }
    return {
        f"{name}.{layer}.{text}": torch.randn(shape, generator=random).bfloat16()
        for name, shape in shapes.items()
        for layer in range(layers)
        for text in range(texts)
    }


def extended(tensors: Tensors, context: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return query [1, 32, L, 128], key and value [1, 8, L, 128] of `context` tokens."""
    layers = 1 + max(int(name.split(".")[1]) for name in tensors)
    texts = 1 + max(int(name.split(".")[2]) for name in tensors)

    def head(name: str, number: int) -> Tensor:
        parts: list[Tensor] = []
        for count in range(context):
            if sum(part.shape[-2] for part in parts) >= context:
                break
            text = (number // layers + count + count // texts) % texts
            parts.append(tensors[f"{name}.{number % layers}.{text}"])
        return torch.cat(parts, -2)[..., :context, :].to(device)

    query, key, value = (
        torch.stack([head(name, number) for number in range(KV_HEADS)])
        for name in ("query", "key", "value")
    )
    return query.flatten(0, 1)[None], key[None], value[None]


if __name__ == "__main__":
    main()
