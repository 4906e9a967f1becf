"""A union of choices: each tile reads the groups of keys that come first in any ranking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lychee_compile.kernels.policies.prefill.positions import places
from lychee_compile.kernels.reference.key_groups import KeyGroups, keys_before
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion


@dataclass(frozen=True)
class Askers:
    """Vectors that stand for the queries of tiles; each ranks the groups of keys."""

    vectors: Tensor
    """float32 [B, Hq, tiles * askers, D]."""
    silent: Tensor
    """Askers that stand for no query and rank nothing, bool [B, Hq, tiles * askers]."""


@dataclass(frozen=True)
class GroupUnion:
    """A policy of prefill that reads the groups of keys that any asker of a tile prefers.

    An asker ranks the groups by their products with it. Equally many keys are taken from the top of
    every ranking, as many as the budget has room for.
    """

    group: Callable[[Tensor], tuple[KeyGroups, Tensor]]
    """Groups keys, float32 [B, Hkv, L, D]: returns the groups and their vectors, [B, Hkv, N, D]."""
    ask: Callable[[Tensor], Askers]
    """Returns the askers of queries, float32 [B, Hq, T, D], whose first begins a tile."""
    askers: int
    """Number of askers of a tile of one query head, at most."""
    longest: int
    """Number of keys of a group, at most."""
    shared: bool = False
    """True if the query heads of a KV head read one union; False if each reads its own."""

    def __call__(self, question: PrefillQuestion) -> Tensor:
        """Return the candidates that each tile reads, bool [B, Hq, tiles, L]."""
        groups, vectors = question.once(self.group)
        askers = self.ask(question.query)
        product = question.scale * question.products(askers.vectors, vectors)
        rank = product.masked_fill(askers.silent[..., None], -torch.inf)
        rank = rank.unflatten(2, (question.tiles, -1))
        seen = question.sight.candidates
        if self.shared:
            kv_heads = question.key.shape[1]
            rank = rank.unflatten(1, (kv_heads, -1)).movedim(2, 3).flatten(3, 4)
            if seen.shape[1] > 1:
                seen = seen.unflatten(1, (kv_heads, -1)).any(2)
        place = places(rank, groups.count(keys_before(seen)))
        if self.shared:
            place = question.per_query_head(place)
        return question.take_groups(-place, groups)
