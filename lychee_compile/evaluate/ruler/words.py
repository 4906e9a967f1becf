"""Words that no language has, and sentences of the prose that comes with Python."""

from __future__ import annotations

import itertools
import random
import re
from functools import lru_cache

from lychee_compile.evaluate.texts import prose

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = tuple(map("".join, itertools.product(CONSONANTS, VOWELS)))
SENTENCE = re.compile(r"[A-Z][a-z]+(?: [\w\"'(),;:-]+){4,24}\.")
"""A plain sentence of five to 25 words."""


def invented(chance: random.Random, count: int, syllables: int = 3) -> list[str]:
    """Return different words of equal length, so that none is a part of another: "kabelo"."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chance.choices(SYLLABLES, k=syllables))] = None
    return list(found)


@lru_cache(maxsize=1)
def sentences() -> tuple[str, ...]:
    """Return plain sentences of Python's reference, without numbers of five digits."""
    text = re.sub(r"\s+", " ", prose())
    return tuple(each for each in SENTENCE.findall(text) if not re.search(r"\d{5}", each))


def passage(chance: random.Random, count: int) -> list[str]:
    """Return neighbouring sentences from a random one on; the text begins anew at its end."""
    known = sentences()
    start = chance.randrange(len(known))
    return [known[(start + number) % len(known)] for number in range(count)]


def planted(
    text: list[str], facts: list[str], chance: random.Random, depth: float | None = None
) -> str:
    """Return the sentences `text` with `facts` between them, in their order, at random places.

    With a `depth` from 0 to 1 the first fact is there, and the others are anywhere.
    """
    places = sorted(chance.randrange(len(text) + 1) for _ in facts)
    if depth is not None:
        others = [chance.randrange(len(text) + 1) for _ in facts[1:]]
        places = [round(depth * len(text)), *others]
    pieces = list(text)
    # From the back, so that places stay those of the text; the last of equal ones goes first.
    order = sorted(range(len(facts)), key=lambda number: (places[number], number), reverse=True)
    for number in order:
        pieces.insert(places[number], facts[number])
    return " ".join(pieces)
