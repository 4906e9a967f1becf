"""A problem of a task, before it becomes a question, and the number of its fillers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lychee_compile.evaluate.errors import EvaluationError

SHARES = (0.955, 1.0)
"""Least and greatest length of a problem, as shares of the length that is asked for."""
TRIES = 16
"""Number of sizes that are tried to find one of the right length."""


@dataclass(frozen=True)
class Problem:
    """Text to read, and what is asked about it."""

    document: str
    """Instruction and text."""
    question: str
    """Question that follows the document."""
    lead: str
    """Beginning of the answer, up to where the expected strings begin."""
    answers: tuple[str, ...]
    """All strings that the answer should hold, in their order in a full answer."""
    joint: str = ", "
    """Text between two of the strings in a full answer."""
    depth: float = 0.5
    """Position of the first planted fact in the text, 0 to 1."""

    @property
    def answer(self) -> str:
        """Full answer, as it follows the lead."""
        return f" {self.joint.join(self.answers)}"

    @property
    def text(self) -> str:
        """All of it, to count tokens."""
        return self.document + self.question + self.lead + self.answer


Build = Callable[[int, random.Random, float], Problem]
"""Makes a problem with so many fillers, by chance, whose fact is at a depth from 0 to 1."""


def fit(
    build: Build,
    tokens: int,
    depth: float,
    seed: str,
    count: Callable[[Sequence[str]], list[int]],
) -> Problem:
    """Return a problem of at most `tokens` tokens, and hardly fewer; `count` counts those of texts.

    Raise `EvaluationError` if the task has none so short.
    """
    least, most = (share * tokens for share in SHARES)
    size, below, above = max(tokens // 16, 1), 0, None
    for _ in range(TRIES):
        problem = build(size, random.Random(seed), depth)
        (length,) = count([problem.text])
        if least <= length <= most:
            return problem
        if length < least:
            below = size
        else:
            above = size
        if above is not None and above - below <= 1:
            break
        size = max(round(size * (least + most) / 2 / length), 1)
        if size <= below or (above is not None and size >= above):
            size = 2 * below if above is None else (below + above) // 2
    raise EvaluationError(f"--length {tokens}: too short for this task")
