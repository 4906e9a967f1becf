"""Small decoders with the cache forms that real ones have, quick to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 8, 2


@dataclass
class StaticKV:
    """Buffers of a static cache: keys and values [B, Hkv, L, D] of each layer, and the length."""

    keys: list[Tensor]
    values: list[Tensor]
    length: Tensor

    @staticmethod
    def empty(batch: int, size: int) -> StaticKV:
        def buffers() -> list[Tensor]:
            return [torch.zeros(batch, KV_HEADS, size, HEAD_DIM) for _ in range(LAYERS)]

        return StaticKV(buffers(), buffers(), torch.zeros((), dtype=torch.int64))

    def copy(self) -> StaticKV:
        """Return an independent copy."""
        return StaticKV(
            [key.clone() for key in self.keys],
            [value.clone() for value in self.values],
            self.length.clone(),
        )

    def tensors(self) -> list[Tensor]:
        """Return every key and value buffer."""
        return [*self.keys, *self.values]


Past = list[tuple[Tensor, Tensor]]


class TinyDecoder(nn.Module):
    """Two layers of causal attention, GQA, over a static or a growing cache."""

    def __init__(self, write: str = "index_copy") -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.write = write
        self.words = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(2048, width)
        self.queries = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))
        self.keys = nn.ModuleList(nn.Linear(width, KV_HEADS * HEAD_DIM) for _ in range(LAYERS))
        self.values = nn.ModuleList(nn.Linear(width, KV_HEADS * HEAD_DIM) for _ in range(LAYERS))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.25)

    def forward(
        self,
        ids: Tensor,
        cache: StaticKV | None = None,
        past: Past | None = None,
        valid: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Past]:
        """Hidden states [B, T, width] of `ids` [B, T], and the grown cache where `cache` is None.

        `valid`, bool [B, L], hides padding.
        """
        if cache is not None:
            return self._static(ids, cache, valid)
        return self._growing(ids, past)

    def _static(self, ids: Tensor, cache: StaticKV, valid: Tensor | None) -> Tensor:
        size = cache.keys[0].shape[2]
        position = torch.arange(ids.shape[1]) + cache.length
        mask = (torch.arange(size) <= position[:, None])[None, None]
        if valid is not None:
            mask = mask & valid[:, None, None]
        hidden = self.words(ids) + self.places(position)
        for layer in range(LAYERS):
            query, key, value = self._project(layer, hidden)
            buffers = (cache.keys[layer], cache.values[layer])
            for buffer, fresh in zip(buffers, (key, value), strict=True):
                if self.write == "index_copy":
                    buffer.index_copy_(2, position, fresh)
                else:
                    buffer[:, :, position] = fresh
            hidden = hidden + self._attend(query, *buffers, mask)
        cache.length.add_(ids.shape[1])
        return hidden

    def _growing(self, ids: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        done = 0 if past is None else past[0][0].shape[2]
        position = torch.arange(ids.shape[1]) + done
        hidden = self.words(ids) + self.places(position)
        grown: Past = []
        for layer in range(LAYERS):
            query, key, value = self._project(layer, hidden)
            if past is not None:
                key = torch.cat([past[layer][0], key], dim=-2)
                value = torch.cat([past[layer][1], value], dim=-2)
            grown.append((key, value))
            mask = torch.arange(key.shape[2]) <= position[:, None]
            hidden = hidden + self._attend(query, key, value, mask[None, None])
        return hidden, grown

    def _project(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def heads(linear: nn.Module, count: int) -> Tensor:
            return linear(hidden).unflatten(-1, (count, HEAD_DIM)).transpose(1, 2)

        return (
            heads(self.queries[layer], HEADS),
            heads(self.keys[layer], KV_HEADS),
            heads(self.values[layer], KV_HEADS),
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(2)


def decode_beside(
    model: TinyDecoder,
    compiled: Callable[..., Any],
    ids: Tensor,
    prompt: int,
    size: int,
    growing: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits of `compiled` and of `model` at each of the `ids` [1, T] behind the prompt.

    Over a growing cache or a static one of `size` slots, which the compiled model alone writes.
    """
    cache, past = StaticKV.empty(1, size), model(ids[:, :prompt])[1]
    model(ids[:, :prompt], cache=cache)
    for token in ids[:, prompt:].split(1, dim=1):
        if growing:
            expected, _ = model(token, past=past)
            got, past = compiled(token, past=past)
        else:
            expected = model(token, cache=cache.copy())
            got = compiled(token, cache=cache)
        yield got, expected
