"""Read batched products in every spelling, as labelled operands and inner labels.

matmul(a, b), a @ b, bmm, mm, mv, dot     baddbmm, addmm (the product in them)
einsum("bhqd,bhkd->bhqk", a, b)           (a[..., :, None, :] * b[..., None, :, :]).sum(-1)
linear(a, b)                              tensordot
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch.fx

from lychee_compile.passes.graph.dataflow import (
    argument,
    first_input,
    is_operator,
    operator_of,
    scalar_of,
    shape_of,
)
from lychee_compile.passes.graph.operator_facts import ProductKind, View
from lychee_compile.passes.symbolic.axes import ZERO, Indices, size_expression

Label = int | str
Labels = tuple[Label | None, ...]
"""A label for each dimension; None for a dimension of size one that no other tensor has."""


@dataclass(frozen=True)
class Product:
    """A product: out[...] = sum over the inner labels of left[...] * right[...]."""

    node: torch.fx.Node
    left: torch.fx.Node
    right: torch.fx.Node
    left_labels: Labels
    right_labels: Labels
    out_labels: Labels
    inner: tuple[Label, ...]
    added: torch.fx.Node | None = None
    """Tensor that `baddbmm` and `addmm` add, broadcast to the output."""
    alpha: sympy.Expr = sympy.S.One
    """Factor of the product."""
    beta: sympy.Expr = sympy.S.One
    """Factor of the added tensor."""

    def inner_sizes(self) -> list[Any]:
        """Return the size of each inner label."""
        return [self._size(label) for label in self.inner]

    def _size(self, label: Label) -> Any:
        sizes = []
        for node, labels in ((self.left, self.left_labels), (self.right, self.right_labels)):
            sizes += [s for s, each in zip(shape_of(node), labels, strict=True) if each == label]
        return next((size for size in sizes if size_expression(size) != 1), sizes[0])

    def operand_indices(self, out: Indices, inner: Sequence[sympy.Expr]) -> tuple[Indices, Indices]:
        """Return the indices of both operands, from those of the output and of the inner labels."""
        index: dict[Label | None, sympy.Expr] = dict(zip(self.inner, inner, strict=True))
        index |= {key: at for key, at in zip(self.out_labels, out, strict=True) if key is not None}

        def indices(node: torch.fx.Node, labels: Labels) -> Indices:
            return tuple(
                ZERO if size_expression(size) == 1 or label is None else index[label]
                for size, label in zip(shape_of(node), labels, strict=True)
            )

        return indices(self.left, self.left_labels), indices(self.right, self.right_labels)


def product_of(node: torch.fx.Node) -> Product | None:
    """Return `node` as a product of two tensors; None if it is none."""
    kind = operator_of(node).product
    return None if kind is None else _RULES[kind](node)


def _tensors(node: torch.fx.Node, *names: str) -> list[torch.fx.Node] | None:
    found = [argument(node, name) for name in names]
    return found if all(isinstance(each, torch.fx.Node) for each in found) else None


def _matmul(node: torch.fx.Node, left: torch.fx.Node, right: torch.fx.Node) -> Product | None:
    """Return a product by the rules of matmul: vectors, matrices, batches that broadcast."""
    ranks = len(shape_of(left)), len(shape_of(right))
    if min(ranks) == 0:
        return None
    batch = max(*ranks, 2) - 2

    def labels(rank: int, last: tuple[Label, ...]) -> Labels:
        own = last if rank > 1 else ("inner",)
        return (*range(batch - (rank - len(own)), batch), *own)

    left_labels, right_labels = (
        labels(ranks[0], ("row", "inner")),
        labels(ranks[1], ("inner", "column")),
    )
    out: Labels = tuple(range(batch))
    out += ("row",) * (ranks[0] > 1) + ("column",) * (ranks[1] > 1)
    return Product(node, left, right, left_labels, right_labels, out, ("inner",))


def _plain(node: torch.fx.Node) -> Product | None:
    left, right = node.args[:2]
    assert isinstance(left, torch.fx.Node)
    assert isinstance(right, torch.fx.Node)
    return _matmul(node, left, right)


def _linear(node: torch.fx.Node) -> Product | None:
    operands: Any = node.args[:2]
    if len(shape_of(operands[1])) != 2:
        return None
    rank = len(shape_of(operands[0]))
    rows: Labels = tuple(range(rank - 1))
    left, right, out = (*rows, "inner"), ("column", "inner"), (*rows, "column")
    added: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return Product(node, operands[0], operands[1], left, right, out, ("inner",), added)


def _added(first: str, second: str) -> Callable[[torch.fx.Node], Product | None]:
    def rule(node: torch.fx.Node) -> Product | None:
        operands = _tensors(node, first, second)
        made = None if operands is None else _matmul(node, *operands)
        alpha, beta = (scalar_of(argument(node, name, 1)) for name in ("alpha", "beta"))
        if made is None or alpha is None or beta is None:
            return None
        added = None if beta.is_zero else argument(node, "self")
        fields = {**vars(made), "added": added, "alpha": alpha, "beta": beta}
        return Product(**fields)

    return rule


def _einsum(node: torch.fx.Node) -> Product | None:
    equation, operands = argument(node, "equation"), argument(node, "tensors")
    if len(operands) != 2 or not isinstance(equation, str):
        return None
    terms, _, out = equation.replace(" ", "").partition("->")
    parts = terms.split(",")
    if "->" not in equation:
        letters = "".join(parts).replace(".", "")
        once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        out = ("..." if "." in terms else "") + "".join(once)
    spare = [
        len(shape_of(each)) - len(part.replace("...", ""))
        for each, part in zip(operands, parts, strict=True)
    ]
    dots = max(
        [count for count, part in zip(spare, parts, strict=True) if "..." in part], default=0
    )

    def labels(part: str, count: int) -> Labels:
        before, ellipsis, after = part.partition("...")
        middle = range(dots - count, dots) if ellipsis else ()
        return (*before, *middle, *after)

    left, right = (labels(part, count) for part, count in zip(parts, spare, strict=True))
    made = labels(out, dots)
    if any(len(set(each)) != len(each) for each in (left, right, made)):
        return None
    labels_of_both = dict.fromkeys(label for label in left + right if label is not None)
    inner = tuple(label for label in labels_of_both if label not in made)
    if not inner or not all(label in left and label in right for label in inner):
        return None
    return Product(node, operands[0], operands[1], left, right, made, inner)


def _sum_of_products(node: torch.fx.Node) -> Product | None:
    """Return `(a * b).sum(dims)`, with operands that broadcast, as a product."""
    times = argument(node, "self")
    while operator_of(times).view is View.COPY:
        times = first_input(times)
    if not is_operator(times, "mul"):
        return None
    operands = _tensors(times, "self", "other")
    dims = argument(node, "dim")
    rank = len(shape_of(times))
    if operands is None or not dims:
        return None
    inner = tuple(sorted(int(dim) % rank for dim in dims))
    left, right = (tuple(range(rank - len(shape_of(each)), rank)) for each in operands)
    if not all(label in left and label in right for label in inner):
        return None
    keep = argument(node, "keepdim", False)
    out: Labels = tuple(None if d in inner else d for d in range(rank) if keep or d not in inner)
    return Product(node, operands[0], operands[1], left, right, out, inner)


def _tensordot(node: torch.fx.Node) -> Product | None:
    operands = _tensors(node, "self", "other")
    if operands is None:
        return None
    ranks = [len(shape_of(each)) for each in operands]
    dims = [
        [int(dim) % rank for dim in argument(node, name)]
        for name, rank in zip(("dims_self", "dims_other"), ranks, strict=True)
    ]
    inner = tuple(f"inner{place}" for place in range(len(dims[0])))

    def labels(side: int) -> Labels:
        return tuple(
            inner[dims[side].index(d)] if d in dims[side] else f"{'lr'[side]}{d}"
            for d in range(ranks[side])
        )

    left, right = labels(0), labels(1)
    out = tuple(label for label in left + right if label not in inner)
    return Product(node, operands[0], operands[1], left, right, out, inner)


_RULES: dict[ProductKind, Callable[[torch.fx.Node], Product | None]] = {
    ProductKind.MATMUL: _plain,
    ProductKind.LINEAR: _linear,
    ProductKind.ADD_BATCHES: _added("batch1", "batch2"),
    ProductKind.ADD_MATRIX: _added("mat1", "mat2"),
    ProductKind.ADD_VECTOR: _added("mat", "vec"),
    ProductKind.EINSUM: _einsum,
    ProductKind.SUM: _sum_of_products,
    ProductKind.TENSORDOT: _tensordot,
}
