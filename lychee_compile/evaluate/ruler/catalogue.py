"""The tasks after RULER by name."""

from __future__ import annotations

from collections.abc import Mapping

from lychee_compile.evaluate.ruler.counting import common_words, frequent_words
from lychee_compile.evaluate.ruler.facts import planted_facts, planted_hops
from lychee_compile.evaluate.ruler.needles import (
    many_keys,
    multi_key,
    multi_query,
    multi_value,
    single_key,
)
from lychee_compile.evaluate.ruler.problem import Build
from lychee_compile.evaluate.ruler.tracking import variable_tracking

RULER: Mapping[str, Build] = {
    "single-key": single_key,
    "multi-key": multi_key,
    "many-keys": many_keys,
    "multi-value": multi_value,
    "multi-query": multi_query,
    "variable-tracking": variable_tracking,
    "common-words": common_words,
    "frequent-words": frequent_words,
    "planted-facts": planted_facts,
    "planted-hops": planted_hops,
}
"""Name -> what makes a problem of so many fillers."""
