"""Costs of the index of "lychee" on a CPU: building it, and choosing by it.

    python -m benchmarks.index_on_cpu [--threads 2] [--runs 30] [--json PATH]

Keys are drawn around topics that come and go, of one KV head for building and of `--kv-heads` for
choosing. A choice is that of one step with four query heads to a KV head and no mask: by a scan of
all sketches, and narrowed down by units, clusters and chunks. Every time is the least of all runs,
since other programs may run on the machine. With `--processor-time` it is that of the processor, by
all threads. `--built 2000 --chosen 4000 --runs 1` tries the benchmark out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common.lengths import length_name, positive, tokens
from benchmarks.common.provenance import device_name, provenance, write_json
from benchmarks.common.terminal import make_console
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import select

CPU = torch.device("cpu")
TOPICS, TURN = 256, 40
"""Number of topics, and of tokens for which one lasts."""


@dataclass(frozen=True)
class Build:
    """Milliseconds to build the index of one KV head."""

    tokens: int
    head_dim: int
    sketches: float
    """To cut chunks, and to sketch all keys."""
    chunks: float
    """To summarise chunks, clusters and units."""


@dataclass(frozen=True)
class Choice:
    """Milliseconds of one choice."""

    tokens: int
    flat: float
    """By the sketches of all tokens."""
    narrowed: float
    """By units, clusters and chunks, and the sketches of `overfetch` times the budget."""


class Clock:
    """Least time of several runs."""

    def __init__(self, runs: int, processor: bool) -> None:
        self.runs, self.now = runs, time.process_time if processor else time.perf_counter

    def least(self, run: Callable[[], object], before: Callable[[], object] | None = None) -> float:
        """Return the milliseconds of `run`, after `before`, which does not count."""
        times = []
        for _ in range(self.runs):
            if before is not None:
                before()
            begun = self.now()
            run()
            times.append(self.now() - begun)
        return 1000 * min(times)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and show building and choosing."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parse(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    clock, console = Clock(chosen.runs, chosen.processor_time), make_console()
    builds, choices = [], []
    for size in chosen.built:
        for head_dim in (64, 128):
            with console.status(f"building {length_name(size)}"):
                builds.append(measure_build(size, head_dim, clock))
    for size in chosen.chosen:
        with console.status(f"choosing among {length_name(size)}"):
            shape = chosen.kv_heads, chosen.head_dim
            choices.append(measure_choice(size, shape, chosen.budget, clock))
    title = f"Choosing, {chosen.kv_heads} KV heads of {chosen.head_dim}"
    tables = [table_of_builds(builds)] if builds else []
    tables += [table_of_choices(choices, title)] if choices else []
    console.print(device_name(CPU), *tables)
    if chosen.json:
        content = provenance("benchmarks.index_on_cpu", arguments, CPU)
        content |= {"builds": [asdict(each) for each in builds]}
        write_json(chosen.json, content | {"choices": [asdict(each) for each in choices]})


def measure_build(size: int, head_dim: int, clock: Clock) -> Build:
    """Return the time to build the index of one KV head."""
    keys, end = topic_keys(size, 1, head_dim)[0], torch.tensor([size])
    made: list[KVIndex] = []

    def empty() -> None:
        made[:] = [make_index(1, 1, head_dim, IndexConfig(), CPU)]

    def sketched() -> None:
        empty()
        made[0].extend(keys, end)

    sketches = clock.least(lambda: made[0].extend(keys, end), empty)
    chunks = clock.least(lambda: made[0].complete(keys), sketched)
    return Build(size, head_dim, sketches, chunks)


def measure_choice(size: int, shape: tuple[int, int], budget: int, clock: Clock) -> Choice:
    """Return the time of one choice in both ways, for KV heads and head_dim of `shape`."""
    (heads, head_dim), group = shape, 4
    keys, topics = topic_keys(size, heads, head_dim)
    query = 2 * topics[: group * heads, None] + normal(1, group * heads, 1, head_dim)
    inputs, times = ScoreInputs(query[None], keys, size, None, head_dim**-0.5), []
    for flat_tokens in (size, 0):
        config = IndexConfig(budget=budget, flat_tokens=flat_tokens)
        index = make_index(1, heads, head_dim, config, CPU)
        index.extend(keys, torch.tensor([size]))
        index.complete(keys)
        times.append(clock.least(partial(select, index, inputs, budget)))
    return Choice(size, *times)


def topic_keys(size: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return keys [1, heads, size, head_dim] around a common mean, and their topics."""
    topics = normal(0, TOPICS, head_dim)
    turns = torch.Generator().manual_seed(0)
    topic = torch.randint(TOPICS, (size // TURN + 1,), generator=turns)
    keys = 2 * normal(2, 1, 1, 1, head_dim) + 0.7 * normal(3, 1, heads, size, head_dim)
    return keys + topics[topic.repeat_interleave(TURN)[:size]], topics


def normal(seed: int, *shape: int) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table_of_builds(builds: Sequence[Build]) -> Table:
    """Return a table with one row for each index that was built."""
    table = Table(
        "tokens", "head_dim", "sketches, ms", "chunks, clusters, units, ms", "all, ms",
        title="Building the index of one KV head",
    )  # fmt: skip
    for each in builds:
        table.add_row(
            f"{each.tokens:,}", str(each.head_dim), f"{each.sketches:.0f}", f"{each.chunks:.0f}",
            f"{each.sketches + each.chunks:.0f}",
        )  # fmt: skip
    return table


def table_of_choices(choices: Sequence[Choice], title: str) -> Table:
    """Return a table with one row for each length."""
    table = Table("tokens", "all sketches, ms", "narrowed, ms", title=title)
    for each in choices:
        table.add_row(f"{each.tokens:,}", f"{each.flat:.1f}", f"{each.narrowed:.1f}")
    return table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--built", type=tokens, nargs="*", default=[30000, 60000, 120000], metavar="N")
    add("--chosen", type=tokens, nargs="*", metavar="N",
        default=[16000, 32000, 60000, 90000, 120000, 240000])  # fmt: skip
    add("--kv-heads", type=positive, default=2, help="KV heads of a choice, 2 by default")
    add("--head-dim", type=positive, default=64, help="head_dim of a choice, 64 by default")
    add("--budget", type=tokens, default=1024, help="tokens that a step reads; 1024 by default")
    add("--threads", type=positive, help="threads of PyTorch; its own number by default")
    add("--runs", type=positive, default=15, help="runs of each measurement, 15 by default")
    add("--processor-time", action="store_true", help="measure the time of the processor")
    add("--json", type=Path, metavar="PATH", help="write what was measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
