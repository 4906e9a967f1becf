"""FlexAttention over as many pairs as lychee reads, in the best blocks by lychee's choice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lychee_compile.kernels.sizes import QUERY_TILE


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, chosen_keys: Tensor, pairs: float
) -> Callable[[], Tensor]:
    """Return FlexAttention over as many pairs, in the blocks that hold most of lychee's keys.

    `chosen_keys` are those that lychee chose in each block of 128, int32 [Hq, tiles, blocks];
    `pairs` is the share of visible pairs that it computed.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    heads, tiles, blocks = chosen_keys.shape
    number = torch.arange(blocks, device=chosen_keys.device)
    causal = number <= torch.arange(tiles, device=chosen_keys.device)[:, None]
    room = (pairs * causal.sum(-1)).ceil().long()
    near = (number == 0) | (number == torch.arange(tiles, device=chosen_keys.device)[:, None])
    rank = chosen_keys.float().masked_fill(near, torch.inf).masked_fill(~causal, -1)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    best = number < room.clamp(min=2)[:, None]
    chosen = torch.zeros_like(causal.expand(heads, -1, -1)).scatter(
        -1, order, best.expand_as(order)
    )
    chosen &= causal
    diagonal = number == torch.arange(tiles, device=chosen_keys.device)[:, None]

    def listed(blocks_read: Tensor) -> tuple[Tensor, Tensor]:
        counts = blocks_read.sum(-1, dtype=torch.int32)[None]
        indices = blocks_read.int().argsort(dim=-1, descending=True, stable=True).int()[None]
        return counts, indices

    mask = BlockMask.from_kv_blocks(
        *listed(chosen & diagonal), *listed(chosen & ~diagonal), BLOCK_SIZE=QUERY_TILE,
        mask_mod=lambda _b, _h, q, kv: q >= kv, seq_lengths=(query.shape[2], key.shape[2]),
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=True)
