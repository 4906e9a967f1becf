"""The operators for decoding in plain PyTorch over keys and values that are computed as they are
read, registered with PyTorch.

They are `update_index` and `sparse_attention` over keys and values of a `Load`: tensors and an
expression of them. Without an expression, the only tensor holds keys [B, Hkv, L, D] or values as
they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lychee_compile.kernels.operators.cache_index import CacheIndex
from lychee_compile.kernels.operators.reference import attended, follow
from lychee_compile.kernels.reference.loaded_tensor import LoadedTensor
from lychee_compile.kernels.reference.loads import Load
from lychee_compile.kernels.reference.operands import Operands

_TAGS = (torch.Tag.cudagraph_unsafe,)


def described(expression: str, dtype: torch.dtype, page: str = "", size: int = 0) -> str:
    """Return a description of keys or values for the operators.

    "float32: at(0, b, h, kv, d)", or, with the page of a token and the tokens of a page,
    "float32: at(0, entry(1, b, kv//16), kv%16, h, d); 16: entry(1, b, kv//16)".
    """
    text = f"{str(dtype).removeprefix('torch.')}: {expression}"
    return f"{text}; {size}: {page}" if page else text


@torch.library.custom_op("lychee::update_loaded_index", mutates_args=("handle",), tags=_TAGS)
def update_loaded_index(
    key: list[Tensor],
    key_load: str,
    sizes: list[int],
    mask: Tensor | None,
    positions: Tensor | None,
    token_ids: Tensor | None,
    handle: Tensor,
    written: int,
) -> None:
    """Run `update_index` over the keys of a load, `sizes` [B, Hkv, L, D] and its numbers."""
    keys = _tensor(key, key_load, sizes[:4], sizes[4:])
    _, _, pages = key_load.partition("; ")
    check = partial(_check_pages, key, pages, sizes) if pages else None
    follow(keys, mask, positions, token_ids, handle, written, check)


@update_loaded_index.register_fake
def _(*_: object, **__: object) -> None:
    return None


@torch.library.custom_op("lychee::loaded_attention", mutates_args=(), tags=_TAGS)
def loaded_attention(
    query: Tensor,
    key: list[Tensor],
    key_load: str,
    value: list[Tensor],
    value_load: str,
    sizes: list[int],
    mask: Tensor | None,
    extra: Tensor | None,
    handle: Tensor,
    scale: float,
    softcap: float | None,
    site: str,
    extra_value: Tensor | None = None,
) -> Tensor:
    """Run `sparse_attention` over keys and values of loads.

    `sizes` are [B, Hkv, L, D, Dv] and the numbers of both loads.
    """
    keys = _tensor(key, key_load, sizes[:4], sizes[5:])
    values = _tensor(value, value_load, [*sizes[:3], sizes[4]], sizes[5:])
    operands = Operands(query, keys, values, mask, scale, softcap, extra, extra_value)
    return attended(operands, handle, site)


@loaded_attention.register_fake
def _(
    query: Tensor, key: list[Tensor], key_load: str, value: list[Tensor], value_load: str,
    sizes: list[int], *_: object, **__: object,
) -> Tensor:  # fmt: skip
    return query.new_empty(*query.shape[:3], sizes[4])


def _tensor(
    tensors: Sequence[Tensor], load: str, sizes: Sequence[int], numbers: Sequence[int]
) -> Tensor:
    """Return keys or values as a tensor, which evaluates what is read of it."""
    if not load:
        return tensors[0]
    dtype, _, expression = load.partition("; ")[0].partition(": ")
    batch, heads, tokens, channels = sizes
    shape = batch, heads, tokens, channels
    kind = getattr(torch, dtype)
    return LoadedTensor.of(Load(expression, kind, tuple(tensors), shape, tuple(numbers)))


def _check_pages(
    tensors: Sequence[Tensor], pages: str, sizes: Sequence[int], cache: CacheIndex, slot: Tensor
) -> None:
    """Distrust the index of a cache if a page that was written holds other known tokens too.

    `slot`, int64 [B, T], are the slots written. A table may list a page more than once, for rows
    that share a prefix: a write to it changes all of them.
    """
    size, _, expression = pages.partition(": ")
    batch, _, tokens, _, *numbers = sizes
    first = torch.arange(0, tokens, int(size), device=slot.device)
    shape = batch, 1, tokens, 1
    load = Load(expression, torch.int64, tuple(tensors), shape, tuple(numbers))
    page = load.shared(first)[:, 0, :, 0]
    end = torch.maximum(cache.known, slot.max(1).values + 1)
    held = torch.where(first < end[:, None], page, -1)
    written = page.gather(1, slot // int(size)).unique()
    if bool((torch.isin(held, written).sum() > len(written)).any()):
        cache.distrust()
