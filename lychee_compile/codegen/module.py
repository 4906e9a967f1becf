"""Put a module together for one specification: each policy has an emitter of its kernels."""

from __future__ import annotations

from collections.abc import Callable

from lychee_compile.codegen.parts import (
    common,
    decode,
    levels,
    listed,
    lychee,
    prefill,
    ranked,
)
from lychee_compile.codegen.parts.site import sees_range
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.policies.prefill.union import GroupUnion
from lychee_compile.kernels.policies.registry import find_policy

Emit = Callable[[AttentionSpec], list[str]]
"""A function that returns the parts of a module's text that are a policy's own, in order."""

_decode_emitters: dict[str, Emit] = {"lychee": lychee.emit_lychee}
_prefill_emitters: dict[str, Emit] = {
    "lychee": prefill.emit_prefill,
    "s2o": prefill.emit_prefill,
    "streaming": ranked.emit_last,
}
"""Policies whose own kernels choose, beside those that are a `GroupUnion`."""


def emit_module(spec: AttentionSpec) -> str:
    """Return the source of the Triton module for `spec`: it needs nothing but Triton.

    Raises ValueError for a policy that has no kernels, or none for such a score or mask.
    """
    parts = [common.emit_heading(spec)]
    if spec.tiles is not None:
        emit = _prefill_emitter(spec, spec.tiles.policy)
        parts += [prefill.emit_constants(spec, emit is prefill.emit_prefill)]
        parts += [*common.emit_terms(spec), *emit(spec)]
    else:
        parts += [decode.emit_constants(spec), *common.emit_terms(spec)]
        parts += decode.emit_exact(spec)
    if spec.sparse is not None:
        parts += _emit_sparse(spec, spec.sparse.policy)
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def _emit_sparse(spec: AttentionSpec, policy: str) -> list[str]:
    """Return the kernels of a policy: made from its levels, or as its emitter writes them."""
    record = find_policy(policy)
    if record is not None and record.levels is not None:
        return levels.emit_levels(spec, record.levels)
    if policy not in _decode_emitters:
        known = ", ".join(_decode_emitters)
        raise ValueError(f"policy {policy!r} has no kernels; {known} have")
    return _decode_emitters[policy](spec)


def register_emitter(policy: str, emit: Emit) -> None:
    """Let modules for `policy` end with what `emit` returns, behind what all modules have.

    Those are constants, score and mask, the kernels of exact attention and the steps of attention.
    Raises ValueError if the policy has another emitter, or is declared as levels.
    """
    record = find_policy(policy)
    if record is not None and record.levels is not None:
        raise ValueError(f"policy {policy!r} is declared: its kernels are made from levels")
    if _decode_emitters.get(policy, emit) is not emit:
        raise ValueError(f"policy {policy!r} has an emitter of kernels already")
    _decode_emitters[policy] = emit


def chooses_by_kernels(spec: AttentionSpec) -> bool:
    """Return True if kernels choose for a prefill; if not, PyTorch's operators do."""
    return spec.tiles is not None and (
        _prefill_emitter(spec, spec.tiles.policy) is not listed.emit_listed
    )


def has_prefill_kernels(policy: str) -> bool:
    """Return True if kernels choose for a prefill by this policy, of tokens in their order.

    Masks with holes may be left to PyTorch.
    """
    record = find_policy(policy)
    union = record is not None and isinstance(record.prefill, GroupUnion)
    return union or policy in _prefill_emitters


def _prefill_emitter(spec: AttentionSpec, policy: str) -> Emit:
    """Return what emits the kernels of a prefill.

    Only those of lychee know masks with holes, and queries in another order, whose own tokens are
    no stretch of keys.
    """
    stretches = sees_range(spec) and not (spec.tiles is not None and spec.tiles.ordered)
    if policy != "lychee" and not (has_prefill_kernels(policy) and stretches):
        return listed.emit_listed
    return _prefill_emitters.get(policy, ranked.emit_groups)
