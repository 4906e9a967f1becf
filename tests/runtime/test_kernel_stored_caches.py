"""Generated kernels over caches that are parts of one tensor, or whose rows are written apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from kernel_steps import SIZE, Cache, assert_exact, assert_sparse, compiled, decode
from torch import Tensor

import lychee_compile

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]


def layers(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *new: Tensor) -> Any:
    """Attend by the second layer of `keys` [layers, B, Hkv, L, D], as the first is written too."""
    keys[0].index_copy_(2, positions, new[0] * 2)
    keys[1].index_copy_(2, positions, new[0])
    return decode(query, keys[1], values, positions, None, new[1])


def beside_others(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *new: Tensor
) -> Any:
    """Tokens come first, and keys [L, 2, B, Hkv, D] lie beside something else."""
    mine, others = keys.unbind(1)
    mine.index_copy_(0, positions, new[0].permute(2, 0, 1, 3))
    others.mul_(2)
    return decode(query, mine.permute(1, 2, 0, 3), values, positions, None, new[1])


@pytest.mark.parametrize("form", [layers, beside_others])
def test_a_part_of_a_tensor_has_an_index_of_its_own(form: Any) -> None:
    """Somebody else writes it between two steps, once: all keys are read, and indexed anew
    a call later, since the index did not live long."""
    cache, step = Cache(batch=2).fill(100), compiled(form)
    if form is layers:
        held = torch.stack((cache.keys, cache.keys))
        cache.keys = held[1]
    else:
        held = torch.stack((cache.keys, cache.keys)).permute(3, 0, 1, 2, 4).contiguous()
        cache.keys = held[:, 0].permute(1, 2, 0, 3)
    for number in range(6):
        if number == 3:
            cache.keys[:, :, 40:60] = cache.fresh(20)
        got, dense = cache.step(lambda query, _, *rest: step(query, held, *rest))
        assert_exact((got, dense)) if number in (0, 3, 4) else assert_sparse((got, dense), cache)
    assert [each.decision for each in lychee_compile.reports()[-1].sites] == ["sparse"]


def test_rows_are_written_at_positions_of_their_own() -> None:
    def apart(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *new: Tensor) -> Any:
        rows = torch.arange(len(keys))[:, None]
        keys[rows, :, positions] = new[0].transpose(1, 2)
        values[rows, :, positions] = new[1].transpose(1, 2)
        mask = torch.arange(SIZE) <= positions[:, :, None]
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask[:, None], enable_gqa=True
        )

    cache, step = Cache(batch=2).fill(100), compiled(apart)
    for number in range(4):
        positions = torch.tensor([[100 + number], [70 + number]])
        query = torch.randn(2, 4, 1, 16)
        new = cache.fresh(1), torch.stack([torch.eye(SIZE)[row] for row in positions])[:, None]
        new = new[0], new[1].expand(-1, 2, -1, -1)
        copies = cache.keys.clone(), cache.values.clone()
        dense = apart(query, *copies, positions, *new)
        got = step(query, cache.keys, cache.values, positions, *new)
        assert_exact((got, dense)) if number == 0 else assert_sparse((got, dense), cache)
