"""Put a module together for one specification."""

from __future__ import annotations

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


def emit_module(spec: AttentionSpec) -> str:
    """Source of the Triton module for `spec`: it needs nothing but Triton.

    Raises ValueError for a policy that has no kernels, or none for such a score or mask.
    """
    if spec.tiles is not None:
        return _joined(_tiled(spec))
    parts = [_heading(spec), common.emit_constants(spec), terms.emit_terms(spec)]
    parts += [terms.emit_range(spec)] if terms.sees_range(spec) else []
    parts += [common.emit_queries(), attend.emit_attention_steps(spec), attend.emit_exact(spec)]
    if spec.sparse is not None:
        emit_policy = _POLICIES.get(spec.sparse.policy)
        if emit_policy is None:
            known = ", ".join(_POLICIES)
            raise ValueError(f"policy {spec.sparse.policy!r} has no kernels; {known} have")
        parts += emit_policy(spec)
    return _joined(parts)


def _joined(parts: list[str]) -> str:
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def _tiled(spec: AttentionSpec) -> list[str]:
    """For whole sequences."""
    return [
        _heading(spec),
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
    """Whether whole pages can be scored: their keys differ in nothing but themselves."""
    return KV not in spec.score.free_symbols and H not in spec.visible.free_symbols


def _lychee(spec: AttentionSpec) -> list[str]:
    """Tokens by their sketches."""
    assert spec.sparse is not None
    paged = scans_pages(spec)
    parts = [
        scan.emit_selection_constants(spec.sparse, paged),
        sketch.emit_sketch_constants(spec, paged),
        f"SCALE = tl.constexpr({float(spec.score.diff(S).subs(S, 0))})  # of s in the score\n",
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


def _quest(spec: AttentionSpec) -> list[str]:
    """Pages by the boxes around their keys."""
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


_POLICIES = {"lychee": _lychee, "quest": _quest}


def _heading(spec: AttentionSpec) -> str:
    visible = "all keys" if spec.visible == True else str(spec.visible)  # noqa: E712
    kind = "Decode attention" if spec.tiles is None else "Attention of whole sequences"
    return f'''"""{kind}: {spec.name.replace("_", " ")}.

score(s) = {spec.score}
visible: {visible}
"""

import triton
import triton.language as tl
'''
