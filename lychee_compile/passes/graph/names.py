"""Name the tensors of a graph as a user would call them, and read the values of constants."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable

import sympy
import torch
import torch.fx

from lychee_compile import torch_private
from lychee_compile.passes.graph.dataflow import operator_of
from lychee_compile.passes.graph.operator_facts import Family, View

_MEANINGLESS = {"L", "self", "fn", "args", "kwargs", "G", "_orig_mod"}


class Names:
    """Short names, one for each tensor of a graph, the same at every call."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self._gm = gm
        self._of: dict[torch.fx.Node, str] = {}
        self._short: dict[str, str] = {}
        """Each name in use, with the name it would be if no other tensor had that name."""

    def of(self, node: torch.fx.Node) -> str:
        """Return the last word of an input's source, "attention_mask", or the node's name."""
        if node not in self._of:
            base = self.base(node)
            name, count = base, 1
            while name in self._short:
                count += 1
                name = f"{base}_{count}"
            self._short[name] = base
            self._of[node] = name
        return self._of[node]

    def shortened(self, names: Iterable[str]) -> dict[str, str]:
        """Return shorter names for some of `names`, unique among them: "bias" for "bias_7"."""
        known = [name for name in names if name in self._short]
        bases = [self._short[name] for name in known]
        return {
            name: base for name, base in zip(known, bases, strict=True) if bases.count(base) == 1
        }

    def tensors(self) -> dict[str, torch.fx.Node]:
        """Return the tensors of the graph that have been named so far, by name."""
        return {name: node for node, name in self._of.items() if node.graph is self._gm.graph}

    def numbers(self) -> dict[sympy.Symbol, sympy.Symbol]:
        """Return the symbols of floats that inputs hold, each with one of the input's name."""
        named = {}
        for source in self._gm.graph.find_nodes(op="placeholder"):
            for node in (source, *source.users):
                value = node.meta.get("val")
                if isinstance(value, torch.SymFloat) and value.node.expr.is_Symbol:
                    named[value.node.expr] = sympy.Symbol(self.base(source))
        return named

    def call(self, node: torch.fx.Node, other: torch.fx.Node) -> None:
        """Give `node`, an input of a function in the graph, the name of the tensor passed to it."""
        self._of[node] = self.of(other)

    def base(self, node: torch.fx.Node) -> str:
        """Return the name of a tensor if no other had the same: the same in every layer."""
        node = _tensor_behind(node)
        if str(node.target).startswith("_tensor_constant"):
            return "constant"
        if node.op != "placeholder":
            return re.sub(r"(_default)?(_\d+)?$", "", node.name)
        words = re.findall(r"[A-Za-z_]\w*", torch_private.source_name(node))
        words = [word for word in words if word not in _MEANINGLESS]
        return words[-1] if words else node.name

    def constant(self, node: torch.fx.Node) -> sympy.Expr | None:
        """Return the value of a constant of the graph with one element; None for other nodes."""
        if node.op != "get_attr" or not isinstance(node.target, str):
            return None
        tensor = getattr(self._gm, node.target, None)
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, torch.nn.Parameter):
            return None
        if not torch_private.has_data(tensor) or tensor.numel() != 1 or tensor.dtype.is_complex:
            return None
        return sympy.sympify(tensor.item())


_PICKS = (Family.GATHER, Family.PADDING)
"""Families of operators whose results show elements of their first input."""


def _tensor_behind(node: torch.fx.Node) -> torch.fx.Node:
    """Return the input or constant whose elements `node` shows, copied, moved or picked.

    If there is none, as for the result of a sum, return `node`.
    """
    source = node
    while source.op == "call_function":
        described = operator_of(source)
        shows = described.view is not None or described.family in _PICKS
        if source.target is operator.getitem:
            shows = operator_of(source.args[0]).view is View.PARTS
        if not shows or not isinstance(source.args[0], torch.fx.Node):
            return node
        source = source.args[0]
    return source
