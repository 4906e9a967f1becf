"""Captured mass and output error of choices by various summaries of keys, at equal tokens read.

    python -m lychee_compile evaluate fidelity --model DIR --save-captures --out results
    python -m benchmarks.quality.summaries CAPTURE [--budget 1024] [--queries 64]

Every summary is tried on the same keys and queries of a real model. Each head group reads sinks,
recent tokens and the best of the rest by the mean softmax share over its heads. Bytes are per token
of context and KV head, 2 a number unless a summary has its own size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.common.lengths import positive, tokens
from benchmarks.quality.estimates import (
    chunk_directions,
    chunk_mean,
    chunk_moments,
    chunk_parts,
    rotated_bits,
    sketch,
)
from benchmarks.quality.lab import CHUNK, Lab
from lychee_compile.evaluate.tensors import Capture, SiteTensors
from lychee_compile.kernels.reference.chunking import similarity_strengths

Summary = tuple[str, str, float, Callable[[Lab], tuple[float, float]]]
"""Name, what is read, bytes per token, and the function that gives (mass, error)."""


def summaries(head_dim: int) -> Iterator[Summary]:
    """Yield every summary for keys of `head_dim` numbers."""
    vector = 2 * head_dim / (sum(CHUNK) / 2)

    def exact(lab: Lab) -> Tensor:
        return lab.score

    def of_chunks(name: str, vectors: float, how: Callable[[Lab], Tensor]) -> Summary:
        return name, "chunks", vectors * vector, lambda lab: lab.read_chunks(how(lab))

    yield "every key", "tokens", 2 * head_dim, lambda lab: lab.read_tokens(exact(lab))
    yield "every key", "chunks", 2 * head_dim, lambda lab: lab.read_chunks(lab.pooled(exact(lab)))
    yield of_chunks("mean", 1, chunk_mean)
    yield of_chunks("mean, diagonal variance", 2, chunk_moments)
    rotated = lambda lab: chunk_moments(lab, rotated=True)  # noqa: E731
    yield of_chunks("mean, variance on common axes", 2, rotated)
    for parts in (2, 4):
        yield of_chunks(f"{parts} centroids", parts, lambda lab, n=parts: chunk_parts(lab, n))
    for rank in (1, 3):
        yield of_chunks(
            f"mean, {rank} directions", 1 + rank, lambda lab, n=rank: chunk_directions(lab, n)
        )
    for bits in (1, 2):
        size = head_dim * bits / 8
        how = lambda lab, n=bits: lab.read_tokens(rotated_bits(lab, n))  # noqa: E731
        yield f"random rotation, {bits} bit", "tokens", size, how
    plans = {
        "1/4 of axes, 4 bit": [(4, 4)],
        "1/2 of axes, 2 bit": [(2, 2)],
        "1/8 4 bit, 1/4 2 bit": [(8, 4), (4, 2)],
        "1/4 4 bit, 1/4 2 bit": [(4, 4), (4, 2)],
        "1/2 of axes, 4 bit": [(2, 4)],
    }
    for name, plan in plans.items():
        size = sum(head_dim / share * bits / 8 for share, bits in plan)
        for block in (10**9, 4096):
            axes = 2 * head_dim * sum(head_dim // share for share, _ in plan) / block
            where = "one set of axes" if block > 10**6 else f"axes per {block} tokens"
            how = lambda lab, p=plan, b=block: lab.read_tokens(sketch(lab, p, b))  # noqa: E731
            yield f"{name}, {where}", "tokens", size + axes, how
    plan = plans["1/4 4 bit, 1/4 2 bit"]
    size = head_dim * 3 / 16 + 2 * head_dim * head_dim / 2 / 4096
    how = lambda lab: lab.read_chunks(lab.pooled(sketch(lab, plan, 4096)))  # noqa: E731
    yield "1/4 4 bit, 1/4 2 bit, axes per 4096 tokens", "chunks", size, how


def labs(capture: Capture, budget: int, queries: int) -> Iterator[Lab]:
    """Yield every KV head of every captured attention."""
    some = torch.linspace(0, len(capture.positions) - 1, queries).long().unique()
    for site in capture.sites:
        strength = capture.strengths
        if strength is None:
            strength = F.pad(similarity_strengths(site.key)[0], (0, 1))
        for head in range(site.key.shape[1]):
            yield Lab(
                _group(site, head)[:, some].float(),
                site.key[0, head].float(),
                site.value[0, head].float(),
                capture.positions[some],
                strength,
                site.scale,
                budget,
            )


def _group(site: SiteTensors, head: int) -> Tensor:
    return site.query[0].unflatten(0, (site.key.shape[1], -1))[head]


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("capture", type=Path, help="a file of `evaluate fidelity --save-captures`")
    parser.add_argument("--budget", type=tokens, default=1024, help="tokens read (1024)")
    parser.add_argument("--queries", type=positive, default=64, help="queries of each head (64)")
    arguments = parser.parse_args()
    capture = Capture.load(arguments.capture)
    heads = list(labs(capture, arguments.budget, arguments.queries))
    length, head_dim = heads[0].key.shape
    title = f"{capture.text}, {length} tokens, budget {arguments.budget}, {len(heads)} KV heads"
    table = Table("summary", "read", "bytes", "mass", "error", title=title)
    for name, unit, size, how in track(list(summaries(head_dim)), "Summaries"):
        results = torch.tensor([how(lab) for lab in heads]).mean(0)
        table.add_row(name, unit, f"{size:.0f}", f"{results[0]:.3f}", f"{results[1]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
