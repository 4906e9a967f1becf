"""Chunks of a row as a table by slot: what the plain form and the index of kernels have in common.

The number of a chunk is its first slot divided by the shortest length, rounded down: chunks begin
too far apart for two to have one number. Its span is one number, int32: how far behind the first
slot of its number it begins, times 2^16, plus its length. 0: there is no chunk of that number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.levels.declaration import Level
from lychee_compile.kernels.reference.chunking import cut_chunks
from lychee_compile.kernels.reference.level_values import summaries
from lychee_compile.kernels.reference.runs import rows_of

GATHERED_NUMBERS = 2**24
"""Number of numbers of keys that are gathered at a time, to bound the memory of building."""
CACHED_NUMBERS = 2**18
"""The same on a CPU, so that they stay in its cache."""
Chunk = tuple[int, int]
"""Lengths of the shortest and the longest chunk."""


def bounds_of(span: Tensor, chunk: Chunk, number: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return first slot and length of each chunk, int64, of spans int32 [..., N]; 0: none.

    `number`, int64 broadcastable to the spans, are the numbers of the chunks; None: 0 to N - 1.
    """
    number = torch.arange(span.shape[-1], device=span.device) if number is None else number
    return number * chunk[0] + (span >> 16), (span & 65535).long()


def decided(span: Tensor, end: Tensor, chunk: Chunk) -> Tensor:
    """Return the chunks that no key from the slot `end`, int64 [...], on had a part in cutting.

    Spans are int32 [..., N], and so is the result, bool.
    """
    low, length = bounds_of(span, chunk)
    return (length > 0) & (low + chunk[1] < end[..., None])


def open_from(span: Tensor, used: Tensor, chunk: Chunk) -> Tensor:
    """Return the slot after the last of the chunks `used`, bool [B, N]: int64 [B]."""
    low, length = bounds_of(span, chunk)
    behind = torch.where(used, low + length, 0)
    return F.pad(behind, (1, 0)).amax(-1)


def cut_more(
    span: Tensor, strength: Tensor, begin: Tensor, end: Tensor, chunk: Chunk
) -> tuple[Tensor, Tensor]:
    """Enter the chunks that begin at or behind `begin` and are decided by the keys before `end`.

    `span` is int32 [B, N], written; `strength` uint8 [B, T] for slots from 0 on; `begin` and `end`
    int64 [B]. Returns the numbers of the new chunks, int64 [B, M], and which of them are real.
    """
    low, high = int(begin.min()), int(end.max())
    starts, lengths = cut_chunks(strength[:, low:high], begin - low, end - low, chunk)
    real = lengths > 0
    starts = torch.where(real, starts + low, 0)
    number = starts.div(chunk[0], rounding_mode="floor")
    row, place = real.nonzero(as_tuple=True)
    packed = (starts % chunk[0] << 16) + lengths
    span[row, number[row, place]] = packed[row, place].to(span.dtype)
    return number, real


def numbers_of_slots(span: Tensor, used: Tensor, slots: int, chunk: Chunk) -> Tensor:
    """Return the number of the chunk that each of the first `slots` slots is in: int64 [B, slots].

    `used`, bool [B, N], are the chunks that count. -1: the slot is in none of these.
    """
    low, length = bounds_of(span, chunk)
    number = torch.arange(span.shape[-1], device=span.device).expand_as(span)
    first = torch.where(used, low, slots).clamp(max=slots)
    begun = number.new_full((span.shape[0], slots + 1), -1)
    begun = begun.scatter(1, first, number)[:, :slots].cummax(1).values
    at = begun.clamp(min=0)
    behind = low.gather(1, at) + length.gather(1, at)
    inside = torch.arange(slots, device=span.device) < behind
    return torch.where((begun >= 0) & inside, begun, -1)


def number_at(span: Tensor, slots: Tensor, chunk: Chunk) -> Tensor:
    """Return the number of the chunk that each slot is in, int64 [B, T]; -1: none.

    `slots`, int64 [B, T], are -1 for none; `span` is int32 [B, N].
    """
    back = -(-(chunk[1] - 1) // chunk[0])
    number = (slots // chunk[0])[..., None] - torch.arange(back + 1, device=span.device)
    known = (number >= 0) & (number < span.shape[1]) & (slots >= 0)[..., None]
    at = torch.where(known, number, 0).flatten(1)
    held = F.pad(span, (0, 1)).gather(1, at).view(number.shape)
    low, length = bounds_of(held, chunk, number)
    inside = known & (low <= slots[..., None]) & (slots[..., None] < low + length)
    return torch.where(inside, number, -1).amax(-1)


def keys_of_chunks(
    key: Tensor, span: Tensor, row: Tensor, number: Tensor, start: Tensor, chunk: Chunk
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield keys of the chunks `number` of the rows `row`, each int64 [M], by their length.

    Each time these are chunks of one length: their places, int64 [C], in `number`, and their keys
    of `key` [B, Hkv, L, D], [C, Hkv, T, D]. Slots before `start`, int64 [B], do not count.
    """
    low, length = bounds_of(span[row, number], chunk, number)
    first = torch.maximum(low, start[row])
    size = low + length - first
    at_once = CACHED_NUMBERS if key.device.type == "cpu" else GATHERED_NUMBERS
    begin = rows_of(key, row, first)
    for tokens in range(1, chunk[1] + 1):
        mine = (size == tokens).nonzero()[:, 0]
        offset = torch.arange(tokens, device=key.device)
        for part in mine.split(max(at_once // (tokens * key.shape[1] * key.shape[3]), 1)):
            if key.is_contiguous():  # on a CPU it is many times as fast to copy whole rows
                at = begin[part, :, None] + offset
                keys = key.view(-1, key.shape[3]).index_select(0, at.flatten())
                yield part, keys.view(*at.shape, key.shape[3])
            else:
                yield part, key[row[part, None], :, first[part, None] + offset].transpose(1, 2)


def summarise_chunks(
    level: Level,
    key: Tensor,
    span: Tensor,
    number: Tensor,
    used: Tensor,
    start: Tensor,
    chunk: Chunk,
    into: dict[str, Tensor],
) -> None:
    """Write the fields of the chunks `number`, int64 [B, M], where `used`, into [B, Hkv, N, ...].

    Fields are contiguous. Chunks that are not `used`, bool [B, M], stay as they are.
    """
    stored = stored_dtype(into)
    row, place = used.nonzero(as_tuple=True)
    number = number[row, place]
    to = rows_of(next(iter(into.values())), row, number)
    for part, keys in keys_of_chunks(key, span, row, number, start, chunk):
        at = to[part].flatten()
        for name, value in summaries(level, keys, None, stored).items():
            held = into[name].view(-1, *into[name].shape[3:])
            rows = (value if held.dim() == 2 else value[..., 0]).flatten(0, 1)
            held.index_copy_(0, at, rows.to(held.dtype))


def stored_dtype(columns: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of the fields [B, Hkv, N, D] among `columns`."""
    wide = [held.dtype for held in columns.values() if held.dim() == 4]
    return wide[0] if wide else torch.float32


def mean_of_chunks(key: Tensor, span: Tensor, start: Tensor, chunk: Chunk) -> Tensor:
    """Return the mean key of every chunk, float32 [B, Hkv, N, D]; 0 for numbers without one."""
    row, number = (span > 0).nonzero(as_tuple=True)
    found = torch.zeros(*key.shape[:2], span.shape[1], key.shape[3], device=key.device)
    for part, keys in keys_of_chunks(key, span, row, number, start, chunk):
        found[row[part], :, number[part]] = keys.float().mean(2)
    return found
