"""Rows of a batch that have new tokens, all at the same places or each at places of its own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def alike(begin: Tensor, end: Tensor) -> Iterator[tuple[int | None, slice]]:
    """Yield the rows whose slots [begin, end), each int64 [B], are not none.

    All rows come together, with no number, if they have the same slots. If not, each comes alone:
    rows of a server may be at very different places, and keys between these need not be read.
    """
    if bool((begin == begin[0]).all() & (end == end[0]).all()):
        if bool(begin[0] < end[0]):
            yield None, slice(None)
        return
    for row in (begin < end).nonzero().flatten().tolist():
        yield row, slice(row, row + 1)
