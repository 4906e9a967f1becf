"""Time of decode steps as a server has them, beside Inductor's in the same run.

    python -m benchmarks.decode.serving [--lengths 8192 32768] [--repeats 3] [--threads 1]

One attention with 8 query heads, 2 KV heads and a head_dim of 64 in float32, compiled by Inductor
and by the lychee backend. Both decode the same random tokens, in turns, step by step. A time is the
median over steps of what a compiled step takes; the ratio is the median over repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.lengths import tokens

HEADS, GROUP, HEAD_DIM = 2, 4, 64
WARM_UP, STEPS, ROOM = 6, 24, 1024
"""Steps before those that count, steps that count, and free slots of a static cache."""


class Serving:
    """Decoding over caches of `length` keys; `step` is the function to compile."""

    rows, queries = 4, 1

    def __init__(self, length: int) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.length, self.steps = length, 0
        self.keys, self.values = self.caches()

    def caches(self) -> list[Tensor]:
        """Return keys and values of `length` tokens and free slots: [rows, HEADS, slots, 64]."""
        return [self.randn(HEADS, self.length + ROOM) for _ in range(2)]

    def randn(self, heads: int, count: int) -> Tensor:
        """Return random float32 [rows, heads, count, HEAD_DIM]."""
        return torch.randn(self.rows, heads, count, HEAD_DIM, generator=self.random)

    def new(self) -> list[Tensor]:
        """Return query, key and value of the next tokens."""
        return [self.randn(heads, self.queries) for heads in (HEADS * GROUP, HEADS, HEADS)]

    def between(self) -> None:
        """Do what the server does outside of the compiled step."""

    def seconds(self, compiled: Callable[..., Any]) -> float:
        """Run the next step and return the time of its compiled part."""
        self.between()
        arguments = self.arguments()
        started = time.perf_counter()
        outputs = compiled(*arguments)
        taken = time.perf_counter() - started
        self.take(outputs)
        self.steps += 1
        return taken

    def arguments(self) -> list[Tensor]:
        """Return the arguments of the next step."""
        raise NotImplementedError

    def take(self, outputs: Any) -> None:
        """Take the caches that a step has returned."""


class BusyRows(Serving):
    """A static cache, every row of which is decoding."""

    alive = (True, True, True, True)

    def arguments(self) -> list[Tensor]:
        """Return new tokens, caches, position and the rows that are alive."""
        position = torch.tensor([self.length + self.steps])
        return [*self.new(), self.keys, self.values, position, torch.tensor(self.alive)]

    @staticmethod
    def step(
        query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor,
        position: Tensor, alive: Tensor,
    ) -> Tensor:  # fmt: skip
        """Write the new tokens and attend in the rows that are alive."""
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        seen = torch.arange(keys.shape[2]) <= position[:, None]
        mask = seen[None, None] & alive[:, None, None, None]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


class IdleRow(BusyRows):
    """A static cache, one row of which has no request."""

    alive = (True, False, True, True)


class NewTensors(Serving):
    """Keys that eager code makes anew before each step, as caches that page or offload."""

    def between(self) -> None:
        """Append the new tokens to the caches."""
        self.query, key, value = self.new()
        self.keys, self.values = torch.cat((self.keys, key), 2), torch.cat((self.values, value), 2)

    def arguments(self) -> list[Tensor]:
        """Return query and caches."""
        return [self.query, self.keys, self.values]

    @staticmethod
    def step(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend over all keys."""
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


