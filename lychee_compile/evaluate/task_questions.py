"""Questions of all tasks: look-ups in real text, and the tasks after RULER."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.models import LanguageModel
from lychee_compile.evaluate.ruler.catalogue import RULER
from lychee_compile.evaluate.ruler.questions import chat_frame, ruler_question
from lychee_compile.evaluate.task_texts import TASKS, Filler, Question, make_question

ALL_TASKS = (*TASKS, *RULER)
"""Names of all tasks."""
GROUPS = {"lookups": tuple(TASKS), "ruler": tuple(RULER)}
"""Tasks that go by one name."""
RESERVED = 96
"""Number of tokens kept free for question and answer."""
SHORTEST = 512
"""Least number of tokens of a document."""


def check_tasks(names: Sequence[str]) -> None:
    """Raise `EvaluationError` for a task that does not exist."""
    for name in names:
        if name not in ALL_TASKS:
            raise EvaluationError(f"--tasks {name}: expected some of {', '.join(ALL_TASKS)}")


def make_questions(
    model: LanguageModel, names: Sequence[str], length: int, repeats: int, seed: int = 0
) -> list[Question]:
    """Return `repeats` questions of each task, at depths spread over documents of `length` tokens.

    Raise `EvaluationError` for a length that does not fit.
    """
    longest = model.longest
    if length < SHORTEST or (longest is not None and length > longest):
        bound = "" if longest is None else f" and at most {longest:,}, what the model was made for"
        raise EvaluationError(f"--length {length}: expected at least {SHORTEST} tokens{bound}")

    def count(texts: Sequence[str]) -> list[int]:
        encoded = model.tokenizer(list(texts), add_special_tokens=False).input_ids
        return [len(ids) for ids in encoded]

    fillers: dict[str, Filler] = {}
    frame = chat_frame(model.tokenizer)
    questions = []
    for name, number in itertools.product(names, range(repeats)):
        chance = f"{seed} {name} {number}"
        depth = (number + 0.5) / repeats
        if name in RULER:
            questions.append(ruler_question(name, length, depth, chance, count, frame))
            continue
        kind = TASKS[name][0]
        if kind not in fillers:
            fillers[kind] = Filler(kind, count)
        room = length - RESERVED
        drawn = random.Random(chance)
        questions.append(make_question(name, fillers[kind], room, depth, count, drawn))
    return questions
