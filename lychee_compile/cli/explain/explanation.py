"""Facts that `explain` shows: what becomes of each kind of attention, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lychee_compile.cli.explain.index_costs import CacheShape, IndexCosts
from lychee_compile.cli.explain.trace import Decoding
from lychee_compile.passes.site import Site
from lychee_compile.report.grouping import group_sites


@dataclass(frozen=True)
class Costs:
    """Costs of the attention of one step, of one attention or of many together."""

    keys_read: int
    """Number of keys that a query reads of one KV head; of many attentions the sum."""
    keys: int
    """Number of keys that dense attention reads; of many attentions the sum."""
    bytes_read: int
    """Bytes of keys, values and index that a step reads, of all rows."""
    dense_bytes: int
    """Bytes of keys and values that dense attention reads, of all rows."""
    index_bytes: int
    """Bytes of memory of the index; 0 without one."""
    index_seconds: float | None
    """Time to build the index once, about; None if it is not known."""

    @property
    def share(self) -> float:
        """Bytes that a step reads, as a share of those of dense attention."""
        return self.bytes_read / max(self.dense_bytes, 1)


@dataclass(frozen=True)
class Kind:
    """Attentions of a model that differ in nothing but their layer."""

    pattern: str
    """Module paths, "model.layers.{0-31}.self_attn"."""
    count: int
    site: Site
    costs: Costs
    """Costs of all of them."""

    def to_dict(self) -> dict[str, Any]:
        """Return the kind as plain values."""
        return {
            "attentions": self.pattern,
            "count": self.count,
            **asdict(self.site),
            **_costs(self.costs),
        }


@dataclass(frozen=True)
class Explanation:
    """A step of decoding over a full cache of one length."""

    context: int
    kinds: list[Kind]
    cache_bytes: int
    costs: Costs
    """Costs of all attentions."""
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as plain values, for JSON."""
        return {
            "context": self.context,
            "attentions": [kind.to_dict() for kind in self.kinds],
            "cache_bytes": self.cache_bytes,
            "cache_bytes_per_token": self.cache_bytes / self.context,
            "index_bytes_per_token": self.costs.index_bytes / self.context,
            **_costs(self.costs),
            "notes": self.notes,
        }


def explanation_of(
    decoding: Decoding,
    context: int,
    index: IndexCosts,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Explanation:
    """Return the explanation of a traced step over a cache of `context` slots."""
    kinds = []
    for pattern, members in group_sites(decoding.report.sites):
        site = members[0]
        each = _costs_of(site, batch, index, dtype, device)
        kinds.append(Kind(pattern or "(unnamed)", len(members), site, _times(each, len(members))))
    total = _sum([kind.costs for kind in kinds])
    notes = [*decoding.report.notes, *decoding.report.rejections()]
    return Explanation(context, kinds, decoding.cache_bytes, total, notes)


def _costs_of(
    site: Site, batch: int, index: IndexCosts, dtype: torch.dtype, device: torch.device
) -> Costs:
    """Return the costs of one attention; sizes that are not known count as 0."""
    sizes = (site.kv_heads, site.kv_len, site.head_dim, site.value_head_dim)
    kv_heads, keys, head_dim, value_dim = (n if isinstance(n, int) else 0 for n in sizes)
    per_key = batch * kv_heads * (head_dim + value_dim) * dtype.itemsize
    dense = Costs(keys, keys, per_key * keys, per_key * keys, 0, 0.0)
    budget = index.options.budget
    if site.decision != "sparse" or budget is None or 0 in (kv_heads, keys, head_dim):
        return dense
    shape = CacheShape(batch, kv_heads, keys, head_dim, dtype, device)
    read = min(budget, keys)
    return replace(
        dense,
        keys_read=read,
        bytes_read=per_key * read + index.bytes_per_step(shape, budget),
        index_bytes=index.bytes(shape),
        index_seconds=index.build_seconds(shape),
    )


def _times(costs: Costs, count: int) -> Costs:
    return _sum([costs] * count)


def _sum(costs: Sequence[Costs]) -> Costs:
    known = [each.index_seconds for each in costs if each.index_seconds is not None]
    return Costs(
        keys_read=sum(each.keys_read for each in costs),
        keys=sum(each.keys for each in costs),
        bytes_read=sum(each.bytes_read for each in costs),
        dense_bytes=sum(each.dense_bytes for each in costs),
        index_bytes=sum(each.index_bytes for each in costs),
        index_seconds=sum(known) if len(known) == len(costs) else None,
    )


def _costs(costs: Costs) -> dict[str, Any]:
    return {**asdict(costs), "share_of_dense_bytes": costs.share}
