"""The policy "quest" on a GPU, as `gpu/methods.py` knows it."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.layout import IndexLayout, IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.gpu.quest.index import QuestIndex
from lychee_compile.kernels.gpu.quest.launch import run_quest
from lychee_compile.kernels.gpu.quest.layout import QuestLayout


@dataclass(frozen=True)
class QuestMethod:
    """Pages of sixteen keys, ranked by the best corner of the box around them."""

    multiple: int = 1
    notices_writes: bool = True

    def layout_of(self, key: Tensor) -> QuestLayout:
        """Return the layout of an index for a cache `key` [B, Hkv, L, D]."""
        return QuestLayout.of(key)

    def new_index(self, layout: IndexLayout, device: torch.device) -> QuestIndex:
        """Return an empty index, which is not trusted."""
        return QuestIndex(layout, device)

    def run(
        self,
        module: ModuleType,
        operands: AttentionOperands,
        index: IndexOperands,
        tuning: Tuning | None = None,
    ) -> Tensor:
        """Return attention over the best pages, [B, Hq, T, Dv]; box the pages just completed."""
        return run_quest(module, operands, index, tuning)
