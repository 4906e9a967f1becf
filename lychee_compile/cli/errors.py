"""Errors of a command line, as one line that says what to do."""

from __future__ import annotations

from importlib.util import find_spec


class CommandError(ValueError):
    """A command cannot run with these arguments; the message is one line for the user."""


def require_transformers(purpose: str) -> None:
    """Raise `CommandError` if transformers is missing, which `purpose` needs."""
    if find_spec("transformers") is None:
        raise CommandError(
            f"{purpose} needs transformers, not installed here: pip install 'transformers>=5.17'"
        )


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line of at most 300 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:297]}..."
