"""Launch the kernels of a module for prefill: grids, scratch memory, arguments. No host sync."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import Scratch, launch
from lychee_compile.kernels.gpu.common.operands import AttentionOperands, strided
from lychee_compile.kernels.gpu.common.tuning import TileTuning, tile_tuning_for
from lychee_compile.kernels.reference.drawing import draws_keys
from lychee_compile.kernels.sizes import QUERY_TILE, SLOT_BITS, power_of_two

SCRATCH_BYTES = 2**29
"""About how much scratch memory the tiles at work at the same time may take."""
TOGETHER = 16
"""Tiles of one head that read keys together, at most."""
SUMMARY_BYTES, SCAN_CENTRE_BYTES = 2**14, 2**15
"""Most bytes of the centres that a program of `summarise_queries`, and one of `scan`, works on."""
PRODUCT_ROWS = 16
"""Centres of a program, at least, which a tensor core's product takes."""
SCANNED = 4096
"""Keys that a program of `scan` reads, at least."""
LANES = 4096
"""Bins that `select_keys` looks at at a time."""
SELECT_REGISTERS = 128
"""Most registers of a thread of `select_keys`: two programs fit on a multiprocessor."""
KEY_BYTES = 2**14
"""About how many bytes of keys `summarise_queries` and `scan` read at a time."""
EDGE_NUMBERS = 8
"""Numbers that `summarise_queries` leaves of the slots that a tile always reads."""
ALL = 2**30
"""A number of keys greater than any cache has."""


@dataclass(frozen=True)
class PrefillBudget:
    """Numbers of keys that the tiles of a prefill read."""

    keys: float
    """Number of keys that a tile reads; if below 1, their share of the keys it sees."""
    shortest: int = 0
    """Tiles that see fewer keys read all of them."""
    coverage: float | None = None
    """Share of the softmax over the keys that may be chosen at which the list of a tile ends; None:
    at `keys` alone. Only a policy that draws keys knows it."""
    own: bool = True
    """True if query i is the token of key i, when there are as many queries as keys.

    A tile then always reads the keys near its own tokens.
    """

    @property
    def most(self) -> int:
        """Number of keys that a tile reads at most; `ALL` if a share of them is asked for."""
        return ALL if self.keys < 1 else min(int(self.keys), ALL)

    def capacity(self, kv_len: int) -> int:
        """Return the number of keys that a tile can choose of `kv_len`."""
        most = int(self.keys * kv_len) + 1 if self.keys < 1 else self.most
        return min(max(most, self.shortest), kv_len)

    def arguments(self) -> dict[str, object]:
        """Return the arguments of the kernels that choose, by name."""
        share = self.keys if self.keys < 1 else 2.0
        return {
            "share": share,
            "most": self.most,
            "shortest": self.shortest,
            "coverage": self.coverage or 0.0,
        }


