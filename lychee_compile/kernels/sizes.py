"""Sizes that the reference, the policies, the GPU indexes and the generated kernels agree on."""

from __future__ import annotations

PAGE = 16
"""Keys of a page: neighbours that are summarised, bounded or read together."""
QUERY_TILE = 128
"""Query positions of a prefill tile, which read the same keys: what tensor cores multiply at once.
"""
SCAN_SLOTS = 512
"""Slots that one program of a scan over tokens takes; GPU indexes have room for a multiple."""
BINS = 256
"""Bins of a histogram of softmax shares."""
LARGEST = 12
"""log2 of the share that the last bin stands for. An estimated denominator may be that far off."""
LUCKIEST = 63
"""Most bins that luck raises a key by when keys are drawn: a factor of 2^(63/8)."""
WHOLE_SHARE = BINS - LUCKIEST - 9
"""Bin of a share of 1 when keys of a prefill are drawn: the luckiest key of the largest share has
one below the last."""
SLOT_BITS = 24
"""Bits of a slot in a list of drawn keys; the bits above hold how seldom such a key is drawn."""
MOST_DRAWN_FROM = 2**SLOT_BITS
"""Number of slots of the longest cache whose keys kernels draw."""


def power_of_two(value: int, at_least: int = 1) -> int:
    """Return the least power of two that is at least `value` and at least `at_least`."""
    return max(at_least, 1 << (max(value, 1) - 1).bit_length())


def whole_scans(slots: int) -> int:
    """Return the least multiple of `SCAN_SLOTS` that is at least `slots`."""
    return -(-slots // SCAN_SLOTS) * SCAN_SLOTS
