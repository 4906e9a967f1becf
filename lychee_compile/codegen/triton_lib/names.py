"""Names that a generated module defines for its site: the functions of this folder may use them.

Declared for editors and checkers alone; templates define them. [ROWS, N] means a tile of that
shape.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

Tile = Any
"""A Triton tensor or a number."""

GROUP: tl.constexpr
"""Query heads that share a KV head."""
ROWS: tl.constexpr
"""GROUP, padded to what a tensor core's product takes."""
HEADS: tl.constexpr
"""GROUP, up to a power of two."""
HEAD_DIM: tl.constexpr
"""Length of a query and of a key."""
DIM: tl.constexpr
"""HEAD_DIM, padded."""
VALUE_DIM: tl.constexpr
"""Length of a value."""
WIDTH: tl.constexpr
"""VALUE_DIM, padded."""

BINS: tl.constexpr
"""Bins of a histogram of shares."""
LAST_BIN: tl.constexpr
"""The share that the last bin stands for, in eighths of an octave."""
LUCKIEST: tl.constexpr
"""Bins that luck raises a drawn key by, at most."""
SLOT_BITS: tl.constexpr
"""Bits of a slot in a list of drawn keys."""
MAY_MISS: tl.constexpr
"""Share of the softmax that may be left out, of a choice by mass."""
EPSILON: tl.constexpr
"""Share of the softmax that a row may leave unread by its certificate."""
SLACK: tl.constexpr
"""Relative error of a sum of products, at most."""
SLOPE: tl.constexpr
"""Largest growth of a score, in bits, when q.k grows by 1."""
PAGE: tl.constexpr
"""Slots summarised together."""
SAMPLED: tl.constexpr
"""Keys that a program of `check_sample` compares."""
NEWEST: tl.constexpr
"""Keys among them that are the newest."""

KEPT: tl.constexpr
"""Coordinates of a sketch."""
KEPT_COLUMNS: tl.constexpr
"""KEPT, padded."""
KEPT_FINE: tl.constexpr
"""Coordinates of 4 bits."""
FINE_BYTES: tl.constexpr
"""Bytes of the 4-bit coordinates of a sketch."""
FINE_COLUMNS: tl.constexpr
"""FINE_BYTES, padded."""
COARSE_BYTES: tl.constexpr
"""Bytes of the 2-bit coordinates of a sketch."""
COARSE_COLUMNS: tl.constexpr
"""COARSE_BYTES, padded."""
PAGE_STEP: tl.constexpr
"""Step of the code of a page's mean, in steps of a coordinate."""
PAGE_ROOM: tl.constexpr
"""Pages whose tokens are looked into."""
FLAT_PAGES: tl.constexpr
"""Pages up to which the tokens of all are looked into."""
TURN: tl.constexpr
"""Chosen pages of one block whose tokens are scored at a time."""
IN_REGISTERS: tl.constexpr
"""True if inline PTX can be used, which Triton's interpreter does not know."""
IN_SHARED: tl.constexpr
"""True if inline PTX counts bins in shared memory."""
IN_WORDS: tl.constexpr
"""True if codes are multiplied four at a time, as the bytes of words."""

RANKED: tl.constexpr
"""Groups of a level that a program ranks."""
CHANNELS: tl.constexpr
"""Channels of queries and keys that the estimates of a level read."""
GATHERED: tl.constexpr
"""CHANNELS, padded."""

SHORTEST: tl.constexpr
"""Slots of the shortest chunk."""
LONGEST: tl.constexpr
"""Slots of the longest chunk."""
LOOK: tl.constexpr
"""Numbers of chunks among which the last one of a row is."""


def due(left: Tile, own: Tile, at_cut: Tile) -> Tile:
    """Return how many of a program's `own` items at the cut are chosen, see decode/due.py.jinja."""


def encode_keys(keys: Tile, axes: Tile, centre: Tile, step: Tile) -> tuple[Tile, Tile]:
    """Return the packed codes of keys, see lychee/encode_keys.py.jinja."""
    raise NotImplementedError
