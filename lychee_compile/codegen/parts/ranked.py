"""Kernels for a prefill by positions or by groups of keys, if the mask has no holes.

`store_edges`    the keys that a tile always reads
`list_last`      the last keys that a tile sees; or, for a `GroupUnion`,
`count_levels`   how many keys each level of each ranking of groups has
`list_groups`    the keys of the groups that come first in any ranking
`attend`         attention of a tile over that list and over the keys that it always reads

The askers of a tile and their products with the groups are PyTorch's: few, and no mask. Groups of
one level of a ranking count as equal. Otherwise the policy's plain form specifies what is read.
"""

from __future__ import annotations

from lychee_compile.codegen.parts.listed import emit_terms_of_scores
from lychee_compile.codegen.parts.prefill import emit_attend
from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import AttentionSpec


def emit_last(spec: AttentionSpec) -> list[str]:
    """Return the functions and kernels of a prefill that reads the last keys."""
    return [
        *_emit_edges(spec),
        *library("prefill_groups", "list_last"),
        *emit_attend(spec, listed=True),
    ]


def emit_groups(spec: AttentionSpec) -> list[str]:
    """Return the functions and kernels of a prefill that reads a union of groups of keys.

    Raises ValueError for a score that `split_score` does not understand.
    """
    return [
        emit_terms_of_scores(spec),
        *_emit_edges(spec),
        *library(
            "prefill_groups",
            "candidates_before",
            "candidates_of",
            "level_of",
            "groups_of",
            "count_levels",
            "list_groups",
        ),
        *emit_attend(spec, listed=True),
    ]


def _emit_edges(spec: AttentionSpec) -> list[str]:
    return [
        fill("prefill/edges.py.jinja", spec),
        fill("prefill/store_edges.py.jinja", spec),
        *library("prefill", "load_edges", "room_for"),
    ]
