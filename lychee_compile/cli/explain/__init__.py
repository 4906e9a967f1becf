"""The command `explain`: what the backend would do with a model, of its configuration alone."""

from __future__ import annotations