class EagerTurn(Serving):
    """A growing cache, to which eager code appends 64 tokens before the measured steps."""

    def between(self) -> None:
        """Append a turn before the first step that counts."""
        if self.steps == WARM_UP:
            self.keys, self.values = [
                torch.cat((cache, self.randn(HEADS, 64)), 2) for cache in (self.keys, self.values)
            ]

    def arguments(self) -> list[Tensor]:
        """Return new tokens and caches."""
        return [*self.new(), self.keys, self.values]

    def take(self, outputs: Any) -> None:
        """Take the grown caches."""
        _, self.keys, self.values = outputs

    @staticmethod
    def step(
        query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append the new tokens and attend over all keys."""
        keys, values = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), keys, values


class NoTurn(EagerTurn):
    """A growing cache that only compiled steps touch."""

    def between(self) -> None:
        """Do nothing."""


class PackedAppended(Serving):
    """Four requests packed into one row; their new tokens are written in turns behind all."""

    rows, queries = 1, 4

    def __init__(self, length: int) -> None:
        super().__init__(length)
        slots, own = torch.arange(length + ROOM), length // self.queries
        self.owner = torch.where(slots < length, slots // own, slots % self.queries)

    def positions(self) -> Tensor:
        """Return the slots of the new tokens, one of each request."""
        return self.length + self.steps * self.queries + torch.arange(self.queries)

    def arguments(self) -> list[Tensor]:
        """Return new tokens, caches, their slots and the request of each slot."""
        return [*self.new(), self.keys, self.values, self.positions(), self.owner]

    @staticmethod
    def step(
        query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor,
        positions: Tensor, owner: Tensor,
    ) -> Tensor:  # fmt: skip
        """Write the new tokens; each attends over its own request."""
        keys.index_copy_(2, positions, key)
        values.index_copy_(2, positions, value)
        mask = torch.arange(keys.shape[2]) <= positions[:, None]
        mask = (mask & (owner[positions][:, None] == owner))[None, None]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


class PackedApart(PackedAppended):
    """Four requests packed into one row, each with free slots behind it."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.own = (length + ROOM) // self.queries
        self.owner = torch.arange(length + ROOM) // self.own

    def positions(self) -> Tensor:
        """Return the slots of the new tokens, one of each request."""
        first = self.own - ROOM // self.queries
        return torch.arange(self.queries) * self.own + first + self.steps


SERVING: dict[str, type[Serving]] = {
    "all rows busy": BusyRows,
    "an idle row": IdleRow,
    "new tensors": NewTensors,
    "no eager turn": NoTurn,
    "after an eager turn": EagerTurn,
    "packed, appended": PackedAppended,
    "packed, apart": PackedApart,
}


def measured(kind: type[Any], length: int, budget: int) -> tuple[float, float]:
    """Return the median seconds of a step compiled by Inductor and by the lychee backend."""
    torch.compiler.reset()
    options: dict[str, Any] = {"budget": budget}
    ways = [
        (kind(length), torch.compile(kind.step)),
        (kind(length), torch.compile(kind.step, backend="lychee", options=options)),
    ]
    times: list[list[float]] = [[], []]
    for _ in range(WARM_UP + STEPS):
        for (serving, compiled), taken in zip(ways, times, strict=True):
            taken.append(serving.seconds(compiled))
    dense, sparse = (statistics.median(taken[WARM_UP:]) for taken in times)
    return dense, sparse


@torch.no_grad()
def main() -> int:
    """Run the benchmark and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=tokens, nargs="+", default=[8192, 32768])
    parser.add_argument("--budget", type=tokens, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=sorted(SERVING), default=list(SERVING))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("steps", "keys", "inductor, ms", "lychee, ms", "lychee / inductor", "of repeats")
    table.title = f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32"
    for name in arguments.only:
        for length in arguments.lengths:
            pairs = [
                measured(SERVING[name], length, arguments.budget) for _ in range(arguments.repeats)
            ]
            table.add_row(name, f"{length:,}", *cells(pairs))
    Console().print(table)
    return 0


def cells(pairs: list[tuple[float, float]]) -> list[str]:
    """Return the cells of a row: medians in ms, the median ratio, and each repeat's ratio."""
    ratios = [sparse / dense for dense, sparse in pairs]
    medians = [f"{1e3 * statistics.median(times):.2f}" for times in zip(*pairs, strict=True)]
    each = " ".join(f"{ratio:.2f}" for ratio in ratios)
    return [*medians, f"{statistics.median(ratios):.2f}", each]


if __name__ == "__main__":
    sys.exit(main())
