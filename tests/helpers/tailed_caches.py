"""Caches of a past and of a tail: the newest tokens are stored apart until there are many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from stored_caches import Sizes, Tensors, packed, scaled
from torch import Tensor

GROUP, KEPT = 8, 2
ROOM = GROUP + KEPT
"""Most tokens of a tail. When it is full, all but the last `KEPT` are moved to the past."""


@dataclass(frozen=True)
class Past:
    """A way to store the tokens before a tail."""

    store: Callable[[Tensor], Tensors]
    """Makes the tensors of keys or values; each has tokens, or groups of them, in dimension 2."""
    read: Callable[..., Tensor]
    """Gives keys or values as float32, from these tensors."""
    parts: int
    """Number of tensors."""


def grouped(x: Tensor) -> Tensors:
    """Quantise with a scale for each channel and group of tokens (KIVI's keys)."""
    number, unit = scaled(x.unflatten(2, (-1, GROUP)), (3,))
    return [number.flatten(2, 3), unit]


def read_grouped(number: Tensor, unit: Tensor) -> Tensor:
    return (number.unflatten(2, (-1, GROUP)).float() * unit).flatten(2, 3)


def read_packed(code: Tensor, unit: Tensor, low: Tensor) -> Tensor:
    return torch.stack((code & 15, code >> 4), -1).flatten(-2).float() * unit + low


PASTS = {
    "bytes": Past(lambda x: list(scaled(x)), lambda number, unit: number.float() * unit, 2),
    "groups of tokens": Past(grouped, read_grouped, 2),
    "4 bits": Past(lambda x: list(packed(x)), read_packed, 3),
    "as it is": Past(lambda x: [x], lambda x: x.float(), 1),
}


class Tailed:
    """A cache of a past of `begin` tokens and of a tail, which has some tokens too."""

    def __init__(self, keys: str, values: str, s: Sizes, begin: int) -> None:
        self.ways, self.sizes = (PASTS[keys], PASTS[values]), s
        self.past = self.stored([s.keys(begin) for _ in self.ways])

    def stored(self, tokens: Tensors) -> Tensors:
        """Return keys and values as a past holds them."""
        both = zip(self.ways, tokens, strict=True)
        return [part for way, each in both for part in way.store(each.float())]

    def _read(self, past: Tensors, dtype: torch.dtype) -> list[Tensor]:
        count = self.ways[0].parts
        both = zip(self.ways, (past[:count], past[count:]), strict=True)
        return [way.read(*parts).to(dtype) for way, parts in both]

    def given(self) -> list[Any]:
        """Return the tensors of the cache, and numbers, as `attend` takes them."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *held: Any) -> Any:
        """Write a token, and attend; tails that grow are returned."""
        raise NotImplementedError

    def take(self, found: Any) -> Tensor:
        """Keep what `attend` has returned of the cache, and return the attention."""
        raise NotImplementedError


class Growing(Tailed):
    """Both grow: the tail at each step, and the past when a tail moves."""

    def __init__(self, *given: Any, at_once: bool = False) -> None:
        super().__init__(*given)
        self.at_once = at_once
        """True if keys are put together from past, tail and new ones, as transformers does."""
        self.tail = [self.sizes.keys(KEPT) for _ in range(2)]

    def given(self) -> list[Any]:
        return [*self.past, *self.tail]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *held: Any) -> Any:
        *past, keys, values = held
        read = self._read(past, key.dtype)
        both = list(zip(read, (keys, values), (key, value), strict=True))
        if self.at_once:
            seen = [torch.cat(parts, 2) for parts in both]
        tails = [torch.cat((tail, new), 2) for _, tail, new in both]
        if not self.at_once:
            seen = [torch.cat((parts[0], tail), 2) for parts, tail in zip(both, tails, strict=True)]
        return F.scaled_dot_product_attention(query, *seen, enable_gqa=True), *tails

    def take(self, found: Any) -> Tensor:
        attended, *self.tail = found
        if self.tail[0].shape[2] == ROOM:
            fresh = self.stored([tail[:, :, :GROUP] for tail in self.tail])
            self.past = [torch.cat(parts, 2) for parts in zip(self.past, fresh, strict=True)]
            self.tail = [tail[:, :, GROUP:].clone() for tail in self.tail]
        return attended


class Static(Tailed):
    """Buffers of fixed size; `begin` of the past's slots hold tokens."""

    def __init__(self, keys: str, values: str, s: Sizes, begin: int) -> None:
        super().__init__(keys, values, s, s.slots)
        self.tail = [s.keys(ROOM) for _ in range(2)]
        self.begin, self.used = begin, KEPT

    def given(self) -> list[Any]:
        device = self.tail[0].device
        ends = [torch.tensor([each], device=device) for each in (self.begin, self.used)]
        return [*ends, *self.past, *self.tail]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *held: Any) -> Any:
        begin, used, *past, keys, values = held
        tails = [keys.index_copy_(2, used, key), values.index_copy_(2, used, value)]
        read = self._read(past, key.dtype)
        seen = [torch.cat(parts, 2) for parts in zip(read, tails, strict=True)]
        slots = torch.arange(read[0].shape[2], device=key.device)
        mask = torch.cat((slots < begin, slots[:ROOM] <= used))
        return F.scaled_dot_product_attention(query, *seen, attn_mask=mask[None], enable_gqa=True)

    def take(self, found: Any) -> Tensor:
        self.used += 1
        if self.used == ROOM:
            fresh = self.stored([tail[:, :, :GROUP] for tail in self.tail])
            for held, part in zip(self.past, fresh, strict=True):
                count = part.shape[2]
                first = self.begin * count // GROUP
                held[:, :, first : first + count] = part
            for tail in self.tail:
                tail[:, :, :KEPT] = tail[:, :, GROUP:].clone()
            self.begin, self.used = self.begin + GROUP, KEPT
        return found


class Sliced(Static):
    """Buffers of fixed size of which a step reads as many tokens as there are, by integers."""

    def given(self) -> list[Any]:
        return [self.begin, self.used, *self.past, *self.tail]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *held: Any) -> Any:
        begin, used, *past, keys, values = held
        for tail, new in ((keys, key), (values, value)):
            tail[:, :, used : used + 1] = new
        read = self._read([each[:, :, :begin] for each in past], key.dtype)
        tails = keys[:, :, : used + 1], values[:, :, : used + 1]
        seen = [torch.cat(parts, 2) for parts in zip(read, tails, strict=True)]
        return F.scaled_dot_product_attention(query, *seen, enable_gqa=True)
