"""The kernels for CPUs: C++ that is compiled when the first step needs it, and then kept on disk.

Each computes what a function of `kernels/reference` computes, up to rounding. That function runs in
its place if there is no compiler.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lychee_compile.kernels.reference.decode_drawing import LAST_BIN, luck_at
from lychee_compile.kernels.reference.recency import Span
from lychee_compile.kernels.reference.selection import Selection
from lychee_compile.kernels.reference.sketch import BLOCK
from lychee_compile.kernels.sizes import LUCKIEST

logger = logging.getLogger(__name__)

SOURCES = ("common.h", "scan.h", "shares.h", "best.h", "draw.h", "attend.h")
"""The parts of the source, in their order."""
NUMBERS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Dtypes of keys and values that are read, with the ends of the functions that read them."""
FEWEST_SLOTS = 2048
"""Number of slots of a cache from which on kernels are worth compiling."""
WORK_OF_THREAD = 2**15
"""Least number of multiplications that are worth a thread."""


@cache
def kernels() -> Kernels | None:
    """Return the kernels; None, with a warning, if they cannot be compiled."""
    folder = Path(__file__).parent
    source = "".join((folder / name).read_text() for name in SOURCES)
    try:
        from lychee_compile import torch_private  # loads the compiler of PyTorch

        return Kernels(torch_private.compiled_cpp(source))
    except Exception as error:  # noqa: BLE001  whatever it is, plain PyTorch runs
        logger.warning(
            "sparse attention runs in plain PyTorch, which takes longer, since its kernels for "
            "CPUs could not be compiled: %s",
            error,
        )
        return None


class Kernels:
    """The compiled functions; all tensors lie in memory of the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._luck = luck_at(torch.arange(2**16, device="cpu")).to(torch.uint8)

    def scan(
        self, codes: Tensor, weight: Tensor, constant: Tensor, first: int, last: int
    ) -> Tensor:
        """Return scores by sketches, float32 [B, Hkv, R, last], known for the slots from `first`.

        `codes` are int8 [B, Hkv, N, r]. `weight` [B, Hkv, S, R, r] and `constant`
        [B, Hkv, S, R, 1], float32, are those of each block of codes.
        """
        batch, heads, blocks, rows, rank = weight.shape
        raw = weight.new_empty(batch, heads, rows, last)
        work = batch * heads * rows * rank * (last - first)
        sizes = (batch * heads, codes.shape[2], blocks, rows, rank, last, BLOCK, first, last)
        tensors = codes.contiguous(), weight.contiguous(), constant.contiguous(), raw
        self._call("scan", tensors, sizes, work)
        return raw

    def log_shares(self, raw: Tensor, span: Span) -> Tensor | None:
        """Return the logarithms of shares of the softmax over slots: float32 [B, Hkv, Tq, N].

        `raw`, float32 [B, Hkv, G * Tq, N], are scores. Shares are summed over the G heads of a
        group, and are zero for slots outside of `span`. None if a score is not finite.
        """
        batch, heads, rows, slots = raw.shape
        query_len = span[0].shape[1]
        share = raw.new_empty(batch, heads, query_len, slots)
        sizes = batch, heads, rows // query_len, query_len, slots
        failed = self._call("shares", (raw, *span, share), sizes, raw.numel())
        return None if failed else share

    def best(self, share: Tensor, span: Span, room: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `room`, int64 [B, Hkv, Tq], slots of the largest shares, in order.

        They are int64 [B, Hkv, Tq, M], and their number is int64 [B, Hkv, Tq]: behind it the
        entries mean nothing. `share`, float32 [B, Hkv, Tq, N], are logarithms of shares.
        """
        slot, count = _listed(share, room)
        tensors = share, *span, room, slot, count
        self._call("best", tensors, (*share.shape, slot.shape[-1]), share.numel())
        return slot, count

    def draw(
        self, share: Tensor, span: Span, room: Tensor, salt: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Draw slots as `decode_drawing.draw` does, and return them as `best` does.

        `salt` is int64 [B, Hkv, 1, 1]. Returned as well are the bins of their shares, int32
        [B, Hkv, Tq, M], and the bin of the highest priority that is not read, int32 [B, Hkv, Tq].
        None if shares of less than e^-87 would have to be told apart.
        """
        slot, count = _listed(share, room)
        entry, cut = slot.to(torch.int32), count.to(torch.int32)
        tensors = share, *span, room, salt.contiguous(), self._luck
        sizes = *share.shape, slot.shape[-1], LAST_BIN + 2, LUCKIEST
        failed = self._call("draw", (*tensors, slot, entry, count, cut), sizes, share.numel())
        return None if failed else (slot, count, entry, cut)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        """Return the means of values at selected slots, and logarithms of the sums of weights.

        `query` is float32 [B, Hkv, Tq, G, D]. Each query sees all slots from its first to its last.
        Keys [B, Hkv, L, D] and values [B, Hkv, L, Dv] have a dtype of `NUMBERS`, the heads of a row
        one after the other, and their last dimension is contiguous. Means are
        [B, Hkv, Tq, G, Dv]; the sums, [2, B, Hkv, Tq, G], are those in which each slot counts as
        often as the selection says, and once.
        """
        batch, heads, query_len, group, dim = query.shape
        mean = query.new_empty(batch, heads, query_len, group, value.shape[-1])
        log_sum = query.new_empty(2, batch, heads, query_len, group)
        weight = selection.log_weight
        weight = weight if weight is None else weight.contiguous()
        start, length = selection.run_start.contiguous(), selection.run_length.contiguous()
        first, end = selection.visible.first.contiguous(), selection.visible.end.contiguous()
        sizes = batch, heads, query_len, group, dim, value.shape[-1], start.shape[-1]
        strides = *key.stride()[1:3], *value.stride()[1:3]
        work = int(length.sum()) * group * (dim + value.shape[-1])
        self._call(
            f"attend_{NUMBERS[key.dtype]}",
            (query, key, value, start, length, weight, first, end, mean, log_sum),
            (*sizes, *strides),
            work,
            ctypes.c_float(selection.scale),
        )
        return mean, log_sum

    def _call(
        self,
        name: str,
        tensors: tuple[Tensor | None, ...],
        sizes: tuple[int, ...],
        work: int,
        *more: ctypes.c_float,
    ) -> int:
        """Call a function with the threads that so many multiplications are worth."""
        pointers = [ctypes.c_void_p(each if each is None else each.data_ptr()) for each in tensors]
        threads = max(1, min(torch.get_num_threads(), work // WORK_OF_THREAD))
        numbers = map(ctypes.c_int64, sizes)
        function = getattr(self._library, f"lychee_{name}")
        return int(function(*pointers, *numbers, *more, ctypes.c_int64(threads)))


def _listed(share: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Return tensors for slots, int64 [B, Hkv, Tq, M], and for their numbers [B, Hkv, Tq]."""
    most = max(min(int(room.max()), share.shape[-1]), 0)
    return room.new_zeros(*room.shape, most), torch.zeros_like(room)
