"""Decoding steps over caches that do not hold keys and values as attention reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = list[Tensor]


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    heads: int = 2
    group: int = 2
    slots: int = 96
    head_dim: int = 16
    dtype: torch.dtype = torch.float32

    def keys(self, tokens: int | None = None) -> Tensor:
        count = self.slots if tokens is None else tokens
        return torch.randn(self.batch, self.heads, count, self.head_dim, dtype=self.dtype)

    def query(self) -> Tensor:
        heads = self.heads * self.group
        return 2 * torch.randn(self.batch, heads, 1, self.head_dim, dtype=self.dtype)


@dataclass(frozen=True)
class Form:
    """A way to store keys and values; tensors of keys come before those of values."""

    store: Callable[[Sizes], Tensors]
    """Makes the tensors of a cache."""
    step: Callable[..., tuple[Tensor, Tensor]]
    """Writes new keys and values at positions, and returns all as attention reads them."""
    tables: int = 0
    """Number of tensors at the end that a step only reads."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, pos: Tensor, *held: Tensor) -> Any:
        keys, values = self.step(key, value, pos, *held)
        mask = torch.arange(keys.shape[2], device=pos.device) <= pos[:, None]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def put(cache: Tensor, pos: Tensor, new: Tensor) -> Tensor:
    return cache.index_copy_(2, pos, new.to(cache.dtype))


def scaled(x: Tensor, dims: tuple[int, ...] = (-1,)) -> tuple[Tensor, Tensor]:
    """Quantise to 8 bits with a scale that is shared along `dims`."""
    scale = x.float().abs().amax(dims, keepdim=True) / 127
    return (x / scale).round().to(torch.int8), scale


def stacked(s: Sizes) -> Tensors:
    return [torch.stack([torch.stack([s.keys(), s.keys()]) for _ in range(2)])]


