"""Find attentions whose exponentials are summed up in pieces, or whose sum is changed.

    for k, v in chunks:                                     over chunks of keys, with a running
        m_new = maximum(m, (q @ k.mT).amax(-1))             maximum and denominator
        p = exp(q @ k.mT - m_new)
        o, l, m = o * exp(m - m_new) + p @ v, l * exp(m - m_new) + p.sum(-1), m_new
    out = o / l

The chunks that meet in one division are one attention. None of these is rewritten.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention, Unread
from lychee_compile.passes.detect.softmax.softmaxes import Softmax, exponentials
from lychee_compile.passes.graph.aliasing import is_view_of_part
from lychee_compile.passes.graph.dataflow import is_operator, operator_of
from lychee_compile.passes.graph.operator_facts import Family
from lychee_compile.passes.graph.region import Order

logger = logging.getLogger(__name__)
FARTHEST = 2000
"""Largest number of operators that a sum of exponentials is followed through."""


class Matcher(Protocol):
    """Finds the attention that exponentials belong to."""

    def __call__(self, softmax: Softmax) -> Iterator[tuple[torch.fx.Node, Attention]]:
        """Yield each product with values, and the attention that it would be."""


@dataclass(frozen=True)
class _Chunk:
    """An attention over some of the keys, and the divisions that it meets the others in."""

    attention: Attention
    divisions: frozenset[torch.fx.Node]


def find_joined(
    graph: torch.fx.Graph, known: frozenset[torch.fx.Node], matches: Matcher, order: Order
) -> Iterator[Unread]:
    """Yield an attention for each group of chunks, but for exponentials that are `known`."""
    chunks = []
    for softmax, sums in exponentials(graph):
        if softmax.node not in known:
            try:
                chunks += _chunks_of(softmax, sums, matches)
            except Exception:
                logger.debug("%s could not be analysed", softmax.node, exc_info=True)
    for group in _groups(chunks):
        yield _one_attention(group, order)


def _chunks_of(softmax: Softmax, sums: torch.fx.Node, matches: Matcher) -> list[_Chunk]:
    """Return the attention over the keys of `softmax`, if its sum leads to a division."""
    _, divisions = _followed(sums)
    if not divisions:
        return []
    before, _ = _followed(softmax.weights)
    for product, attention in matches(softmax):
        after, _ = _followed(product)
        met = divisions & (before | after)
        if met:
            return [_Chunk(attention, frozenset(met))]
    return []


def _followed(start: torch.fx.Node) -> tuple[set[torch.fx.Node], set[torch.fx.Node]]:
    """Return the nodes that are linear in `start`, and the nodes that divide by those."""
    reached, divisions, waiting = {start}, set(), [start]
    while waiting and len(reached) < FARTHEST:
        node = waiting.pop(0)
        for user in node.users:
            if is_operator(user, "div") and user.args[1] is node:
                divisions.add(user)
            elif is_operator(user, "reciprocal"):
                divisions.update(each for each in user.users if is_operator(each, "mul"))
            elif user not in reached and _is_linear(user):
                reached.add(user)
                waiting.append(user)
    return reached, divisions


def _is_linear(node: torch.fx.Node) -> bool:
    carries = operator_of(node).carries_weights or is_view_of_part(node)
    joins = operator_of(node).family is Family.JOINING or is_operator(node, "sum")
    return carries or joins


def _groups(chunks: Sequence[_Chunk]) -> list[list[_Chunk]]:
    """Return the chunks in groups, each of those that meet in a division."""
    groups: list[list[_Chunk]] = []
    for chunk in chunks:
        meeting = [
            group for group in groups if any(each.divisions & chunk.divisions for each in group)
        ]
        groups = [group for group in groups if group not in meeting]
        groups.append([*(each for group in meeting for each in group), chunk])
    return groups


def _one_attention(group: list[_Chunk], order: Order) -> Unread:
    divisions = [node for chunk in group for node in chunk.divisions]
    first = group[0].attention
    alike = [each.attention for each in group if each.attention.query.node is first.query.node]
    roles = first.roles
    reason = reasons.SUM_IN_CHUNKS(count=len(group)) if len(group) > 1 else reasons.SUM_CHANGED()
    return Unread(
        node=max(divisions, key=order.place.__getitem__),
        form=first.form,
        query_heads=first.size(roles.kv_heads + roles.group),
        kv_heads=first.size(roles.kv_heads),
        head_dim=first.size(roles.head_dim),
        query_len=first.query_len,
        kv_len=sum(each.kv_len for each in alike),
        mask="not read",
        reason=reason,
        by_design=False,
    )
