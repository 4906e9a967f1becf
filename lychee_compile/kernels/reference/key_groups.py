"""Groups of neighbouring keys that a prefill policy ranks: blocks of one size, or chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class KeyGroups:
    """N groups that together hold every key, in the order of the keys."""

    label: Tensor
    """Number of the group of each key, int64 [B or 1, L]; it never falls."""
    bounds: Tensor
    """First key of each group, and L at the end, int64 [B or 1, N + 1]; an unused group is empty.
    """

    @staticmethod
    def of_labels(label: Tensor, count: int) -> KeyGroups:
        """Return the `count` groups of the keys with these labels, int64 [B or 1, L]."""
        numbers = torch.arange(count + 1, device=label.device).expand(len(label), -1)
        bounds = torch.searchsorted(label.contiguous(), numbers.contiguous())
        return KeyGroups(label, bounds)

    @staticmethod
    def of_size(size: int, kv_len: int, device: torch.device) -> KeyGroups:
        """Return groups of `size` keys; the last may have fewer."""
        label = torch.arange(kv_len, device=device)[None] // size
        return KeyGroups.of_labels(label, -(-kv_len // size))

    def count(self, through: Tensor) -> Tensor:
        """Count keys by group, int32 [..., N]; `through` is what `keys_before` returns."""
        return self._at(through, self.bounds).diff(dim=-1)

    def offsets(self, ahead: Tensor, through: Tensor) -> Tensor:
        """Return what to add to `keys_before` for the place of a key: [..., N].

        The groups are put in another order, in which `ahead`, [..., N], keys stand ahead of each.
        """
        return ahead - self._at(through, self.bounds[:, :-1])

    def spread(self, of_groups: Tensor) -> Tensor:
        """Repeat values [B, H, tiles, N] for the keys of each group: [B, H, tiles, L]."""
        return self._at(of_groups, self.label)

    def _at(self, values: Tensor, index: Tensor) -> Tensor:
        """Return values [B or 1, H, tiles, M] at an index [B or 1, K]: [B or 1, H, tiles, K]."""
        batch = max(len(values), len(index))
        wide = index[:, None, None].expand(batch, *values.shape[1:3], -1)
        return values.expand(batch, -1, -1, -1).gather(-1, wide)


def keys_before(chosen: Tensor) -> Tensor:
    """Count the keys `chosen`, bool [..., L], before each key and in all: int32 [..., L + 1]."""
    return F.pad(chosen.cumsum(-1, dtype=torch.int32), (1, 0))


def standing(rank: Tensor, counts: Tensor) -> Tensor:
    """Return how many keys stand ahead of each group, the groups in falling order: int32 [..., N].

    `rank` is [..., N], `counts` the number of keys of each group. Equals keep their order.
    """
    order = rank.argsort(dim=-1, descending=True, stable=True)
    sizes = counts.int().expand(order.shape).gather(-1, order)
    ahead = sizes.cumsum(-1, dtype=torch.int32) - sizes
    return torch.empty_like(ahead).scatter_(-1, order, ahead)
