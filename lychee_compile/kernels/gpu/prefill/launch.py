"""Launch the kernels of a module for whole sequences: grids, scratch memory, arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import (
    Scratch,
    captured_arguments,
    power_of_two,
)
from lychee_compile.kernels.gpu.common.tuning import TileTuning, tile_tuning_for
from lychee_compile.kernels.policies.prefill.lychee import PARTS
from lychee_compile.kernels.reference.tiles import TILE

SCRATCH_BYTES = 2**29
"""Scratch memory that the tiles at work at the same time may take, about."""
TOGETHER = 16
"""Tiles of one head that read keys together, at most."""
ASK_BYTES, ASKING_BYTES = 2**14, 2**15
"""Of the centres of those of a program, in `ask` and in `scan`."""
SCANNED = 4096
"""Keys that a program of `scan` reads, at least."""
LANES, CHOOSE_REGISTERS = 4096, 128
"""Bins that `choose` looks at at a time; numbers of a thread, so that two programs fit together."""
SCAN_BYTES = 2**14
"""Of keys that `ask` and `scan` read at a time, about."""
ALL = 2**30
"""More keys than there are."""


def run_tiles(
    module: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    extra: Tensor | None,
    budget: float,
    shortest: int = 0,
    own: bool = True,
    tuning: TileTuning | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `query` [B, Hq, T, D] over part of `key` [B, Hkv, L, D].

    `value` is [B, Hkv, L, Dv]; a tile reads `budget` keys, below 1 that share of those it sees, and
    all of them where it sees less than `shortest`. With `own`, query i of as many queries as keys
    is the token of key i, and reads what is near it. Returns the output [B, Hq, T, Dv] and the
    log-sum-exp of the scores read, float32 [B, Hq, T].
    """
    launch = TileLaunch(module, query, key, value, captured, extra, budget, shortest, own, tuning)
    for first_row, count in launch.slices():
        launch.select(first_row, count)
        launch.attend(first_row, count)
    return launch.output, launch.log_sums


class TileLaunch:
    """One attention of a whole sequence: what its kernels read and write.

    A row is a tile of one head, in the order of heads. Where scratch memory for all would be large,
    some rows are done after others.
    """

    def __init__(
        self,
        module: ModuleType,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captured: Sequence[Tensor],
        extra: Tensor | None,
        budget: float,
        shortest: int = 0,
        own: bool = True,
        tuning: TileTuning | None = None,
    ) -> None:
        batch, heads, query_len, head_dim = query.shape
        kv_len, value_dim = key.shape[2], value.shape[-1]
        self._module = module
        self._tuning = tuning or tile_tuning_for(module, query, key, value)
        self._shortest = shortest
        self._share, self._most = (budget, ALL) if budget < 1 else (2.0, min(int(budget), ALL))
        self.output = query.new_empty(batch, query_len, heads, value_dim).transpose(1, 2)
        self.log_sums = query.new_empty(batch, heads, query_len, dtype=torch.float32)
        logits = self.log_sums[:1, :1, :1] if extra is None else extra
        logits = logits.expand(batch, heads, query_len)
        self.tiles = -(-query_len // (TILE * TOGETHER)) * TOGETHER
        """Tiles of one head, filled up with empty ones."""
        self._rows = batch * heads * self.tiles
        most = int(budget * kv_len) + 1 if budget < 1 else self._most
        self.capacity = min(max(most, shortest), kv_len)
        """Keys that a tile can choose."""
        at_once = SCRATCH_BYTES // ((kv_len + 4 * self.capacity) * TOGETHER) * TOGETHER
        self._at_once = max(TOGETHER, min(at_once, self._rows))
        self._splits = max(1, kv_len // SCANNED)
        wide = power_of_two(head_dim) * key.element_size()
        self._scanned_at_once = max(16, min(SCAN_BYTES // wide, 64))
        self._ask_together, self._together = (
            max(2, min(size // (PARTS * wide), TOGETHER)) for size in (ASK_BYTES, ASKING_BYTES)
        )
        self._bin_room = -(-kv_len // 16) * 16  # rows of bins that can be read 16 at a time
        scratch = Scratch()
        scratch.want("centres", query.dtype, self._at_once, PARTS, head_dim)
        scratch.want("totals", torch.float32, self._at_once, PARTS)
        scratch.want("edge", torch.int32, self._at_once, 8)
        scratch.want("bins", torch.uint8, self._at_once, self._bin_room)
        scratch.want("chosen", torch.int32, self._at_once, self.capacity)
        scratch.want("counts", torch.int32, self._at_once)
        self.made = scratch.allocate(query.device)
        self._query, self._key = (query, *query.stride()), (key, *key.stride())
        self._value, self._logits = (value, *value.stride()), (logits, *logits.stride())
        self._sizes = (heads, self.tiles, query_len, kv_len)
        self._more, self._self = captured_arguments(captured), own and query_len == kv_len

    def slices(self) -> Iterator[tuple[int, int]]:
        """First row and number of rows that are done together."""
        for first_row in range(0, self._rows, self._at_once):
            yield first_row, min(self._at_once, self._rows - first_row)

    def select(self, first_row: int, count: int) -> None:
        """Find what these rows read, besides what they read in any case."""
        module, made, where = self._module, self.made, (first_row, *self._sizes)
        module.ask[(count // self._ask_together,)](
            *self._query, *self._key, made["centres"], made["totals"], made["edge"],
            *where, *self._more,
            KEYS=self._scanned_at_once, TILES=self._ask_together, SELF=self._self,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        module.scan[(count // self._together, self._splits)](
            *self._key, made["centres"], made["totals"], made["edge"], made["bins"],
            self._bin_room, *where, self._splits, *self._more,
            KEYS=self._scanned_at_once, TILES=self._together, num_warps=4, num_stages=2,
        )  # fmt: skip
        module.choose[(count,)](
            made["edge"], made["bins"], self._bin_room, made["chosen"], made["counts"],
            self.capacity, self._share, self._most, self._shortest,
            LANES=LANES, num_warps=8, num_stages=1, maxnreg=CHOOSE_REGISTERS,
        )  # fmt: skip

    def attend(self, first_row: int, count: int) -> None:
        """Attention of these rows over what they read."""
        made, tuning, output = self.made, self._tuning, self.output
        limit = {"maxnreg": tuning.registers} if tuning.registers else {}
        self._module.attend[(count, TILE // tuning.rows)](
            *self._query, *self._key, *self._value, *self._logits,
            output, *output.stride(), self.log_sums,
            made["edge"], made["chosen"], made["counts"], self.capacity,
            first_row, *self._sizes, *self._more,
            ROWS=tuning.rows, KEYS=tuning.keys,
            num_warps=tuning.warps, num_stages=tuning.stages, **limit,
        )  # fmt: skip
