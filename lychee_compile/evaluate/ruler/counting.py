"""Long lists of words, of which the most frequent are asked for."""

from __future__ import annotations

import random

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.ruler.problem import Problem
from lychee_compile.evaluate.ruler.words import invented

COMMON, OFTEN, RARELY = 10, 20, 2
"""Number of common words; times that each of them occurs, and each other word."""
FREQUENT, KINDS, DECAY = 3, 40, 2.0
"""Number of words asked for, of all words, and the exponent by which frequencies decay."""


def common_words(size: int, chance: random.Random, depth: float) -> Problem:
    """Return a numbered list of `size` rare words and ten common ones, which are asked for."""
    words = invented(chance, COMMON + size)
    entries = words[:COMMON] * OFTEN + words[COMMON:] * RARELY
    chance.shuffle(entries)
    text = " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
    return Problem(
        document="Below is a numbered list of words. Some words occur more often than others. "
        f"Remember those that occur most often.\n\n{text}",
        question=f"\n\nQuestion: What are the {COMMON} most common words in the list above?",
        lead=f"\nAnswer: The {COMMON} words that occur most often in the list are:",
        answers=tuple(words[:COMMON]),
        depth=depth,
    )


def frequent_words(size: int, chance: random.Random, depth: float) -> Problem:
    """Return `10 size` words whose frequencies decay; the three most frequent are asked for.

    Raise `EvaluationError` if they are too few to tell the frequent ones.
    """
    words = invented(chance, KINDS)
    weights = [rank**-DECAY for rank in range(1, KINDS + 1)]
    times = [max(round(10 * size * weight / sum(weights)), 1) for weight in weights]
    if len(set(times[: FREQUENT + 1])) <= FREQUENT:
        raise EvaluationError("--length: too short to tell frequent words from others")
    entries = [word for word, count in zip(words, times, strict=True) for _ in range(count)]
    chance.shuffle(entries)
    return Problem(
        document="Read the following coded text and follow how often each coded word occurs.\n\n"
        + " ".join(entries),
        question=f"\n\nQuestion: What are the {FREQUENT} most frequent words in the coded text?",
        lead=f"\nAnswer: The {FREQUENT} most frequent words in the coded text are:",
        answers=tuple(words[:FREQUENT]),
        depth=depth,
    )
