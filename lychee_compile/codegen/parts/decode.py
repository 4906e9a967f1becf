"""The functions and kernels that decoding needs, whatever the policy."""

from __future__ import annotations

from collections.abc import Sequence

from lychee_compile.codegen.parts.loads import emit_loads
from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import AttentionSpec, SparseSpec
from lychee_compile.kernels.sizes import BINS, LARGEST, PAGE, power_of_two

SAMPLE = {"sampled": 32, "newest": 8}
"""Keys that each KV head compares with fingerprints in each step, and the newest among them."""
STAGES = ("choose", "attend")
"""Kernels that decode/attend.py.jinja becomes."""
NOTING = ("note_heads", "note_small", "note_mass", "note_left_out")
"""Functions of `triton_lib/mass.py` that add up the mass of items. Lists need the last one."""
DRAWING = (
    "luck_of_number",
    "luck_at",
    "salt_of",
    "deal_table",
    "priorities",
    "drawn_items",
    "lift_of",
)
"""Functions of `triton_lib/drawing.py` by which a step draws tokens."""
_OWN_ITEMS = 2048
"""Upper bound of the items that a program chooses from at a time."""


def emit_constants(spec: AttentionSpec) -> str:
    """Return the sizes of a site of decoding."""
    return fill("decode/constants.py.jinja", spec)


def emit_exact(spec: AttentionSpec) -> list[str]:
    """Return the kernels of exact attention: `attend_all` and `combine`, with what they call."""
    return [
        *emit_loads(spec),
        *library("decode", "load_queries"),
        fill("decode/attend_to.py.jinja", spec),
        *library("decode", "store_part"),
        fill("decode/combine.py.jinja", spec),
        fill("decode/attend_all.py.jinja", spec),
    ]


def emit_fingerprints(spec: AttentionSpec) -> list[str]:
    """Return functions and kernels that compare keys with what was indexed.

    `compare_keys`, a kernel that compares all of them, is for keys that are loads: these change
    when a table or a scale does.
    """
    return [
        *library("trust", "lose_row", "move_end"),
        *library("fingerprints", "fingerprint", "changed_keys"),
        fill("decode/check_sample.py.jinja", spec),
        *([] if spec.keys is None else [fill("decode/compare_keys.py.jinja", spec)]),
    ]


def emit_bins(
    spec: AttentionSpec,
    sparse: SparseSpec,
    counts: bool = True,
    by_bin: bool = True,
    noting: Sequence[str] = NOTING,
) -> list[str]:
    """Return functions that put shares of the softmax into bins, and choose by these.

    Without `counts` there is no `count_bins`, and without `by_bin` no `choose_by_bin`. A policy
    that does not use all functions by which the mass of items is noted names those that it does.
    """
    fits_32 = sparse.overfetch * sparse.budget * _OWN_ITEMS < 2**31
    return [
        *library("bins", "written_slots", "fresh_from", "denominators"),
        *library("bins", "bins_of_shares", *(["count_bins"] if counts else []), "threshold"),
        *(_emit_mass(spec, noting) if sparse.coverage is not None else []),
        fill("decode/fresh_seen.py.jinja", spec),
        fill("decode/due.py.jinja", spec, fits_32=fits_32),
        *library("bins", *(["choose_by_bin"] if by_bin else []), "choose_of_sixteens"),
        *(library("drawing", *DRAWING) if sparse.draws else []),
    ]


def _emit_mass(spec: AttentionSpec, noting: Sequence[str]) -> list[str]:
    """Return functions that end a choice at a share of the softmax."""
    counted = library("mass", *noting, "mass_of_bins")
    found = library("mass", "limit_of_mass", "threshold_of_mass")
    return [*counted, *found, fill("decode/log_always.py.jinja", spec)]


def emit_always_read(spec: AttentionSpec, sparse: SparseSpec, unread: str, more: str = "") -> str:
    """Return `always_read`: sinks and recent tokens, and all from the slot `unread` on.

    `more` is ", name" for a parameter that the formula `unread` reads.
    """
    most = power_of_two(sparse.sinks + sparse.recent)
    return fill("decode/always_read.py.jinja", spec, unread=unread, most=most, more=more)


def emit_selection(spec: AttentionSpec, unread: str = "fresh") -> list[str]:
    """Return what a policy needs around kernels of its own, but for `attend` itself.

    These are the constants BUDGET, SINKS, RECENT, PAGE, BINS, LAST_BIN and HEADS, the functions of
    `triton_lib/bins.py` that make bins, and `always_read`. All slots from `unread` on are always
    read: a formula of `fresh`, the first slot that the index does not hold.
    """
    assert spec.sparse is not None
    sizes = {"page": PAGE, "bins": BINS, "largest": LARGEST}
    return [
        fill("decode/selection.py.jinja", spec, **sizes),
        *emit_bins(spec, spec.sparse),
        *library("bins", "shares_of", "bins_of"),
        emit_always_read(spec, spec.sparse, unread),
    ]
