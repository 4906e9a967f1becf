"""Decoders whose rows share the first keys of a cache, in several spellings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from memory_keys import one_operator, scored
from torch import Tensor, nn

B, H, G, D, DV = 3, 2, 2, 16, 8
PREFIX, SLOTS = 150, 40


def both(prefix: Tensor, own: Tensor) -> Tensor:
    """Return keys or values of the prefix [1, H, n, D] and those of each row behind them."""
    return torch.cat((prefix.expand(len(own), -1, -1, -1), own), 2)


class Static(nn.Module):
    """Rows write into a cache of fixed size, and see the prefix and their own up to `pos`."""

    def forward(
        self, q: Tensor, pk: Tensor, pv: Tensor, ck: Tensor, cv: Tensor, pos: Tensor, k: Any, v: Any
    ) -> Tensor:
        ck.index_copy_(2, pos, k)
        cv.index_copy_(2, pos, v)
        slots = torch.arange(pk.shape[2] + ck.shape[2], device=pos.device)
        seen = slots <= (pk.shape[2] + pos)[:, None]
        return self.attend(q, both(pk, ck), both(pv, cv), seen)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return one_operator(q, k, v, seen[None, None])


class Padded(Static):
    """The prefix has padding, and the last row does not see all of it; scores have a soft-cap."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        rows, slots = (
            torch.arange(len(q), device=q.device),
            torch.arange(k.shape[2], device=q.device),
        )
        begin = 5 + 20 * (rows == len(q) - 1)
        hidden = ~(seen[None] & (slots >= begin[:, None, None]))
        return scored(q, k, v, hidden[:, None], cap=3)


class WithSink(Static):
    """A logit of each head takes its share of the softmax beside all keys."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.ones(H * G))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        k, v = (each.repeat_interleave(G, 1) for each in (k, v))
        score = (q @ k.mT * 0.3).masked_fill(~seen, -torch.inf)
        sink = self.sink.view(1, -1, 1, 1).expand(len(q), -1, q.shape[2], 1)
        return torch.cat((score, sink), -1).softmax(-1)[..., :-1] @ v


class TokensFirst(Static):
    """Caches are [B, L, H, D], joined before heads come first."""

    def forward(
        self, q: Tensor, pk: Tensor, pv: Tensor, ck: Tensor, cv: Tensor, pos: Tensor, k: Any, v: Any
    ) -> Tensor:
        ck[:, pos], cv[:, pos] = k.transpose(1, 2), v.transpose(1, 2)
        count = pk.shape[1]
        keys, values = (
            torch.cat((shared.expand(len(own), -1, -1, -1), own), 1).transpose(1, 2)
            for shared, own in ((pk, ck), (pv, cv))
        )
        slots = torch.arange(keys.shape[2], device=pos.device)
        return self.attend(q, keys, values, slots <= (count + pos)[:, None])


class Growing(nn.Module):
    """Each row's own keys grow by `cat` and are returned."""

    def forward(
        self, q: Tensor, pk: Tensor, pv: Tensor, ck: Tensor, cv: Tensor, k: Tensor, v: Tensor
    ) -> Any:
        ck, cv = torch.cat((ck, k), 2), torch.cat((cv, v), 2)
        return one_operator(q, both(pk, ck), both(pv, cv)), ck, cv


class Biased(Growing):
    """Scores fall with the distance, over prefix and own keys alike."""

    def forward(
        self, q: Tensor, pk: Tensor, pv: Tensor, ck: Tensor, cv: Tensor, k: Tensor, v: Tensor
    ) -> Any:
        ck, cv = torch.cat((ck, k), 2), torch.cat((cv, v), 2)
        keys, values = (each.repeat_interleave(G, 1) for each in (both(pk, ck), both(pv, cv)))
        far = torch.arange(keys.shape[2] - 1, -1, -1, dtype=torch.float32)
        return (q @ keys.mT * 0.3 - 0.01 * far).softmax(-1) @ values, ck, cv


STATIC: list[Callable[[], Static]] = [Static, Padded, WithSink]


def prefix(dtype: torch.dtype = torch.float32, count: int = PREFIX) -> tuple[Tensor, Tensor]:
    """Return keys and values of a prefix."""
    return torch.randn(1, H, count, D).to(dtype), torch.randn(1, H, count, DV).to(dtype)


def caches(length: int, dtype: torch.dtype = torch.float32, rows: int = B) -> tuple[Tensor, Tensor]:
    """Return caches of keys and values of `length` slots."""
    return torch.randn(rows, H, length, D).to(dtype), torch.randn(rows, H, length, DV).to(dtype)


def new(
    count: int = 1, dtype: torch.dtype = torch.float32, rows: int = B
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, and a key and a value to write, of `count` tokens."""
    query, key = torch.randn(rows, H * G, count, D), torch.randn(rows, H, count, D)
    return query.to(dtype), key.to(dtype), torch.randn(rows, H, count, DV).to(dtype)


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    """Return tensors [B, H, L, D] as [B, L, H, D]."""
    return [each.transpose(1, 2).contiguous() for each in tensors]
