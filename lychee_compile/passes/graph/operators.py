"""The table of ATen operators, the only place that says what an operator is.

To add an operator, add its name to a row that describes it, or write a new row. In a row, words are
operators that share the description, and names joined by `/` are synonyms of one operator. Only the
first of the synonyms is ever written in code (`is_operator(node, "div")`).

To teach detection a new form of mask, say which of these the operators that make it are:

- an elementwise function: give `numbers`, `truths` or `bits`, a function of sympy;
- a view, copy or repetition: give `view`, one of the rules in `symbolic.views`;
- something else whose elements can be told: give `rule`, and write it in `symbolic.element_rules`;
- something that meets the scores: give `steps`, a `StepKind` for each operand that scores may be;
  what a kind does to a score is in `detect.scores`.

`operator_facts` explains every column. Then add a test line. A mask that is new goes into `MASKS`
in `tests/detection/test_masks.py`, and a known mask that is written in another way goes into
`tests/helpers/spellings_masks.py`. `tests/detection/test_operator_table.py` checks that names
exist.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from lychee_compile.passes.graph.operator_facts import (
    AtenOperator,
    Family,
    Memory,
    ProductKind,
    Rule,
    StepKind,
    View,
    WriteKind,
)

OTHER, FILL, FLOOR = StepKind.OTHER, StepKind.FILL, StepKind.FLOOR
PLUS, MINUS, TIMES = StepKind.PLUS, StepKind.MINUS, StepKind.TIMES


def _exclusive_or(left: Boolean, right: Boolean) -> Boolean:
    """Return one of two without both; if one implies the other, as in a band, their difference."""
    parts = [set(sympy.And.make_args(each)) for each in (left, right)]
    if parts[0] <= parts[1]:
        return sympy.And(left, sympy.Not(sympy.And(*(parts[1] - parts[0]))))
    if parts[1] <= parts[0]:
        return sympy.And(right, sympy.Not(sympy.And(*(parts[0] - parts[1]))))
    return sympy.Xor(left, right)


def _logarithm(value: sympy.Expr) -> sympy.Expr:
    return -sympy.oo if value.is_zero else sympy.log(value)


def _shifted_right(value: sympy.Expr, bits: sympy.Expr) -> sympy.Expr:
    """Return `value >> bits`. Raise `NotImplementedError` if `bits` is not a number."""
    if not (value.is_integer and bits.is_Integer and bits.is_nonnegative):
        raise NotImplementedError
    return sympy.floor(value / 2**bits)


def _row(names: str, **facts: Any) -> Iterator[tuple[str, AtenOperator]]:
    """Yield each name in a row with what the row says."""
    for synonyms in names.split():
        first, *others = synonyms.split("/")
        described = AtenOperator(first, **facts)
        yield from ((name, described) for name in (first, *others))


def _table() -> Iterator[tuple[str, AtenOperator]]:
    yield from _copies()
    yield from _views()
    yield from _arithmetic()
    yield from _other_elementwise()
    yield from _made_from_nothing()
    yield from _selections()
    yield from _products()
    yield from _writes()
    yield from _others()


def _copies() -> Iterator[tuple[str, AtenOperator]]:
    yield from _row("alias detach", view=View.COPY, memory=Memory.OF_INPUT)
    yield from _row("contiguous to positive", view=View.COPY)
    yield from _row("clone _to_copy lift_fresh_copy", view=View.COPY, memory=Memory.FRESH)
    yield from _row("type_as lift_fresh", view=View.COPY, memory=Memory.PERHAPS_OF_INPUT)
    yield from _row("detach_", view=View.COPY, writes_nothing=True)


def _views() -> Iterator[tuple[str, AtenOperator]]:
    mine, maybe, fresh = Memory.OF_INPUT, Memory.PERHAPS_OF_INPUT, Memory.FRESH
    yield from _row("view view_as unsqueeze squeeze unflatten", view=View.RESHAPE, memory=mine)
    yield from _row("reshape reshape_as flatten ravel _unsafe_view", view=View.RESHAPE)
    yield from _row("atleast_2d atleast_3d", view=View.RESHAPE, memory=maybe)
    yield from _row("expand expand_as broadcast_to", view=View.BROADCAST, memory=mine)
    yield from _row("transpose/swapaxes/swapdims", view=View.SWAP, memory=mine)
    yield from _row("t mT mH adjoint matrix_H", view=View.SWAP_LAST, memory=mine)
    yield from _row("permute", view=View.PERMUTE, memory=mine)
    yield from _row("movedim/moveaxis", view=View.MOVE, memory=mine)
    yield from _row("numpy_T", view=View.REVERSE, memory=mine)
    yield from _row("select", view=View.SELECT, memory=mine)
    yield from _row("slice narrow", view=View.SLICE, memory=mine)
    yield from _row("repeat tile", view=View.REPEAT, memory=fresh)
    yield from _row("repeat_interleave", view=View.INTERLEAVE, memory=fresh)
    yield from _row("flip", view=View.FLIP, memory=fresh)
    yield from _row(
        "chunk split split_with_sizes unbind tensor_split "
        "unsafe_chunk unsafe_split unsafe_split_with_sizes",
        view=View.PARTS, memory=mine,
    )  # fmt: skip
    yield from _row("atleast_1d broadcast_tensors meshgrid hsplit vsplit dsplit", memory=maybe)


def _arithmetic() -> Iterator[tuple[str, AtenOperator]]:
    yield from _row("add", numbers=operator.add, steps=(PLUS, PLUS), carries=True)
    yield from _row(
        "sub/subtract", numbers=operator.sub, steps=(MINUS, StepKind.FROM), carries=True
    )
    yield from _row("rsub", numbers=lambda a, b: b - a, steps=(StepKind.FROM, MINUS), carries=True)
    yield from _row("mul/multiply", numbers=operator.mul, steps=(TIMES, TIMES), carries=True)
    yield from _row(
        "div/divide/true_divide", rule=Rule.DIVIDE, steps=(StepKind.OVER,), carries=True
    )
    yield from _row("neg/negative", numbers=operator.neg, steps=(TIMES,), carries=True)
    yield from _row("maximum", numbers=sympy.Max, steps=(FLOOR, FLOOR), carries=True)
    yield from _row("max", steps=(FLOOR, FLOOR))
    yield from _row("clamp/clip clamp_min", steps=(FLOOR,), carries=True)
    yield from _row("tanh", numbers=sympy.tanh, steps=(StepKind.TANH,))
    yield from _row("minimum", numbers=sympy.Min, steps=(OTHER, OTHER), carries=True)
    yield from _row("abs/absolute", numbers=sympy.Abs, steps=(OTHER,), carries=True)
    yield from _row("exp", numbers=sympy.exp, steps=(OTHER,), family=Family.EXPONENTIAL)
    yield from _row("exp2/special_exp2", family=Family.EXPONENTIAL)
    yield from _row("sqrt", numbers=sympy.sqrt, steps=(OTHER,), carries=True)
    yield from _row("square", numbers=lambda a: a**2, steps=(OTHER,), carries=True)
    yield from _row("pow", numbers=operator.pow, steps=(OTHER, OTHER), carries=True)
    yield from _row(
        "sigmoid/special_expit", numbers=lambda a: 1 / (1 + sympy.exp(-a)), steps=(OTHER,)
    )
    yield from _row("nan_to_num relu", steps=(OTHER,), carries=True)
    yield from _row("lerp addcmul", carries=True)
    yield from _row("clamp_max leaky_relu gelu silu sin cos softplus elu hardtanh", steps=(OTHER,))


def _other_elementwise() -> Iterator[tuple[str, AtenOperator]]:
    yield from _row("log", numbers=_logarithm)
    yield from _row("rsqrt", numbers=lambda a: 1 / sympy.sqrt(a))
    yield from _row("reciprocal", numbers=lambda a: 1 / a)
    yield from _row("floor_divide", numbers=lambda a, b: sympy.floor(a / b))
    yield from _row("remainder", numbers=sympy.Mod)
    yield from _row("bitwise_right_shift/__rshift__", numbers=_shifted_right, keeps_range=True)
    yield from _row("le/less_equal", numbers=sympy.Le)
    yield from _row("lt/less", numbers=sympy.Lt)
    yield from _row("ge/greater_equal", numbers=sympy.Ge)
    yield from _row("gt/greater", numbers=sympy.Gt)
    yield from _row("eq", numbers=sympy.Eq)
    yield from _row("ne/not_equal", numbers=sympy.Ne)
    yield from _row("logical_not", truths=sympy.Not)
    yield from _row("logical_and", truths=sympy.And)
    yield from _row("logical_or", truths=sympy.Or)
    yield from _row("logical_xor", truths=_exclusive_or)
    yield from _row("bitwise_not", bits=sympy.Not)
    yield from _row("bitwise_and/__and__", bits=sympy.And, keeps_range=True)
    yield from _row("bitwise_or/__or__", bits=sympy.Or)
    yield from _row("bitwise_xor/__xor__", bits=_exclusive_or)


def _made_from_nothing() -> Iterator[tuple[str, AtenOperator]]:
    yield from _row("arange", rule=Rule.ARANGE)
    yield from _row("ones", rule=Rule.ONES)
    yield from _row("zeros", rule=Rule.ZEROS)
    yield from _row("full scalar_tensor", rule=Rule.FULL)
    yield from _row("ones_like new_ones", rule=Rule.ONES, reads_shape_only=True)
    yield from _row("zeros_like new_zeros", rule=Rule.ZEROS, reads_shape_only=True)
    yield from _row("full_like new_full", rule=Rule.FULL, reads_shape_only=True)
    yield from _row("empty_like new_empty", reads_shape_only=True)


def _selections() -> Iterator[tuple[str, AtenOperator]]:
    yield from _row("where", rule=Rule.WHERE, steps=(None, FILL, FILL), carries=True)
    yield from _row("masked_fill", rule=Rule.MASKED_FILL, steps=(FILL,), carries=True)
    yield from _row("index_put", rule=Rule.INDEX_PUT, steps=(FILL,), write=WriteKind.INDEX_PUT)
    yield from _row("tril", rule=Rule.LOWER_TRIANGLE)
    yield from _row("triu", rule=Rule.UPPER_TRIANGLE)
    yield from _row("index", rule=Rule.INDEX, family=Family.GATHER)
    yield from _row("index_select", rule=Rule.INDEX_SELECT, family=Family.GATHER)
    yield from _row("embedding", rule=Rule.EMBEDDING, family=Family.GATHER)
    yield from _row("gather take_along_dim", family=Family.GATHER)
    yield from _row("constant_pad_nd pad", family=Family.PADDING)


def _products() -> Iterator[tuple[str, AtenOperator]]:
    yield from _row("matmul/linalg_matmul bmm mm mv dot", product=ProductKind.MATMUL)
    yield from _row("linear inner", product=ProductKind.LINEAR)
    yield from _row("baddbmm", product=ProductKind.ADD_BATCHES)
    yield from _row("addmm", product=ProductKind.ADD_MATRIX)
    yield from _row("addmv", product=ProductKind.ADD_VECTOR)
    yield from _row("einsum", product=ProductKind.EINSUM)
    yield from _row("sum", product=ProductKind.SUM)
    yield from _row("tensordot", product=ProductKind.TENSORDOT)
    yield from _row(
        "conv1d conv2d conv3d convolution _convolution "
        "conv_transpose1d conv_transpose2d conv_transpose3d",
        family=Family.CONVOLUTION,
    )


def _writes() -> Iterator[tuple[str, AtenOperator]]:
    yield from _row("index_put_", write=WriteKind.INDEX_PUT)
    yield from _row("index_copy index_copy_", write=WriteKind.INDEX_COPY)
    yield from _row("scatter scatter_", write=WriteKind.SCATTER)
    puts = {"steps": (OTHER,), "family": Family.JOINING}
    yield from _row("slice_scatter", write=WriteKind.SLICE_SCATTER, **puts)
    yield from _row("select_scatter", write=WriteKind.SELECT_SCATTER, **puts)


def _others() -> Iterator[tuple[str, AtenOperator]]:
    maybe = Memory.PERHAPS_OF_INPUT
    yield from _row("softmax/_softmax/special_softmax/_safe_softmax")
    yield from _row("log_softmax/_log_softmax/special_log_softmax")
    yield from _row("logsumexp/special_logsumexp")
    yield from _row("scaled_dot_product_attention view_as_complex view_as_real isnan roll")
    yield from _row("stack cat/concat/concatenate", family=Family.JOINING)
    yield from _row(
        "layer_norm native_layer_norm batch_norm group_norm instance_norm rms_norm",
        family=Family.NORMALISATION,
    )
    yield from _row(
        "_transformer_encoder_layer_fwd _native_multi_head_attention",
        family=Family.ATTENTION_MODULE,
    )
    yield from _row("dropout", family=Family.DROPOUT, memory=maybe, carries=True)
    yield from _row("native_dropout", family=Family.DROPOUT, carries=True)
    yield from _row(
        "feature_dropout alpha_dropout feature_alpha_dropout", family=Family.DROPOUT, memory=maybe
    )
    yield from _row("rrelu", memory=maybe)
    yield from _row("requires_grad_", writes_nothing=True)
    yield from _row("fill_ zero_")
    yield from _row(
        "dropout_ feature_dropout_ alpha_dropout_ feature_alpha_dropout_", family=Family.DROPOUT
    )
    yield from _row("set_ resize_", only_in_place=True)


OPERATORS: Mapping[str, AtenOperator] = dict(_table())
"""Rows of the table, by each of the names of an operator, without overload."""
UNKNOWN = AtenOperator()
"""Row of all operators that are not in the table."""
PURE_CALLS = (operator.getitem, torch.ops.higher_order.flex_attention)
"""Calls in a graph that have no effect, though they are not operators of ATen."""
