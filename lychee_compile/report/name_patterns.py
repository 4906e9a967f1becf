"""Many numbered module paths in one line: "model.layers.{0-4,6-10}.self_attn"."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def collapse(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Patterns that stand for the names between them, each with the indices of its names.

    Names whose paths differ in numbers alone share a pattern, as long as it stands for no other
    name: where two numbers vary and not every pair occurs, the first gets a pattern of each value.
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
    """Sorted distinct integers: "7", or "{0-4,6-10}"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][-1] == value - 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return text if text.isdecimal() else f"{{{text}}}"
