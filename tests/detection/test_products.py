"""Every spelling of a product has the labels, and the inner sizes, of what it computes."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from tracing import Traced

from lychee_compile.passes.graph.dataflow import shape_of
from lychee_compile.passes.symbolic.axes import Axes, free_axes
from lychee_compile.passes.symbolic.products import Product, product_of

A, B, C, D, E = 2, 3, 4, 5, 6


def by_labels(product: Product, traced: Traced, tensors: dict[Any, Tensor]) -> Tensor:
    """Return the product computed from its labels alone."""
    letters: dict[Any, str] = {}

    def squeezed(node: Any, labels: Any) -> tuple[Tensor, str]:
        tensor, kept = tensors[node], ""
        for dim in reversed(range(tensor.dim())):
            if tensor.shape[dim] == 1:
                tensor = tensor.squeeze(dim)
            else:
                letters.setdefault(labels[dim], string.ascii_letters[len(letters)])
                kept = letters[labels[dim]] + kept
        return tensor, kept

    left, first = squeezed(product.left, product.left_labels)
    right, second = squeezed(product.right, product.right_labels)
    sizes = tensors[product.node].shape
    out = [letters.get(label, "") for label in product.out_labels if label is not None]
    result = torch.einsum(f"{first},{second}->{''.join(out)}", left, right)
    result = float(product.alpha) * result.reshape(sizes)
    if product.added is not None:
        result = result + float(product.beta) * tensors[product.added]
    return result


def check(function: Callable[..., Tensor], *inputs: Tensor, dynamic: tuple[int, ...] = ()) -> None:
    expected = function(*inputs)
    traced = Traced(function, *inputs, dynamic=dynamic)
    (node,) = traced.outputs
    product = product_of(node)
    assert product is not None, f"{node.target} is a product"
    tensors = _values(traced, inputs)
    torch.testing.assert_close(by_labels(product, traced, tensors), expected)
    _check_indices(product)


def _values(traced: Traced, inputs: tuple[Tensor, ...]) -> dict[Any, Any]:
    """Return the value of every node of the graph."""
    found: dict[Any, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    Recorder(traced.gm).run(*inputs)
    return found


def _check_indices(product: Product) -> None:
    """Check that the summed axes are those that both operands have and the output has not."""
    axes = Axes()
    out = [axes.index(f"o{dim}", size) for dim, size in enumerate(shape_of(product.node))]
    inner = [axes.index(f"i{dim}", size) for dim, size in enumerate(product.inner_sizes())]
    left, right = product.operand_indices(tuple(out), inner)
    assert free_axes(inner) <= free_axes(left) | free_axes(right)
    assert free_axes(out) <= free_axes(left) | free_axes(right)
    for indices, node in ((left, product.left), (right, product.right)):
        assert [axes.digits(*each) for each in zip(indices, shape_of(node), strict=True)]


SPELLINGS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "matmul": (torch.matmul, ((A, B, C, D), (A, B, D, E))),
    "at": (lambda x, y: x @ y.mT, ((A, B, C, D), (A, B, E, D))),
    "broadcast batch": (torch.matmul, ((A, 1, C, D), (B, D, E))),
    "single row": (torch.matmul, ((A, B, 1, D), (A, B, D, 1))),
    "single inner": (torch.matmul, ((A, C, 1), (A, 1, E))),
    "vector left": (torch.matmul, ((D,), (A, B, D, E))),
    "vector right": (torch.matmul, ((A, B, C, D), (D,))),
    "vectors": (torch.matmul, ((D,), (D,))),
    "bmm": (torch.bmm, ((A, C, D), (A, D, E))),
    "mm": (torch.mm, ((C, D), (D, E))),
    "mv": (torch.mv, ((C, D), (D,))),
    "dot": (torch.dot, ((D,), (D,))),
    "inner": (torch.inner, ((A, C, D), (E, D))),
    "inner of vectors": (torch.inner, ((D,), (E, D))),
    "linear": (F.linear, ((A, C, D), (E, D))),
    "linear with bias": (F.linear, ((A, C, D), (E, D), (E,))),
    "linear of a vector": (F.linear, ((D,), (E, D))),
    "baddbmm": (lambda x, y, z: torch.baddbmm(z, x, y, beta=2, alpha=0.5),
                ((A, C, D), (A, D, E), (A, C, E))),
    "baddbmm of nothing": (lambda x, y, z: torch.baddbmm(z, x, y, beta=0, alpha=3),
                           ((A, C, D), (A, D, E), (1, 1, 1))),
    "addmm": (lambda x, y, z: torch.addmm(z, x, y, alpha=2), ((C, D), (D, E), (E,))),
    "addmv": (lambda x, y, z: torch.addmv(z, x, y, beta=3), ((C, D), (D,), (C,))),
    "einsum": (lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y), ((A, B, C, D), (A, B, E, D))),
    "einsum grouped": (lambda x, y: torch.einsum("bhgqd,bhkd->bhgqk", x, y),
                       ((A, B, 2, C, D), (A, B, E, D))),
    "einsum implicit": (lambda x, y: torch.einsum("zxk, xky", x, y), ((A, B, C), (B, C, D))),
    "einsum capitals": (lambda x, y: torch.einsum("aKb,KZb", x, y), ((A, B, C), (B, D, C))),
    "einsum dots": (lambda x, y: torch.einsum("...qd,...kd->...qk", x, y),
                    ((A, B, C, D), (B, E, D))),
    "einsum dots implicit": (lambda x, y: torch.einsum("...qd,...kd", x, y),
                             ((A, B, C, D), (A, B, E, D))),
    "einsum dots in the middle": (lambda x, y: torch.einsum("b...d,bd->b...", x, y),
                                  ((A, B, C, D), (A, D))),
    "einsum dots of ones": (lambda x, y: torch.einsum("...qd,...kd->...qk", x, y),
                            ((A, 1, C, D), (B, E, D))),
    "einsum dots dropped": (lambda x, y: torch.einsum("...d,...d->d", x, y),
                            ((A, B, D), (A, B, D))),
    "einsum one of one": (lambda x, y: torch.einsum("bqd,bkd->bqk", x, y), ((1, C, D), (A, E, D))),
    "einsum two inner": (lambda x, y: torch.einsum("abq,kab->qk", x, y), ((A, B, C), (E, A, B))),
    "einsum outer order": (lambda x, y: torch.einsum("qd,kd->kq", x, y), ((C, D), (E, D))),
    "sum of products": (lambda x, y: (x[:, :, None] * y[:, None]).sum(-1), ((A, C, D), (A, E, D))),
    "sum, kept": (lambda x, y: (x * y).sum((0, -1), keepdim=True), ((A, C, D), (A, 1, D))),
    "sum, fewer dimensions": (lambda x, y: (x * y).sum(1), ((A, C, D), (C, D))),
    "sum in another dtype": (lambda x, y: (x * y).sum(-1, dtype=torch.float64).float(),
                             ((A, D), (A, D))),
    "sum over a repeated side": (lambda x, y: (x * y).sum((0, 2)), ((A, C, D), (1, C, D))),
    "tensordot": (lambda x, y: torch.tensordot(x, y, dims=([2], [1])), ((A, C, D), (E, D))),
    "tensordot of two": (lambda x, y: torch.tensordot(x, y, dims=([0, -1], [2, 0])),
                         ((A, C, D), (D, E, A))),
    "tensordot by count": (lambda x, y: torch.tensordot(x, y, dims=2), ((A, C, D), (C, D, E))),
}  # fmt: skip
LAST_IS_CAST = {"sum in another dtype"}


@pytest.mark.parametrize("dynamic", [(), (0, 1, 2)], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_product_is_what_its_labels_say(name: str, dynamic: tuple[int, ...]) -> None:
    function, shapes = SPELLINGS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    if name in LAST_IS_CAST:
        traced = Traced(function, *inputs, dynamic=dynamic)
        assert product_of(traced.outputs[0].args[0]) is not None
        return
    check(function, *inputs, dynamic=dynamic)


@settings(max_examples=20)
@given(st.data())
def test_a_random_einsum_is_what_its_labels_say(data) -> None:
    letters = data.draw(st.permutations("abcDEz"))
    sizes = {letter: data.draw(st.integers(1, 3)) for letter in letters}
    terms = [
        "".join(data.draw(st.lists(st.sampled_from(letters), min_size=1, max_size=4, unique=True)))
        for _ in range(2)
    ]
    shared = set(terms[0]) & set(terms[1])
    inner = {letter for letter in sorted(shared) if data.draw(st.booleans())}
    assume(inner)
    out = data.draw(st.permutations(sorted((set(terms[0]) | set(terms[1])) - inner)))
    dots = [data.draw(st.integers(0, 2)) for _ in range(2)]
    places = [data.draw(st.integers(0, len(term))) for term in terms]
    inputs, spelled = [], []
    for term, count, at in zip(terms, dots, places, strict=True):
        spelled.append(f"{term[:at]}...{term[at:]}" if any(dots) else term)
        shape = [1 if data.draw(st.booleans()) and x in inner else sizes[x] for x in term]
        shape[at:at] = [(2, 3)[2 - count + each] for each in range(count)] if any(dots) else []
        inputs.append(torch.randn(shape))
    equation = f"{','.join(spelled)}->{'...' if any(dots) else ''}{''.join(out)}"
    check(lambda x, y: torch.einsum(equation, x, y), *inputs)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x: torch.einsum("ii->i", x), ((C, C),)),
        (lambda x, y: torch.einsum("ii,ik->k", x, y), ((C, C), (C, D))),
        (lambda x, y: torch.einsum("ij,k->k", x, y), ((C, D), (E,))),
        (lambda x, y, z: torch.einsum("ab,bc,cd->ad", x, y, z), ((A, B), (B, C), (C, D))),
        (lambda x, y: torch.einsum("ab,cd->abcd", x, y), ((A, B), (C, D))),
        (lambda x: (x * 2).sum(-1), ((A, B),)),
        (lambda x, y: (x * y).sum(), ((A, B), (A, B))),
        (lambda x, y: (x * y).sum(0), ((A, B), (B,))),
        (lambda x, y: (x + y).sum(-1), ((A, B), (A, B))),
    ],
)
def test_what_is_no_product_of_two_is_none(function, shapes) -> None:
    traced = Traced(function, *(torch.randn(shape) for shape in shapes))
    assert product_of(traced.outputs[0]) is None
