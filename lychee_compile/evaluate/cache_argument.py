"""Name of the argument by which a model of transformers takes its cache.

Newer releases of transformers (5.24 among them) call it `cache` in `forward()` and in `generate()`
and warn about the older name `past_key_values`. Older releases (5.17 among them), and models whose
code does not come with transformers, know the older name alone.
"""

from __future__ import annotations

import inspect
from typing import Any


def cache_argument(model: Any) -> str:
    """Return "cache" if the forward of `model`, which is not compiled, takes it by that name.

    Return "past_key_values" otherwise. Pass the cache as `model(ids, **{name: cache})`.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
