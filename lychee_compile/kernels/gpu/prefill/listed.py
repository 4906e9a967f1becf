"""Prefill by a policy that chooses in PyTorch: the same function as its plain form, on the device.

A kernel of the site's module says what each tile of queries sees, without a mask in memory. The
policy chooses, some tiles of all heads at a time, so that memory stays bounded. The keys that it
leaves are listed, and generated kernels attend. The host waits once for each such group of tiles.
"""

from __future__ import annotations

from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import TileTuning
from lychee_compile.kernels.gpu.prefill.launch import EDGE_NUMBERS, LANES
from lychee_compile.kernels.gpu.prefill.lists import Lists, PrefillByLists
from lychee_compile.kernels.policies.registry import prefill_choice
from lychee_compile.kernels.reference.prefill_attention import PrefillConfig
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion, as_drawn
from lychee_compile.kernels.reference.tiles import Sight, TileSight, always_read
from lychee_compile.kernels.sizes import QUERY_TILE

PAIR_BYTES = 64
"""About how many bytes a choice takes for each key and each tile of a head."""
SEEN_QUERIES, SEEN_KEYS = 32, 128
"""Queries and keys that a program of `see_tiles` looks at at a time."""


def chooses_in_pytorch(module: ModuleType) -> bool:
    """Return True if `ListedPrefill` runs the kernels of a prefill, and not `run_prefill`."""
    return hasattr(module, "see_tiles")


def listed_config(module: ModuleType, budget: float, shortest: int = 0) -> PrefillConfig:
    """Return the settings of a prefill by this module; `budget` and `shortest` are given anew."""
    choice, sinks, recent = prefill_choice(module.POLICY), module.SINKS.value, module.RECENT.value
    return PrefillConfig(choice, budget, sinks, recent, shortest=shortest)


class ListedPrefill(PrefillByLists):
    """The choices and launches of one prefill, each tile over the keys that its policy chooses."""

    def __init__(
        self,
        module: ModuleType,
        operands: AttentionOperands,
        config: PrefillConfig,
        order: Tensor | None = None,
    ) -> None:
        """Take the operands; `order`, int64 [T], are the positions of queries in another order."""
        super().__init__(module, operands)
        self._config = config
        batch, heads, query_len, _ = operands.query.shape
        kv_len, device = operands.kv_len, operands.query.device
        self._sight = Sight(None, False, batch, query_len, kv_len, device, order)
        self._facts: dict[object, Any] = {}
        self._arguments |= {
            "seen_heads": heads if module.BY_HEAD else 1,
            "SELF": order is None and query_len == kv_len,
            "QUERIES": SEEN_QUERIES,
            "LANES": LANES,
        }

    def lists(self, first_tile: int, tiles: int) -> Lists:
        """Return the keys that these tiles read."""
        sight, edge = self.see(first_tile, tiles)
        question = self.question(first_tile, sight)
        chosen = as_drawn(self._config.choice(question)).read
        read = (sight.always | chosen).flatten(0, 2).contiguous()
        capacity = max(1, int(read.sum(-1).max()))
        chosen = edge.new_empty(len(read), capacity)
        lists = Lists(first_tile, tiles, chosen, edge.new_empty(len(read)), edge)
        arguments = {**self._of(lists), "read": read.view(torch.uint8)}
        launch(self._module.list_keys, (len(read),), arguments, num_warps=4, num_stages=1)
        return lists

    def _tile_bytes(self) -> int:
        return self._operands.kv_len * PAIR_BYTES

    def question(self, first_tile: int, sight: TileSight) -> PrefillQuestion:
        """Return the question to the policy about tiles that see this."""
        query, module = self._operands.query, self._module
        begin, tiles = first_tile * QUERY_TILE, sight.some.shape[2]
        room = self._config.room(sight, query.shape[1])
        return PrefillQuestion(
            query=query[:, :, begin : begin + tiles * QUERY_TILE].float(),
            key=self._known_key,
            scale=module.SCALE,
            softcap=module.SOFTCAP,
            sight=sight,
            room=room.expand(query.shape[0], -1, -1),
            facts=self._facts,
        )

    def attend_first(self, tuning: TileTuning | None = None) -> None:
        """Attend from the queries of the first tiles."""
        self.attend(self._first_lists, tuning)

    @cached_property
    def _first_lists(self) -> Lists:
        return self.lists(*next(self.slices()))

    @cached_property
    def _known_key(self) -> Tensor:
        """Keys as float32 [B, Hkv, L, D], without the NaN that unseen keys may hold."""
        return self._operands.key.float().nan_to_num()

    def see(self, first_tile: int, tiles: int) -> tuple[TileSight, Tensor]:
        """Return what these tiles see, and slots that they always read, int32 [rows, 8]."""
        module, query, kv_len = self._module, self._operands.query, self._operands.kv_len
        batch, heads, query_len, _ = query.shape
        size = batch, heads if module.BY_HEAD else 1, tiles
        held = query.new_empty(*size, kv_len, dtype=torch.uint8)
        bias = query.new_empty(*size, kv_len, dtype=torch.float32) if module.BIASED else None
        sighted = query.new_zeros(*size[:2], query_len, dtype=torch.uint8)
        edge = query.new_zeros(*size, EDGE_NUMBERS, dtype=torch.int32)
        arguments = {
            **self._arguments,
            "held": held,
            "mean_bias": held if bias is None else bias,
            "sighted": sighted,
            "edge": edge,
            "first_tile": first_tile,
            "tiles": tiles,
            "KEYS": SEEN_KEYS,
        }
        grid = size[0] * size[1] * tiles, -(-kv_len // SEEN_KEYS)
        launch(module.see_tiles, grid, arguments, num_warps=4, num_stages=1)
        of_rows = edge.expand(-1, heads, -1, -1).reshape(-1, EDGE_NUMBERS).contiguous()
        return self._sight_of(first_tile, held, sighted, bias), of_rows

    def _sight_of(
        self, first_tile: int, held: Tensor, sighted: Tensor, bias: Tensor | None
    ) -> TileSight:
        """Return what tiles see, by how many queries of a tile see each key, and which see any."""
        config, some, tiles = self._config, held > 0, held.shape[2]
        begin, query_len = first_tile * QUERY_TILE, self._operands.query_len
        mine = sighted[:, :, begin : begin + tiles * QUERY_TILE]
        filled = F.pad(mine, (0, tiles * QUERY_TILE - mine.shape[-1]))
        count = filled.unflatten(-1, (tiles, QUERY_TILE)).sum(-1, keepdim=True)
        firsts = range(begin, begin + tiles * QUERY_TILE, QUERY_TILE)
        near = [
            self._sight.near(first, min(first + QUERY_TILE, query_len), config.recent)
            for first in firsts
        ]
        every = some & (held == count)
        always = always_read(some, every, config.sinks, config.recent, torch.stack(near))
        return TileSight(some, always, bias)
