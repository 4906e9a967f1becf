"""Trust: the degree to which an index describes the keys of its cache."""

from __future__ import annotations

from enum import Enum, auto


class Trust(Enum):
    """Degree to which an index is known to describe the keys of its cache."""

    DISTRUSTED = auto()
    """The keys may have changed, or the index is not built yet. It must be compared with the keys
    or built anew before it is used."""
    TRUSTED = auto()
    """The index describes the keys."""
    GIVEN_UP = auto()
    """Memory ran out: the index is never built again, and attention reads all keys."""
