"""Find every softmax of a graph, in all the forms in which it is written.

softmax(x, d), log_softmax(x, d).exp()         exp(x - m) / exp(x - m).sum(d, keepdim=True)
exp(x - logsumexp(x, d, keepdim=True))         (exp(x - m) @ v) / exp(x - m).sum(d)
exp(x - m) * seen / (exp(x - m) * seen).sum(d) exp(x - m) / (exp(x - m).sum(d) + exp(sink - m))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.fx

from lychee_compile.passes.graph.dataflow import (
    argument,
    first_input,
    is_operator,
    is_tensor,
    operator_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.operator_facts import Family, View
from lychee_compile.passes.symbolic.axes import Axes, free_axes, with_finer_axes
from lychee_compile.passes.symbolic.views import source_of


@dataclass(frozen=True)
class Softmax:
    """A softmax: weights = exp(scores) / sum of exp(scores) over the dimensions `dims`."""

    node: torch.fx.Node
    """The node that stands for the softmax in reports."""
    weights: torch.fx.Node
    """The weights; if `deferred`, before they are divided by their sum."""
    scores: torch.fx.Node
    """Argument of the exponential."""
    dims: tuple[int, ...]
    base_two: bool = False
    """True if the base of the exponential is 2."""
    total: torch.fx.Node | None = None
    """The sum of exponentials, or its logarithm, if that is written out."""
    reader: torch.fx.Node | None = None
    """The node that divides by `total`, or subtracts it."""
    deferred: bool = False
    """True if `reader` divides the product with the values instead of the weights."""
    masked: torch.fx.Node | None = None
    """The operator that sets some exponentials to zero before they are summed up."""
    extra: torch.fx.Node | float | None = None
    """Addend of the sum: the exponential of an extra logit, or a number."""
    sums: torch.fx.Node | None = None
    """The sum of the exponentials of the scores alone, if `total` holds more."""


def find_softmaxes(graph: torch.fx.Graph) -> Iterator[Softmax]:
    """Yield every softmax, in order."""
    for node in graph.nodes:
        if is_operator(node, "softmax"):
            source = first_input(node)
            yield Softmax(node, node, source, (_dim(argument(node, "dim"), source),))
        elif _exponent(node) is not None:
            softmax = _from_logarithm(node) or _from_exponentials(node)
            if softmax is not None:
                yield softmax


def _exponent(node: torch.fx.Node) -> tuple[torch.fx.Node, bool] | None:
    """Return the argument of an exponential, and True if its base is 2; None for other nodes."""
    if operator_of(node).family is Family.EXPONENTIAL:
        return first_input(node), is_operator(node, "exp2")
    if is_operator(node, "pow") and node.args[0] == 2 and is_tensor(node.args[1]):
        return node.all_input_nodes[0], True
    return None


def _from_logarithm(node: torch.fx.Node) -> Softmax | None:
    """Read exp(log_softmax(x)), exp(x - logsumexp(x)) or exp(x - log(sum(exp(x))))."""
    if not is_operator(node, "exp"):
        return None
    source = _behind_copies(first_input(node))
    if is_operator(source, "log_softmax"):
        scores = first_input(source)
        return Softmax(source, node, scores, (_dim(argument(source, "dim"), scores),))
    if not is_operator(source, "sub") or not all(map(is_tensor, source.args)):
        return None
    total = _behind_shapes(source.all_input_nodes[-1])
    if is_operator(total, "log"):
        summed = _behind_shapes(first_input(total))
        dims, inner = summed_dims(summed), _behind_copies(first_input(summed))
        if dims is None or not is_operator(inner, "exp"):
            return None
        return _log_form(node, source, inner, summed, dims)
    if not is_operator(total, "logsumexp"):
        return None
    return _log_form(node, source, total, total, argument(total, "dim"))


def _log_form(
    node: torch.fx.Node,
    difference: torch.fx.Node,
    summing: torch.fx.Node,
    total: torch.fx.Node,
    dims: int | Sequence[int],
) -> Softmax | None:
    """Return exp(`difference`) as a softmax if `summing` takes the same scores into `total`."""
    scores = first_input(difference)
    if _behind_copies(first_input(summing)) is not _behind_copies(scores):
        return None
    return Softmax(node, node, scores, _dims(dims, scores), total=total, reader=difference)


def _from_exponentials(node: torch.fx.Node) -> Softmax | None:
    """Return exponentials divided by their sum, at once or after the product with the values."""
    exponent = _exponent(node)
    assert exponent is not None
    scores, base_two = exponent
    for source, masked in ((node, None), *((each, each) for each in _masked(node))):
        for sums, where in sums_of(source):
            for total, extra in _totals(sums, base_two):
                for reader in _readers(total):
                    inputs = map(_behind_copies, reader.all_input_nodes)
                    deferred = source not in inputs
                    if deferred and masked is not None and not hides_keys(masked):
                        continue  # a sum of products is no sum of weights
                    weights = source if deferred else reader
                    return Softmax(
                        node,
                        weights,
                        scores,
                        where,
                        base_two,
                        total,
                        reader,
                        deferred,
                        masked,
                        extra,
                        sums,
                    )
    return None


def exponentials(graph: torch.fx.Graph) -> Iterator[tuple[Softmax, torch.fx.Node]]:
    """Yield exponentials as weights that nothing divides, with each sum of them, in order."""
    for node in graph.nodes:
        exponent = _exponent(node)
        if exponent is None:
            continue
        scores, base_two = exponent
        for source, masked in ((node, None), *((each, each) for each in _masked(node))):
            for sums, where in sums_of(source):
                yield Softmax(node, source, scores, where, base_two, masked=masked), sums


def sums_of(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, tuple[int, ...]]]:
    """Yield each sum over whole dimensions of `node`, and these dimensions."""
    for total in _users_behind_shapes(node):
        where = _dims_summed(total, node)
        if where is not None:
            yield total, where


def _masked(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the operators that set some elements of `node` to zero, or multiply them."""
    for user in _users_behind_shapes(node):
        zeroes = is_operator(user, "mul") or is_operator(user, "dropout")
        zeroes = zeroes or (is_operator(user, "where") and bool(user.args[2] == 0))
        if is_operator(user, "masked_fill"):
            zeroes = bool(user.args[2] == 0) and _behind_copies(first_input(user)) is node
        if zeroes and shape_of(user) == shape_of(node):
            yield user


