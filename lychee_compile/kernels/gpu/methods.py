"""The policies that have kernels, each with an index of its own in the memory of the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_sparse
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.gpu.quest.index import QuestIndex
from lychee_compile.kernels.gpu.quest.launch import run_quest
from lychee_compile.kernels.gpu.quest.layout import QuestLayout

Layout = SketchLayout | QuestLayout


@dataclass(frozen=True)
class GpuMethod:
    """How one policy's kernels are run, and where its index lies."""

    layout_of: Callable[[Tensor], Layout]
    """The layout of an index for a cache [B, Hkv, L, D]."""
    run: Callable[..., Tensor]
    """Attends, with the arguments of `run_sparse`."""
    multiple: int = 1
    """What divides the size of a key that the index can hold."""


def policy_name(kernel: str) -> str:
    """The policy of a generated module, "lychee" that of "decode_lychee_bf16_..."."""
    return kernel.split("_")[1]


def policy_of(kernel: str) -> GpuMethod:
    """How the kernels of a generated module are run."""
    return GPU_METHODS[policy_name(kernel)]


def new_index(layout: Layout, device: torch.device) -> DeviceIndex:
    """An empty index, which nobody may trust."""
    with torch.inference_mode(False):  # graphs write to it in every mode
        if isinstance(layout, QuestLayout):
            return QuestIndex(layout, device)
        return SketchIndex(layout, device)


GPU_METHODS = {
    "lychee": GpuMethod(SketchLayout.of, run_sparse, multiple=8),
    "quest": GpuMethod(QuestLayout.of, run_quest),
}
