"""Describe attentions and softmaxes for the report, in words and formulas."""

from __future__ import annotations

import sympy

from lychee_compile.passes.detect.attention import Attention, Rejected, Unread
from lychee_compile.passes.detect.masks.reading import Reading
from lychee_compile.passes.graph.dataflow import module_path, operator_name, source_line
from lychee_compile.passes.site import RejectedSite, Site
from lychee_compile.passes.symbolic.axes import Axis


def describe(attention: Attention, cache: str) -> Site:
    """Return the site of an attention whose keys are in a cache of kind `cache`, undecided."""
    roles, reading = attention.roles, Reading(attention)
    first, end = reading.key_range

    def size(axes: tuple[Axis, ...]) -> int | str:
        value = attention.size(axes)
        return value if isinstance(value, int) else str(value)

    return Site(
        name=module_path(attention.node),
        source=source_line(attention.node),
        form=attention.form,
        query_heads=size(roles.kv_heads + roles.group),
        kv_heads=size(roles.kv_heads),
        head_dim=size(roles.head_dim),
        value_head_dim=size(roles.value_dim),
        query_len=size(roles.query),
        kv_len=size(roles.key),
        mask=reading.words(),
        predicate=reading.predicate,
        key_range=f"[{first}, {end})",
        score=_rounded(reading.score) + (" with an extra logit" if attention.score.extra else ""),
        monotone=attention.score.monotone,
        cache=cache,
    )


def _rounded(expression: sympy.Basic) -> str:
    """Return a formula as text, with its numbers rounded to four digits."""
    short = {
        each: sympy.Integer(int(each)) if float(each).is_integer() else sympy.Float(each, 4)
        for each in expression.atoms(sympy.Float)
        if each.is_finite
    }
    return str(expression.xreplace(short))


def describe_unread(unread: Unread) -> Site:
    """Return the site of an operator that was not analysed, kept for its reason."""

    def size(value: int | sympy.Expr) -> int | str:
        return value if isinstance(value, int) else str(value)

    return Site(
        name=module_path(unread.node),
        source=source_line(unread.node),
        form=unread.form,
        query_heads=size(unread.query_heads),
        kv_heads=size(unread.kv_heads),
        head_dim=size(unread.head_dim),
        value_head_dim=size(unread.head_dim),
        query_len=size(unread.query_len),
        kv_len=size(unread.kv_len),
        mask=unread.mask,
        cache="none",
        score="",
        reason=unread.reason,
        by_design=unread.by_design,
        kernel=operator_name(unread.node),
    )


def describe_rejected(rejected: Rejected) -> RejectedSite:
    """Return the record of a softmax that belongs to no attention."""
    node = rejected.node
    return RejectedSite(module_path(node), source_line(node), rejected.reason)
