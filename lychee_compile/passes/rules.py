"""Rules that keep an attention as it is or let it stay exact: facts in, a reason out."""

from __future__ import annotations

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.reference import DEVICES, DTYPES, LONGEST_QUERY
from lychee_compile.kernels.policies.registry import (
    find_policy,
    has_index,
    policy_names,
    prefill_policy_names,
)
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.dataflow import value_of
from lychee_compile.passes.lower.kernel_support import decodes
from lychee_compile.passes.reasons import Reason


def unsupported(attention: Attention, needs_gradients: bool) -> Reason | None:
    """Return why nothing of this backend can take the place of an attention; None if it can."""
    return (
        _unsupported_operands(attention, needs_gradients)
        or attention.refused
        or _unsupported_form(attention)
    )


def _unsupported_operands(attention: Attention, needs_gradients: bool) -> Reason | None:
    if needs_gradients:
        return reasons.GRADIENTS()
    operands = (attention.query.node, attention.key.node, attention.value.node)
    for value in (value_of(node) for node in operands):
        if value.dtype not in DTYPES:
            return reasons.DTYPE_UNSUPPORTED(dtype=str(value.dtype).removeprefix("torch."))
    return None


def _unsupported_form(attention: Attention) -> Reason | None:
    if attention.dropout > 0:
        return reasons.DROPOUT(probability=attention.dropout)
    if attention.score.unsupported:
        return attention.score.unsupported
    heads = attention.size(attention.roles.kv_heads + attention.roles.group)
    if not isinstance(heads, int):
        return reasons.SIZE_SYMBOLIC(name="the number of query heads", size=heads)
    return None


def unsupported_device(attention: Attention, config: IndexConfig) -> Reason | None:
    """Return why the reference does not run on the device of an attention; None if it does."""
    device = value_of(attention.query.node).device.type
    if device not in DEVICES and not config.reference:
        return reasons.DEVICE_UNSUPPORTED(device=device)
    return None


def is_prefill(attention: Attention, cached: bool) -> bool:
    """True if all positions of a sequence are queries at once, or many of them.

    The number of queries over a cache can be symbolic: a call may be one of decoding then.
    """
    query_len = attention.query_len
    if query_len == attention.kv_len or attention.is_causal:
        return True
    return query_len > LONGEST_QUERY if isinstance(query_len, int) else not cached


def reads_at_once(attention: Attention) -> bool:
    """True if an attention has as many queries as keys, or more than one that decodes has."""
    query_len = attention.query_len
    many = isinstance(query_len, int) and query_len > LONGEST_QUERY
    return query_len == attention.kv_len or many


def exact_prefill(attention: Attention, place: int | None, config: IndexConfig) -> Reason | None:
    """Return why a prefill stays exact though `prefill="sparse"` is asked for; None if it need not.

    `place` is the number of layers before it, None if not known. If the number of keys is symbolic,
    the operator finds out itself if they are too few.
    """
    if config.budget is None:
        return reasons.BUDGET_NONE()
    if reason := _in_dense_layers(place, config):
        return reason
    kv_len = attention.kv_len
    if isinstance(kv_len, int) and kv_len < config.prefill_from:
        return reasons.BELOW_PREFILL_FROM(kv_len=kv_len, prefill_from=config.prefill_from)
    if config.policy not in prefill_policy_names():
        known = ", ".join(map(repr, prefill_policy_names()))
        return reasons.POLICY_CANNOT_PREFILL(policy=config.policy, known=known)
    return None


def exact_decoding(attention: Attention, place: int | None, config: IndexConfig) -> Reason | None:
    """Return why an attention is meant to read all keys; None if sparse reading can win.

    `place` is the number of layers before it, None if not known.
    """
    query_len, kv_len = attention.query_len, attention.kv_len
    if config.budget is None:
        return reasons.BUDGET_NONE()
    if reads_at_once(attention):
        return reasons.PREFILL(query_len=query_len)
    if attention.is_causal:
        return reasons.CAUSAL_FROM_FIRST_KEY()
    if isinstance(kv_len, int) and kv_len <= config.budget:
        return reasons.WITHIN_BUDGET(kv_len=kv_len, budget=config.budget)
    if not has_index(config.policy):
        known = ", ".join(map(repr, policy_names()))
        return reasons.POLICY_CANNOT_DECODE(policy=config.policy, known=known)
    return _in_dense_layers(place, config)


def decodes_many_keys(attention: Attention, config: IndexConfig) -> bool:
    """True if few queries read more keys than it takes for a decode kernel to pay."""
    kv_len, budget = attention.kv_len, config.budget
    short = isinstance(kv_len, int) and budget is not None and kv_len <= budget
    square = attention.query_len == kv_len or attention.is_causal
    return decodes(attention) and not (short or square)


def better_as_one_operator(attention: Attention, config: IndexConfig) -> bool:
    """True if products and a softmax written out are better one operator, without a score matrix.

    The score matrix of few queries is small: they stay, unless exact attention was asked for.
    """
    query_len = attention.query_len
    few = isinstance(query_len, int) and query_len <= LONGEST_QUERY
    plain = attention.score.softcap is None and attention.score.extra is None
    return attention.form == "eager" and plain and (not few or config.budget is None)


def dense_layers(config: IndexConfig) -> int:
    """Return the number of first layers that stay exact."""
    if config.dense_layers is not None:
        return config.dense_layers
    policy = find_policy(config.policy)
    return 0 if policy is None else policy.dense_layers


def _in_dense_layers(place: int | None, config: IndexConfig) -> Reason | None:
    """Return why the attention of a first layer stays exact; None for the others."""
    layers = dense_layers(config)
    if place is not None and place < layers:
        return reasons.DENSE_LAYERS(dense_layers=layers)
    return None
