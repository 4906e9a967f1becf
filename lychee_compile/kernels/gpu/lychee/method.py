"""The policy "lychee" on a GPU, as `gpu/methods.py` knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.layout import IndexLayout
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_lychee
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout


@dataclass(frozen=True)
class LycheeMethod:
    """Tokens ranked by sketches of their keys; in a long context pages or chunks come first."""

    multiple: ClassVar[int] = 8
    notices_writes: ClassVar[bool] = True
    covers_mass: ClassVar[bool] = True
    certifies: ClassVar[bool] = True
    computes_keys: ClassVar[bool] = True
    run = staticmethod(run_lychee)

    def layout_of(self, key: Tensor) -> SketchLayout:
        """Return the layout of an index for a cache `key` [B, Hkv, L, D], by default settings."""
        return SketchLayout.over(key)

    def new_index(self, layout: IndexLayout, device: torch.device) -> SketchIndex:
        """Return an empty index, which is not trusted. Raises TypeError for another's layout."""
        if not isinstance(layout, SketchLayout):
            raise TypeError(f"an index of sketches has a SketchLayout, got {layout!r}")
        return SketchIndex(layout, device)
