"""Errors that a user can mend, as one line that says what to do."""

from __future__ import annotations

from importlib.util import find_spec


class EvaluationError(ValueError):
    """The evaluation cannot run with these arguments; the message is one line for the user."""


def require(package: str, purpose: str) -> None:
    """Raise `EvaluationError` if `package` is missing; the message names the extra that has it."""
    if find_spec(package) is None:
        raise EvaluationError(
            f"{purpose} needs {package}, not installed here: pip install 'lychee_compile[evaluate]'"
        )
