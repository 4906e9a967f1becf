"""Variables that are assigned to each other, scattered over a long text."""

from __future__ import annotations

import random

from lychee_compile.evaluate.ruler.problem import Problem
from lychee_compile.evaluate.ruler.words import invented, passage, planted

HOPS = 4
"""Number of assignments of a variable to another one."""


def variable_tracking(size: int, chance: random.Random, depth: float) -> Problem:
    """Return a chain of variables in `size` sentences of prose; all of its names are asked for."""
    names = [name.upper() for name in invented(chance, HOPS + 1)]
    value = str(chance.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    steps = [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=True)]
    return Problem(
        document="Remember the chain of assigned variables in the following text.\n\n"
        + planted(passage(chance, size), steps, chance),
        question=f"\n\nQuestion: Find all variables that have the value {value} in the text above.",
        lead=f"\nAnswer: According to the chain of assignments in the text above, {HOPS + 1} "
        f"variables have the value {value}, and they are:",
        answers=tuple(names),
        depth=depth,
    )
