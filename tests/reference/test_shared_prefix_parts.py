"""Attention to a prefix of all rows, joined with that to their own keys, is dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lychee_compile.kernels.reference.attention import dense_attention
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.shared_prefix import (
    as_positions,
    as_rows,
    attend_to_all,
    joined,
    over_prefix,
    reads_whole,
)

B, HEADS, GROUP, T, SHARED, OWN = 3, 2, 2, 2, 20, 7


def masks() -> dict[str, Any]:
    """Return SDPA masks over all keys; in the second, a row sees nothing of the prefix."""
    seen = torch.rand(B, 1, T, SHARED + OWN) > 0.3
    seen[2, ..., :SHARED] = False
    biases = torch.randn(B, HEADS * GROUP, T, SHARED + OWN)
    biases[0, :, 1] = -torch.inf
    return {"none": None, "bool": seen, "of all rows": seen[0, 0], "additive": biases}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", ["none", "bool", "of all rows", "additive"])
def test_both_parts_together_are_dense_attention(name: str, softcap: float | None) -> None:
    torch.manual_seed(0)
    mask, double = masks()[name], torch.float64
    query = torch.randn(B, HEADS * GROUP, T, 8, dtype=double)
    shared = [torch.randn(1, HEADS, SHARED, size, dtype=double) for size in (8, 5)]
    own = [torch.randn(B, HEADS, OWN, size, dtype=double) for size in (8, 5)]
    whole = [
        torch.cat((one.expand(B, -1, -1, -1), other), 2)
        for one, other in zip(shared, own, strict=True)
    ]
    in_front, behind = (None, None) if mask is None else (mask[..., :SHARED], mask[..., SHARED:])
    prefix = attend_to_all(over_prefix(Operands(query, *shared, in_front, 0.4, softcap)))
    prefix = type(prefix)(as_rows(prefix.mean, B), as_rows(prefix.log_sum, B))
    got = joined(prefix, attend_to_all(Operands(query, *own, behind, 0.4, softcap)))
    expected = dense_attention(Operands(query, *whole, mask, 0.4, softcap))
    torch.testing.assert_close(got.mean, expected.nan_to_num(0), atol=1e-6, rtol=1e-6)


def test_rows_are_positions_and_rows_again() -> None:
    rows = torch.randn(B, HEADS, T, 4)
    positions = as_positions(rows)
    assert torch.equal(positions[0, :, T : 2 * T], rows[1])
    assert torch.equal(as_rows(positions, B), rows)


def test_many_queries_read_a_prefix_whole() -> None:
    assert reads_whole(16, 32768, 1024)
    assert not reads_whole(15, 32768, 1024)
    assert reads_whole(1, 10**6, None)
