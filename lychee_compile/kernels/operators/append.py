"""`lychee::append`: concatenation to a cache that has room behind it, without a copy of the past.

    keys = append(keys, new, 2)      instead of      keys = cat((keys, new), 2)

What it gives is a view of a larger buffer, tokens first in memory: its strides say nothing of how
large the buffer is, so that they are the same at every step. The buffer goes with the tensor that
shows all of it that is used, and from that to the next: whoever appends to any other tensor, an
older one of a branch or a part of one that was cropped, gets a copy. No tensor's contents change.

PyTorch asks of operators that what they give shares no storage with what they take, since graphs
may write to either. Nothing in a graph does here, and each tensor is given a storage of its own
over the same memory: versions are counted, and copies made, of what that tensor shows alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from lychee_compile.kernels.out_of_memory import ran_out

_BUFFER = "_lychee_buffer"
"""Attribute of the tensor that may be appended to: its buffer [slots, ...]."""
_LEAST = 256
"""Tokens that a new buffer has room for, at least, beyond those it is made for."""

_library = torch.library.Library("lychee", "FRAGMENT")
_library.define(
    "append(Tensor past, Tensor new, int dim) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,)
)


@torch.library.impl(_library, "append", "CPU")
@torch.library.impl(_library, "append", "CUDA")
def append(past: Tensor, new: Tensor, dim: int) -> Tensor:
    """`past` [..., L, ...] and behind it `new` [..., T, ...], along `dim`: [..., L + T, ...]."""
    held, end = past.shape[dim], past.shape[dim] + new.shape[dim]
    buffer = past.__dict__.pop(_BUFFER, None)
    if buffer is None or not _fits(buffer, past, dim, end):
        buffer = _larger(past, dim, end)
        buffer[:held] = past.movedim(dim, 0)
    buffer[held:end] = new.movedim(dim, 0)
    grown = from_dlpack(buffer[:end].movedim(0, dim))
    if len(buffer) > end:
        setattr(grown, _BUFFER, buffer)
    return grown


def _fits(buffer: Tensor, past: Tensor, dim: int, end: int) -> bool:
    """Whether `past` is the beginning of `buffer`, which has room up to `end`."""
    shown = buffer[: past.shape[dim]].movedim(0, dim)
    same = past.data_ptr() == buffer.data_ptr() and past.stride() == shown.stride()
    return same and past.shape == shown.shape and end <= len(buffer)


def _larger(past: Tensor, dim: int, end: int) -> Tensor:
    """A buffer [slots, ...] with room for half as many tokens again, or for `end` alone."""
    others = past.movedim(dim, 0).shape[1:]
    try:
        return past.new_empty(end + max(end // 2, _LEAST), *others)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return past.new_empty(end, *others)


@torch.library.register_fake("lychee::append", lib=_library)
def _(past: Tensor, new: Tensor, dim: int) -> Tensor:
    others = past.movedim(dim, 0).shape[1:]
    return past.new_empty(past.shape[dim] + new.shape[dim], *others).movedim(0, dim)
