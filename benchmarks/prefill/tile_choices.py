"""Error of what a tile reads: by the heads and positions in it, and by how keys are grouped.

    python -m benchmarks.prefill.tile_choices --tensors FILE [--tiles 6] [--parts 8]

The table gives the relative output error of tiles of causal sequences, whose tensors
`benchmarks.prefill.tensors` writes. A tile reads a share of all runs of keys: those that hold most
of the softmax of its queries (oracle), or most by an estimate in which the mean of each part's
queries stands for them (parts). "Drawn" reads single keys of large shares and a sample of the
others, which stands for all, as policy "lychee" does. Sinks and the last 64 keys are always read,
and not counted.
Errors are means over tiles, layers and texts.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.prefill.tensors import GROUP, HEAD_DIM, Tensors, read_tensors
from lychee_compile.kernels.reference.drawing import log_weight, luck_of, share_bins

FORMS = ((1, 128), (1, 64), (4, 32), (4, 16))
"""Numbers of heads and positions of a tile."""
RUNS = (1, 4, 16)
"""Numbers of neighbouring keys that are read together."""
SHARES = (0.05, 0.1, 0.2, 0.3)
SINKS, RECENT = 16, 64

Row = tuple[int, int, int, str]
"""Heads and positions of a tile, keys in a run, and the way in which runs are ranked."""


@torch.no_grad()
def main() -> None:
    """Measure and show all ways to choose."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--tensors", type=Path, required=True, metavar="FILE", help="see benchmarks.prefill.tensors"
    )
    add("--tiles", type=int, default=6, metavar="N", help="of each sequence (%(default)s)")
    add("--parts", type=int, default=8, metavar="N", help="of a tile (%(default)s)")
    chosen = parser.parse_args()
    tensors = read_tensors(chosen.tensors)
    errors = defaultdict[tuple[Row, float], list[float]](list)
    for name in (name for name in tensors if name.startswith("query")):
        for (heads, positions), number in itertools.product(FORMS, range(chosen.tiles)):
            tile = tile_of(
                tensors, name.removeprefix("query"), heads, positions, number, chosen.tiles
            )
            for row, share, error in measured(tile, heads, positions, chosen.parts):
                errors[row, share].append(error)
    Console().print(table_of(errors))


def table_of(errors: Mapping[tuple[Row, float], list[float]]) -> Table:
    """Return a table with one row for each tile form, run length and ranking."""
    table = Table("heads x positions", "keys in a run", "ranked by", box=SIMPLE_HEAD)
    for share in SHARES:
        table.add_column(f"error at {share:g}", justify="right")
    for row in dict.fromkeys(row for row, _ in errors):
        means = (f"{fmean(errors[row, share]):.3f}" for share in SHARES)
        table.add_row(f"{row[0]} x {row[1]}", str(row[2]), row[3], *means)
    return table


def tile_of(
    tensors: Tensors, name: str, heads: int, positions: int, number: int, tiles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries [heads, P, D] of a tile, and the keys and values [n, D] up to its last."""
    query, key, value = (tensors[f"{each}{name}"].float() for each in ("query", "key", "value"))
    first = torch.linspace(key.shape[0] // 3, key.shape[0] - positions, tiles)[number]
    first = int(first) // positions * positions
    head = number % GROUP if heads == 1 else 0
    queries = query[head : head + heads, first : first + positions]
    return queries, key[: first + positions], value[: first + positions]


def measured(
    tile: tuple[Tensor, Tensor, Tensor], heads: int, positions: int, parts: int
) -> list[tuple[Row, float, float]]:
    """Return the error of every way to choose and every share, for one tile."""
    query, key, value = tile
    rows, seen = query.flatten(0, 1), key.shape[0]
    scale = HEAD_DIM**-0.5
    position = torch.arange(seen - positions, seen).repeat(heads)
    score = (scale * (rows @ key.T)).masked_fill(torch.arange(seen) > position[:, None], -torch.inf)
    share = score.softmax(-1)
    dense = share @ value
    candidates = slice(SINKS, (seen - positions - RECENT) // max(RUNS) * max(RUNS))
    centres = query.unflatten(1, (max(parts // heads, 1), -1)).mean(2).flatten(0, 1)
    ranks = {
        "oracle": share[:, candidates].mean(0),
        "parts": (scale * (centres @ key[candidates].T)).softmax(-1).mean(0),
    }
    results = []

    def error_of(weight: Tensor) -> float:
        kept = share * weight
        output = (kept @ value) / kept.sum(-1, keepdim=True)
        return ((output - dense).norm(dim=-1) / dense.norm(dim=-1)).mean().item()

    for run, (name, rank) in itertools.product(RUNS, ranks.items()):
        of_runs = rank.view(-1, run).sum(-1)
        order = of_runs.argsort(descending=True)
        for part in SHARES:
            count, weight = int(part * len(order)), torch.ones(seen)
            best = torch.zeros_like(of_runs).index_fill(0, order[:count], 1)
            weight[candidates] = best.repeat_interleave(run)
            results.append(((heads, positions, run, name), part, error_of(weight)))
            if run == 1:
                weight[candidates] = drawn(rank, count)
                row = (heads, positions, run, f"{name}, drawn")
                results.append((row, part, error_of(weight)))
    return results


def drawn(share: Tensor, count: int) -> Tensor:
    """Return how much each of `count` drawn keys counts, and 0 for others: float32 [n].

    `share` are estimated shares of the softmax, [n].
    """
    bins = share_bins(share.log())
    priority = bins + luck_of(torch.arange(len(share)))
    order = priority.argsort(descending=True, stable=True)
    weight = log_weight(priority[order[count]], bins).exp()
    return weight.index_fill(0, order[count:], 0)


if __name__ == "__main__":
    main()
