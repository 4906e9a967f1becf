"""Put a module together for one specification."""

from __future__ import annotations

from lychee_compile.codegen.parts import attend, common, encode, scan, sketch, terms
from lychee_compile.codegen.specification import AttentionSpec, S


def emit_module(spec: AttentionSpec) -> str:
    """Source of the Triton module for `spec`: it needs nothing but Triton."""
    parts = [_heading(spec), common.emit_constants(spec), terms.emit_terms(spec)]
    parts += [terms.emit_range(spec)] if terms.sees_range(spec) else []
    parts += [common.emit_queries(), attend.emit_attention_steps(spec), attend.emit_exact(spec)]
    if spec.sparse is not None:
        parts += [
            scan.emit_selection_constants(spec.sparse),
            sketch.emit_sketch_constants(spec),
            f"SCALE = tl.constexpr({float(spec.score.diff(S).subs(S, 0))})  # of s in the score\n",
            scan.emit_bins(),
            scan.emit_always_read(spec),
            sketch.emit_weigh(spec),
            sketch.emit_sketch_scores(spec),
            scan.emit_scan(spec),
        ]
        if scans_pages(spec):
            parts += [sketch.emit_page_scores(spec), scan.emit_page_scans(spec)]
        parts += [sketch.emit_encoder(spec), encode.emit_encode()]
        parts.append(attend.emit_sparse(spec))
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def scans_pages(spec: AttentionSpec) -> bool:
    """Whether whole pages can be scored: their keys differ in nothing but themselves."""
    from lychee_compile.codegen.specification import KV, H

    return KV not in spec.score.free_symbols and H not in spec.visible.free_symbols


def _heading(spec: AttentionSpec) -> str:
    visible = "all keys" if spec.visible == True else str(spec.visible)  # noqa: E712
    return f'''"""Decode attention: {spec.name.replace("_", " ")}.

score(s) = {spec.score}
visible: {visible}
"""

import triton
import triton.language as tl
'''