def hides_keys(masked: torch.fx.Node) -> bool:
    """True if an operator on exponentials does nothing but set some of them to zero."""
    if is_operator(masked, "dropout"):
        return False
    return not is_operator(masked, "mul") or any(
        value_of(_behind_copies(each)).dtype == torch.bool for each in masked.all_input_nodes
    )


def _totals(
    sums: torch.fx.Node, base_two: bool
) -> Iterator[tuple[torch.fx.Node, torch.fx.Node | float | None]]:
    """Yield a sum of exponentials, and its sums with what may be the exponential of a logit."""
    yield sums, None
    for user in _users_behind_shapes(sums):
        if not is_operator(user, "add") or argument(user, "alpha", 1) != 1:
            continue
        operands = list(user.args[:2])
        if isinstance(operands[0], torch.fx.Node) and _behind_shapes(operands[0]) is not sums:
            operands.reverse()
        ours, other = operands
        if not isinstance(ours, torch.fx.Node) or shape_of(ours) != shape_of(user):
            continue
        if isinstance(other, (int, float)):
            if other == 1:  # a logit of zero; a smaller number is there to divide by no zero
                yield user, float(other)
        elif isinstance(other, torch.fx.Node):
            exponent = _exponent(_behind_shapes(other))
            if exponent is not None and exponent[1] == base_two:
                yield user, _behind_shapes(other)


def _dims_summed(total: torch.fx.Node, node: torch.fx.Node) -> tuple[int, ...] | None:
    """Return the dimensions of `node` that `total` sums over, perhaps of a view of it.

    None if `total` is no sum, or sums over anything but whole dimensions of `node`.
    """
    dims = summed_dims(total)
    if dims is None:
        return None
    source = argument(total, "tensors")[0] if is_operator(total, "einsum") else first_input(total)
    if _behind_copies(source) is node:
        return _dims(dims, node)
    return with_finer_axes(
        lambda axes: _dims_through_views(source, _dims(dims, source), node, axes)
    )


def _dims_through_views(
    view: torch.fx.Node, dims: Sequence[int], node: torch.fx.Node, axes: Axes
) -> tuple[int, ...] | None:
    """Return the dimensions of `node` that are `dims` of a view of it; None if there are none."""
    at = tuple(axes.index(f"s{dim}", size) for dim, size in enumerate(shape_of(view)))
    summed = free_axes(at[dim] for dim in dims)
    while view is not node:
        behind = source_of(view, at, axes)
        if behind is None:
            return None
        view, at = behind
    digits = [axes.digits(index, size) for index, size in zip(at, shape_of(node), strict=True)]
    where = tuple(dim for dim, each in enumerate(digits) if each and set(each) & summed)
    return where if free_axes(at[dim] for dim in where) == summed else None


def summed_dims(node: torch.fx.Node) -> Sequence[int] | None:
    """Return the dimensions that a sum, or an einsum of one operand, sums over; None for others."""
    if is_operator(node, "sum"):
        dims = argument(node, "dim")
        return [dims] if isinstance(dims, int) else dims or None
    if is_operator(node, "einsum") and len(argument(node, "tensors")) == 1:
        taken, _, kept = argument(node, "equation").replace(" ", "").partition("->")
        plain = kept and "." not in taken and [each for each in taken if each in kept]
        if plain == list(kept):
            return [place for place, each in enumerate(taken) if each not in kept]
    return None


def _readers(total: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the nodes that divide by `total`."""
    for user in _users_behind_shapes(total):
        divisor = user.args[1] if is_operator(user, "div") else None
        if isinstance(divisor, torch.fx.Node) and _behind_shapes(divisor) is total:
            yield user
        elif is_operator(user, "reciprocal"):
            yield from (each for each in _users_behind_shapes(user) if is_operator(each, "mul"))


def _users_behind_shapes(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    for user in node.users:
        if _is_shape(user):
            yield from _users_behind_shapes(user)
        else:
            yield user


def _is_shape(node: torch.fx.Node) -> bool:
    """True if a node shows what another holds, in another shape or broadcast."""
    view = operator_of(node).view
    return view is not None and (view.keeps_all or view.keeps_order)


def _behind_shapes(node: torch.fx.Node) -> torch.fx.Node:
    while _is_shape(node):
        node = first_input(node)
    return node


def _behind_copies(node: torch.fx.Node) -> torch.fx.Node:
    while operator_of(node).view is View.COPY:
        node = first_input(node)
    return node


def _dim(dim: int, source: torch.fx.Node) -> int:
    return dim % max(len(shape_of(source)), 1)


def _dims(dims: int | Sequence[int], source: torch.fx.Node) -> tuple[int, ...]:
    each = [dims] if isinstance(dims, int) else dims
    return tuple(_dim(dim, source) for dim in each)
