"""Read the nodes of a pre-dispatch ATen graph, and walk from node to node."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import sympy
import torch
import torch.fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lychee_compile import torch_private
from lychee_compile.passes.graph.operator_facts import AtenOperator, View
from lychee_compile.passes.graph.operators import OPERATORS, UNKNOWN

aten = torch.ops.aten


def value_of(node: torch.fx.Node) -> Any:
    """Return the fake value that a node had when it was traced; None if it has none."""
    return node.meta.get("val")


def is_tensor(value: Any) -> bool:
    """True if an argument of a node is a tensor of the graph."""
    return isinstance(value, torch.fx.Node) and isinstance(value_of(value), torch.Tensor)


def is_symbolic_number(value: Any) -> TypeGuard[torch.fx.Node]:
    """True if an argument of a node is a number that only a run of the graph tells."""
    return isinstance(value, torch.fx.Node) and isinstance(
        value_of(value), (torch.SymInt, torch.SymFloat)
    )


def first_input(node: torch.fx.Node) -> torch.fx.Node:
    """Return the tensor that an operator takes first."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    return source


def shape_of(node: torch.fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Return the shape of a tensor node; empty for all other nodes."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def argument(node: torch.fx.Node, name: str, default: Any = None) -> Any:
    """Return the argument that the operator's schema calls `name`, however it was passed."""
    for place, formal in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if formal.name == name:
            if place < len(node.args):
                return node.args[place]
            return node.kwargs.get(name, default)
    return default


def operator_key(node: Any) -> str:
    """Return the ATen operator that a node calls, without overload: "add"; else ""."""
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
    """Return a number or a symbolic size as a sympy expression; None for anything else."""
    if isinstance(value, torch.fx.Node):
        value = value_of(value)
    if isinstance(value, torch.SymInt):
        return torch_private.symbolic_expression(value)
    if isinstance(value, torch.SymFloat):
        return value.node.expr
    if isinstance(value, sympy.Expr):
        return value
    if isinstance(value, bool):
        return sympy.Integer(int(value))
    return sympy.sympify(value) if isinstance(value, (int, float)) else None


def ancestors(
    node: torch.fx.Node, ends: Callable[[torch.fx.Node], bool] = lambda _: False
) -> Iterator[torch.fx.Node]:
    """Yield `node` and all nodes that it is computed from, the nearest first.

    What a node takes that `ends` the search is left out.
    """
    waiting, met = deque([node]), {node}
    while waiting:
        node = waiting.popleft()
        yield node
        inputs = () if ends(node) else node.all_input_nodes
        fresh = [each for each in inputs if each not in met]
        met.update(fresh)
        waiting.extend(fresh)


def outputs_of(graph: torch.fx.Graph) -> tuple[Any, ...]:
    """Return what a graph gives, in order."""
    outputs = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def output_place(node: torch.fx.Node) -> int | None:
    """Return the place of the first output that is `node` or a copy of it; None if none is."""
    for place, each in enumerate(outputs_of(node.graph)):
        if isinstance(each, torch.fx.Node) and through_copies(each) is node:
            return place
    return None


def calls(node: Any, *targets: Any) -> bool:
    """True if `node` is a call of one of the operators."""
    return isinstance(node, torch.fx.Node) and node.op == "call_function" and node.target in targets


def through_copies(node: torch.fx.Node) -> torch.fx.Node:
    """Return the first node up the graph that is no copy of its input in the same dtype and shape.

    A slice of the same length counts as a copy, because it takes everything.
    """
    while operator_of(node).view is View.COPY or calls(node, aten.slice.Tensor):
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        before, after = value_of(source), value_of(node)
        if before.dtype != after.dtype or not same_shape(shape_of(source), shape_of(node)):
            break
        node = source
    return node


def through_bits(node: torch.fx.Node) -> torch.fx.Node:
    """Return the first node up the graph that is no copy and shows no bits as another dtype.

    The number of bytes of an element stays the same.
    """
    node = through_copies(node)
    while calls(node, aten.view.dtype):
        source = first_input(node)
        if value_of(source).dtype.itemsize != value_of(node).dtype.itemsize:
            break
        node = through_copies(source)
    return node


def same(left: Any, right: Any) -> bool:
    """True if two sizes are proved equal; no guard is added."""
    return statically_known_true(left == right)


def same_shape(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """True if two shapes are proved equal."""
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))


def static_size(size: Any) -> int | None:
    """Return a size that is a plain number; None if it is symbolic."""
    return size if isinstance(size, int) else None


def operator_name(node: torch.fx.Node) -> str:
    """Return the operator that a node calls, without its overload: "aten.add"."""
    return str(getattr(node.target, "overloadpacket", node.target))


def module_path(node: torch.fx.Node) -> str:
    """Return the path of the calling module, as in `named_modules`, or else the node's name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = str(list(stack.values())[-1][0])
    path = path.replace("._modules['", ".").replace("']", "").replace("['", ".")
    # A decorator may call a method with `*args`; then the first of them is the module.
    path = path.removeprefix("L.self").removeprefix("L.args[0]").removeprefix("L").lstrip(".")
    path = path.removeprefix("_orig_mod").lstrip(".")
    return path.removeprefix("fn.") or node.name


def source_line(node: torch.fx.Node) -> str:
    """Return the user's line that made a node, "file.py:12, in forward"; empty if not known."""
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
