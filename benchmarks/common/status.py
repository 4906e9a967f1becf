"""Outcomes of one measurement in a benchmark's records."""

from __future__ import annotations

MEASURED = "measured"
"""There is a number."""
UNAVAILABLE = "unavailable"
"""There is no such variant on this device."""
SKIPPED = "skipped"
"""The measurement does not fit into memory."""
FAILED = "failed"
"""The measurement raised an error or its output is wrong."""
