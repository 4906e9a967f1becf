"""Lists of the groups below each cluster, as in an inverted file: a step reads only some of them.

The groups that a step looks into are listed once for each KV head. A mask says which of them each
query position looks into.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lychee_compile.kernels.reference.clustered import Columns
from lychee_compile.kernels.reference.runs import expand_runs, packed, take_rows


@dataclass(frozen=True)
class Listed:
    """Groups of one level that a step looks into."""

    number: Tensor
    """Numbers of the groups in rising order, int64 [B, Hkv, M]."""
    within: Tensor
    """Groups that each query position looks into, bool [B, Hkv, Tq, M]."""

    @staticmethod
    def of(number: Tensor, within: Tensor) -> Listed:
        """Return a list in order; numbers that no position looks into come last."""
        anybody = within.any(2)
        order = torch.where(anybody, number, torch.iinfo(number.dtype).max).argsort(
            dim=-1, stable=True
        )
        return Listed(
            number.gather(-1, order), within.gather(-1, order[:, :, None].expand_as(within))
        )

    def rows(self, values: Tensor) -> Tensor:
        """Return the values [B, 1 or Hkv, N, ...] of the groups: [B, Hkv, M, ...]."""
        return take_rows(values, self.number)

    def columns(self, columns: Columns) -> Columns:
        """Return the columns, each [B, 1 or Hkv, N, ...], of the groups."""
        return {name: self.rows(values) for name, values in columns.items()}


@dataclass(frozen=True)
class ChildLists:
    """The groups of a level, sorted by the cluster above that they belong to."""

    member: Tensor
    """Numbers of the groups, int64 [B, Hkv, N], those without a cluster first."""
    bounds: Tensor
    """Place in `member` where the groups of each cluster begin, and the end, int64 [B, Hkv, C + 1].
    """

    @staticmethod
    def of(label: Tensor, clusters: int) -> ChildLists:
        """List the groups by their `label`, int [B, Hkv, N], below so many clusters."""
        ordered, member = label.long().sort(dim=-1, stable=True)
        number = torch.arange(clusters + 1, device=label.device)
        number = number.expand(*label.shape[:2], -1).contiguous()
        return ChildLists(member, torch.searchsorted(ordered, number))

    def below(self, kept: Tensor, parents: Listed | None, label: Tensor) -> Listed:
        """Return the groups whose cluster is kept, bool [B, Hkv, Tq, P].

        `parents` are the P clusters; None: all there are. Groups whose `label`, int [B, Hkv, N], is
        no longer that of the list are left out.
        """
        place, real = packed(kept.any(2))
        cluster = place if parents is None else parents.number.gather(-1, place)
        begin, end = self.bounds.gather(-1, cluster), self.bounds.gather(-1, cluster + 1)
        at, run, inside = expand_runs(begin, torch.where(real, end - begin, 0))
        number = self.member.gather(-1, at)
        inside &= label.gather(-1, number) == cluster.gather(-1, run)
        wide = place.gather(-1, run)[:, :, None].expand(-1, -1, kept.shape[2], -1)
        return Listed.of(number, kept.gather(-1, wide) & inside[:, :, None])
