"""Runs of slots and of other numbers: expanded, packed from masks, and what stands there."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_runs(start: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers in runs, one after the other, the run of each, and which are real.

    A run is `length` numbers from `start`, each int64 [..., R]. All results are [..., M], where M
    is the most numbers that any row has. Entries that only fill up are number 0 of the last run.
    """
    ends = length.cumsum(-1)
    most = int(ends[..., -1].max()) if ends.numel() else 0
    place = torch.arange(most, device=ends.device).expand(*ends.shape[:-1], most).contiguous()
    run = torch.searchsorted(ends, place, right=True)
    real = run < ends.shape[-1]
    run = run.clamp(max=max(ends.shape[-1] - 1, 0))
    number = start.gather(-1, run) + place - (ends - length).gather(-1, run)
    return torch.where(real, number, 0), run, real


def packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places that are set in a mask [..., N], in order, and which of them are real.

    Both are [..., M], where M is the most places that any row has. Others are 0 and not real.
    """
    rows = mask.flatten(0, -2)
    row, column = rows.nonzero(as_tuple=True)
    count = rows.sum(-1)
    most = int(count.max()) if count.numel() else 0
    number = torch.arange(len(row), device=mask.device) - (count.cumsum(0) - count)[row]
    places = column.new_zeros(len(rows), most)
    places[row, number] = column
    real = torch.arange(most, device=mask.device) < count[:, None]
    return places.unflatten(0, mask.shape[:-1]), real.unflatten(0, mask.shape[:-1])


def take_rows(values: Tensor, number: Tensor) -> Tensor:
    """Return the values [B, 1 or H, N, ...] at numbers int64 [B, H, M]: [B, H, M, ...].

    Whole rows are copied, which on a CPU is many times as fast as `gather`.
    """
    first = torch.arange(values.shape[0] * values.shape[1], device=values.device) * values.shape[2]
    at = first.view(values.shape[0], -1, 1) + number
    return values.flatten(0, 2).index_select(0, at.flatten()).view(*at.shape, *values.shape[3:])


def rows_of(values: Tensor, row: Tensor, number: Tensor) -> Tensor:
    """Return where numbers of rows, each int64 [C], stand in the flat values [B * H * N]: [C, H].

    The values are [B, H, N, ...].
    """
    heads = torch.arange(values.shape[1], device=row.device)
    return (row[:, None] * values.shape[1] + heads) * values.shape[2] + number[:, None]
