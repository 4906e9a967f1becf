"""Numbers hidden in a long text under words, one or several of which are asked for."""

from __future__ import annotations

import random

from lychee_compile.evaluate.ruler.problem import Problem
from lychee_compile.evaluate.ruler.words import invented, passage, planted

FEW = 4
"""Number of keys, values or questions of the tasks that have several."""


def single_key(size: int, chance: random.Random, depth: float) -> Problem:
    """Return one number in `size` sentences of prose, which is asked for."""
    (key,), (value,) = _keys(chance, 1), _values(chance, 1)
    text = planted(passage(chance, size), [_needle(key, value)], chance, depth)
    return _ask(text, [key], [value], depth)


def multi_key(size: int, chance: random.Random, depth: float) -> Problem:
    """Return numbers under different keys in prose, one of which is asked for."""
    keys, values = _keys(chance, FEW), _values(chance, FEW)
    needles = [_needle(*pair) for pair in zip(keys, values, strict=True)]
    text = planted(passage(chance, size), needles, chance, depth)
    return _ask(text, keys[:1], values[:1], depth)


def many_keys(size: int, chance: random.Random, depth: float) -> Problem:
    """Return `size` numbers under different keys and nothing else, one of which is asked for."""
    keys, values = _keys(chance, size + 1), _values(chance, size + 1)
    needles = [_needle(*pair) for pair in zip(keys, values, strict=True)]
    asked = round(depth * size)
    return _ask(" ".join(needles), [keys[asked]], [values[asked]], depth)


def multi_value(size: int, chance: random.Random, depth: float) -> Problem:
    """Return several numbers under one key in prose, all of which are asked for."""
    (key,), values = _keys(chance, 1), _values(chance, FEW)
    text = planted(passage(chance, size), [_needle(key, each) for each in values], chance)
    return _ask(text, [key], sorted(values, key=text.index), depth)


def multi_query(size: int, chance: random.Random, depth: float) -> Problem:
    """Return numbers under different keys in prose, all of which are asked for."""
    keys, values = _keys(chance, FEW), _values(chance, FEW)
    needles = [_needle(*pair) for pair in zip(keys, values, strict=True)]
    text = planted(passage(chance, size), needles, chance, depth)
    return _ask(text, keys, values, depth)


def _needle(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _ask(text: str, keys: list[str], values: list[str], depth: float) -> Problem:
    """Return the question for the numbers of some keys, in the order of the keys."""
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    many = len(values) > 1
    noun, verb = ("numbers", "are") if many else ("number", "is")
    told = f"special magic {noun} for {named} mentioned in the provided text {verb}"
    return Problem(
        document=f"Special magic numbers are hidden in the text below. Remember them.\n\n{text}",
        question=f"\n\nQuestion: What {verb} the special magic {noun} for {named} mentioned in the "
        "provided text?",
        lead=f"\nAnswer: The {told}",
        answers=tuple(values),
        depth=depth,
    )


def _keys(chance: random.Random, count: int) -> list[str]:
    return invented(chance, count, syllables=4)


def _values(chance: random.Random, count: int) -> list[str]:
    return [str(number) for number in chance.sample(range(10_000, 100_000), count)]
