"""Numbers of tokens as people write them, "8192", "8k" or "2m"; parsers for an option."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection


def tokens(text: str) -> int:
    """Return the number of tokens that `text` names, as "8192", "8k" or "2m"."""
    match = re.fullmatch(r"([0-9]+)([km]?)", text.strip().lower())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected an integer of at least 1, as 8192, 8k or 2m"
        )
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2]]


def positive(text: str) -> int:
    """Return the whole number from 1 on that `text` names."""
    if not re.fullmatch("[0-9]+", text.strip()) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least 1")
    return int(text)


def length_name(tokens: int) -> str:
    """Return a short name for a number of tokens: "128k" for 131072."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else f"{tokens:,}"


def lengths(text: str) -> list[int]:
    """Return the numbers of tokens that commas separate, each once, the least first."""
    return sorted({tokens(part) for part in text.split(",")})


def numbers(text: str) -> list[int]:
    """Return the whole numbers from 1 on that commas separate, each once, the least first."""
    return sorted({positive(part) for part in text.split(",")})


def listed(choices: Collection[str]) -> Callable[[str], list[str]]:
    """Return a parser of names separated by commas, each of which is one of `choices`."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r}: expected some of {', '.join(choices)}")
        return list(dict.fromkeys(names))

    return parse
