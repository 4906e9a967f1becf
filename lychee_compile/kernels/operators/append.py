"""Operator `lychee::append`: concatenation to a growing cache without a copy of the past.

    keys = append(keys, new, 2)      instead of      keys = cat((keys, new), 2)

The result is a view of a larger buffer. Tokens are the outermost dimension of the buffer in memory,
so that the strides of the view do not depend on the size of the buffer: they are the same at every
step. The buffer belongs to the tensor that shows all used slots of it, and passes from that tensor
to its result. An append to any other tensor, such as an older one or a cropped one, copies. The
contents of no tensor change.

PyTorch requires that the output of an operator shares no storage with its inputs, since a graph may
write to either. No rewritten graph writes to them. Each result still gets a storage of its own over
the same memory, so that PyTorch counts versions, and copies, for that tensor alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from lychee_compile.kernels.out_of_memory import ran_out

_BUFFER = "_lychee_buffer"
"""Name of the attribute that keeps the buffer [slots, ...] of a tensor."""
_LEAST = 256
"""Least number of free slots of a new buffer."""

_library = torch.library.Library("lychee", "FRAGMENT")
_library.define(
    "append(Tensor past, Tensor new, int dim) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,)
)


@torch.library.impl(_library, "append", "CPU")
@torch.library.impl(_library, "append", "CUDA")
def append(past: Tensor, new: Tensor, dim: int) -> Tensor:
    """Concatenate `past` [..., L, ...] and `new` [..., T, ...] along `dim`: [..., L + T, ...]."""
    begin, end = past.shape[dim], past.shape[dim] + new.shape[dim]
    buffer = past.__dict__.pop(_BUFFER, None)
    if buffer is None or not _fits(buffer, past, dim, end):
        buffer = _larger(past, dim, end)
        buffer[:begin] = past.movedim(dim, 0)
    buffer[begin:end] = new.movedim(dim, 0)
    grown = from_dlpack(buffer[:end].movedim(0, dim))
    if len(buffer) > end:
        setattr(grown, _BUFFER, buffer)
    return grown


def _fits(buffer: Tensor, past: Tensor, dim: int, end: int) -> bool:
    """True if `past` is the beginning of `buffer`, and `buffer` has room up to `end`."""
    shown = buffer[: past.shape[dim]].movedim(0, dim)
    same = past.data_ptr() == buffer.data_ptr() and past.stride() == shown.stride()
    return same and past.shape == shown.shape and end <= len(buffer)


def _larger(past: Tensor, dim: int, end: int) -> Tensor:
    """Return a buffer [slots, ...] with room for half of `end` again.

    If there is no memory for that, it has room for `end` tokens.
    """
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
