"""Numbers of tokens as people write them, "8192", "8k" or "2m"; parsers for an option."""

from __future__ import annotations

import argparse
import re


def tokens(text: str) -> int:
    """Return the number of tokens that `text` names, as "8192", "8k" or "2m"."""
    match = re.fullmatch(r"([0-9]+)([km]?)", text.lower())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, as 8192, 8k or 2m")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2]]


def positive(text: str) -> int:
    """Return the whole number from 1 on that `text` names."""
    if not re.fullmatch("[0-9]+", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def length_name(tokens: int) -> str:
    """Return a short name for a number of tokens: "128k" for 131072."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else f"{tokens:,}"
