"""Attention to selected tokens, as `kernels/reference/attention.py` computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.cpu.library import FEWEST_SLOTS, NUMBERS, kernels
from lychee_compile.kernels.reference.attention import Part, attend_part
from lychee_compile.kernels.reference.loaded_tensor import LoadedTensor
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.scores import mask_at
from lychee_compile.kernels.reference.selection import Selection, slots_read


def part_of(operands: Operands, selection: Selection) -> tuple[Part, Tensor]:
    """Return what `attend_part` does, by a kernel for CPUs if one fits."""
    if not _fits(operands) or (compiled := kernels()) is None:
        return attend_part(operands, selection)
    slot, padding = slots_read(selection)
    hidden = padding
    if operands.mask is not None:
        hidden = hidden | ~mask_at(operands.mask, slot, operands.query.shape[1])[:, :, :, 0]
    weight = None if selection.log_weight is None else selection.token_log_weight().contiguous()
    heads = operands.key.shape[1]
    query = operands.query.float().unflatten(1, (heads, -1)).transpose(2, 3).contiguous()
    mean, log_sum = compiled.attend(
        query, operands.key, operands.value, slot, hidden, weight, operands.scale
    )
    counted, once = log_sum.transpose(3, 4).flatten(2, 3)
    return Part(mean.transpose(2, 3).flatten(1, 2), counted), once


def _fits(operands: Operands) -> bool:
    """True if keys are many, scores but scaled products, and keys and values lie as is read."""
    mask = operands.mask
    if mask is not None and (mask.dtype != torch.bool or (mask.dim() == 4 and mask.shape[1] > 1)):
        return False
    held = operands.key, operands.value
    few = operands.kv_len < FEWEST_SLOTS
    if few or operands.softcap is not None or not all(_is_read(each) for each in held):
        return False
    same = operands.key.dtype == operands.value.dtype
    return same and operands.query.dtype in (torch.float32, *NUMBERS)


def _is_read(held: Tensor) -> bool:
    """True if the kernel reads keys or values that lie like this."""
    if isinstance(held, LoadedTensor) or held.device.type != "cpu" or held.dtype not in NUMBERS:
        return False
    row, head, _, channel = held.stride()
    return channel == 1 and (held.shape[0] == 1 or row == held.shape[1] * head)
