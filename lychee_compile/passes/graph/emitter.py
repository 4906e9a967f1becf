"""Add operators to a graph, and take them back if an attempt fails.

with emit.attempt(), graph.inserting_before(node):
wide = emit(aten.expand.default, key, sizes)      erased again if ...
check(wide)                                       ... this raises
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.fx

from lychee_compile.passes.graph.dataflow import aten, value_of
from lychee_compile.torch_private import FakeTensorMode


class Emitter:
    """Adds operators to one graph, each with its fake value."""

    def __init__(self, graph: torch.fx.Graph, mode: FakeTensorMode) -> None:
        self.graph, self.mode = graph, mode
        self._undo: list[Callable[[], object]] = []
        self._attempts = 0

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """Add a call of the operator `target` at the graph's insert point."""
        node = self.graph.call_function(target, args, kwargs)
        self.on_undo(partial(self.graph.erase_node, node))
        with self.mode:
            values = torch.fx.node.map_arg(args, value_of), torch.fx.node.map_arg(kwargs, value_of)
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def cast(self, node: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
        """Emit a tensor in `dtype`; it is `node` itself if that has the dtype."""
        return node if value_of(node).dtype == dtype else self(aten.to.dtype, node, dtype)

    def on_undo(self, callback: Callable[[], object]) -> None:
        """Call `callback` if an attempt that is under way fails, the latest callback first."""
        if self._attempts:
            self._undo.append(callback)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Take back all that is emitted inside the context if an exception leaves it."""
        before = len(self._undo)
        self._attempts += 1
        try:
            yield
        except BaseException:
            while len(self._undo) > before:
                self._undo.pop()()
            raise
        finally:
            self._attempts -= 1
            if not self._attempts:  # until then, an outer attempt may take all of it back
                self._undo.clear()
