"""Random sympy expressions, each with its value computed by PyTorch while it is put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from hypothesis import strategies as st
from torch import Tensor

from lychee_compile.codegen.specification import KV, KV_LEN, B, Captured, H, Q, S
from lychee_compile.passes.symbolic.elementwise import Flag

BATCH, HEADS, QUERIES, KEYS = SIZES = (2, 3, 2, 7)
EPSILON = 1e-6
"""Relative error of one float32 operation, of an approximate one on a GPU too."""


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


TENSORS = {
    "one": _random(),
    "taken": torch.tensor(True),
    "table": _random(5, HEADS).mT,
    "half": _random(QUERIES, 2 * KEYS)[:, ::2].half(),
    "brain": _random(KEYS).bfloat16(),
    "double": _random(BATCH, 1).double().expand(BATCH, QUERIES),
    "flags": _random(KEYS, BATCH).mT > 0,
    "counts": torch.tensor([5, 3]),
    "offsets": torch.tensor([-3, 100, -128], dtype=torch.int8),
    "bytes": torch.tensor([255, 0, 7], dtype=torch.uint8),
    "ids": torch.arange(BATCH * KEYS, dtype=torch.int32).view(BATCH, KEYS) % 5 - 2,
}
"""Tensors that expressions read: many dtypes and strides, with no, one or two dimensions."""
CAPTURED = {
    name: Captured(name, str(tensor.dtype).removeprefix("torch."), tensor.ndim)
    for name, tensor in TENSORS.items()
}
PRODUCTS = (_random(*SIZES) * 16).round() / 8
"""s, at multiples of 1/8, so that comparing it is exact."""


@dataclass(frozen=True)
class Term:
    """An expression, its value [B, H, Q, KV] in 64 bits, and how far float32 may be off."""

    expression: Any
    value: Tensor
    error: float = 0.0

    @property
    def size(self) -> float:
        return float(self.value.abs().max())


def _axis(symbol: sympy.Symbol, dim: int) -> Term:
    shape = [-1 if each == dim else 1 for each in range(4)]
    return Term(symbol, torch.arange(SIZES[dim]).view(shape).expand(SIZES))


AXES = [_axis(symbol, dim) for dim, symbol in enumerate((B, H, Q, KV))]
LENGTH = Term(KV_LEN, torch.tensor(KEYS).expand(SIZES))
SCORE = Term(S, PRODUCTS.double())


def _constant(value: int) -> Term:
    return Term(sympy.Integer(value), torch.tensor(value).expand(SIZES))


def _number(value: float) -> Term:
    tensor = torch.tensor(value, dtype=torch.float64).expand(SIZES)
    return _rounded(sympy.Float(value), tensor, 0)


def _rounded(expression: Any, value: Tensor, error: float) -> Term:
    return Term(expression, value, error + float(value.abs().max()) * EPSILON + EPSILON)


@st.composite
def _elements(draw, names: list[str], depth: int) -> Term:
    """Draw an element of a tensor, at axes of the right size or at remainders by the size."""
    name = draw(st.sampled_from(names))
    tensor, indices = TENSORS[name], []
    for size in tensor.shape:
        fitting = [axis for axis, length in zip(AXES, SIZES, strict=True) if length <= size]
        index = draw(st.sampled_from([*fitting, *map(_constant, range(2)), None]))
        if index is None:
            index = _remainder(draw(_divisible(depth - 1)), size)
        indices.append(index)
    kind = {"integer": True} if name in ("offsets", "ids") else {}
    symbol = sympy.Symbol(name, **kind)
    expression = symbol
    if indices:
        base = sympy.IndexedBase(symbol, **kind)
        expression = sympy.Indexed(base, *(each.expression for each in indices))
    value = tensor[tuple(each.value for each in indices)].expand(SIZES)
    if tensor.dtype == torch.bool:
        return Term(Flag(expression), value)
    if tensor.is_floating_point():
        return _rounded(expression, value.double(), 0)
    return Term(expression, value.long())


# Each with the number of its operands, in sympy and in PyTorch. Divisors are not 0.
INTEGER_OPERATIONS = [
    (2, lambda a, b: a + b, lambda x, y: x + y),
    (2, lambda a, b: a - b, lambda x, y: x - y),
    (2, lambda a, b: a * b, lambda x, y: x * y),
    (1, lambda a: a**2, lambda x: x**2),
    (2, lambda a, b: sympy.floor(a / (abs(b) + 1)), lambda x, y: x // (y.abs() + 1)),
    (2, lambda a, b: sympy.floor(-a / (abs(b) + 1)), lambda x, y: -x // (y.abs() + 1)),
    (2, lambda a, b: sympy.ceiling(a / (abs(b) + 1)), lambda x, y: -(-x // (y.abs() + 1))),
    (1, lambda a: sympy.floor(a / 16), lambda x: x // 16),
    (2, sympy.Max, torch.maximum),
    (2, sympy.Min, torch.minimum),
    (1, sympy.Abs, torch.abs),
]
REMAINDERS = [
    (1, lambda a: sympy.Mod(a, 8), lambda x: x % 8),
    (1, lambda a: sympy.Mod(a, -7), lambda x: x % -7),
    (1, lambda a: sympy.Mod(a, KV_LEN), lambda x: x % KEYS),
]
SMOOTH_OPERATIONS = [
    (2, lambda a, b: a + b, lambda x, y: x + y),
    (2, lambda a, b: a - b, lambda x, y: x - y),
    (1, lambda a: 4 * sympy.tanh(a / 4), lambda x: 4 * (x / 4).tanh()),
    (1, lambda a: sympy.exp(-abs(a)), lambda x: (-x.abs()).exp()),
    (1, lambda a: sympy.Rational(3, 10) ** abs(a), lambda x: 0.3 ** x.abs()),
    (1, lambda a: 2 ** -abs(a), lambda x: 2.0 ** -x.abs()),
    (1, lambda a: sympy.log(1 + abs(a)), lambda x: (1 + x.abs()).log()),
    (1, lambda a: sympy.sqrt(1 + abs(a)), lambda x: (1 + x.abs()).sqrt()),
    (1, lambda a: 1 / sympy.sqrt(1 + abs(a)), lambda x: (1 + x.abs()).rsqrt()),
    (2, sympy.Max, torch.maximum),
    (2, sympy.Min, torch.minimum),
]
"""They make no difference larger."""
PRODUCTS_OF_NUMBERS = [
    (2, lambda a, b: a * b, lambda x, y: x * y),
    (1, lambda a: a**2, lambda x: x**2),
    (2, lambda a, b: a / (1 + abs(b)), lambda x, y: x / (1 + y.abs())),
]
LOGIC = [
    (3, sympy.And, lambda x, y, z: x & y & z),
    (3, sympy.Or, lambda x, y, z: x | y | z),
    (1, sympy.Not, torch.logical_not),
    (2, sympy.Xor, torch.logical_xor),
    (3, sympy.ITE, torch.where),
]
COMPARISONS = [
    (sympy.Le, torch.le), (sympy.Lt, torch.lt), (sympy.Ge, torch.ge),
    (sympy.Gt, torch.gt), (sympy.Eq, torch.eq), (sympy.Ne, torch.ne),
]  # fmt: skip


def _applied(draw, operation: tuple[int, Any, Any], operands: st.SearchStrategy[Term]):
    """Return an operation on operands: expression, value, and the operands."""
    count, expressed, computed = operation
    terms = [draw(operands) for _ in range(count)]
    expression = expressed(*(each.expression for each in terms))
    return expression, computed(*(each.value for each in terms)), terms


def _is_leaf(draw, depth: int) -> bool:
    return depth == 0 or draw(st.integers(0, 3)) == 0


@st.composite
def ints(draw, depth: int = 3) -> Term:
    """Draw a term of integers, which is exact."""
    if _is_leaf(draw, depth):
        leaves = st.sampled_from([*AXES, LENGTH]) | st.integers(-9, 9).map(_constant)
        if depth > 0:
            leaves |= _elements(["counts", "offsets", "bytes", "ids"], depth)
        return draw(leaves)
    kind = draw(st.sampled_from(["operation", "operation", "remainder", "choice"]))
    if kind == "choice":
        return draw(_choices(ints(depth - 1), depth))
    if kind == "remainder":
        operation, operands = draw(st.sampled_from(REMAINDERS)), _divisible(depth - 1)
    else:
        operation, operands = draw(st.sampled_from(INTEGER_OPERATIONS)), ints(depth - 1)
    expression, value, _ = _applied(draw, operation, operands)
    return Term(expression, value)


@st.composite
def floats(draw, depth: int = 3) -> Term:
    """Draw a term of scores, floats and integers."""
    if _is_leaf(draw, depth):
        leaves = st.just(SCORE) | st.floats(-4, 4, allow_subnormal=False).map(_number)
        if depth > 0:
            leaves |= _elements(["one", "table", "half", "brain", "double"], depth)
            leaves |= _divisible(depth - 1).map(_as_float)
        return draw(leaves)
    kind = draw(st.sampled_from(["smooth", "smooth", "product", "choice"]))
    if kind == "choice":
        return draw(_choices(floats(depth - 1), depth))
    operations = SMOOTH_OPERATIONS if kind == "smooth" else PRODUCTS_OF_NUMBERS
    operation = draw(st.sampled_from(operations))
    expression, value, operands = _applied(draw, operation, floats(depth - 1))
    error = sum(each.error for each in operands)
    if kind == "product":
        error *= 2 + 2 * max(each.size for each in operands)
    return _rounded(expression, value, error)


@st.composite
def bools(draw, depth: int = 3) -> Term:
    """Draw truth values, of integers, flags, and scores at multiples of 1/8."""
    if _is_leaf(draw, depth):
        limit = draw(st.integers(-16, 16)) / 8
        simple = [
            Term(sympy.Le(KV, Q + 3), AXES[3].value <= AXES[2].value + 3),
            Term(sympy.Gt(S, limit), SCORE.value > limit),
        ]
        return draw(st.sampled_from(simple) | _elements(["taken", "flags"], depth))
    if draw(st.booleans()):
        operation = (2, *draw(st.sampled_from(COMPARISONS)))
        expression, value, _ = _applied(draw, operation, _unchosen(depth - 1))
    else:
        expression, value, _ = _applied(draw, draw(st.sampled_from(LOGIC)), bools(depth - 1))
    return Term(expression, value)


@st.composite
def _choices(draw, operands: st.SearchStrategy[Term], depth: int) -> Term:
    condition, yes, no = draw(bools(depth - 1)), draw(operands), draw(operands)
    pairs = (yes.expression, condition.expression), (no.expression, True)
    value = torch.where(condition.value, yes.value, no.value)
    return Term(sympy.Piecewise(*pairs, evaluate=False), value, yes.error + no.error)


def _unchosen(depth: int) -> st.SearchStrategy[Term]:
    """Return integers without choices: sympy takes no condition that has conditions."""
    return ints(depth).filter(lambda term: not term.expression.has(sympy.Piecewise))


def _divisible(depth: int) -> st.SearchStrategy[Term]:
    """Return integers that sympy 1.14 has right remainders of.

    It takes Mod(3*Mod(q, 5), 8) for Mod(3*Mod(q, 5)**2, 8), Mod(Piecewise((0, c), (2, True)), 8)
    for 0, and loses itself in divisors that are negative expressions.
    """
    return ints(depth).filter(lambda term: not term.expression.has(sympy.Piecewise, sympy.Mod))


def _remainder(term: Term, divisor: int) -> Term:
    return Term(sympy.Mod(term.expression, divisor), term.value % divisor)


def _as_float(term: Term) -> Term:
    rest = _remainder(term, 100)
    return _rounded(rest.expression / sympy.Integer(30), rest.value.double() / 30, 0)
