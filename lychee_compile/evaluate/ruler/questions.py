"""Questions of the tasks after RULER, in the chat template of a model if it has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.ruler.catalogue import RULER
from lychee_compile.evaluate.ruler.problem import Problem, fit
from lychee_compile.evaluate.task_texts import Question

MARK = "@@the-document@@"
"""Text that stands for a user's message in a chat template."""


def ruler_question(
    task: str,
    tokens: int,
    depth: float,
    seed: str,
    count: Callable[[Sequence[str]], list[int]],
    frame: tuple[str, str] | None = None,
) -> Question:
    """Return a question of a task, of at most `tokens` tokens with its document and its answer.

    `frame` is text before a user's message and after it; None: the model has no chat template.
    Raise `EvaluationError` if the task has none so short.
    """
    before, after = frame or ("", "")
    around = sum(count([before, after])) if frame else 0
    try:
        problem = fit(RULER[task], tokens - around, depth, seed, count)
    except EvaluationError as error:
        raise EvaluationError(f"--length {tokens}: too short for {task}") from error
    return Question(
        task,
        before + problem.document,
        problem.question + after + _lead(problem, frame),
        problem.answer,
        problem.depth,
        answers=problem.answers,
        framed=frame is not None,
    )


def chat_frame(tokenizer: Any) -> tuple[str, str] | None:
    """Return text before a user's message and after it, up to where the model answers.

    None: the tokenizer has no chat template, or one that does not take a user's message alone.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    message = [{"role": "user", "content": MARK}]
    try:
        shown = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception:  # noqa: BLE001  a template is a program of somebody else
        return None
    before, found, after = str(shown).partition(MARK)
    return (before, after) if found else None


def _lead(problem: Problem, frame: tuple[str, str] | None) -> str:
    """Return the beginning of the answer; an answer in a chat has no heading."""
    if frame is None:
        return problem.lead
    return problem.lead.removeprefix("\nAnswer: ")
