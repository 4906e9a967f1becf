"""Numbers of tokens as people write them, as "8192" or "8k"; parsers for a command's options."""

from __future__ import annotations

import argparse
import re


def tokens(text: str) -> int:
    """Return the number of tokens that `text` names, as "8192" or "8k"."""
    match = re.fullmatch(r"([0-9]+)(k?)", text.lower())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, as 8192 or 8k")
    return int(match[1]) * (1024 if match[2] else 1)


def positive(text: str) -> int:
    """Return the whole number from 1 on that `text` names."""
    if not re.fullmatch("[0-9]+", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def length_name(tokens: int) -> str:
    """Return a short name for a number of tokens: "128k" for 131072."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else f"{tokens:,}"
