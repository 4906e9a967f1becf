"""The kernels by which chunks narrow a long context, before sketches rank the tokens in them."""

from __future__ import annotations

from lychee_compile.codegen.parts.level_index import emit_index_chunks, parts_of_chunks
from lychee_compile.codegen.parts.levels import (
    LISTED_OF_FEW,
    RANKED,
    chunk_sizes,
    emit_level,
    few_clusters,
    scanned_at_once,
)
from lychee_compile.codegen.parts.site import fill, sees_range
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.levels.declaration import LevelStack

AT_ONCE = 64
"""Number of candidates that a program scores at a time."""


def emit_chunks(spec: AttentionSpec, stack: LevelStack) -> list[str]:
    """Return the kernel that follows the chunks of an index, which some site may have built."""
    assert spec.sparse is not None
    number = len(stack.levels) - 1
    shared: dict[str, object] = {
        "narrows": True,
        "kind": "chunks",
        "last_kind": "chunks",
        "number": number,
        "in_clusters": number > 0,
        "parts": parts_of_chunks(stack),
    }
    sizes = chunk_sizes(spec.sparse.groups)
    return [
        fill("lychee/chunk_constants.py.jinja", spec, **sizes),
        *library("levels", "span_bounds", "unread_slot"),
        emit_index_chunks(spec, stack, spec.sparse, shared),
    ]


def emit_narrowing(spec: AttentionSpec, stack: LevelStack) -> list[str]:
    """Return the kernels that list the tokens of the best chunks.

    They need the functions of `emit_bins`, `emit_always_read` and `emit_chunks`.
    """
    levels = range(len(stack.levels))
    return [
        _constants(spec, stack),
        *library("bins", "shares_of"),
        *library("levels", "weigh_bins", "weights_before", "weights_above"),
        *([] if sees_range(spec) else [fill("levels/window.py.jinja", spec, narrows=True)]),
        *(each for number in levels for each in emit_level(spec, stack, number, narrows=True)),
    ]


def _constants(spec: AttentionSpec, stack: LevelStack) -> str:
    sparse = spec.sparse
    assert sparse is not None
    quota = sparse.overfetch * sparse.budget
    levels = [
        {
            "number": number,
            "scanned": scanned_at_once(spec, level),
            "per_token": level.keep and level.keep.per_token,
            "kept": level.keep and level.keep.tokens(quota),
            "few": few_clusters(spec, stack, number),
        }
        for number, level in enumerate(stack.levels)
    ]
    # Besides those of chunks, the tokens that are in no chunk yet are candidates.
    room = max(quota, sparse.flat_tokens) + 2 * sparse.groups.chunk[1]
    return fill(
        "lychee/narrowing_constants.py.jinja",
        spec,
        settings=sparse.groups.arguments,
        ranked=RANKED,
        listed=LISTED_OF_FEW,
        at_once=AT_ONCE,
        room=-(-room // 16) * 16,
        levels=levels,
    )
