"""Attention to selected tokens, as `kernels/reference/attention.py` computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.cpu.library import FEWEST_SLOTS, NUMBERS, kernels
from lychee_compile.kernels.reference.attention import Part, attend_part, by_query_head
from lychee_compile.kernels.reference.loaded_tensor import LoadedTensor
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.selection import Selection


def part_of(operands: Operands, selection: Selection) -> tuple[Part, Tensor]:
    """Return what `attend_part` does, by a kernel for CPUs if one fits."""
    if not _fits(operands, selection) or (compiled := kernels()) is None:
        return attend_part(operands, selection)
    heads = operands.key.shape[1]
    query = operands.query.float().unflatten(1, (heads, -1)).transpose(2, 3).contiguous()
    mean, log_sum = compiled.attend(query, operands.key, operands.value, selection)
    mean, counted, once = map(by_query_head, (mean, *log_sum))
    return Part(mean, counted), once


def _fits(operands: Operands, selection: Selection) -> bool:
    """True if keys are many, scores but scaled products, and keys and values lie as is read."""
    plain = selection.visible.is_range and operands.softcap is None
    if not plain or operands.kv_len < FEWEST_SLOTS:
        return False
    if operands.scale != selection.scale or not all(map(_is_read, (operands.key, operands.value))):
        return False
    same = operands.key.dtype == operands.value.dtype
    return same and operands.query.dtype in (torch.float32, *NUMBERS)


def _is_read(held: Tensor) -> bool:
    """True if the kernel reads keys or values that lie like this."""
    if isinstance(held, LoadedTensor) or held.device.type != "cpu" or held.dtype not in NUMBERS:
        return False
    row, head, _, channel = held.stride()
    return channel == 1 and (held.shape[0] == 1 or row == held.shape[1] * head)
