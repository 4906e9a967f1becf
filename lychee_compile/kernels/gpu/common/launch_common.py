"""What launches of all kernels share: scratch memory, arguments, and the sum of partial results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BINS = 256
"""Of a histogram of shares."""


class Scratch:
    """MatchedParts of one uninitialised allocation, by name."""

    def __init__(self) -> None:
        self._pieces: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def want(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        """Ask for a piece."""
        self._pieces[name] = dtype, shape

    def want_parts(self, rows: int, splits: int, group: int, value_dim: int) -> None:
        """Ask for what each program of an attention kernel leaves for `combine`."""
        self.want("partial", torch.float32, rows, splits, group, value_dim)
        self.want("partial_top", torch.float32, rows, splits, group)
        self.want("partial_sum", torch.float32, rows, splits, group)

    def allocate(self, device: torch.device) -> dict[str, Tensor]:
        """All pieces, each from a multiple of 256 bytes on."""
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in self._pieces.values()]
        places = [0, *itertools.accumulate(-(-size // 256) * 256 for size in sizes)]
        whole = torch.empty(places[-1], dtype=torch.uint8, device=device)
        return {
            name: whole[start : start + size].view(dtype).view(shape)
            for (name, (dtype, shape)), start, size in zip(
                self._pieces.items(), places[:-1], sizes, strict=True
            )
        }


def power_of_two(value: int, at_least: int = 1) -> int:
    """The least power of two that is at least both."""
    return max(at_least, 1 << (max(value, 1) - 1).bit_length())


def captured_arguments(captured: Sequence[Tensor]) -> list[Any]:
    """Tensors that expressions read, each with its strides."""
    return [value for each in captured for value in (each, *each.stride())]


def written_arguments(positions: Tensor | None, batch: int, unused: Tensor) -> list[Any]:
    """The slots just written, int [T] or [B, T], with strides and number; None: none were."""
    if positions is None:
        return [unused, 0, 0, 0]
    wide = positions.expand(batch, -1)
    return [wide, *wide.stride(), wide.shape[1]]


def list_size(module: ModuleType) -> int:
    """Room for the slots that one program of `attend` reads."""
    return -(-(module.BUDGET.value + 64) // 64) * 64


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended, as Hopper's may."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlapping(early: bool) -> dict[str, bool]:
    """Options of a kernel that begins before the one before it has ended, where that is so."""
    return {"EARLY": early, **({"launch_pdl": True} if early else {})}


def combine(
    module: ModuleType,
    made: dict[str, Tensor],
    extra: Tensor | None,
    query: Tensor,
    heads: int,
    splits: int,
    early: bool,
) -> Tensor:
    """Attention [B, Hq, T, Dv] from what the programs left for `query` [B, Hq, T, D]."""
    batch, query_heads, query_len, _ = query.shape
    output = query.new_empty(*query.shape[:3], made["partial"].shape[-1])
    sums = splits * module.WIDTH.value  # a warp holds 4,096 of them well
    # The extra logits, broadcastable to [B, Hq, T]; without any the kernel has no use for them.
    logits = query if extra is None else extra.expand(query.shape[:3])
    module.combine[(batch * heads * query_len, query_heads // heads)](
        made["partial"], made["partial_top"], made["partial_sum"],
        logits, *logits.stride()[:3],
        output, *output.stride(),
        heads, query_len, splits,
        SPLITS=power_of_two(splits), **overlapping(early),
        num_warps=max(1, min(power_of_two(sums) // 4096, 4)), num_stages=1,
    )  # fmt: skip
    return output
