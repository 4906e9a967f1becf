"""Quest's page selection (arXiv 2406.10774): pages ranked by the best corner of a box around keys.

Chosen pages are read whole. `kernels/policies/decode/quest.py` says what differs from the paper.
"""

from __future__ import annotations

from lychee_compile.codegen.parts.decode import LARGEST, SAMPLE, emit_always_read, emit_bins
from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import KV, AttentionSpec
from lychee_compile.kernels.sizes import BINS, PAGE, power_of_two

RANKED = 512
"""Pages that a program ranks."""
BYTES_AT_ONCE = 32768
"""Bytes of boxes that a program of the scan loads at a time."""


def emit_quest(spec: AttentionSpec) -> list[str]:
    """Return the kernels of Quest's selection.

    Raises ValueError if the score depends on a key's slot.
    """
    assert spec.sparse is not None
    sparse = spec.sparse
    if KV in spec.score.free_symbols:
        raise ValueError("quest has no kernels for scores that depend on a key's slot")
    return [
        _constants(spec),
        *emit_bins(spec, sparse),
        fill("decode/fresh_seen.py.jinja", spec),
        *library("bins", "chosen_of_tiles"),
        emit_always_read(spec, sparse, unread="fresh // PAGE * PAGE"),
        *library("fingerprints", "fingerprint", "changed_keys", "check_sample"),
        *library("fingerprints", "record_fingerprints"),
        fill("quest/scan_boxes.py.jinja", spec),
        *library("quest", "rank_boxes"),
        fill("quest/list_boxes.py.jinja", spec),
        *library("quest", "box_new"),
        fill("quest/attend.py.jinja", spec),
    ]


def _constants(spec: AttentionSpec) -> str:
    box = 2 * power_of_two(spec.head_dim, 16) * (4 if spec.dtype == "float32" else 2)
    return fill(
        "quest/constants.py.jinja",
        spec,
        page=PAGE,
        scanned=max(BYTES_AT_ONCE // box, 16),
        ranked=RANKED,
        bins=BINS,
        largest=LARGEST,
        **SAMPLE,
    )
