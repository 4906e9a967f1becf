"""Real texts that come with Python, and the user's own."""

from __future__ import annotations

import json
import sysconfig
import unicodedata
from collections.abc import Callable
from pathlib import Path

from lychee_compile.evaluate.errors import EvaluationError

MODULES = (
    "argparse",
    "tarfile",
    "subprocess",
    "typing",
    "inspect",
    "zipfile",
    "doctest",
    "pdb",
    "optparse",
    "smtplib",
    "ipaddress",
    "logging/__init__",
    "logging/handlers",
    "email/_header_value_parser",
    "unittest/mock",
    "_pydecimal",
    "pickletools",
    "turtle",
)
"""Modules of the standard library whose code is read."""
TOPICS_FIRST = ("execmodel", "objects", "import", "class", "exceptions", "types", "specialnames")


def code() -> str:
    """Return the code of modules of Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [root / f"{name}.py" for name in MODULES]
    present = [file for file in files if file.is_file()] or sorted(root.glob("*.py"))
    return "\n\n".join(file.read_text(encoding="utf-8").strip() for file in present)


def prose() -> str:
    """Return chapters of Python's language reference."""
    from pydoc_data.topics import topics

    names = [*TOPICS_FIRST, *sorted(set(topics) - set(TOPICS_FIRST))]
    return "\n\n".join(topics[name].strip() for name in names if name in topics)


def json_text() -> str:
    """Return tables of the standard library as one pretty-printed JSON document."""
    return json.dumps(json_tables(), indent=2, ensure_ascii=False)


def json_tables() -> dict[str, object]:
    """Return media types, HTML entities, locale names and characters of Unicode."""
    import html.entities
    import locale
    import mimetypes

    types = mimetypes.MimeTypes()  # the built-in table: no files of this machine
    entities = [
        {"name": name, "character": character} for name, character in html.entities.html5.items()
    ]
    return {
        "media_types": dict(types.types_map[1]),
        "characters": _characters(0x20, 0x600),
        "locales": dict(locale.locale_alias),
        "entities": entities,
        "symbols": _characters(0x2010, 0x2C00),
    }


def _characters(first: int, end: int) -> list[dict[str, object]]:
    named = [(chr(point), unicodedata.name(chr(point), "")) for point in range(first, end)]
    return [
        {
            "point": f"U+{ord(character):04X}",
            "name": name,
            "category": unicodedata.category(character),
            "bidirectional": unicodedata.bidirectional(character),
            "mirrored": bool(unicodedata.mirrored(character)),
        }
        for character, name in named
        if name
    ]


BUILT_IN: dict[str, Callable[[], str]] = {"code": code, "json": json_text, "prose": prose}


def read_text(source: str) -> tuple[str, str]:
    """Return a kind and its text, for "code", "json", "prose" or KIND=FILE.

    Raise `EvaluationError` for another kind, or a file that is unreadable, empty or not UTF-8.
    """
    kind, separator, name = source.partition("=")
    if not separator:
        if kind not in BUILT_IN:
            raise EvaluationError(
                f"--text {source}: expected {', '.join(BUILT_IN)} or KIND=FILE, a UTF-8 text"
            )
        return kind, BUILT_IN[kind]()
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise EvaluationError(f"--text {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"--text {source}: not UTF-8, from byte {error.start} on") from error
    if not text.strip():
        raise EvaluationError(f"--text {source}: nothing in it")
    return kind or Path(name).stem, text
