"""Put a module together for one specification: each policy has an emitter of its kernels."""

from __future__ import annotations

from collections.abc import Callable

from lychee_compile.codegen.parts import (
    attend,
    boxes,
    common,
    encode,
    pages,
    scan,
    sketch,
    terms,
    tile_attend,
    tile_choice,
    tiles,
)
from lychee_compile.codegen.specification import KV, AttentionSpec, H, S

Emit = Callable[[AttentionSpec], list[str]]
"""A function that returns the parts of a module's text that are a policy's own, in order."""


def emit_module(spec: AttentionSpec) -> str:
    """Return the source of the Triton module for `spec`: it needs nothing but Triton.

    Raises ValueError for a policy that has no kernels, or none for such a score or mask.
    """
    if spec.tiles is not None:
        return _joined([_heading(spec), *_emitter(_prefill_emitters, spec.tiles.policy)(spec)])
    parts = [_heading(spec), common.emit_constants(spec), terms.emit_terms(spec)]
    parts += [terms.emit_range(spec)] if terms.sees_range(spec) else []
    parts += [common.emit_queries(), attend.emit_attention_steps(spec), attend.emit_exact(spec)]
    if spec.sparse is not None:
        parts += _emitter(_decode_emitters, spec.sparse.policy)(spec)
    return _joined(parts)


def register_emitter(policy: str, emit: Emit) -> None:
    """Let modules for `policy` end with what `emit` returns, behind what all modules have.

    Those are constants, score and mask, the kernels of exact attention and the steps of attention.
    `attend`, with which a sparse step ends, is `codegen.parts.attend.emit_sparse`. Raises
    ValueError if the policy has another emitter.
    """
    if _decode_emitters.get(policy, emit) is not emit:
        raise ValueError(f"policy {policy!r} has an emitter of kernels already")
    _decode_emitters[policy] = emit


def policies_with_emitters(prefill: bool = False) -> tuple[str, ...]:
    """Return the policies that have an emitter for decoding, or for prefill."""
    return tuple(_prefill_emitters if prefill else _decode_emitters)


def _emitter(emitters: dict[str, Emit], policy: str) -> Emit:
    if policy not in emitters:
        raise ValueError(f"policy {policy!r} has no kernels; {', '.join(emitters)} have")
    return emitters[policy]


def _joined(parts: list[str]) -> str:
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def _tiled(spec: AttentionSpec) -> list[str]:
    """Return the parts of a module for prefill."""
    return [
        tiles.emit_tile_constants(spec),
        terms.emit_terms(spec),
        terms.emit_range(spec),
        tiles.emit_edges(spec),
        tiles.emit_ask(spec),
        tiles.emit_scan(spec),
        tile_choice.emit_choose(spec),
        tile_attend.emit_attend(spec),
    ]


def scans_pages(spec: AttentionSpec) -> bool:
    """Return True if pages can be scored: score and mask treat the keys of a page alike."""
    return KV not in spec.score.free_symbols and H not in spec.visible.free_symbols


def _lychee(spec: AttentionSpec) -> list[str]:
    """Return the kernels that rank tokens by their sketches."""
    assert spec.sparse is not None
    paged = scans_pages(spec)
    parts = [
        scan.emit_selection_constants(spec.sparse, paged),
        sketch.emit_sketch_constants(spec, paged),
        _lychee_constants(spec, paged),
        scan.emit_bins(spec),
        scan.emit_always_read(spec),
        sketch.emit_weigh(spec, paged),
        sketch.emit_sketch_scores(spec),
        scan.emit_scan(spec),
    ]
    if paged:
        parts += [scan.emit_ranks(), pages.emit_page_scores(spec), pages.emit_page_scans(spec)]
    parts += [sketch.emit_encoder(spec), encode.emit_encode()]
    return [*parts, attend.emit_sparse(spec, encode.UPKEEP)]


def _lychee_constants(spec: AttentionSpec, paged: bool) -> str:
    scale = float(spec.score.diff(S).subs(S, 0))
    return f"""
RANKS_PAGES = {paged}  # True if pages of a long context are ranked first
SCALE = tl.constexpr({scale})  # of s in the score
"""


def _quest(spec: AttentionSpec) -> list[str]:
    """Return the kernels that rank pages by the boxes around their keys.

    Raises ValueError for scores that depend on a key's slot.
    """
    if KV in spec.score.free_symbols:
        raise ValueError("quest has no kernels for scores that depend on a key's slot")
    return [
        boxes.emit_box_constants(spec),
        scan.emit_bins(spec),
        scan.emit_ranks(),
        scan.emit_always_read(spec, unread="fresh // PAGE * PAGE"),
        boxes.emit_scan(spec),
        boxes.emit_choice(spec),
        boxes.emit_update(),
        attend.emit_sparse(spec, boxes.UPKEEP),
    ]


_decode_emitters: dict[str, Emit] = {"lychee": _lychee, "quest": _quest}
_prefill_emitters: dict[str, Emit] = {"lychee": _tiled}


def _heading(spec: AttentionSpec) -> str:
    """Return the beginning of a module: what it is for, and what a launch has to know of it."""
    visible = "all keys" if spec.visible == True else str(spec.visible)  # noqa: E712
    kind = "Decode attention" if spec.tiles is None else "Attention of whole sequences"
    policy = None if spec.policy is None else f'"{spec.policy}"'
    captured = "".join(f'"{each.name}", ' for each in spec.captured).removesuffix(" ")
    captured = captured.removesuffix(",") if len(spec.captured) > 1 else captured
    return f'''"""{kind}: {spec.name.replace("_", " ")}.

score(s) = {spec.score}
visible: {visible}
"""

import triton
import triton.language as tl

POLICY = {policy}  # the policy that selects keys; None: all visible keys are read
CAPTURED = ({captured})  # tensors that score and mask read, in the order of a call
'''
