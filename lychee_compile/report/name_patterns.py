"""Write many numbered module paths as one pattern: "model.layers.{0-4,6-10}.self_attn"."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def collapse(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return patterns that together stand for `names`, each with the indices of its names.

    Names that differ in numbers alone share a pattern, if that pattern stands for no other name.
    If two numbers vary and some pair of them does not occur, each value of the first number gets
    a pattern of its own.
    """
    shapes: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        shapes.setdefault(_NUMBER.sub("{}", name), []).append(index)
    numbers = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    return [
        part
        for shape, indices in shapes.items()
        for part in _split(shape, {index: numbers[index] for index in indices})
    ]


def _split(shape: str, numbers: dict[int, tuple[int, ...]]) -> list[tuple[str, list[int]]]:
    columns = [sorted(set(column)) for column in zip(*numbers.values(), strict=True)]
    occurrences = Counter(numbers.values())
    covers_all = len(occurrences) == math.prod(len(column) for column in columns)
    if covers_all and len(set(occurrences.values())) == 1:
        pattern = shape.replace("{}", "\0")
        for column in columns:
            pattern = pattern.replace("\0", _ranges(column), 1)
        return [(pattern, list(numbers))]
    first = next((at for at, column in enumerate(columns) if len(column) > 1))
    parts = []
    for value in columns[first]:
        part = {index: each for index, each in numbers.items() if each[first] == value}
        parts.extend(_split(shape, part))
    return parts


def _ranges(values: Iterable[int]) -> str:
    """Return sorted, distinct integers as text: "7", or "{0-4,6-10}"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][-1] == value - 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return text if text.isdecimal() else f"{{{text}}}"
