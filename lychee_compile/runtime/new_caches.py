"""Rule for the caches that a graph is the first to see: an index pays only if a cache comes again.

A step may be given new key tensors each time, as if keys are gathered from pages, come back from
another device, or are reordered for beam search. An index of such a tensor is never read again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache as only_once

from lychee_compile.runtime.cache_registry import Entry, Uses

logger = logging.getLogger(__name__)

WORTH_TELLING = 3
"""Number of calls in a row, each with new caches alone, after which the user is told."""
NEW_KEYS = (
    "keys are a new tensor at each call, so that no index pays: attention reads all of them. Let "
    "compiled code write them to a cache that stays, with no graph break before attention"
)
"""Words that tell the user so."""

NEW_TABLES = (
    "keys depend on a tensor or size beside the cache that is a new one at each call, so that no "
    "index pays: attention reads all keys. Pass the same at each call, such as a buffer"
)
"""Words that tell the user of such a tensor."""


class NewCaches:
    """The new caches of one graph, and whether those before them came a second time."""

    def __init__(self) -> None:
        self.tell: Callable[[str], None] | None = None
        """Takes a note for the report of the graph."""
        self._last: list[Uses] = []
        """Uses of the new caches of the last call that had any."""
        self._came_again = False
        """True if the new caches of the last call that is known came a second time."""
        self._in_a_row = 0
        """Number of calls in a row whose new caches were dropped after this one call."""

    def meet(self, entries: Sequence[Entry], reads_only: Sequence[bool]) -> None:
        """Delay the indexes of new caches unless those before them came a second time.

        `entries` are those of one call, and `reads_only` tells which caches the graph only reads.
        Caches that the graph writes are indexed at once, as who writes to a cache means to read it
        again, unless `WORTH_TELLING` calls in a row showed otherwise.
        """
        new = [entry for entry in entries if entry.storage is None]
        if not new:
            return
        self._learn()
        self._last = [entry.uses for entry in new]
        for entry, only_read in zip(entries, reads_only, strict=True):
            waits = not self._came_again if only_read else self._in_a_row >= WORTH_TELLING
            if entry.storage is None and waits:
                entry.owner.delay_build()

    def meet_replaced(self, entry: Entry) -> None:
        """Let attention read all keys if they depend on a tensor that is another one at each call.

        Each such call would compare all keys with those that were indexed.
        """
        if entry.replaced < WORTH_TELLING:
            return
        entry.owner.delay_build()
        if entry.replaced == WORTH_TELLING:
            _warn(NEW_TABLES)
            if self.tell is not None:
                self.tell(NEW_TABLES)

    def _learn(self) -> None:
        """Find out what became of the new caches before."""
        if any(uses.count > 1 for uses in self._last):
            self._came_again, self._in_a_row = True, 0
        elif any(uses.expired() for uses in self._last):
            self._came_again = False
            self._in_a_row += 1
            if self._in_a_row == WORTH_TELLING:
                _warn(NEW_KEYS)
                if self.tell is not None:
                    self.tell(NEW_KEYS)
                    self.tell = None


@only_once
def _warn(words: str) -> None:
    logger.warning("%s", words)
