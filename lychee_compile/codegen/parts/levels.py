"""The kernels of a policy that is declared as levels (`kernels/levels/declaration.py`)."""

from __future__ import annotations

from dataclasses import replace

from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.level_source import estimate_source
from lychee_compile.codegen.parts.certificate import emit_of_levels
from lychee_compile.codegen.parts.decode import (
    NOTING,
    SAMPLE,
    STAGES,
    emit_always_read,
    emit_bins,
    emit_fingerprints,
)
from lychee_compile.codegen.parts.level_index import emit_index_new, parts_of_chunks
from lychee_compile.codegen.parts.site import fill, precision, sees_range
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import KV, AttentionSpec, S, SparseSpec
from lychee_compile.kernels.levels.declaration import Level, LevelStack
from lychee_compile.kernels.levels.groups import Chunks, Clusters, GroupSettings, TokenClusters
from lychee_compile.kernels.sizes import BINS, LARGEST, power_of_two

RANKED = 512
"""Groups that a program ranks."""
BYTES_AT_ONCE = 32768
"""Bytes of summaries that a program of a scan loads at a time."""
SEEN_AT_ONCE = 8192
"""Slots whose visibility a program of a scan finds out at a time."""
LISTED_AT_ONCE = {"pages": 16, "chunks": 8, "clusters": 4}
"""Children of a group that a program lists at a time, by the kind of the groups."""
LISTED_OF_FEW = 128
"""Groups in few clusters that a program lists at a time."""
MOST_FEW = 128
"""Largest number of clusters whose children are listed by the places that they get."""
_UNREAD = {"pages": "fresh // PAGE * PAGE", "chunks": "unread", "token clusters": "unread"}
"""Formula of the first slot that is always read, by the kind of the groups of the last level."""
_OF_KIND = {
    "pages": ("bins", "chosen_of_tiles"),
    "chunks": (
        "levels", "span_bounds", "unread_slot", "weigh_bins", "weights_before", "weights_above",
    ),
}  # fmt: skip
"""Functions that lists need, by the kind of the groups of the last level."""


def emit_levels(spec: AttentionSpec, stack: LevelStack) -> list[str]:
    """Return the kernels of a selection by the levels of `stack`.

    Raises Unprintable for summaries and estimates that have no Triton form, and for scores that
    depend on the slot of a key if there are clusters.
    """
    assert spec.sparse is not None
    if _by_slot(spec) and any(_has_clusters(level) for level in stack.levels):
        raise Unprintable("scores depend on the slot of a key, of which a cluster has many")
    sinks, recent = stack.always_read(spec.sparse.sinks, spec.sparse.recent, spec.sparse.budget)
    sparse, kind = replace(spec.sparse, sinks=sinks, recent=recent), _last_kind(stack)
    unread = "fresh" if kind == "pages" and stack.last_size == 1 else _UNREAD[kind]
    lists = any(_is_listed(stack, number) for number in range(len(stack.levels)))
    noting = NOTING if lists else [name for name in NOTING if name != "note_left_out"]
    has_window = not stack.levels or (kind != "pages" and not sees_range(spec))
    return [
        _constants(spec, stack, sparse),
        *(library("bins", "shares_of") if stack.levels else []),
        *emit_bins(
            spec,
            sparse,
            counts=bool(stack.levels) and kind != "chunks",
            by_bin=any(
                _is_listed(stack, number) and _kind(level) == "pages"
                for number, level in enumerate(stack.levels)
            ),
            noting=noting,
        ),
        *(library(*_OF_KIND[kind]) if lists else []),
        *(library("levels", "unread_before") if kind == "chunks" and not sees_range(spec) else []),
        emit_always_read(spec, sparse, unread, more="" if kind == "pages" else ", unread"),
        *emit_fingerprints(spec),
        fill("decode/record_fingerprints.py.jinja", spec),
        *([] if stack.pairs is None else library("levels", "load_query_channels")),
        *([fill("levels/window.py.jinja", spec, narrows=False)] if has_window else []),
        *(each for number in range(len(stack.levels)) for each in emit_level(spec, stack, number)),
        *_attend(spec, stack, sparse),
        *emit_of_levels(spec, stack),
    ]


def _kind(level: Level) -> str:
    """Return the word that templates have for the groups of a level: pages if they are even."""
    kinds = {Chunks: "chunks", Clusters: "clusters", TokenClusters: "token clusters"}
    return kinds.get(type(level.groups), "pages")


def _last_kind(stack: LevelStack) -> str:
    """Return the kind of the groups of the last level."""
    return _kind(stack.levels[-1]) if stack.levels else "pages"


def _has_clusters(level: Level) -> bool:
    return isinstance(level.groups, Clusters | TokenClusters)


def _by_slot(spec: AttentionSpec) -> bool:
    """True if scores depend on the slot of a key."""
    return KV in spec.score.free_symbols


def _is_listed(stack: LevelStack, number: int) -> bool:
    """True if what is in the chosen groups of a level is listed.

    Single tokens are not at the last level, and slots have the bins of their clusters of tokens.
    """
    is_last = number == len(stack.levels) - 1
    return not is_last or (stack.last_size > 1 and _last_kind(stack) != "token clusters")


