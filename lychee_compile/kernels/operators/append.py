"""Operator `lychee::append`: concatenation to a growing cache without a copy of the past.

    keys = append(keys, new, 2)      instead of      keys = cat((keys, new), 2)

The result is a view of a larger buffer, laid out like a contiguous cache with free slots behind its
tokens. Dynamo makes a symbol of the stride that depends on the number of slots, so that a graph
compiled for such a view takes a contiguous cache too, as an eager step leaves one. The buffer
belongs to the tensor that shows all used slots of it, and passes from that tensor to its result. An
append to any other tensor, such as an older one or a cropped one, copies. The contents of no tensor
change.

The number of slots is not known when compiling, so that the fake result is contiguous. Its readers
must take any strides, and Inductor must not assert them.

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
        buffer.narrow(dim, 0, begin).copy_(past)
    buffer.narrow(dim, begin, end - begin).copy_(new)
    grown = from_dlpack(buffer.narrow(dim, 0, end))
    if buffer.shape[dim] > end:
        setattr(grown, _BUFFER, buffer)
    return grown


def _fits(buffer: Tensor, past: Tensor, dim: int, end: int) -> bool:
    """True if `past` is the beginning of `buffer`, and `buffer` has room up to `end`."""
    if past.data_ptr() != buffer.data_ptr() or end > buffer.shape[dim]:
        return False
    shown = buffer.narrow(dim, 0, past.shape[dim])
    return past.shape == shown.shape and past.stride() == shown.stride()


def _larger(past: Tensor, dim: int, end: int) -> Tensor:
    """Return a contiguous buffer [..., slots, ...] with room for half of `end` again.

    If there is no memory for that, it has room for `end` tokens.
    """

    def buffer(slots: int) -> Tensor:
        return past.new_empty(*past.shape[:dim], slots, *past.shape[dim + 1 :])

    try:
        return buffer(end + max(end // 2, _LEAST))
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return buffer(end)


@torch.library.register_fake("lychee::append", lib=_library)
def _(past: Tensor, new: Tensor, dim: int) -> Tensor:
    slots = past.shape[dim] + new.shape[dim]
    return past.new_empty(*past.shape[:dim], slots, *past.shape[dim + 1 :])
