"""Trust in the index of one row of the batch, which the header of an index holds with its end.

The header is int32 [1 + B]: trust in the index as a whole, and the end of each row, the slot after
the last one written. The end of a row that is not trusted is stored as its complement, -1 - end.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lose_row(header, b):
    """Distrust the index of a row: attention reads all its keys until it is built anew."""
    end = tl.load(header + 1 + b)
    tl.store(header + 1 + b, tl.minimum(end, -1 - end))


@triton.jit
def move_end(header, b, end):
    """Note where a row ends. A row that is not trusted stays so."""
    lost = tl.load(header + 1 + b) < 0
    tl.store(header + 1 + b, tl.where(lost, -1 - end, end))
