"""Put a module together for one specification: each policy has an emitter of its kernels."""

from __future__ import annotations

from collections.abc import Callable

from lychee_compile.codegen.parts import common, decode, levels, listed, lychee, prefill
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.policies.registry import find_policy

Emit = Callable[[AttentionSpec], list[str]]
"""A function that returns the parts of a module's text that are a policy's own, in order."""

_decode_emitters: dict[str, Emit] = {"lychee": lychee.emit_lychee}
_prefill_emitters: dict[str, Emit] = {"lychee": prefill.emit_prefill}
"""Policies whose own kernels choose; the others choose in PyTorch."""


def emit_module(spec: AttentionSpec) -> str:
    """Return the source of the Triton module for `spec`: it needs nothing but Triton.

    Raises ValueError for a policy that has no kernels, or none for such a score or mask.
    """
    parts = [common.emit_heading(spec)]
    if spec.tiles is not None:
        policy = spec.tiles.policy
        parts += [prefill.emit_constants(spec, chooses_by_kernels(policy))]
        parts += common.emit_terms(spec)
        parts += _prefill_emitters.get(policy, listed.emit_listed)(spec)
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
    return _emitter(policy)(spec)


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


def policies_with_emitters() -> tuple[str, ...]:
    """Return the policies that have an emitter for decoding."""
    return tuple(_decode_emitters)


def chooses_by_kernels(policy: str) -> bool:
    """Return True if kernels of a policy's own choose for a prefill; if not, PyTorch does."""
    return policy in _prefill_emitters


def _emitter(policy: str) -> Emit:
    if policy not in _decode_emitters:
        known = ", ".join(_decode_emitters)
        raise ValueError(f"policy {policy!r} has no kernels; {known} have")
    return _decode_emitters[policy]
