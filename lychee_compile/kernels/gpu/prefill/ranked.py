"""Prefill by positions or by groups of keys, chosen by kernels. The host never waits.

Some tiles of all heads are in work at a time. For a `GroupUnion`, PyTorch multiplies the askers of
these tiles with the vectors of all groups, in float16. Only the order of a ranking counts, so the
mean of all groups is taken away and lengths are scaled to 1 before. Kernels do the rest.
"""

from __future__ import annotations

from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import TileTuning
from lychee_compile.kernels.gpu.prefill.launch import EDGE_NUMBERS, PrefillBudget, run_prefill
from lychee_compile.kernels.gpu.prefill.lists import Lists, PrefillByLists
from lychee_compile.kernels.policies.prefill.union import GroupUnion
from lychee_compile.kernels.policies.registry import prefill_choice
from lychee_compile.kernels.reference.key_groups import KeyGroups
from lychee_compile.kernels.sizes import QUERY_TILE, power_of_two

LISTED = 2048
"""Keys that a program lists at a time."""
RANKED = 4096
"""Ranks that a program looks at at a time."""
LEVELS = 1024
"""Levels of a ranking; groups of one level count as equal."""
QUERY_COPIES = 6
"""About how many copies of its queries, in float32, the askers of a tile take."""


def run_by_kernels(
    module: ModuleType,
    operands: AttentionOperands,
    budget: PrefillBudget,
    tuning: TileTuning | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention of a prefill by a module whose kernels choose, as `run_prefill` does."""
    if not hasattr(module, "store_edges"):
        return run_prefill(module, operands, budget, tuning)
    return RankedPrefill(module, operands, budget, tuning).run()


class RankedPrefill(PrefillByLists):
    """The launches of one prefill, each tile over the last keys or over groups of keys."""

    def __init__(
        self,
        module: ModuleType,
        operands: AttentionOperands,
        budget: PrefillBudget,
        tuning: TileTuning | None = None,
    ) -> None:
        super().__init__(module, operands, tuning)
        self._capacity = budget.capacity(operands.kv_len)
        self._arguments |= {
            **budget.arguments(),
            "capacity": self._capacity,
            "SELF": budget.own and operands.query_len == operands.kv_len,
        }

    def lists(self, first_tile: int, tiles: int) -> Lists:
        """Return the keys that these tiles read."""
        heads = self._operands.query.shape[1]
        edge = self._edge[:, None, first_tile : first_tile + tiles].expand(-1, heads, -1, -1)
        edge = edge.reshape(-1, EDGE_NUMBERS).contiguous()  # kernels count on it
        chosen = edge.new_empty(len(edge), self._capacity)
        lists = Lists(first_tile, tiles, chosen, edge.new_empty(len(edge)), edge)
        if hasattr(self._module, "list_last"):
            arguments = {**self._of(lists), "LANES": LISTED}
            launch(self._module.list_last, (len(edge),), arguments, num_warps=4, num_stages=1)
        else:
            self._list_groups(lists)
        return lists

    def rank(self, first_tile: int, tiles: int) -> tuple[Tensor, Tensor]:
        """Return how the askers of these tiles rank all groups, and which askers are silent.

        The ranks are float16 [rows, askers, N]; the second is uint8 [rows, askers]. A row is a tile
        of a query head, or of the heads of a KV head if they read the same.
        """
        query, kv_heads = self._operands.query, self._operands.kv_heads
        begin, _, vectors = first_tile * QUERY_TILE, *self._groups
        askers = self._choice.ask(query[:, :, begin : begin + tiles * QUERY_TILE].float())
        length = torch.linalg.vector_norm(askers.vectors, dim=-1, keepdim=True)
        sign = -1 if self._module.SCALE < 0 else 1
        asking = (askers.vectors.nan_to_num() / length.clamp(min=1e-30) * sign).half()
        rows = asking.unflatten(2, (tiles, -1)).unflatten(1, (kv_heads, -1))
        silent = askers.silent.unflatten(2, (tiles, -1)).unflatten(1, (kv_heads, -1))
        if self._choice.shared:
            rows, silent = (each.movedim(2, 3) for each in (rows, silent))
        product = rows.flatten(2, 4) @ vectors.mT
        shape = rows.shape[0] * kv_heads * rows.shape[2] * (1 if self._choice.shared else tiles)
        return product.reshape(shape, -1, vectors.shape[2]), silent.reshape(shape, -1).byte()

    def _list_groups(self, lists: Lists) -> None:
        """List the keys of the groups that come first in any ranking."""
        module, (batch, heads, _, _) = self._module, self._operands.query.shape
        rank, silent = self.rank(lists.first_tile, lists.tiles)
        rows, askers, groups = rank.shape
        padded = power_of_two(askers)
        arguments = {
            **self._of(lists),
            "rank": rank,
            "silent": silent,
            "askers": askers,
            "groups": groups,
            "label": self._groups[0].label,
            "bounds": self._groups[0].bounds,
            "at_levels": silent.new_zeros(rows, askers, LEVELS, dtype=torch.int32),
            "places": silent.new_empty(rows, groups, dtype=torch.int32),
            "longest": self._choice.longest,
            "rankers": rows // (batch * lists.tiles),
            "SHARING": batch * heads * lists.tiles // rows,
            "ASKERS": padded,
            "LEVELS": LEVELS,
            "LANES": max(16, RANKED // padded),
            "KEYS": LISTED,
        }
        for kernel in (module.count_levels, module.list_groups):
            launch(kernel, (rows,), arguments, num_warps=4, num_stages=1)

    def _tile_bytes(self) -> int:
        listed = torch.int32.itemsize * self._capacity
        if hasattr(self._module, "list_last"):
            return listed
        operands, groups = self._operands, self._groups[1].shape[2]
        ranks = self._choice.askers * (2 * groups + torch.int32.itemsize * LEVELS)
        queries = torch.float32.itemsize * QUERY_TILE * operands.query.shape[-1]
        return listed + ranks + torch.int32.itemsize * groups + QUERY_COPIES * queries

    @cached_property
    def _edge(self) -> Tensor:
        """Slots that each tile always reads, int32 [B, tiles, 8], as `edges` returns them."""
        query = self._operands.query
        edge = query.new_zeros(len(query), self._tiles, EDGE_NUMBERS, dtype=torch.int32)
        arguments = {**self._arguments, "edge": edge, "tiles": self._tiles}
        grid = (len(query) * self._tiles,)
        launch(self._module.store_edges, grid, arguments, num_warps=4, num_stages=1)
        return edge

    @cached_property
    def _choice(self) -> GroupUnion:
        choice = prefill_choice(self._module.POLICY)
        if not isinstance(choice, GroupUnion):
            raise TypeError(f"policy {self._module.POLICY!r} no longer reads a union of groups")
        return choice

    @cached_property
    def _groups(self) -> tuple[KeyGroups, Tensor]:
        """The groups of all keys, numbers as int32 for every row, and their vectors.

        The vectors are float16 [B, Hkv, N, D], less their mean, and at most 1 long. Keys that no
        query sees count as 0.
        """
        key, batch = self._operands.key, len(self._operands.query)
        slot = torch.arange(key.shape[2], device=key.device)
        first, end = self._edge[..., 0].amin(1), self._edge[..., 5].amax(1)
        seen = (slot >= first[:, None]) & (slot < end[:, None])
        known = key.float().nan_to_num().masked_fill_(~seen[:, None, :, None], 0)
        groups, vectors = self._choice.group(known)
        label, bounds = (
            each.to(torch.int32).expand(batch, -1).contiguous()
            for each in (groups.label, groups.bounds)
        )
        apart = vectors - vectors.mean(2, keepdim=True)
        longest = torch.linalg.vector_norm(apart, dim=-1).amax(-1)[..., None, None]
        return KeyGroups(label, bounds), (apart / longest.clamp(min=1e-30)).half()
