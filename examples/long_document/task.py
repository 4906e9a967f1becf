"""Document that the demo's model reads, and the question it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACT = "The pass key of the lighthouse is 48213. Remember it."
EXPECTED = "48213"
# A small model that was not tuned on instructions answers best by ending a sentence.
QUESTION_FOR_FACT = (
    "\n\nQuestion: What is the pass key of the lighthouse?"
    "\nAnswer: The pass key of the lighthouse is"
)
OTHERS = (
    "harbour", "windmill", "castle", "bridge", "library", "museum", "garden", "tower", "market",
    "school", "stable", "chapel", "theatre", "station", "farm", "quarry", "bakery", "shipyard",
)  # fmt: skip
"""Places whose pass keys a document may hold, too."""
TOPICS = ("execmodel", "objects", "import", "class", "exceptions", "types", "specialnames")
"""Chapters of Python's language reference with which a document begins."""


class RefusedError(Exception):
    """The demo cannot run with these arguments; the message is one line for the user."""


@dataclass(frozen=True)
class Task:
    """Document and a question about it."""

    document: str
    question: str
    """Text between the document and the answer."""
    fact_start: int | None = None
    """Position of the planted fact in the document, in characters; None if there is none."""

    @property
    def expected(self) -> str | None:
        """Text that a right answer contains; None if it is unknown."""
        return None if self.fact_start is None else EXPECTED


def reference_manual() -> str:
    """Return the chapters of Python's language reference, which every Python has."""
    from pydoc_data.topics import topics

    names = [*TOPICS, *sorted(set(topics) - {*TOPICS})]
    return "\n\n".join(topics[name].strip() for name in names if name in topics)


def read_document(path: Path) -> str:
    """Return the text of a file. Raise `RefusedError` if it is unreadable, empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RefusedError(f"--document {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RefusedError(
            f"--document {path}: not UTF-8 text, from byte {error.start} on"
        ) from error
    if not text.strip():
        raise RefusedError(f"--document {path}: nothing in it")
    return text


def compose(document: str, question: str | None) -> Task:
    """Return the user's question about the document, or a planted fact and a question for it."""
    if question is not None:
        return Task(document, f"\n\nQuestion: {question.strip()}\nAnswer:")
    planted, start = plant(document, FACT)
    return Task(planted, QUESTION_FOR_FACT, start)


def with_others(document: str) -> str:
    """Return the document with a pass key of each of `OTHERS` between its paragraphs."""
    paragraphs = document.split("\n\n")
    gap = len(paragraphs) / len(OTHERS)
    for number, place in reversed(list(enumerate(OTHERS))):
        key = 10_007 + 4_729 * number
        other = FACT.replace("lighthouse", place).replace(EXPECTED, str(key))
        paragraphs.insert(round((number + 0.5) * gap), other)
    return "\n\n".join(paragraphs)


def plant(document: str, fact: str) -> tuple[str, int]:
    """Return the document with `fact` as a paragraph near its middle, and where `fact` starts."""
    at = _break_near_middle(document)
    before = document[:at].rstrip() + "\n\n"
    return f"{before}{fact}\n\n{document[at:].lstrip()}", len(before)


def _break_near_middle(text: str) -> int:
    """Return a break near the middle: between paragraphs, else lines, else words.

    The outer quarters of the text hold no such break.
    """
    middle = len(text) // 2
    for separator in ("\n\n", "\n", " "):
        cuts = (text.rfind(separator, 0, middle), text.find(separator, middle))
        inner = [cut for cut in cuts if len(text) <= 4 * cut <= 3 * len(text)]
        if inner:
            return min(inner, key=lambda cut: abs(cut - middle))
    return middle


def first_paragraphs(document: str, tokenizer: Any, tokens: int) -> str:
    """Return the first whole paragraphs of `document` that have at most `tokens` tokens."""
    kept: list[str] = []
    for paragraph in document.split("\n\n"):
        tokens -= len(tokenizer(f"{paragraph}\n\n", add_special_tokens=False).input_ids)
        if tokens < 0:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)
