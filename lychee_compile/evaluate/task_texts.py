"""Questions about long documents in which the answers are planted at a known depth.

Models that were not tuned on instructions answer best by ending a sentence. Therefore every
question breaks off where its answer begins. Answers are random, so that no model knows them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.texts import BUILT_IN

PLACES = (
    "lighthouse", "harbour", "library", "windmill", "castle", "bridge", "station", "museum",
    "bakery", "chapel", "garden", "theatre", "market", "quarry", "vineyard", "stable",
)  # fmt: skip
WORDS = (
    "amber", "basalt", "candle", "dapple", "ember", "falcon", "glacier", "hazel", "indigo",
    "juniper", "kettle", "lantern", "marble", "nettle", "orchid", "pebble", "quartz", "raven",
    "saffron", "thistle", "umber", "velvet", "walnut", "yarrow", "zephyr", "acorn", "bramble",
    "cobalt", "drizzle", "feather", "gravel", "hollow", "ivory", "jasper", "linen", "meadow",
)  # fmt: skip
MANY = 8
"""Number of facts of the same form in one document, one of which is asked for."""
SHORT = 0.05
"""Share of the tokens of a document that may be missing since the next piece does not fit."""


@dataclass(frozen=True)
class Question:
    """Document and a question about it."""

    task: str
    document: str
    question: str
    """Text that follows the document."""
    answer: str
    """Text that follows the question."""
    depth: float
    """Position of the answer in the document, 0 to 1."""
    answers: tuple[str, ...] = ()
    """Strings that a free answer should hold; none: greedy decoding must give `answer`."""
    framed: bool = False
    """True if the texts have the special tokens of a chat template already."""


@dataclass(frozen=True)
class _Planted:
    """Pieces to plant into a document, in order, and a question about one of them."""

    pieces: Sequence[str]
    asked: int
    question: str
    answer: str


class Filler:
    """Real text in pieces of known length in tokens."""

    def __init__(self, kind: str, count: Callable[[Sequence[str]], list[int]]) -> None:
        """Cut a built-in text of `kind`; `count` returns the number of tokens of each text."""
        self.joint = "\n" if kind == "json" else "\n\n"
        self.pieces = [piece for piece in BUILT_IN[kind]().split(self.joint) if piece.strip()]
        self.sizes = count([piece + self.joint for piece in self.pieces])

    def take(self, tokens: int, chance: random.Random) -> list[str]:
        """Return neighbouring pieces of at most `tokens` in all, from a random one on.

        A piece that does not fit ends them, unless more than `SHORT` of the tokens would then be
        missing.
        """
        start, pieces, left = chance.randrange(len(self.pieces)), list[str](), tokens
        for number in range(len(self.pieces)):
            piece = (start + number) % len(self.pieces)
            if self.sizes[piece] <= left:
                left -= self.sizes[piece]
                pieces.append(self.pieces[piece])
            elif left <= SHORT * tokens:
                break
        return pieces


def pass_key(chance: random.Random) -> _Planted:
    """Return one fact, which is asked for."""
    return _pass_keys(chance, 1)


def pass_keys(chance: random.Random) -> _Planted:
    """Return several facts that differ in place and number, one of which is asked for."""
    return _pass_keys(chance, MANY)


def _pass_keys(chance: random.Random, many: int) -> _Planted:
    places, numbers, asked = _facts(chance, many)
    pieces = [
        f"The pass key of the {place} is {number}. Remember it."
        for place, number in zip(places, numbers, strict=True)
    ]
    question = (
        f"\n\nQuestion: What is the pass key of the {places[asked]}?"
        f"\nAnswer: The pass key of the {places[asked]} is"
    )
    return _Planted(pieces, asked, question, f" {numbers[asked]}")


def json_lookup(chance: random.Random) -> _Planted:
    """Return entries of a JSON document, one of which is asked for."""
    places, numbers, asked = _facts(chance, MANY)
    pieces = [
        f'    "{place}_pass_key": "{number}",'
        for place, number in zip(places, numbers, strict=True)
    ]
    question = (
        f'\n\nThe value of "{places[asked]}_pass_key" in the JSON document above:'
        f'\n\n    "{places[asked]}_pass_key": "'
    )
    return _Planted(pieces, asked, question, numbers[asked])


def function_lookup(chance: random.Random) -> _Planted:
    """Return functions and constants in source code, one of whose values is asked for."""
    places, numbers, asked = _facts(chance, MANY)
    pieces = [
        f"def {place}_pass_key():\n    return {number}"
        if chance.random() < 0.5
        else f"{place.upper()}_PASS_KEY = {number}"
        for place, number in zip(places, numbers, strict=True)
    ]
    name = pieces[asked].removeprefix("def ").partition("_")[0]
    call = f"{name}_PASS_KEY" if name.isupper() else f"{name}_pass_key()"
    question = f"\n\n# What the definitions above give:\nassert {call} =="
    return _Planted(pieces, asked, question, f" {numbers[asked]}")


def repeated_copy(chance: random.Random) -> _Planted:
    """Return a line of random words, whose rest is asked for after its beginning."""
    words = chance.sample(WORDS, 12)
    return _Planted([" ".join(words)], 0, "\n\n" + " ".join(words[:4]), " " + " ".join(words[4:8]))


TASKS: dict[str, tuple[str, Callable[[random.Random], _Planted]]] = {
    "pass-key": ("prose", pass_key),
    "pass-keys": ("prose", pass_keys),
    "json-lookup": ("json", json_lookup),
    "function-lookup": ("code", function_lookup),
    "repeated-copy": ("prose", repeated_copy),
}
"""Name -> kind of the document, and what is planted in it."""


def make_question(
    task: str,
    filler: Filler,
    tokens: int,
    depth: float,
    count: Callable[[Sequence[str]], list[int]],
    chance: random.Random,
) -> Question:
    """Return a question of the task about a document of at most `tokens` tokens.

    The answer is planted at `depth`, 0 to 1; other facts are spread over the document. Raise
    `EvaluationError` if the document is too short to hold them apart.
    """
    planted = TASKS[task][1](chance)
    joint = filler.joint
    room = tokens - sum(count([piece + joint for piece in planted.pieces]))
    text = filler.take(room, chance)
    if len(text) < 2 * len(planted.pieces):
        raise EvaluationError(
            f"--length {tokens}: too short for {task}, which plants {len(planted.pieces)} facts "
            "between paragraphs"
        )
    others = [number for number in range(len(planted.pieces)) if number != planted.asked]
    spread = {number: (rank + 0.5) / len(others) for rank, number in enumerate(others)}
    depths = spread | {planted.asked: depth}
    gaps = {number: _gap_at(text, each) for number, each in depths.items()}
    for number in sorted(depths, key=depths.__getitem__, reverse=True):
        text.insert(gaps[number], planted.pieces[number])
    return Question(task, joint.join(text), planted.question, planted.answer, depth)


def _gap_at(pieces: Sequence[str], depth: float) -> int:
    """Return the gap between pieces that is nearest to `depth` of their characters, 0 to 1."""
    ends = [0, *itertools.accumulate(map(len, pieces))]
    return min(range(len(ends)), key=lambda gap: abs(ends[gap] - depth * ends[-1]))


def _facts(chance: random.Random, many: int) -> tuple[list[str], list[str], int]:
    """Return places, a number of five digits for each, and the one that is asked for."""
    numbers = [str(number) for number in chance.sample(range(10_000, 100_000), many)]
    return chance.sample(PLACES, many), numbers, chance.randrange(many)
