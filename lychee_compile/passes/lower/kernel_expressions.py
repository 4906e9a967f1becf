"""Derive the score and the mask of one attention as a generated kernel computes them.

    mask = arange(L) <= arange(T)[:, None] + length         visible = kv <= q + given_length
    mask = mask & padding[:, None, None, :]                           & given_padding[b, kv]
    scores = q @ k.mT / 8 + slopes[:, None, None] * ...     score = s/8 + given_slopes[h]*...

A mask that is made in the graph is thus never in memory: the kernel reads what it is made from. If
that takes a long expression, or one without a Triton form, the kernel reads the mask itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import sympy
import torch.fx
from sympy.logic.boolalg import Boolean

from lychee_compile.codegen.bounds import key_bound
from lychee_compile.codegen.printer import Unprintable, print_expression
from lychee_compile.codegen.specification import KV, KV_LEN, B, Captured, H, Q, S
from lychee_compile.kernels.reference.hidden import HIDDEN
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.dataflow import shape_of, value_of
from lychee_compile.passes.lower.canonical import Canonicaliser
from lychee_compile.passes.lower.kernel_symbols import KernelSymbols, captured_as
from lychee_compile.passes.lower.read_time import NotCapturable, Reads
from lychee_compile.passes.symbolic.axes import Axis, size_expression
from lychee_compile.passes.symbolic.elementwise import Element, Flag

logger = logging.getLogger(__name__)

LONGEST = 150
"""Largest number of symbols, numbers and operators in score and mask together."""
MOST_CAPTURED = 8
"""Largest number of tensors that a kernel reads for score and mask."""


class NotExpressible(Exception):  # noqa: N818  the mask is read instead
    """Score or mask cannot be computed in the kernel; the message says why."""


@dataclass(frozen=True)
class KernelExpressions:
    """Score and mask of one attention, in symbols of a specification.

    A captured tensor without dimensions is a symbol. Other captured tensors are read through
    `sympy.Indexed` elements.
    """

    score: sympy.Expr
    """Expression of S, B, H, Q, KV and captured tensors, without the mask."""
    visible: Boolean
    """Condition on B, H, Q, KV, KV_LEN and captured tensors; a key without it has no weight."""
    captured: tuple[Captured, ...]
    nodes: tuple[torch.fx.Node, ...]
    """Tensors of the graph for `captured`, in the same order."""

    def behind(self, count: int | sympy.Symbol) -> KernelExpressions:
        """Return the expressions of a kernel for the keys behind the first `count`."""
        shift = {KV: KV + count, KV_LEN: KV_LEN + count}
        return replace(self, score=self.score.xreplace(shift), visible=self.visible.xreplace(shift))

    def of_rows_as_heads(self, rows: int, group: int, query_len: int) -> KernelExpressions:
        """Return the expressions of a kernel in which rows of the batch are heads and positions.

        Position p of such a kernel is one of the `query_len` positions of some `rows` rows, and its
        heads are those of one KV head in all of these rows: `group` of the first, and so on.
        """
        names = {
            B: sympy.floor(Q / query_len) * rows + sympy.Mod(sympy.floor(H / group), rows),
            H: sympy.floor(H / (group * rows)) * group + sympy.Mod(H, group) if rows > 1 else H,
            Q: sympy.Mod(Q, query_len),
        }
        return replace(self, score=self.score.xreplace(names), visible=self.visible.xreplace(names))


def kernel_expressions(attention: Attention, canonical: Canonicaliser) -> KernelExpressions:
    """Return score and mask of `attention`, from what they are made of or from the mask tensor.

    S is the product of the query and the key that `canonical` emits: tensors that multiply scores
    are part of that query. The nodes are for an operator in the attention's place. Raises
    `RewriteError` if neither way is open.
    """
    try:
        with canonical.emit.attempt():
            return fused_terms(attention, canonical)
    except (NotExpressible, NotCapturable) as why:
        logger.debug("%s reads its mask: %s", attention.node, why)
        return mask_terms(attention, canonical)


def fused_terms(attention: Attention, canonical: Canonicaliser) -> KernelExpressions:
    """Return expressions that read what score and mask are made of.

    Raises `NotExpressible` if they would be long or have no Triton form, and `NotCapturable` if a
    tensor is written meanwhile.
    """
    _check_supported(attention)
    score, visible = _recovered(attention)
    symbols = KernelSymbols(attention, score, visible)
    score, visible = symbols(score), _with_causal(attention, symbols(visible))
    visible = _without_the_obvious(visible, symbols(sympy.sympify(attention.kv_len)))
    _check_printable(score, visible, symbols.captured)
    return KernelExpressions(
        score, visible, symbols.captured, _as_read(attention, symbols.nodes, canonical)
    )


def mask_terms(attention: Attention, canonical: Canonicaliser) -> KernelExpressions:
    """Return expressions that read the mask as `canonical` emits it, `mask` [B, Hq, T, L].

    A dimension that is broadcast is indexed by 0. A bias that leaves no weight hides its key.
    Raises `RewriteError` if there is no such tensor, as in FlexAttention.
    """
    _check_supported(attention)
    score = attention.score
    if attention.form == "flex" and (score.unsupported or score.visible != sympy.true):
        raise RewriteError(reasons.FLEX_NO_MASK())
    mask = canonical.mask()
    if mask is None:
        return KernelExpressions(_scaled(attention), _with_causal(attention, sympy.true), (), ())
    captured = captured_as("mask", mask)
    at = [
        sympy.S.Zero if size_expression(size) == 1 else index
        for index, size in zip((B, H, Q, KV), shape_of(mask), strict=True)
    ]
    element = sympy.Indexed(sympy.IndexedBase(captured.name), *at)
    if captured.dtype == "bool":
        terms = _scaled(attention), Flag(element)
    else:
        terms = _scaled(attention) + element, element > HIDDEN
    return KernelExpressions(terms[0], _with_causal(attention, terms[1]), (captured,), (mask,))


def _check_supported(attention: Attention) -> None:
    if attention.form != "flex" and attention.score.unsupported:
        raise RewriteError(attention.score.unsupported)


def _with_causal(attention: Attention, visible: Boolean) -> Boolean:
    """Return `visible` with PyTorch's own causal mask if that applies: query i sees keys 0 to i."""
    return sympy.And(visible, KV <= Q) if attention.is_causal else visible


