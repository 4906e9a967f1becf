"""Name of the argument by which a model of transformers takes its cache.

Newer releases of transformers (5.24 among them) call it `cache` in `forward()` and in `generate()`
and warn about the older name `past_key_values`. Older releases (5.17 among them), and models whose
code does not come with transformers, know the older name alone.
"""

from __future__ import annotations

import inspect
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument, the newest first."""


def cache_name(model: Any) -> str | None:
    """Return the name by which the forward of `model` takes a cache; None if it takes none.

    The forward is not compiled.
    """
    known = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in known), None)
