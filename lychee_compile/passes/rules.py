"""Rules that keep an attention as it is or let it stay exact: facts in, a reason in words out."""

from __future__ import annotations

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.reference import DEVICES, DTYPES, LONGEST_QUERY
from lychee_compile.kernels.policies.prefill_registry import tile_policy_names
from lychee_compile.kernels.policies.registry import has_index, index_class, policy_names
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.dataflow import value_of
from lychee_compile.passes.lower.kernel_support import decodes


def unsupported(attention: Attention, needs_gradients: bool) -> str | None:
    """Return why nothing of this backend can take the place of an attention; None if it can."""
    return (
        _unsupported_operands(attention, needs_gradients)
        or attention.refused
        or _unsupported_form(attention)
    )


def _unsupported_operands(attention: Attention, needs_gradients: bool) -> str | None:
    if needs_gradients:
        return "gradients are needed: call the model under torch.no_grad() for sparse attention"
    operands = (attention.query.node, attention.key.node, attention.value.node)
    for value in (value_of(node) for node in operands):
        if value.dtype not in DTYPES:
            return f"dtype {str(value.dtype).removeprefix('torch.')} is not supported"
    return None


def _unsupported_form(attention: Attention) -> str | None:
    if attention.dropout > 0:
        return f"dropout {attention.dropout} on the attention weights"
    if attention.score.unsupported:
        return attention.score.unsupported
    heads = attention.size(attention.roles.kv_heads + attention.roles.group)
    if not isinstance(heads, int):
        return f"the number of heads, {heads}, is not known when compiling"
    return None


def unsupported_device(attention: Attention, config: IndexConfig) -> str | None:
    """Return why the reference does not run on the device of an attention; None if it does."""
    device = value_of(attention.query.node).device.type
    if device not in DEVICES and not config.reference:
        return f"no kernels for device {device} yet: they would be slower than dense"
    return None


def is_prefill(attention: Attention, cached: bool) -> bool:
    """True if all positions of a sequence are queries at once, or many of them.

    The number of queries over a cache can be symbolic: a call may be one of decoding then.
    """
    query_len = attention.query_len
    if query_len == attention.kv_len or attention.is_causal:
        return True
    return query_len > LONGEST_QUERY if isinstance(query_len, int) else not cached


def exact_prefill(attention: Attention, place: int, config: IndexConfig) -> str | None:
    """Return why a prefill stays exact though `prefill="sparse"` is asked for; None if it need not.

    `place` counts the attentions of the graph before this one. If the number of keys is symbolic,
    the operator finds out itself if they are too few.
    """
    if config.budget is None:
        return _EXACT_ASKED_FOR
    if reason := _in_dense_layers(place, config):
        return reason
    kv_len = attention.kv_len
    if isinstance(kv_len, int) and kv_len < config.prefill_from:
        return f"key length {kv_len} is below prefill_from={config.prefill_from}"
    if config.policy not in tile_policy_names():
        known = " and ".join(map(repr, tile_policy_names()))
        return f"option policy={config.policy!r} has no form for whole sequences: {known} have one"
    return None


def exact_decoding(attention: Attention, place: int, config: IndexConfig) -> str | None:
    """Return why an attention is meant to read all keys; None if sparse reading can win.

    `place` counts the attentions of the graph before this one.
    """
    query_len, kv_len = attention.query_len, attention.kv_len
    if config.budget is None:
        return _EXACT_ASKED_FOR
    if query_len == kv_len or (isinstance(query_len, int) and query_len > LONGEST_QUERY):
        return f"{query_len} query positions: a prefill or an encoder, which stays exact"
    if attention.is_causal:
        return "is_causal counts from the first key, which decoding over a cache does not mean"
    if isinstance(kv_len, int) and kv_len <= config.budget:
        return f"key length {kv_len} is within the budget {config.budget}"
    if not has_index(config.policy):
        known = ", ".join(map(repr, policy_names()))
        return f"option policy={config.policy!r} cannot decode, only whole sequences; {known} can"
    return _in_dense_layers(place, config)


_EXACT_ASKED_FOR = "budget=None asks for exact attention"


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


def _in_dense_layers(place: int, config: IndexConfig) -> str | None:
    """Return why the first attentions of a graph stay exact; None for the others."""
    dense_layers = config.dense_layers
    if dense_layers is None:
        known = has_index(config.policy)
        dense_layers = index_class(config.policy).dense_layers if known else 0
    if place < dense_layers:
        return f"among the first attentions, {dense_layers} of which stay exact"
    return None