def _scaled(attention: Attention) -> sympy.Expr:
    """Return what becomes of S before anything is added: softcap * tanh(scale * S / softcap)."""
    scale, cap = attention.score.scale, attention.score.softcap
    if cap is not None:
        return cap * sympy.tanh(scale / cap * S)
    return S if scale == 1 else scale * S


def _recovered(attention: Attention) -> tuple[sympy.Expr, Boolean]:
    """Return score and mask in the axes of the attention and the names of the graph."""
    score = attention.score
    if attention.form == "flex":
        return score.expression, score.visible
    total, conditions = _scaled(attention), [score.visible]
    for bias in score.biases:
        conditions += [sympy.Not(each) for each in bias.hidden]
        total += bias.added
        if _may_hide(bias.added, frozenset(attention.roles.key)):
            conditions.append(bias.added > HIDDEN)
    return total, sympy.And(*conditions)


def _without_the_obvious(visible: Boolean, kv_len: sympy.Expr) -> Boolean:
    """Return `visible` without bounds that no key exceeds.

    The causal bound of a query at the end of a growing cache is one of them.
    """

    def exceeded(condition: Boolean) -> bool:
        bound = key_bound(condition)
        if bound is None:
            return True
        room = bound.key - (kv_len - 1) if bound.upper else -bound.key
        return not sympy.expand(room).is_nonnegative

    return sympy.And(*filter(exceeded, sympy.And.make_args(visible)))


def _may_hide(added: Element, keys: frozenset[Axis]) -> bool:
    """True if a bias could be a mask: it is a tensor with a number per key, or has large numbers.

    ALiBi, slopes times distances, is not meant to hide far keys.
    """
    per_key = any(each.free_symbols & keys for each in added.atoms(sympy.Indexed))
    return per_key or any(abs(each) >= -HIDDEN for each in added.atoms(sympy.Number))


def _check_printable(score: sympy.Expr, visible: Boolean, captured: tuple[Captured, ...]) -> None:
    length = sum(1 for each in (score, visible) for _ in sympy.preorder_traversal(each))
    if length > LONGEST or len(captured) > MOST_CAPTURED:
        raise NotExpressible(f"{length} symbols with {len(captured)} tensors are too many")
    if KV_LEN in score.free_symbols:
        raise NotExpressible("its score depends on the number of keys")
    known = {each.name: each for each in captured}
    try:
        for each in (score, visible):
            print_expression(each, known)
    except Unprintable as error:
        raise NotExpressible(str(error)) from error


def _as_read(
    attention: Attention, tensors: tuple[torch.fx.Node, ...], canonical: Canonicaliser
) -> tuple[torch.fx.Node, ...]:
    """Return `tensors` as they were when score and mask were made. Raises `NotCapturable`."""
    device = value_of(attention.query.node).device
    for each in tensors:
        if value_of(each).device != device:
            raise NotCapturable(f"{each} is not on {device}")
    if attention.form == "flex":
        reads = Reads(tensors, attention.node.all_input_nodes[0])
    else:
        operands = [each.operand for each in attention.score.masks]
        operands += [each.operand for each in attention.score.biases]
        reads = Reads([each.node for each in operands], attention.node)
    return tuple(reads.as_read(each, attention.node, canonical.emit) for each in tensors)
