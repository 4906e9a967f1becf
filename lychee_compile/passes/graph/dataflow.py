"""Walking the dataflow of a pre-dispatch ATen graph."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lychee_compile.passes.graph.operator_facts import AtenOperator, View
from lychee_compile.passes.graph.operators import OPERATORS, UNKNOWN

aten = torch.ops.aten


def value_of(node: torch.fx.Node) -> Any:
    """The fake value that the node had when it was traced."""
    return node.meta.get("val")


def is_tensor(value: Any) -> bool:
    """Whether an argument of a node is a tensor of the graph."""
    return isinstance(value, torch.fx.Node) and isinstance(value_of(value), torch.Tensor)


def first_input(node: torch.fx.Node) -> torch.fx.Node:
    """The tensor that an operator takes first."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    return source


def shape_of(node: torch.fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Shape of a tensor node; empty for what is no tensor."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def argument(node: torch.fx.Node, name: str, default: Any = None) -> Any:
    """The argument that the operator's schema calls `name`, however it was passed."""
    for place, formal in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if formal.name == name:
            if place < len(node.args):
                return node.args[place]
            return node.kwargs.get(name, default)
    return default


def operator_key(node: Any) -> str:
    """Name of the ATen operator that a node calls, without overload: "add"; empty for others."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    namespace, _, name = getattr(schema, "name", "").partition("::")
    return name if namespace == "aten" else ""


def operator_of(node: Any) -> AtenOperator:
    """Return what is known of the operator that a node calls; `UNKNOWN` for all others."""
    return OPERATORS.get(operator_key(node), UNKNOWN)


def is_operator(node: Any, name: str) -> bool:
    """True if a node calls the operator whose first name in the table is `name`.

    Raises KeyError if the table has no such operator.
    """
    return operator_of(node) is OPERATORS[name]


def scalar_of(value: Any) -> sympy.Expr | None:
    """A number of the graph, or a symbolic size, as sympy has it; None for tensors and the like."""
    if isinstance(value, torch.fx.Node):
        value = value_of(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value.node.expr
    if isinstance(value, sympy.Expr):
        return value
    if isinstance(value, bool):
        return sympy.Integer(int(value))
    return sympy.sympify(value) if isinstance(value, (int, float)) else None


def calls(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of the operators."""
    return isinstance(node, torch.fx.Node) and node.op == "call_function" and node.target in targets


def through_copies(node: torch.fx.Node) -> torch.fx.Node:
    """The first node up the graph that is no mere copy of its input in the same dtype and shape.

    A slice of the same length takes everything, so it counts as a copy.
    """
    while operator_of(node).view is View.COPY or calls(node, aten.slice.Tensor):
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        before, after = value_of(source), value_of(node)
        if before.dtype != after.dtype or not same_shape(shape_of(source), shape_of(node)):
            break
        node = source
    return node


def same(left: Any, right: Any) -> bool:
    """Whether two sizes are proved equal, without adding a guard."""
    return statically_known_true(left == right)


def same_shape(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Whether two shapes are proved equal."""
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))


def static_size(size: Any) -> int | None:
    """The size where it is a plain number, None where it is symbolic."""
    return size if isinstance(size, int) else None


def operator_name(node: torch.fx.Node) -> str:
    """The operator that a node calls, without its overload."""
    return str(getattr(node.target, "overloadpacket", node.target))


def module_path(node: torch.fx.Node) -> str:
    """Path of the module that made the call, as `named_modules` has it, or the node's name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = str(list(stack.values())[-1][0])
    path = path.replace("._modules['", ".").replace("']", "").replace("['", ".")
    # Decorators may call a method by `*args`, the first of which is then the module.
    path = path.removeprefix("L.self").removeprefix("L.args[0]").removeprefix("L").lstrip(".")
    path = path.removeprefix("_orig_mod").lstrip(".")
    return path.removeprefix("fn.") or node.name


def source_line(node: torch.fx.Node) -> str:
    """The user's line that made the node: "file.py:12, in forward"; empty where it is not known."""
    frames = [
        line.strip()
        for line in (node.stack_trace or "").splitlines()
        if line.strip().startswith("File ")
    ]
    if not frames:
        return ""
    file, line, *function = frames[-1].removeprefix("File ").split(", ")
    name = file.strip('"').replace("\\", "/").rsplit("/", 1)[-1]
    return ", ".join([f"{name}:{line.removeprefix('line ')}", *function])
