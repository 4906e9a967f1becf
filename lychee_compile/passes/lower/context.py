"""Shared parts of lowering: what the attentions of one graph need while operators are emitted."""

from __future__ import annotations

from functools import cached_property

import torch.fx

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.passes.detect.token_ids import find_token_ids
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.index_inputs import IndexInputs
from lychee_compile.passes.lower.patch_grids import Orders
from lychee_compile.torch_private import FakeTensorMode


class LoweringContext:
    """Emits into one graph, and knows which indexes, orders and updates the graph has already."""

    def __init__(
        self, gm: torch.fx.GraphModule, mode: FakeTensorMode, config: IndexConfig, autotune: bool
    ) -> None:
        self.config = config
        self.autotune = autotune
        """True if tile sizes are measured at the first call of a kernel."""
        self.emit = Emitter(gm.graph, mode)
        self.index_inputs = IndexInputs(gm, self.emit)
        self.orders = Orders(self.emit)
        self._updated: set[torch.fx.Node] = set()

    @cached_property
    def token_ids(self) -> torch.fx.Node | None:
        """Graph input that holds token ids, int [B, T]; None if there is none."""
        return find_token_ids(self.emit.graph)

    def is_first_use(self, index: torch.fx.Node) -> bool:
        """True the first time that it is called for an index, which is to be updated then."""
        if index in self._updated:
            return False
        self._updated.add(index)
        self.emit.on_undo(lambda: self._updated.discard(index))
        return True
