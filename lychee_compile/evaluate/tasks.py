"""What a model still finds in a long document that it reads sparsely.

The document is prefilled densely, once; question and answer are then decoded token by token over
it, by dense attention and by every policy at every budget. With the question inside the dense
prefill, the answer would already be in the cache. A variant with `prefill=sparse` reads the
document sparsely as well, in one pass and for itself.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.models import (
    LanguageModel,
    compiled,
    nothing,
    prefill,
    prefill_at_once,
)
from lychee_compile.evaluate.reading import Reading, encode, read_densely, read_sparsely
from lychee_compile.evaluate.task_texts import TASKS, Filler, Question, make_question
from lychee_compile.evaluate.variants import Variant, check_budgets, describe
from lychee_compile.torch_private import unlimited_recompiles

DENSE = "dense"
RESERVED = 96
"""Tokens left for question and answer."""
SHORTEST = 512
"""Tokens of a document, at least."""


@dataclass(frozen=True)
class TaskAnswer:
    """One question, asked in one way."""

    task: str
    policy: str
    budget: int | None
    depth: float
    document_tokens: int
    expected: str
    predicted: str
    """The likeliest token at each place of the expected answer."""
    exact: bool
    """Whether greedy decoding gives the expected answer."""
    log_likelihood: float
    """Of the expected answer."""
    agreement: float
    """Share of the answer's tokens for which dense attention predicts the same."""
    divergence: float
    """Mean Kullback-Leibler divergence from dense attention over question and answer, in nats."""


@dataclass(frozen=True)
class TaskRow:
    """All questions of one task, asked in one way."""

    task: str
    policy: str
    budget: int | None
    questions: int
    exact: float
    log_likelihood: float
    agreement: float
    divergence: float


@dataclass(frozen=True)
class TaskResult:
    """Every task by dense attention and by every policy at every budget."""

    model: str
    length: int
    """Tokens of a document, at most."""
    configs: dict[str, dict[str, Any]]
    """The options of each policy."""
    answers: list[TaskAnswer]

    def rows(self) -> list[TaskRow]:
        """The answers averaged over each task's questions; then over all, as task "all"."""
        ways: dict[tuple[str, str, int | None], list[TaskAnswer]] = {}
        for answer in self.answers:
            for task in (answer.task, "all"):
                ways.setdefault((task, answer.policy, answer.budget), []).append(answer)
        ordered = sorted(ways.items(), key=lambda way: way[0][0] == "all")
        return [_row(*way, those) for way, those in ordered]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        rows, answers = self.rows(), [asdict(answer) for answer in self.answers]
        return {**vars(self), "rows": [asdict(row) for row in rows], "answers": answers}


def check_tasks(names: Sequence[str]) -> None:
    """Raise `EvaluationError` for a task that does not exist."""
    for name in names:
        if name not in TASKS:
            raise EvaluationError(f"--tasks {name}: expected some of {', '.join(TASKS)}")


def run_tasks(
    model: LanguageModel,
    names: Sequence[str],
    variants: Sequence[Variant],
    budgets: Sequence[int],
    *,
    length: int,
    repeats: int,
    seed: int = 0,
    advance: Callable[[int], object] = nothing,
) -> TaskResult:
    """Ask `repeats` questions of each task, at depths spread over documents of `length` tokens.

    `advance` is called with 1 after each question in each way. Raises `EvaluationError` for an
    unknown task or a length that does not fit, `OptionError` for a budget that a policy cannot
    have.
    """
    check_tasks(names)
    check_budgets(variants, budgets)
    ways = _Ways(model, variants, budgets)
    answers = []
    with unlimited_recompiles():
        for question in make_questions(model, names, length, repeats, seed):
            answers += ways.ask(question, advance)
    configs = {v.label: describe(v.backend_options(max(budgets))) for v in variants}
    return TaskResult(model.name, length, configs, answers)


def make_questions(
    model: LanguageModel, names: Sequence[str], length: int, repeats: int, seed: int = 0
) -> list[Question]:
    """`repeats` questions of each task, at depths spread over documents of `length` tokens.

    Raises `EvaluationError` for a length that does not fit.
    """
    longest = model.longest
    if length < SHORTEST or (longest is not None and length > longest):
        bound = "" if longest is None else f" and at most {longest:,}, what the model was made for"
        raise EvaluationError(f"--length {length}: expected at least {SHORTEST} tokens{bound}")

    def count(texts: Sequence[str]) -> list[int]:
        encoded = model.tokenizer(list(texts), add_special_tokens=False).input_ids
        return [len(ids) for ids in encoded]

    fillers: dict[str, Filler] = {}
    asked = []
    for name, number in itertools.product(names, range(repeats)):
        kind = TASKS[name][0]
        if kind not in fillers:
            fillers[kind] = Filler(kind, count)
        chance = random.Random(f"{seed} {name} {number}")
        depth = (number + 0.5) / repeats
        asked.append(make_question(name, fillers[kind], length - RESERVED, depth, count, chance))
    return asked


class _Ways:
    """A model under every policy at every budget, compiled when it is first asked."""

    def __init__(
        self, model: LanguageModel, variants: Sequence[Variant], budgets: Sequence[int]
    ) -> None:
        self._model = model
        self._ways = list(itertools.product(variants, budgets))
        self._compiled: dict[tuple[str, int], tuple[Callable[..., Any], Any]] = {}

    def ask(self, question: Question, advance: Callable[[int], object]) -> list[TaskAnswer]:
        """The answers of dense attention and of every way to a question."""
        encoded = encode(question, self._model)
        cache = prefill(self._model.model, encoded.document)
        dense = read_densely(self._model, cache, encoded)
        tokens = len(encoded.document)
        answers = [self._answer(question, DENSE, None, tokens, dense, dense)]
        advance(1)
        for variant, budget in self._ways:
            forward, config = self._compiled_for(variant, budget)
            own = cache
            if config.prefill == "sparse":
                own = prefill_at_once(forward, self._model.model, encoded.document)
            reading = read_sparsely(forward, self._model, own, encoded, config)
            answers.append(self._answer(question, variant.label, budget, tokens, reading, dense))
            advance(1)
        return answers

    def _compiled_for(self, variant: Variant, budget: int) -> tuple[Callable[..., Any], Any]:
        key = (variant.label, budget)
        if key not in self._compiled:
            # The index is found by its options: they must be those of the compiled model.
            reference = self._model.device.type != "cpu"
            table = self._model.boundaries
            options = variant.backend_options(budget, tokenizer=table, reference=reference)
            self._compiled[key] = compiled(self._model.model, options), options.index_config()
        return self._compiled[key]

    def _answer(
        self,
        question: Question,
        policy: str,
        budget: int | None,
        document_tokens: int,
        reading: Reading,
        dense: Reading,
    ) -> TaskAnswer:
        return TaskAnswer(
            task=question.task,
            policy=policy,
            budget=budget,
            depth=question.depth,
            document_tokens=document_tokens,
            expected=question.answer,
            predicted=self._model.tokenizer.decode(reading.predicted.tolist()),
            exact=reading.exact,
            log_likelihood=reading.log_likelihood,
            agreement=reading.agreement(dense),
            divergence=reading.divergence(dense),
        )


def _row(task: str, policy: str, budget: int | None, answers: Sequence[TaskAnswer]) -> TaskRow:
    return TaskRow(
        task,
        policy,
        budget,
        questions=len(answers),
        exact=fmean(answer.exact for answer in answers),
        log_likelihood=fmean(answer.log_likelihood for answer in answers),
        agreement=fmean(answer.agreement for answer in answers),
        divergence=fmean(answer.divergence for answer in answers),
    )