def stacked_step(k: Tensor, v: Tensor, pos: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    for layer in (0, 1):
        cache[layer, 0].index_copy_(2, pos, k * (layer + 1))
        cache[layer][1].index_copy_(2, pos, v)
    return cache[1, 0], cache[1, 1]


def unbound_step(k: Tensor, v: Tensor, pos: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens come before heads, and keys beside values."""
    keys, values = cache.unbind(2)
    keys[:, pos] = k.transpose(1, 2)
    values[:, pos] = v.transpose(1, 2)
    return keys.transpose(1, 2), values.transpose(1, 2)


def chunk_step(k: Tensor, v: Tensor, pos: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = cache.chunk(2, 1)
    keys.index_copy_(2, pos, k)
    values.index_copy_(2, pos, v)
    return keys, values


def per_token(s: Sizes) -> Tensors:
    return [each for _ in range(2) for each in scaled(s.keys())]


def per_token_step(
    k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, ks: Tensor, cv: Tensor, vs: Tensor
) -> tuple[Tensor, Tensor]:
    for cache, scale, new in ((ck, ks, k), (cv, vs, v)):
        number, unit = scaled(new)
        put(cache, pos, number)
        put(scale, pos, unit)
    return ck.to(k.dtype) * ks.to(k.dtype), cv.to(k.dtype) * vs.to(k.dtype)


def fixed_scales(shape: tuple[int, ...]) -> Callable[[Sizes], Tensors]:
    def store(s: Sizes) -> Tensors:
        sizes = [{-2: s.heads, -1: s.head_dim}.get(size, size) for size in shape]
        units = [0.02 + 0.01 * torch.rand(sizes) for _ in range(2)]
        stored = [(s.keys() / unit).round().clamp(-127, 127).to(torch.int8) for unit in units]
        return [*stored, *units]

    return store


def fixed_scale_step(
    k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, cv: Tensor, ks: Tensor, vs: Tensor
) -> tuple[Tensor, Tensor]:
    put(ck, pos, (k / ks).round().clamp(-127, 127))
    put(cv, pos, (v / vs).round().clamp(-127, 127))
    return (ck * ks).to(k.dtype), (cv * vs).to(k.dtype)


def with_zero(s: Sizes) -> Tensors:
    tensors = []
    for _ in range(2):
        x = s.keys().float()
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        unit = (high - low) / 255
        tensors += [((x - low) / unit).round().to(torch.uint8), unit, low]
    return tensors


def with_zero_step(k: Tensor, v: Tensor, pos: Tensor, *held: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for new, (cache, scale, zero) in ((k, held[:3]), (v, held[3:])):
        low, high = new.amin(-1, keepdim=True).float(), new.amax(-1, keepdim=True).float()
        unit = (high - low) / 255
        put(cache, pos, ((new - low) / unit).round())
        put(scale, pos, unit)
        put(zero, pos, low)
        found.append(cache * scale + zero)
    return found[0].to(k.dtype), found[1].to(k.dtype)


GROUP = 8


def per_group(s: Sizes) -> Tensors:
    tensors = []
    for _ in range(2):
        number, unit = scaled(s.keys().unflatten(-1, (-1, GROUP)))
        tensors += [number.flatten(-2), unit[..., 0]]
    return tensors


def per_group_step(
    k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, ks: Tensor, cv: Tensor, vs: Tensor
) -> tuple[Tensor, Tensor]:
    found = []
    for cache, scale, new in ((ck, ks, k), (cv, vs, v)):
        number, unit = scaled(new.unflatten(-1, (-1, GROUP)))
        put(cache, pos, number.flatten(-2))
        put(scale, pos, unit[..., 0])
        found.append((cache.float() * scale.repeat_interleave(GROUP, -1)).to(k.dtype))
    return found[0], found[1]


def packed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise to 4 bits, two numbers a byte, with a scale and a zero point for each token."""
    low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    unit = (high - low) / 15
    code = ((x - low) / unit).round().to(torch.uint8)
    return code[..., ::2] | (code[..., 1::2] << 4), unit, low


def packed_step(k: Tensor, v: Tensor, pos: Tensor, *held: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of keys lie side by side in a byte; those of values are half a vector apart."""
    found = []
    for new, (cache, scale, zero) in ((k, held[:3]), (v, held[3:])):
        for tensor, each in zip((cache, scale, zero), packed(new), strict=True):
            put(tensor, pos, each)
        parts = cache & 15, cache >> 4
        codes = torch.stack(parts, -1).flatten(-2) if new is k else torch.cat(parts, -1)
        found.append(codes.to(k.dtype) * scale.to(k.dtype) + zero.to(k.dtype))
    return found[0], found[1]


def in_words(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise to 8 bits, four numbers to an integer of four times `bits`, with zero points."""
    low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    unit = (high - low) / 255
    code = ((x - low) / unit).round().to(torch.int32 if bits == 8 else torch.int64)
    parts = [part << bits * place for place, part in enumerate(code.chunk(4, -1))]
    return parts[0] | parts[1] | parts[2] | parts[3], unit, low


def words(s: Sizes) -> Tensors:
    return [*in_words(s.keys(), 8), *in_words(s.keys(), 16)]


def words_step(k: Tensor, v: Tensor, pos: Tensor, *held: Tensor) -> tuple[Tensor, Tensor]:
    """Keys lie in integers of 32 bits, values in those of 64: float32 holds neither."""
    found = []
    for new, bits, (cache, scale, zero) in ((k, 8, held[:3]), (v, 16, held[3:])):
        for tensor, each in zip((cache, scale, zero), in_words(new, bits), strict=True):
            put(tensor, pos, each)
        codes = torch.cat([(cache >> bits * place) & 255 for place in range(4)], -1)
        found.append(codes.to(k.dtype) * scale.to(k.dtype) + zero.to(k.dtype))
    return found[0], found[1]


def bytes_of(s: Sizes) -> Tensors:
    return [s.keys().to(torch.float8_e4m3fn) for _ in range(2)]


def bytes_step(k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, cv: Tensor) -> tuple[Tensor, Tensor]:
    for cache, new in ((ck, k), (cv, v)):
        cache.view(torch.uint8).index_copy_(2, pos, new.to(cache.dtype).view(torch.uint8))
    return ck.to(k.dtype), cv.to(k.dtype)


def angles(s: Sizes) -> Tensor:
    return torch.arange(s.slots)[:, None] / 100 ** (torch.arange(0, s.head_dim, 2) / s.head_dim)


def with_tables(s: Sizes) -> Tensors:
    angle = angles(s)
    return [s.keys(), s.keys(), angle.cos().to(s.dtype), angle.sin().to(s.dtype)]


def rotated_step(
    k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, cv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    a, b = put(ck, pos, k).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1), put(cv, pos, v)


def half_rotated_step(
    k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, cv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """The tables are repeated at each step, as in transformers."""
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    put(ck, pos, k)
    half = ck.shape[-1] // 2
    turned = torch.cat((-ck[..., half:], ck[..., :half]), -1)
    return ck * cos + turned * sin, put(cv, pos, v)


def pairs_rotated_step(
    k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, cv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    put(ck, pos, k)
    turned = torch.stack((-ck[..., 1::2], ck[..., ::2]), -1).flatten(-2)
    wide = (each.repeat_interleave(2, -1) for each in (cos, sin))
    return ck * next(wide) + turned * next(wide), put(cv, pos, v)


def bytes_and_tables(s: Sizes) -> Tensors:
    number, unit = scaled(s.keys())
    angle = angles(s)
    return [number, unit, s.keys(), angle.cos(), angle.sin()]


def rotated_bytes_step(
    k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, ks: Tensor, cv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    number, unit = scaled(k)
    keys = put(ck, pos, number).float() * put(ks, pos, unit)
    a, b = keys.chunk(2, -1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return turned.to(k.dtype), put(cv, pos, v)


def latents(s: Sizes) -> Tensors:
    lat = torch.randn(s.batch, s.slots, s.head_dim - 4, dtype=s.dtype)
    return [lat, torch.randn(s.batch, s.slots, 4, dtype=s.dtype), s.keys()]


def latent_step(
    k: Tensor, v: Tensor, pos: Tensor, lat: Tensor, rot: Tensor, cv: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys are a latent and a rotated part, which all heads share."""
    count = lat.shape[-1]
    lat.index_copy_(1, pos, k[:, 0, :, :count])
    rot.index_copy_(1, pos, k[:, 0, :, count:])
    keys = torch.cat((lat, rot), -1)[:, None].expand(-1, cv.shape[1], -1, -1)
    return keys, put(cv, pos, v)


PAGE = 8


def pages(s: Sizes) -> Tensors:
    """One table for all rows would hold their tokens in one place: so it is one row."""
    count = s.slots // PAGE
    stored = [torch.randn(count, PAGE, s.heads, s.head_dim, dtype=s.dtype) for _ in range(2)]
    return [*stored, torch.randperm(count)]


def pages_step(
    k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, cv: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    page, slot = table[pos // PAGE], pos % PAGE
    found = []
    for cache, new in ((ck, k), (cv, v)):
        cache[page, slot] = new[0].transpose(0, 1)
        found.append(cache[table].flatten(0, 1)[None].transpose(1, 2))
    return found[0], found[1]


def pages_of_rows(s: Sizes) -> Tensors:
    count = s.batch * s.slots // PAGE
    number = torch.randint(-127, 128, (2, count, s.heads, PAGE, s.head_dim), dtype=torch.int8)
    unit = 0.02 + 0.01 * torch.rand(2, count, s.heads, PAGE, 1)
    table = torch.randperm(count).view(s.batch, -1)
    return [number[0].clone(), unit[0].clone(), number[1].clone(), unit[1].clone(), table]


def pages_of_rows_step(
    k: Tensor, v: Tensor, pos: Tensor, ck: Tensor, ks: Tensor, cv: Tensor, vs: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Pages of quantised tokens, heads before tokens."""
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    page, slot = table[rows, pos // PAGE], pos % PAGE
    found = []
    for cache, scale, new in ((ck, ks, k), (cv, vs, v)):
        number, unit = scaled(new.transpose(1, 2))
        cache[page, :, slot] = number
        scale[page, :, slot] = unit
        read = cache[table].to(k.dtype) * scale[table].to(k.dtype)
        found.append(read.transpose(1, 2).flatten(2, 3))
    return found[0], found[1]


PAST = GROUP
"""Tokens that lie before a tail."""


def with_past(s: Sizes) -> Tensors:
    """Keys have scales for channels and groups of tokens (KIVI), values are packed."""
    past = s.keys(PAST).unflatten(2, (-1, GROUP))
    number, unit = scaled(past, (3,))
    tails = [s.keys(s.slots - PAST) for _ in range(2)]
    return [number.flatten(2, 3), unit, *packed(s.keys(PAST)), *tails]


def tail_step(k: Tensor, v: Tensor, pos: Tensor, *held: Tensor) -> tuple[Tensor, Tensor]:
    """The past is frozen; new tokens come behind it in full precision."""
    number, unit, code, scale, zero, keys, values = held
    past = (number.unflatten(2, (-1, GROUP)).float() * unit).flatten(2, 3)
    codes = torch.stack((code & 15, code >> 4), -1).flatten(-2)
    before = codes.float() * scale + zero
    return (
        torch.cat((past.to(k.dtype), put(keys, pos - PAST, k)), 2),
        torch.cat((before.to(k.dtype), put(values, pos - PAST, v)), 2),
    )


def beside(s: Sizes) -> Tensors:
    return [torch.stack((s.keys().transpose(1, 2), s.keys().transpose(1, 2)), 2)]


FORMS = {
    "layers in one tensor": Form(stacked, stacked_step),
    "values beside keys": Form(beside, unbound_step),
    "heads of values behind those of keys": Form(
        lambda s: [torch.cat((s.keys(), s.keys()), 1)], chunk_step
    ),
    "scale per token": Form(per_token, per_token_step),
    "scale per channel": Form(fixed_scales((-2, 1, -1)), fixed_scale_step, tables=2),
    "scale of all": Form(fixed_scales(()), fixed_scale_step, tables=2),
    "zero points": Form(with_zero, with_zero_step),
    "scale per group": Form(per_group, per_group_step),
    "float8": Form(bytes_of, bytes_step),
    "4 bits": Form(lambda s: [each for _ in range(2) for each in packed(s.keys())], packed_step),
    "rotated": Form(with_tables, rotated_step, tables=2),
    "half rotated": Form(with_tables, half_rotated_step, tables=2),
    "pairs rotated": Form(with_tables, pairs_rotated_step, tables=2),
    "rotated bytes": Form(bytes_and_tables, rotated_bytes_step, tables=2),
    "latents": Form(latents, latent_step),
    "pages": Form(pages, pages_step),
    "pages of rows": Form(pages_of_rows, pages_of_rows_step),
    "words": Form(words, words_step),
    "tail": Form(with_past, tail_step),
}
