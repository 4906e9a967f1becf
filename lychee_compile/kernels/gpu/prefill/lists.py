"""A prefill whose tiles read lists of keys: some tiles of all heads are listed, and then attend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import TileTuning, tile_tuning_for
from lychee_compile.kernels.gpu.prefill.launch import attend_arguments, launch_attend, new_outputs
from lychee_compile.kernels.sizes import QUERY_TILE

CHOICE_BYTES = 2**31
"""About how much memory the tiles in work may take; a policy's own function can take more."""


@dataclass(frozen=True)
class Lists:
    """The keys that some tiles of all heads read. A row is a tile of a head."""

    first_tile: int
    tiles: int
    chosen: Tensor
    """Slots, int32 [rows, capacity]."""
    counts: Tensor
    """Number of slots listed, int32 [rows]."""
    edge: Tensor
    """Slots that are always read and not listed, int32 [rows, 8], as `edges` returns them."""


class PrefillByLists(ABC):
    """The launches of one prefill; a subclass lists the keys that tiles read."""

    def __init__(
        self, module: ModuleType, operands: AttentionOperands, tuning: TileTuning | None = None
    ) -> None:
        self._module, self._operands, self._tuning = module, operands, tuning
        self.output, self.log_sums = new_outputs(operands)
        self._tiles = -(-operands.query_len // QUERY_TILE)
        self._arguments = attend_arguments(module, operands, self.output, self.log_sums)

    @abstractmethod
    def lists(self, first_tile: int, tiles: int) -> Lists:
        """Return the keys that these tiles read."""

    @abstractmethod
    def _tile_bytes(self) -> int:
        """Return about how many bytes a tile of one head takes."""

    def run(self) -> tuple[Tensor, Tensor]:
        """Return the output, [B, Hq, T, Dv], and the log-sum-exp of the scores read, [B, Hq, T]."""
        for first_tile, tiles in self.slices():
            self.attend(self.lists(first_tile, tiles), self._tuning)
        return self.output, self.log_sums

    def slices(self) -> Iterator[tuple[int, int]]:
        """Yield the first tile and the number of the tiles that are done together."""
        batch, heads = self._operands.query.shape[:2]
        at_once = max(1, CHOICE_BYTES // (batch * heads * self._tile_bytes()))
        for first_tile in range(0, self._tiles, at_once):
            yield first_tile, min(at_once, self._tiles - first_tile)

    def attend(self, lists: Lists, tuning: TileTuning | None = None) -> None:
        """Attend from the queries of these tiles to the keys that they read."""
        tuning = tuning or tile_tuning_for(self._module, self._operands)
        launch_attend(self._module, len(lists.counts), self._of(lists), tuning)

    def _of(self, lists: Lists) -> dict[str, object]:
        """Return the arguments of the kernels about some tiles, by name."""
        return {
            **self._arguments,
            "edge": lists.edge,
            "chosen": lists.chosen,
            "counts": lists.counts,
            "capacity": lists.chosen.shape[1],
            "first_tile": lists.first_tile,
            "tiles": lists.tiles,
        }
