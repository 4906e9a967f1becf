"""Put a module together for one specification."""

from __future__ import annotations

from lychee_compile.codegen.parts import common, decode, lychee, prefill, quest
from lychee_compile.codegen.specification import AttentionSpec

_POLICIES = {"lychee": lychee.emit_lychee, "quest": quest.emit_quest}
"""The emitter of each policy that has kernels for decoding."""


def emit_module(spec: AttentionSpec) -> str:
    """Return the source of the Triton module for `spec`: it needs nothing but Triton.

    Raises ValueError for a policy that has no kernels, or none for such a score or mask.
    """
    if spec.tiles is not None:
        parts = prefill.emit_prefill(spec)
    else:
        parts = [*decode.emit_exact(spec), *_selection(spec)]
    parts = [common.emit_heading(spec), *parts]
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def _selection(spec: AttentionSpec) -> list[str]:
    """Return the kernels of a decode policy; none if the site selects nothing."""
    sparse = spec.sparse
    if sparse is None:
        return []
    emit_policy = _POLICIES.get(sparse.policy)
    if emit_policy is None:
        known = ", ".join(_POLICIES)
        raise ValueError(f"policy {sparse.policy!r} has no kernels; {known} have")
    return emit_policy(spec, sparse)
