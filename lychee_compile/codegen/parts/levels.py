"""The kernels of a policy that is declared as levels (`kernels/levels/declaration.py`)."""

from __future__ import annotations

from dataclasses import replace

from lychee_compile.codegen.level_source import estimate_source, summary_source
from lychee_compile.codegen.parts.certificate import emit_of_levels
from lychee_compile.codegen.parts.decode import LARGEST, SAMPLE, emit_always_read, emit_bins
from lychee_compile.codegen.parts.site import fill, precision, sees_range
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import KV, AttentionSpec, S
from lychee_compile.kernels.levels.declaration import Level, LevelStack, Pages
from lychee_compile.kernels.sizes import BINS, power_of_two

RANKED = 512
"""Groups that a program ranks."""
BYTES_AT_ONCE = 32768
"""Bytes of summaries that a program of a scan loads at a time."""
SEEN_AT_ONCE = 8192
"""Slots whose visibility a program of a scan finds out at a time."""
NUMBERS_AT_ONCE = 4096
"""Numbers of the keys of a group that are summarised at a time."""
LISTED_AT_ONCE = 16
"""Children of a group that a program lists at a time."""


def emit_levels(spec: AttentionSpec, stack: LevelStack) -> list[str]:
    """Return the kernels of a selection by the levels of `stack`.

    Raises Unprintable for summaries and estimates that have no Triton form.
    """
    assert spec.sparse is not None
    sinks, recent = stack.always_read(spec.sparse.sinks, spec.sparse.recent, spec.sparse.budget)
    sparse = replace(spec.sparse, sinks=sinks, recent=recent)
    unread = "fresh" if stack.last_size == 1 else "fresh // PAGE * PAGE"
    is_listed = stack.last_size > 1 or len(stack.levels) > 1
    names = "".join(f"summary_{name}, " for level in stack.levels for name in level.fields)
    described = [_described(spec, number, level) for number, level in enumerate(stack.levels)]
    return [
        _constants(spec, stack),
        *emit_bins(spec, sparse, weighed=not stack.levels),
        *(library("bins", "chosen_of_tiles") if is_listed else []),
        emit_always_read(spec, sparse, unread=unread),
        *library("fingerprints", "fingerprint", "changed_keys", "check_sample"),
        *library("fingerprints", "record_fingerprints"),
        *([] if stack.pairs is None else library("levels", "load_query_channels")),
        *(_of_level(spec, stack, number) for number in range(len(stack.levels))),
        *([] if stack.levels else [fill("levels/window.py.jinja", spec)]),
        fill("levels/summarise_new.py.jinja", spec, levels=described, names=names),
        fill("levels/attend.py.jinja", spec, names=names, **_by_mass(stack)),
        *emit_of_levels(spec, stack),
    ]


def _by_mass(stack: LevelStack) -> dict[str, bool]:
    """Return that `attend` ends no choice by mass, if the list of whole groups has done so."""
    return {"by_mass": False} if stack.last_size > 1 else {}


def _constants(spec: AttentionSpec, stack: LevelStack) -> str:
    assert spec.sparse is not None
    sparse = spec.sparse
    sinks, recent = stack.always_read(sparse.sinks, sparse.recent, sparse.budget)
    levels = [
        {
            "number": number,
            "size": level.groups.size,
            "scanned": _scanned(spec, level),
            "channels": _gathered(spec, level),
            "gathered": power_of_two(_gathered(spec, level), 16),
            "kept": level.keep and level.keep.groups(sparse.budget, level.groups.size),
        }
        for number, level in enumerate(stack.levels)
    ]
    return fill(
        "levels/constants.py.jinja",
        spec,
        sinks=sinks,
        recent=recent,
        last_size=stack.last_size,
        ranked=RANKED,
        bins=BINS,
        largest=LARGEST,
        levels=levels,
        **SAMPLE,
    )


def _scanned(spec: AttentionSpec, level: Level) -> int:
    """Return how many groups of a level a program scores at a time."""
    channels = sum(level.channels.values()) * spec.head_dim + level.key_channels(spec.head_dim)
    number = 4 if spec.dtype == "float32" else 2
    size = power_of_two(channels, 16) * number
    most = min(power_of_two(BYTES_AT_ONCE // size), 256)
    if not sees_range(spec):
        most = min(most, SEEN_AT_ONCE // level.groups.size)
    return max(most, 16)


def _gathered(spec: AttentionSpec, level: Level) -> int:
    """Return how many channels of queries and keys a level reads, if not all; else 0."""
    return 0 if level.pairs is None else level.key_channels(spec.head_dim)


def _described(spec: AttentionSpec, number: int, level: Level) -> dict[str, object]:
    """Return what templates read of a level."""
    rounds = level.rounds_fields and spec.dtype != "float32"
    source = summary_source(level, spec.head_dim, f"tl.{spec.dtype}" if rounds else None)
    tile = min(level.groups.size, max(NUMBERS_AT_ONCE // power_of_two(spec.head_dim, 16), 16))
    return {
        "number": number,
        "tile": tile,
        "passes": source.passes,
        "fields": [(name, wide, source.fields[name]) for name, wide in level.channels.items()],
    }


def _of_level(spec: AttentionSpec, stack: LevelStack, number: int) -> str:
    """Return the kernels of one level: scan, ranks, and the list of chosen groups."""
    level, is_last = stack.levels[number], number == len(stack.levels) - 1
    scan = fill(
        "levels/scan.py.jinja",
        spec,
        number=number,
        size=level.groups.size,
        fields=list(level.channels.items()),
        estimate=_estimate(spec, level),
        reads_keys=level.reads_keys,
        gathers=level.pairs is not None,
        by_slot=KV in spec.score.free_symbols,
    )
    is_listed = not is_last or isinstance(level.groups, Pages)
    covers = is_last and spec.sparse is not None and spec.sparse.coverage is not None
    rank = fill(
        "levels/rank.py.jinja",
        spec,
        number=number,
        by_layer=stack.vote == "layer",
        is_listed=is_listed,
        covers=covers,
        keeps_first=level.keeps_first,
    )
    if not is_listed:
        return f"{scan.strip()}\n\n\n{rank.strip()}"
    below = 1 if is_last else stack.levels[number + 1].groups.size
    listing = fill(
        "levels/list.py.jinja",
        spec,
        number=number,
        children=level.groups.size // below,
        at_once=min(level.groups.size // below, LISTED_AT_ONCE),
        is_last=is_last,
        covers=covers,
    )
    return "\n\n\n".join(part.strip() for part in (scan, rank, listing))


def _estimate(spec: AttentionSpec, level: Level) -> str:
    scale = float(spec.score.diff(S).subs(S, 0))
    return estimate_source(level, precision(spec), scale, spec.head_dim)
