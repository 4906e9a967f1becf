"""Arguments by name, scratch memory and sums of partial results, for launches of all kernels.

A launch puts every argument into one dictionary, under the name that kernels have for it; `launch`
gives each kernel those that it names. No launch waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.device import overlapping
from lychee_compile.kernels.gpu.common.layout import Part, bytes_of, views_of
from lychee_compile.kernels.gpu.common.operands import AttentionOperands, strided
from lychee_compile.kernels.sizes import power_of_two

COMBINED_BY_WARP = 4096
"""Partial results that one warp of `combine` holds well."""


class Kernel(Protocol):
    """A Triton kernel, as far as a launch needs to know it."""

    @property
    def arg_names(self) -> Sequence[str]:
        """Names of the parameters, in order."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """Return what launches the kernel on a grid."""


def launch(
    kernel: Kernel, grid: tuple[int, ...], arguments: Mapping[str, object], **options: object
) -> None:
    """Launch `kernel` on `grid` with those of `arguments` that it names.

    `options` are Triton's own, such as `num_warps`. Keys that kernels compute must be the same
    numbers in all of them: products and sums are not fused then. Raises TypeError if an argument is
    missing.
    """
    try:
        ordered = [arguments[name] for name in kernel.arg_names]  # faster to pass than by name
    except KeyError as error:
        raise TypeError(f"a launch lacks the argument {error} of its kernel") from None
    if isinstance(arguments.get("key"), tuple):
        options["enable_fp_fusion"] = False
    kernel[grid](*ordered, **options)


class Scratch:
    """Pieces of one uninitialised allocation, by name."""

    def __init__(self) -> None:
        self._pieces: dict[str, Part] = {}

    def want(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        """Ask for a piece."""
        self._pieces[name] = name, shape, dtype

    def want_parts(self, operands: AttentionOperands, splits: int) -> None:
        """Ask for what the `splits` programs of each row leave for `combine`."""
        size = operands.rows, splits, operands.group
        self.want("partial", torch.float32, *size, operands.value.shape[-1])
        self.want("partial_top", torch.float32, *size)
        self.want("partial_sum", torch.float32, *size)

    def allocate(self, device: torch.device) -> dict[str, Tensor]:
        """Return all pieces, each of which begins at a multiple of 256 bytes."""
        parts = self._pieces.values()
        return views_of(torch.empty(bytes_of(parts), dtype=torch.uint8, device=device), parts)


def log_weight(operands: AttentionOperands, scratch: Mapping[str, Tensor]) -> Tensor:
    """Return log2 of the sum of the weights that all programs of a row have read, [B, Hq, T]."""
    bits = scratch["partial_top"] + scratch["partial_sum"].log2()
    total = (bits * math.log(2)).logsumexp(1) / math.log(2)
    return of_rows(operands, total).movedim(-1, 2).flatten(1, 2)


def of_rows(operands: AttentionOperands, scratch: Tensor) -> Tensor:
    """Return scratch memory [rows, ...] as [B, Hkv, T, ...]."""
    batch, heads = operands.query.shape[0], operands.kv_heads
    return scratch.unflatten(0, (batch, operands.query_len, heads)).transpose(1, 2)


def combine(
    module: ModuleType,
    operands: AttentionOperands,
    scratch: Mapping[str, Tensor],
    splits: int,
    early: bool,
) -> Tensor:
    """Return attention [B, Hq, T, Dv] from what the `splits` programs of each row have left.

    If the module computes a part of an attention, the result is float32 [B, Hq, T, Dv + 1], and
    ends with the log-sum-exp of the scores.
    """
    query, extra = operands.query, operands.extra
    size, dtype = scratch["partial"].shape[-1], query.dtype
    if hasattr(module, "PART"):
        size, dtype = size + 1, torch.float32
    output = query.new_empty(*query.shape[:3], size, dtype=dtype)
    # Without extra logits the kernel reads none: any tensor stands for them, without a view of it.
    logits = (query, "bhtd") if extra is None else (extra.expand(query.shape[:3]), "bht")
    more = operands.extra_value
    arguments = {
        **scratch,
        **strided("extra", *logits),
        **({} if more is None else strided("extra_value", more, "bhtd")),
        **strided("output", output, "bhtd"),
        "kv_heads": operands.kv_heads,
        "query_len": operands.query_len,
        "splits": splits,
        "SPLITS": power_of_two(splits),
        "EARLY": early,
    }
    sums = power_of_two(splits * module.WIDTH.value)
    warps = max(1, min(sums // COMBINED_BY_WARP, 4))
    grid = operands.rows, operands.group
    launch(module.combine, grid, arguments, num_warps=warps, num_stages=1, **overlapping(early))
    return output
