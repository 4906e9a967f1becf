"""Name by which the models of the installed transformers take their cache."""

from __future__ import annotations

import pytest

from lychee_compile.evaluate.cache_argument import cache_argument

transformers = pytest.importorskip("transformers")

CACHE = cache_argument(transformers.LlamaForCausalLM)
"""Keyword of `forward()` and of `generate()`: "cache", or "past_key_values" in older releases."""
