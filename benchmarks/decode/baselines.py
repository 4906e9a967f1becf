"""Decode attention without this package: what PyTorch offers, in each of its forms.

Each function takes the buffers that are rotated. It returns one call per buffer for every form of
the same attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.common.problem import Inputs

Attention = Callable[[], Tensor]
"""One decode attention over tensors of its own, which returns [B, Hq, 1, D]."""
Forms = dict[str, list[Attention]]
"""Calls of equivalent forms of one attention, one call per buffer, by the name of the form."""


def flash_forms(buffers: Sequence[Inputs]) -> Forms:
    """Return the two ways to call flash without a copy of keys and values and without a mask."""
    return {
        "enable_gqa": [partial(_flash, each) for each in buffers],
        "group as positions": [partial(_flash_folded, each) for each in buffers],
    }


def gqa_forms(buffers: Sequence[Inputs]) -> Forms:
    """Return SDPA without a mask, on the backend that PyTorch chooses."""
    return {"default backend": [partial(_gqa, each) for each in buffers]}


def flex_forms(buffers: Sequence[Inputs]) -> Forms:
    """Return compiled FlexAttention whose block mask depends on a tensor of valid lengths."""
    attend, mask = _compiled(_flex, buffers[0].key.device.type), _block_mask(buffers[0].key)
    calls = [partial(attend, each.query, each.key, each.value, mask) for each in buffers]
    return {"block mask": calls}


def masked_forms(buffers: Sequence[Inputs]) -> Forms:
    """Return attention as transformers compiles it over a StaticCache: repeated heads, a mask."""
    key = buffers[0].key
    attend = _compiled(_repeated, key.device.type)
    position = torch.full((key.shape[0], 1, 1, 1), key.shape[2] - 1, device=key.device)
    mask = torch.arange(key.shape[2], device=key.device) <= position
    calls = [partial(attend, each.query, each.key, each.value, mask) for each in buffers]
    return {"compiled": calls}


def _flash(inputs: Inputs) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _gqa(inputs)


def _flash_folded(inputs: Inputs) -> Tensor:
    """Attend with a group's query heads as positions of one head, the same without a mask."""
    query, kv_heads = inputs.query, inputs.key.shape[1]
    folded = query.view(query.shape[0], kv_heads, -1, query.shape[3])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = F.scaled_dot_product_attention(folded, inputs.key, inputs.value)
    return output.reshape(query.shape)


def _gqa(inputs: Inputs) -> Tensor:
    query, key, value = inputs.query, inputs.key, inputs.value
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    return flex_attention(query, key, value, block_mask=mask, enable_gqa=True)


def _repeated(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = _repeat(key, group), _repeat(value, group)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _repeat(states: Tensor, group: int) -> Tensor:
    """Repeat [B, Hkv, L, D] to [B, Hkv * group, L, D] as `repeat_kv` of transformers does."""
    batch, heads, length, head_dim = states.shape
    if group == 1:
        return states
    wide = states[:, :, None].expand(batch, heads, group, length, head_dim)
    return wide.reshape(batch, heads * group, length, head_dim)


def _block_mask(key: Tensor) -> BlockMask:
    """Return a block mask of all slots, whose lengths are known to a tensor on the device only."""
    lengths = torch.full((key.shape[0],), key.shape[2], device=key.device)

    def valid(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001
        return slot < lengths[row]

    return create_block_mask(valid, None, None, 1, key.shape[2], device=key.device)


@cache
def _compiled(attend: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """Compile `attend` for each shape; on a CPU, which only checks numbers, leave it as it is."""
    return attend if device == "cpu" else torch.compile(attend, dynamic=False, fullgraph=True)