def _constants(spec: AttentionSpec, stack: LevelStack, sparse: SparseSpec) -> str:
    levels = [
        {
            "number": number,
            "kind": _kind(level),
            "size": level.groups.size,
            "scanned": scanned_at_once(spec, level),
            "channels": _gathered(spec, level),
            "gathered": power_of_two(_gathered(spec, level), 16),
            "kept": _kept(level, sparse.budget),
            "few": few_clusters(spec, stack, number),
        }
        for number, level in enumerate(stack.levels)
    ]
    groups = stack.levels and stack.levels[-1].groups
    waiting = groups.window if isinstance(groups, TokenClusters) else 0
    return fill(
        "levels/constants.py.jinja",
        spec,
        sinks=sparse.sinks,
        recent=sparse.recent,
        last_kind=_last_kind(stack),
        last_size=stack.last_size,
        settings=sparse.groups.arguments,
        **chunk_sizes(sparse.groups),
        always=sparse.sinks + sparse.recent + 2 * waiting,
        ranked=RANKED,
        listed=LISTED_OF_FEW,
        bins=BINS,
        largest=LARGEST,
        levels=levels,
        **SAMPLE,
    )


def chunk_sizes(settings: GroupSettings) -> dict[str, object]:
    """Return the holes of levels/constant_fragments.jinja."""
    shortest, longest = settings.chunk
    look, members = power_of_two(longest // shortest + 2), power_of_two(longest)
    return {"chunk": settings.chunk, "look": look, "members": members}


def few_clusters(spec: AttentionSpec, stack: LevelStack, number: int) -> int:
    """Return a power of two that a level has at most as many clusters as; 0: they may be many."""
    groups = stack.levels[number].groups
    if number > 0 or not isinstance(groups, Clusters) or not groups.limited:
        return 0
    assert spec.sparse is not None
    units = power_of_two(spec.sparse.groups.coarse_units)
    return units if units <= MOST_FEW else 0


def _kept(level: Level, budget: int) -> int | None:
    """Return how many pages, or tokens of clusters, a level keeps; None at the last level."""
    if level.keep is None:
        return None
    if _has_clusters(level):
        return level.keep.tokens(budget)
    return level.keep.groups(budget, level.groups.size)


def scanned_at_once(spec: AttentionSpec, level: Level) -> int:
    """Return how many groups of a level a program scores at a time."""
    channels = sum(level.channels.values()) * spec.head_dim + level.key_channels(spec.head_dim)
    number = 4 if spec.dtype == "float32" else 2
    size = power_of_two(max(channels, spec.head_dim if level.fields else 1), 16) * number
    most = min(power_of_two(BYTES_AT_ONCE // size), 256)
    if _kind(level) == "pages" and not sees_range(spec):
        most = min(most, SEEN_AT_ONCE // level.groups.size)
    return max(most, 16)


def _gathered(spec: AttentionSpec, level: Level) -> int:
    """Return how many channels of queries and keys a level reads, if not all; else 0."""
    return 0 if level.pairs is None else level.key_channels(spec.head_dim)


def emit_level(
    spec: AttentionSpec, stack: LevelStack, number: int, narrows: bool = False
) -> list[str]:
    """Return the kernels of one level: scan, ranks, and the list of what is in chosen groups.

    If the level `narrows` a choice by others, what the last level lists is ranked again.
    """
    level, is_last = stack.levels[number], number == len(stack.levels) - 1
    kind, is_listed = _kind(level), _is_listed(stack, number)
    shared = {
        "number": number,
        "kind": kind,
        "last_kind": _last_kind(stack),
        "narrows": narrows,
        "in_clusters": number > 0 and isinstance(stack.levels[number - 1].groups, Clusters),
        "is_listed": is_listed,
        "is_last": is_last,
        "covers": is_last and spec.sparse is not None and spec.sparse.coverage is not None,
        "few": few_clusters(spec, stack, number),
    }
    scan = fill(
        "levels/scan.py.jinja",
        spec,
        **shared,
        size=level.groups.size,
        clears=number == 0 and not narrows,
        checks=number == 0 and (kind == "pages" or sees_range(spec)),
        fields=list(level.channels.items()),
        estimate=_estimate(spec, level),
        reads_keys=level.reads_keys,
        gathers=level.pairs is not None,
        by_slot=_by_slot(spec),
    )
    voting = {"by_layer": stack.vote == "layer", "keeps_first": level.keeps_first}
    kernels = [scan, fill("levels/rank.py.jinja", spec, **shared, **voting)]
    if kind == "token clusters":
        kernels.append(fill("levels/spread.py.jinja", spec, **shared))
    if is_listed:
        below = 1 if is_last else stack.levels[number + 1].groups.size
        children = level.groups.size // below
        most = LISTED_AT_ONCE[kind]
        listed = {"children": children, "at_once": min(children, most) if kind == "pages" else most}
        kernels.append(fill("levels/list.py.jinja", spec, **shared, **listed))
    return kernels


def _estimate(spec: AttentionSpec, level: Level) -> str:
    scale = float(spec.score.diff(S).subs(S, 0))
    return estimate_source(level, precision(spec), scale, spec.head_dim)


def _attend(spec: AttentionSpec, stack: LevelStack, sparse: SparseSpec) -> list[str]:
    """Return `attend`, and what brings the index up to date.

    `attend` ends no choice by mass if the list of whole groups has done so.
    """
    kind, number = _last_kind(stack), len(stack.levels) - 1
    names = "".join(f"summary_{name}, " for level in stack.levels for name in level.fields)
    if kind == "chunks":
        names = parts_of_chunks(stack)
    elif kind == "token clusters":
        names = "label, waiting, "
    shared: dict[str, object] = {"last_kind": kind, "kind": kind, "parts": names}
    shared |= {"number": number, "in_clusters": False, "narrows": False}
    ended: dict[str, object] = {"by_mass": False} if _is_listed(stack, number) else {}
    shared |= ended
    kernels = [fill("levels/attend.py.jinja", spec, **shared, stage=stage) for stage in STAGES]
    return [emit_index_new(spec, stack, sparse, shared), *kernels]
