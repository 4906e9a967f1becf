"""Read the score and the mask of FlexAttention from the functions that its graph holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.fx

from lychee_compile.codegen.specification import S
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.assemble import GraphContext
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.score import Score
from lychee_compile.passes.graph.dataflow import scalar_of
from lychee_compile.passes.symbolic.axes import Axes, Indices
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.elementwise import Element, truth

NO_BLOCKS = 1 << 30
"""Block size of the mask that FlexAttention makes up if the caller has none."""


def flex_score(
    node: torch.fx.Node, attention: Attention, indices: Indices, context: GraphContext
) -> Attention:
    """Return `attention` with the score and the mask of the FlexAttention `node`.

    `indices` are the indices of batch, head, query and key.
    """
    score_mod, blocks, scale = node.args[3:6]
    score_others, mask_others = (*node.args[7:9], (), ())[:2]
    factor = scalar_of(scale)
    factor = sympy.S.One if factor is None else factor
    raw = S * factor * attention.score.scale  # by which queries or keys were multiplied before
    modified = _call(score_mod, (raw, *indices), score_others, attention.axes, context)
    visible: Any = sympy.true
    if not _unblocked(blocks):
        visible = _call(blocks[-1], indices, mask_others, attention.axes, context)  # type: ignore[index]
    score = replace(_simple_score(modified), expression=modified, visible=truth(visible))
    refused = attention.refused
    if not _unblocked(blocks):
        refused = refused or reasons.FLEX_BLOCK_MASK()
    return replace(attention, score=score, refused=refused or score.unsupported)


def _unblocked(blocks: Any) -> bool:
    """True if the caller gave no BlockMask: its sizes come before the mask function."""
    sizes = [size for size in blocks[:-1] if isinstance(size, int)]
    return bool(sizes) and sizes[-1] == NO_BLOCKS


def _call(
    function: Any, arguments: tuple[Element, ...], others: Any, axes: Axes, context: GraphContext
) -> Element:
    """Return the value of one of the graph's functions, whose captured tensors are `others`."""
    inner = getattr(context.gm, function.target)
    inputs = [each for each in inner.graph.nodes if each.op == "placeholder"]
    for place, captured in zip(inputs[len(arguments) :], others or (), strict=False):
        context.names.call(place, captured)
    values = dict(zip(inputs, arguments, strict=False))
    elements = Elements(axes, context.names, known=values)
    result = next(each for each in inner.graph.nodes if each.op == "output").args[0]
    return elements.of(result[0] if isinstance(result, (tuple, list)) else result)


def _simple_score(modified: Element) -> Score:
    """Return the scale and the soft-cap of a score that consists of nothing else."""
    if not isinstance(modified, sympy.Expr) or isinstance(modified, sympy.Piecewise):
        return Score(unsupported=reasons.FLEX_CHOICE())
    scale = modified.coeff(S, 1)
    if scale.is_number and scale.is_positive and sympy.expand(modified - scale * S) == 0:
        return Score(scale=float(scale))
    cap, curve = modified.as_independent(sympy.tanh, as_Add=False)
    if isinstance(curve, sympy.tanh) and cap.is_number and cap.is_positive:
        inside = curve.args[0].coeff(S, 1)
        if inside.is_positive and sympy.expand(curve.args[0] - inside * S) == 0:
            return Score(scale=float(inside * cap), softcap=float(cap))
    return Score(unsupported=reasons.FLEX_SCORE())
