"""What the demo's model reads and what it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACT = "The pass key of the lighthouse is 48213. Remember it."
EXPECTED = "48213"
# A small model that was never tuned on instructions answers best by ending a sentence.
QUESTION_FOR_FACT = (
    "\n\nQuestion: What is the pass key of the lighthouse?"
    "\nAnswer: The pass key of the lighthouse is"
)
TOPICS = ("execmodel", "objects", "import", "class", "exceptions", "types", "specialnames")


class RefusedError(Exception):
    """The demo cannot be run as asked; the message is one line for the user."""


@dataclass(frozen=True)
class Task:
    """A document and a question about it."""

    document: str
    question: str
    """Follows the document; the answer follows it."""
    fact_start: int | None = None
    """Where in the document a fact was planted, in characters; None where none was."""

    @property
    def expected(self) -> str | None:
        """What a right answer holds; None where nobody knows."""
        return None if self.fact_start is None else EXPECTED


def reference_manual() -> str:
    """A document that is wherever Python is: chapters of its language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in TOPICS if name in topics)


def read_document(path: Path) -> str:
    """The text of a file. Raises `RefusedError` where it cannot be read, is empty or not UTF-8."""
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
    """The user's question about the document, or else a fact planted in it and asked for."""
    if question is not None:
        return Task(document, f"\n\nQuestion: {question.strip()}\nAnswer:")
    planted, start = plant(document, FACT)
    return Task(planted, QUESTION_FOR_FACT, start)


def plant(document: str, fact: str) -> tuple[str, int]:
    """The document with `fact` as a paragraph of its own near the middle, and where that starts."""
    at = _break_near_middle(document)
    before = document[:at].rstrip() + "\n\n"
    return f"{before}{fact}\n\n{document[at:].lstrip()}", len(before)


def _break_near_middle(text: str) -> int:
    """Between paragraphs, else lines, else words, and not in the outer quarters of the text."""
    middle = len(text) // 2
    for separator in ("\n\n", "\n", " "):
        cuts = (text.rfind(separator, 0, middle), text.find(separator, middle))
        inner = [cut for cut in cuts if len(text) <= 4 * cut <= 3 * len(text)]
        if inner:
            return min(inner, key=lambda cut: abs(cut - middle))
    return middle


def first_paragraphs(document: str, tokenizer: Any, tokens: int) -> str:
    """As many whole paragraphs from the beginning as make up at most `tokens` tokens."""
    kept: list[str] = []
    for paragraph in document.split("\n\n"):
        tokens -= len(tokenizer(f"{paragraph}\n\n", add_special_tokens=False).input_ids)
        if tokens < 0:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)
