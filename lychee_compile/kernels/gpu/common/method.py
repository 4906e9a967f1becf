"""The protocol of a policy that runs generated kernels on a GPU."""

from __future__ import annotations

from types import ModuleType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.common.layout import IndexLayout, IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.policies.registry import GpuKernels


@runtime_checkable
class GpuMethod(GpuKernels, Protocol):
    """A policy on a GPU: it runs the policy's kernels and knows where their index lies.

    The kernels themselves are text that `codegen/module.py` puts together, under the same name.
    """

    def layout_of(self, key: Tensor) -> IndexLayout:
        """Return the layout of an index for a cache `key` [B, Hkv, L, D]."""

    def new_index(self, layout: IndexLayout, device: torch.device) -> DeviceIndex:
        """Return an empty index, which is not trusted."""

    def run(
        self,
        module: ModuleType,
        operands: AttentionOperands,
        index: IndexOperands,
        tuning: Tuning | None = None,
    ) -> Tensor:
        """Return attention over the best keys, [B, Hq, T, Dv], and index the keys just written.

        While the index is not trusted, all visible keys are read.
        """