def run_prefill(
    module: ModuleType,
    operands: AttentionOperands,
    budget: PrefillBudget,
    tuning: TileTuning | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention of a prefill, each tile over the keys that matter to it.

    The output is [B, Hq, T, Dv]; the log-sum-exp of the scores read is float32 [B, Hq, T].
    """
    prefill = PrefillLaunch(module, operands, budget, tuning)
    for first_row, count in prefill.slices():
        prefill.select(first_row, count)
        prefill.attend(first_row, count)
    return prefill.output, prefill.log_sums


class PrefillLaunch:
    """The launches of one prefill, and the tensors that they read and write.

    A row is a tile of one head, in the order of heads. Rows are done in slices if the scratch
    memory for all of them would be large.
    """

    def __init__(
        self,
        module: ModuleType,
        operands: AttentionOperands,
        budget: PrefillBudget,
        tuning: TileTuning | None = None,
    ) -> None:
        self._module, self._operands, self._budget = module, operands, budget
        self._tuning = tuning or tile_tuning_for(module, operands)
        query, kv_len = operands.query, operands.kv_len
        batch, heads, query_len, _ = query.shape
        self.output, self.log_sums = new_outputs(operands)
        self.tiles = -(-query_len // (QUERY_TILE * TOGETHER)) * TOGETHER
        """Tiles of one head, filled up with empty ones."""
        self.capacity = budget.capacity(kv_len)
        """Number of keys that a tile can choose."""
        self._rows = batch * heads * self.tiles
        row_bytes = kv_len + torch.int32.itemsize * self.capacity
        at_once = SCRATCH_BYTES // (row_bytes * TOGETHER) * TOGETHER
        self._at_once = max(TOGETHER, min(at_once, self._rows))
        self._splits = max(1, kv_len // SCANNED)
        draws = draws_keys(budget.keys, kv_len) and kv_len <= 1 << SLOT_BITS
        self._slot_bits = SLOT_BITS if draws else 31
        self._bin_room = -(-kv_len // 16) * 16  # rows of bins that can be read 16 at a time
        self.scratch = self._scratch().allocate(query.device)
        self._arguments = self._named()

    @property
    def _key_bytes(self) -> int:
        """Bytes of a key, padded as products need it."""
        key = self._operands.key
        return power_of_two(key.shape[-1]) * key.element_size()

    def _scratch(self) -> Scratch:
        query, rows = self._operands.query, self._at_once
        scratch = Scratch()
        parts = self._module.PARTS.value
        scratch.want("centres", query.dtype, rows, parts, query.shape[-1])
        scratch.want("totals", torch.float32, rows, parts)
        scratch.want("edge", torch.int32, rows, EDGE_NUMBERS)
        scratch.want("bins", torch.uint8, rows, self._bin_room)
        scratch.want("luck", torch.uint8, self._bin_room)
        scratch.want("chosen", torch.int32, rows, self.capacity)
        scratch.want("counts", torch.int32, rows)
        return scratch

    def _named(self) -> dict[str, object]:
        """Return the arguments of all kernels by name, but for the first row."""
        operands, budget = self._operands, self._budget
        return {
            **attend_arguments(self._module, operands, self.output, self.log_sums),
            **self.scratch,
            "tiles": self.tiles,
            "splits": self._splits,
            "bin_room": self._bin_room,
            "capacity": self.capacity,
            **budget.arguments(),
            "SELF": budget.own and operands.query_len == operands.kv_len,
            "LANES": LANES,
            "SLOT_BITS": self._slot_bits,
            "COVERS": budget.coverage is not None and self._slot_bits < 31,
        }

    def slices(self) -> Iterator[tuple[int, int]]:
        """Yield the first row and the number of the rows that are done together."""
        for first_row in range(0, self._rows, self._at_once):
            yield first_row, min(self._at_once, self._rows - first_row)

    def select(self, first_row: int, count: int) -> None:
        """Choose the keys of these rows, besides those that a tile always reads."""
        module, keys = self._module, max(16, min(KEY_BYTES // self._key_bytes, 64))
        parts = module.PARTS.value
        summarised, scanning = (
            min(max(PRODUCT_ROWS // parts, size // (parts * self._key_bytes)), TOGETHER)
            for size in (SUMMARY_BYTES, SCAN_CENTRE_BYTES)
        )
        named = {**self._arguments, "first_row": first_row, "KEYS": keys}
        summarise, scan = {**named, "TILES": summarised}, {**named, "TILES": scanning}
        if hasattr(module, "deal_luck") and first_row == 0:
            grid = (-(-self._bin_room // LANES),)
            launch(module.deal_luck, grid, named, num_warps=4, num_stages=1)
        launch(
            module.summarise_queries, (count // summarised,), summarise, num_warps=4, num_stages=2
        )
        launch(module.scan, (count // scanning, self._splits), scan, num_warps=4, num_stages=2)
        launch(
            module.select_keys, (count,), named, num_warps=8, num_stages=1, maxnreg=SELECT_REGISTERS
        )

    def attend(self, first_row: int, count: int) -> None:
        """Attend from the queries of these rows to the keys that their tiles read."""
        launch_attend(
            self._module, count, {**self._arguments, "first_row": first_row}, self._tuning
        )


def new_outputs(operands: AttentionOperands) -> tuple[Tensor, Tensor]:
    """Return memory for the output, [B, Hq, T, Dv], and for log-sum-exps, float32 [B, Hq, T]."""
    query = operands.query
    batch, heads, query_len, _ = query.shape
    output = query.new_empty(batch, query_len, heads, operands.value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(batch, heads, query_len, dtype=torch.float32)


def attend_arguments(
    module: ModuleType, operands: AttentionOperands, output: Tensor, log_sums: Tensor
) -> dict[str, object]:
    """Return the tensors that `attend` reads and writes, and their strides, by name."""
    # Without extra logits the kernel reads none: any tensor stands for them.
    logits = log_sums[:1, :1, :1] if operands.extra is None else operands.extra
    return {
        **operands.arguments(module),
        **strided("extra", logits.expand(log_sums.shape), "bht"),
        **strided("output", output, "bhtd"),
        "log_sums": log_sums,
    }


def launch_attend(
    module: ModuleType, rows: int, arguments: dict[str, object], tuning: TileTuning
) -> None:
    """Attend from the queries of `rows` rows to the keys that their tiles read."""
    limit = {"maxnreg": tuning.registers} if tuning.registers else {}
    launch(
        module.attend,
        (rows, QUERY_TILE // tuning.rows),
        {**arguments, "ROWS": tuning.rows, "KEYS": tuning.keys},
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **limit,
    )
