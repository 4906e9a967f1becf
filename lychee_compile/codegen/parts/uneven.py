"""The kernels of a policy whose groups differ in length (`kernels/levels/groups.py`)."""

from __future__ import annotations

from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.level_source import chunk_summary_source, estimate_source
from lychee_compile.codegen.parts.certificate import emit_of_levels
from lychee_compile.codegen.parts.decode import LARGEST, SAMPLE, emit_always_read, emit_bins
from lychee_compile.codegen.parts.site import fill, precision, sees_range
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import KV, AttentionSpec, S, SparseSpec
from lychee_compile.kernels.levels.declaration import Level, LevelStack
from lychee_compile.kernels.levels.groups import Chunks, TokenClusters
from lychee_compile.kernels.sizes import BINS, power_of_two

RANKED = 512
"""Groups that a program ranks."""
BYTES_AT_ONCE = 32768
"""Bytes of summaries that a program of a scan loads at a time."""
_OF_CHUNKS = ("span_bounds", "unread_slot", "weigh_bins", "weights_before")
"""Functions that kernels of chunks call, and kernels of clusters of tokens do not."""


def emit_uneven(spec: AttentionSpec, stack: LevelStack) -> list[str]:
    """Return the kernels of a selection by the uneven groups of `stack`.

    Raises Unprintable for summaries and estimates that have no Triton form, and for scores that
    depend on the slot of a key, unless all groups are chunks.
    """
    sparse = spec.sparse
    assert sparse is not None
    of_chunks = isinstance(stack.levels[-1].groups, Chunks)
    by_slot = KV in spec.score.free_symbols
    if by_slot and not (of_chunks and len(stack.levels) == 1):
        raise Unprintable("scores depend on the slot of a key, of which a cluster has many")
    return [
        _constants(spec, stack, sparse),
        *emit_bins(spec, sparse, weighed=of_chunks),
        *(library("uneven", *_OF_CHUNKS) if of_chunks else []),
        emit_always_read(spec, sparse, unread="unread", more=", unread"),
        *library("fingerprints", "fingerprint", "changed_keys", "check_sample"),
        *library("fingerprints", "record_fingerprints"),
        *([] if sees_range(spec) else [fill("levels/window.py.jinja", spec)]),
        *(each for number in range(len(stack.levels)) for each in _of_level(spec, stack, number)),
        *_attend(spec, stack, sparse),
        *emit_of_levels(spec, stack),
    ]


def _constants(spec: AttentionSpec, stack: LevelStack, sparse: SparseSpec) -> str:
    sinks, recent = stack.always_read(sparse.sinks, sparse.recent, sparse.budget)
    groups, settings = stack.levels[-1].groups, sparse.groups
    shortest, longest = settings.chunk
    levels = [
        {
            "number": number,
            "scanned": _scanned(spec, level),
            "kept": level.keep and level.keep.tokens(sparse.budget),
        }
        for number, level in enumerate(stack.levels)
    ]
    return fill(
        "uneven/constants.py.jinja",
        spec,
        sinks=sinks,
        recent=recent,
        settings=settings.arguments,
        shortest=shortest,
        longest=longest,
        look=power_of_two(longest // shortest + 2),
        members=power_of_two(longest),
        waiting=groups.window if isinstance(groups, TokenClusters) else 0,
        ranked=RANKED,
        bins=BINS,
        largest=LARGEST,
        levels=levels,
        **SAMPLE,
    )


def _scanned(spec: AttentionSpec, level: Level) -> int:
    """Return how many groups of a level a program scores at a time."""
    number = 4 if spec.dtype == "float32" else 2
    size = max(sum(level.channels.values()), 1) * power_of_two(spec.head_dim, 16) * number
    return min(max(power_of_two(BYTES_AT_ONCE // size), 16), 256)


def _of_level(spec: AttentionSpec, stack: LevelStack, number: int) -> list[str]:
    """Return the kernels of one level: scan, ranks, and what says which groups are chosen."""
    level, is_last = stack.levels[number], number == len(stack.levels) - 1
    kind = _kind(level)
    shared = {
        "number": number,
        "kind": kind,
        "of_chunks": isinstance(stack.levels[-1].groups, Chunks),
    }
    scale = float(spec.score.diff(S).subs(S, 0))
    scan = fill(
        "uneven/scan.py.jinja",
        spec,
        **shared,
        fields=list(level.channels.items()),
        estimate=estimate_source(level, precision(spec), scale, spec.head_dim),
        is_child=number > 0,
        is_first=number == 0,
        by_slot=KV in spec.score.free_symbols,
    )
    rank = fill("uneven/rank.py.jinja", spec, **shared, by_layer=stack.vote == "layer")
    then = "spread" if kind == "tokens" else "list" if is_last else "keep"
    return [scan, rank, fill(f"uneven/{then}.py.jinja", spec, **shared)]


def _kind(level: Level) -> str:
    """Return the word that templates have for the groups of a level."""
    if isinstance(level.groups, Chunks):
        return "chunks"
    return "tokens" if isinstance(level.groups, TokenClusters) else "clusters"


def _attend(spec: AttentionSpec, stack: LevelStack, sparse: SparseSpec) -> list[str]:
    """Return `attend`, and what brings the index up to date."""
    last, number = stack.levels[-1], len(stack.levels) - 1
    of_chunks = isinstance(last.groups, Chunks)
    shared = {
        "names": "".join(f"summary_{name}, " for name in last.fields),
        "label": f"label_{number}, " if number else "",
    }
    attend = fill(
        "uneven/attend.py.jinja",
        spec,
        **shared,
        number=number,
        kind=_kind(last),
        of_chunks=of_chunks,
    )
    if not of_chunks:
        return [fill("uneven/note_new.py.jinja", spec), attend]
    stored = None if spec.dtype == "float32" else f"tl.{spec.dtype}"
    source = chunk_summary_source(last, spec.head_dim, stored)
    fields = [(name, wide, source.fields[name]) for name, wide in last.channels.items()]
    similar = sparse.groups.by_similarity
    new = fill(
        "uneven/summarise_new.py.jinja",
        spec,
        **shared,
        passes=source.passes,
        fields=fields,
        by_similarity=similar,
        tile=min(power_of_two(sparse.groups.chunk[1]), 16),
    )
    return [new, attend]
