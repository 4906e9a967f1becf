"""Every spelling of attention that the tests know."""

from __future__ import annotations

from typing import Any, TypeVar

import spellings_decoders
import spellings_in_place
import spellings_masks
import spellings_models
import spellings_products
import spellings_scores
import spellings_softmax
import spellings_whole
from spellings_base import Spelling
from spellings_whole import Whole

Kind = TypeVar("Kind")


def _all(kind: type[Kind], *modules: Any) -> list[Kind]:
    made = [each for module in modules for each in vars(module).values()]
    return [each for each in made if isinstance(each, kind)]


SPELLINGS = _all(
    Spelling,
    spellings_decoders,
    spellings_products,
    spellings_scores,
    spellings_masks,
    spellings_softmax,
    spellings_in_place,
)
"""Spellings that may read a cache."""
WHOLES = _all(Whole, spellings_whole, spellings_models)
"""Spellings that have no cache."""
