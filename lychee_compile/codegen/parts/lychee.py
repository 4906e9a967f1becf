"""Kernels that select tokens by sketches of their keys; in long contexts pages or chunks first."""

from __future__ import annotations

from lychee_compile.codegen.parts.certificate import emit_certificate, emit_constants
from lychee_compile.codegen.parts.decode import (
    SAMPLE,
    STAGES,
    emit_always_read,
    emit_bins,
    emit_fingerprints,
)
from lychee_compile.codegen.parts.narrowing import emit_chunks, emit_narrowing
from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.parts.sketches import (
    emit_listed_sketches,
    emit_page_sketches,
    emit_sketches,
    weight_columns,
)
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import KV, AttentionSpec, H, S, SparseSpec
from lychee_compile.kernels.gpu.lychee.layout import (
    PAGE_MIDDLE,
    PAGE_STEP,
    Field,
    plane_bytes,
    planes,
)
from lychee_compile.kernels.policies.decode.lychee import LYCHEE
from lychee_compile.kernels.reference.sketch_axes import STEPS
from lychee_compile.kernels.sizes import (
    BINS,
    LARGEST,
    LUCKIEST,
    PAGE,
    SCAN_SLOTS,
    SLOT_BITS,
    power_of_two,
)

TURN = 32
"""Chosen pages of one block whose tokens a program scores at a time."""
PROBES = 16
"""Number of slots of a block at which a score that depends on the slot is evaluated."""
BOUNDED = 128
"""Slots whose bounds a program computes at a time; it divides a block."""
SMALLEST = 1e-30
"""Least of the greatest weights of a head and block, in float32: weights are divided by it."""
_VARIANCE = {bits: step**-2 for bits, step in STEPS.items()}
"""Variance of coordinates of so many bits over a block, in steps."""


def emit_lychee(spec: AttentionSpec) -> list[str]:
    """Return the kernels of a selection by sketches."""
    assert spec.sparse is not None
    sparse = spec.sparse
    paged = scans_pages(spec)
    noting = ["note_heads", "note_small", *(["note_left_out"] if paged else [])]
    return [
        _constants(spec, sparse, paged),
        *emit_bins(spec, sparse, counts=narrows(spec), by_bin=paged, noting=noting),
        *library("counts", "no_counts", "count_items", "add_counts"),
        emit_always_read(spec, sparse, unread="fresh"),
        *emit_fingerprints(spec),
        _query_weights(spec, paged),
        *emit_sketches(spec),
        _fill("scan_tokens", spec),
        *(_page_scans(spec) if paged else []),
        *emit_chunks(spec, LYCHEE),
        *(_listed_scans(spec) if narrows(spec) else []),
        *library("sketch", "field_codes"),
        _fill("encode_keys", spec),
        *library("sketch", "page_code"),
        _fill("encode", spec),
        _fill("encode_new", spec),
        *(_fill("attend", spec, stage=stage, slot_bits=SLOT_BITS) for stage in STAGES),
        *(_certificate(spec) if sparse.epsilon is not None else []),
    ]


def _certificate(spec: AttentionSpec) -> list[str]:
    """Return the kernels that bound unread keys by sketches, and how far keys are from these."""
    by_slot = KV in spec.score.free_symbols
    bound = _fill("bound_unread", spec, size=1, even=True, at_once=BOUNDED, by_slot=by_slot)
    shared = library("residuals", "sketch_levels", "load_axes", "store_residuals")
    return [
        emit_constants(spec, BOUNDED),
        *shared,
        _fill("measure", spec),
        _fill("measure_new", spec),
        *library("residuals", "weigh_blocks"),
        *emit_certificate(spec, bound),
    ]


def scans_pages(spec: AttentionSpec) -> bool:
    """True if whole pages can be scored: their keys differ in nothing but themselves."""
    return KV not in spec.score.free_symbols and H not in spec.visible.free_symbols


def narrows(spec: AttentionSpec) -> bool:
    """True if chunks can narrow a long context. A choice by mass needs the shares of all tokens."""
    assert spec.sparse is not None
    return scans_pages(spec) and spec.sparse.coverage is None


def _fill(name: str, spec: AttentionSpec, **values: object) -> str:
    """Return a kernel; its template may also read the fields of a sketch, `fine` and `coarse`."""
    fine, coarse = planes(spec.head_dim)
    return fill(f"lychee/{name}.py.jinja", spec, fine=fine, coarse=coarse, **values)


def _constants(spec: AttentionSpec, sparse: SparseSpec, paged: bool) -> str:
    fine, coarse = planes(spec.head_dim)
    kept = sum(field.width for field in fine + coarse)
    return _fill(
        "constants",
        spec,
        paged=paged,
        page_room=-(-sparse.overfetch * sparse.budget // PAGE),
        flat_pages=sparse.flat_tokens // PAGE,
        turn=TURN,
        bins=BINS,
        largest=LARGEST,
        luckiest=LUCKIEST,
        slot_bits=SLOT_BITS,
        **SAMPLE,
        tile=SCAN_SLOTS,
        page=PAGE,
        kept=kept,
        kept_columns=power_of_two(kept, 16),
        kept_fine=sum(field.width for field in fine),
        fine_bytes=plane_bytes(fine),
        fine_columns=power_of_two(plane_bytes(fine), 16),
        coarse_bytes=plane_bytes(coarse),
        coarse_columns=power_of_two(plane_bytes(coarse), 16),
        weight_columns=weight_columns(spec.head_dim),
        page_step=PAGE_STEP,
        page_zero=PAGE_MIDDLE,
        scale=float(spec.score.diff(S).subs(S, 0)),
    )


def _query_weights(spec: AttentionSpec, paged: bool) -> str:
    fine_zero, coarse_zero = (Field(0, 1, 0, bits).offset for bits in (4, 2))
    return _fill(
        "query_weights",
        spec,
        paged=paged,
        by_slot=KV in spec.score.free_symbols,
        fine_zero=fine_zero,
        coarse_zero=coarse_zero,
        fine_variance=_VARIANCE[4],
        coarse_variance=_VARIANCE[2],
        smallest=SMALLEST,
        probes=PROBES,
    )


def _page_scans(spec: AttentionSpec) -> list[str]:
    return [
        *library("bins", "chosen_of_tiles"),
        *emit_page_sketches(spec),
        *library("pages", "plan_turns"),
        _fill("scan_pages", spec),
        _fill("scan_chosen", spec),
    ]


def _listed_scans(spec: AttentionSpec) -> list[str]:
    return [
        *emit_narrowing(spec, LYCHEE),
        *emit_listed_sketches(spec),
        _fill("scan_listed", spec),
    ]
