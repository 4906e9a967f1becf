"""Demo: a question about a long document, answered with dense and with sparse attention."""

from __future__ import annotations
