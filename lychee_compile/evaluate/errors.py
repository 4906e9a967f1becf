"""What goes wrong for the user's reasons, and what to do about it."""

from __future__ import annotations

from importlib.util import find_spec


class EvaluationError(ValueError):
    """An evaluation cannot be run as asked; the message is one line for the user."""


def require(package: str, purpose: str) -> None:
    """Raise `EvaluationError` where `package` is missing, saying which extra brings it."""
    if find_spec(package) is None:
        raise EvaluationError(
            f"{purpose} needs {package}, not installed here: pip install 'lychee_compile[evaluate]'"
        )
