"""Decoders that attend to a few keys of their own in front of a cache, in several spellings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, H, G, D, DV, MEMORY = 2, 2, 2, 16, 8, 4


def scored(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, cap: float = 0) -> Tensor:
    """Return attention written as products and a softmax, over heads repeated by hand."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    score = q @ k.mT * 0.3
    if cap:
        score = cap * torch.tanh(score / cap)
    if hidden is not None:
        score = score.masked_fill(hidden, -torch.inf)
    return score.softmax(-1) @ v


def one_operator(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Memory(nn.Module):
    """Keys and values [H, M, D] of a layer, in front of those of a cache."""

    def __init__(self, count: int = MEMORY, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(H, count, D).to(dtype))
        self.values = nn.Parameter(torch.randn(H, count, DV).to(dtype))
        self.scale = nn.Parameter(torch.ones(D).to(dtype))

    def before(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        front, wide = (each.expand(len(keys), -1, -1, -1) for each in (self.keys, self.values))
        return torch.cat((front, keys), 2), torch.cat((wide, values), 2)


class Growing(Memory):
    """A cache that grows by `cat` and is returned."""

    def forward(self, q: Tensor, ck: Tensor, cv: Tensor, k: Tensor, v: Tensor) -> Any:
        ck, cv = torch.cat((ck, k), 2), torch.cat((cv, v), 2)
        return self.attend(q, ck, cv), ck, cv

    def attend(self, q: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
        return one_operator(q, *self.before(ck, cv))


class Repeated(Growing):
    """The memory is a view, computed anew at each step and copied for every row."""

    def before(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        front = F.normalize(self.keys, dim=-1) * self.scale
        front = front.view(1, H, -1, D).repeat(len(keys), 1, 1, 1)
        wide = self.values.view(1, H, -1, DV).repeat(len(keys), 1, 1, 1)
        return torch.cat((front, keys), 2), torch.cat((wide, values), 2)


class OfAllHeads(Growing):
    """All heads share one memory, and scores have a soft-cap."""

    def before(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        front, wide = self.keys[:1].expand(B, H, -1, -1), self.values[:1].expand(B, H, -1, -1)
        return torch.cat((front, keys), 2), torch.cat((wide, values), 2)

    def attend(self, q: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
        return scored(q, *self.before(ck, cv), cap=3)


class TokensFirst(Growing):
    """The cache is [B, L, H, D], and heads come first before keys are joined."""

    def forward(self, q: Tensor, ck: Tensor, cv: Tensor, k: Tensor, v: Tensor) -> Any:
        ck = torch.cat((ck.transpose(1, 2), k.transpose(1, 2)), 1).transpose(1, 2)
        cv = torch.cat((cv.transpose(1, 2), v.transpose(1, 2)), 1).transpose(1, 2)
        return self.attend(q, ck, cv), ck, cv


class Biased(Growing):
    """Keys of the cache are biased by their distance, those of the memory are not."""

    def attend(self, q: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
        far = torch.arange(ck.shape[2] - 1, -1, -1, dtype=torch.float32)
        bias = F.pad(-0.01 * far, (self.keys.shape[1], 0))
        k, v = (each.repeat_interleave(G, 1) for each in self.before(ck, cv))
        return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


class WithSink(Growing):
    """A logit of each head takes its share of the softmax beside memory and cache."""

    def attend(self, q: Tensor, ck: Tensor, cv: Tensor) -> Tensor:
        k, v = (each.repeat_interleave(G, 1) for each in self.before(ck, cv))
        sink = self.scale[: H * G].view(1, -1, 1, 1).expand(len(q), -1, q.shape[2], 1)
        return torch.cat((q @ k.mT * 0.3, sink), -1).softmax(-1)[..., :-1] @ v


class Static(Memory):
    """A cache of fixed size, up to whose last token all are seen, and the memory besides."""

    def forward(
        self, q: Tensor, ck: Tensor, cv: Tensor, pos: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        ck.index_copy_(2, pos, k)
        cv.index_copy_(2, pos, v)
        slots = torch.arange(ck.shape[2], device=pos.device)
        seen = F.pad(slots <= pos[:, None], (self.keys.shape[1], 0), value=True)
        return one_operator(q, *self.before(ck, cv), seen[None, None])


class StaticHidden(Static):
    """A row of the batch does not see the memory: a tensor says which."""

    def forward(
        self, q: Tensor, ck: Tensor, cv: Tensor, pos: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        ck.index_copy_(2, pos, k)
        cv.index_copy_(2, pos, v)
        late = (torch.arange(ck.shape[2]) > pos[:, None]).expand(B, -1, -1)
        away = torch.tensor([False, True])[:, None, None].expand(B, len(pos), self.keys.shape[1])
        return scored(q, *self.before(ck, cv), torch.cat((away, late), -1)[:, None])


GROWING: list[Callable[[], Growing]] = [
    Growing, Repeated, OfAllHeads, TokensFirst, Biased, WithSink
]  # fmt: skip
STATIC: list[Callable[[], Static]] = [Static, StaticHidden]


def new(count: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, and a key and a value to write, of `count` tokens."""
    query, key = torch.randn(B, H * G, count, D), torch.randn(B, H, count, D)
    return query.to(dtype), key.to(dtype), torch.randn(B, H, count, DV).to(dtype)


def caches(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return caches of keys and values of `length` slots."""
    return torch.randn(B, H, length, D).to(dtype), torch.randn(B, H, length, DV).to(dtype)
