"""Rows of an index that were distrusted alone, as when a row is given to another request."""

from __future__ import annotations

from collections.abc import Sequence

WORTHWHILE_FOR_ROW = 8
"""Number of sparse calls that pay for indexing one row. A row that is lost sooner waits longer."""
MOST_CALLS_TO_WAIT = 1023
"""Largest number of calls that a lost row, or a lost index, waits before it is built."""


class LostRows:
    """Lost rows of an index, and how long each of them waits until it is indexed anew.

    Calls are counted since the index was built as a whole.
    """

    def __init__(self) -> None:
        self._built: dict[int, int] = {}
        """Number of the call after which each row was last indexed alone."""
        self._waits: dict[int, int] = {}
        """Number of calls that each row waited the last time."""
        self._due: dict[int, int] = {}
        """Number of the call after which each lost row is indexed."""

    def ready(self, lost: Sequence[int], calls: int) -> list[int]:
        """Return those of the lost rows that are to be indexed after this call."""
        for row in lost:
            if row not in self._due:
                lived = calls - self._built.get(row, 0)
                longer = min(2 * self._waits.get(row, 0) + 1, MOST_CALLS_TO_WAIT)
                self._waits[row] = longer if lived < WORTHWHILE_FOR_ROW else 0
                self._due[row] = calls + self._waits[row]
        found = [row for row in lost if self._due[row] <= calls]
        for row in found:
            self._built[row] = calls
            del self._due[row]
        return found

    @property
    def next_due(self) -> int | None:
        """Number of the call after which the next row is indexed; None if no row waits."""
        return min(self._due.values(), default=None)
