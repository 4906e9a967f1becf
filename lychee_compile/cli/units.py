"""Sizes and times in words, for tables."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T")


def size_name(size: float) -> str:
    """Return a number of bytes in the largest unit of at least one: "1.5 GB"."""
    for prefix in _PREFIXES:
        if size < 1000 or prefix == _PREFIXES[-1]:
            break
        size /= 1000
    digits = 0 if not prefix or size >= 100 else 1
    return f"{size:,.{digits}f} {prefix}B"


def time_name(seconds: float | None) -> str:
    """Return a time in milliseconds, or in seconds from one on; "?" if it is not known."""
    if seconds is None:
        return "?"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1e3 * seconds:,.0f} ms"
