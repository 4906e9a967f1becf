"""Examples: scripts that stand alone, and the demo as a package. README.md lists them."""

from __future__ import annotations
