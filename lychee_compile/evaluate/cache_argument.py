"""Name of the argument for the cache, of a model that is known to take one."""

from __future__ import annotations

from typing import Any

from lychee_compile.cache.argument import CACHE_NAMES, cache_name


def cache_argument(model: Any) -> str:
    """Return the name by which the forward of `model`, which is not compiled, takes its cache.

    It is "past_key_values" if the forward does not tell. Pass the cache as
    `model(ids, **{name: cache})`.
    """
    return cache_name(model) or CACHE_NAMES[-1]
