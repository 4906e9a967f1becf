"""Answers that a model finds in a long document while it reads sparsely.

The document is prefilled densely, once. Question and answer are then decoded token by token over
it, by dense attention and by every policy at every budget. If the question were part of the dense
prefill, the answer would already be in the cache. A variant with `prefill=sparse` reads the
document sparsely as well, in a pass of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch

from lychee_compile.evaluate.models import (
    LanguageModel,
    nothing,
    prefill,
    prefill_at_once,
)
from lychee_compile.evaluate.reading import (
    Reading,
    answer_densely,
    answer_sparsely,
    encode,
    found_share,
    read_densely,
    read_sparsely,
)
from lychee_compile.evaluate.task_questions import check_tasks, make_questions
from lychee_compile.evaluate.task_texts import Question
from lychee_compile.evaluate.variants import Variant, check_budgets, describe
from lychee_compile.torch_private import unlimited_recompiles

DENSE = "dense"


@dataclass(frozen=True)
class TaskAnswer:
    """Answer to one question under one policy and budget."""

    task: str
    policy: str
    budget: int | None
    depth: float
    document_tokens: int
    expected: str
    predicted: str
    """Text of the likeliest token at each position of the expected answer; of a task after RULER
    the text that greedy decoding gives."""
    exact: bool
    """True if greedy decoding gives the expected answer."""
    found: float
    """Share of the expected strings that greedy decoding gives, 0 to 1."""
    log_likelihood: float
    """Log-likelihood of the expected answer."""
    agreement: float
    """Share of the answer's tokens for which dense attention predicts the same."""
    divergence: float
    """Mean Kullback-Leibler divergence from dense attention over question and answer, in nats."""


@dataclass(frozen=True)
class TaskRow:
    """Averages over all questions of one task under one policy and budget."""

    task: str
    policy: str
    budget: int | None
    questions: int
    exact: float
    found: float
    log_likelihood: float
    agreement: float
    divergence: float


@dataclass(frozen=True)
class TaskResult:
    """Answers of dense attention and of every policy at every budget."""

    model: str
    length: int
    """Largest number of tokens of a document."""
    configs: dict[str, dict[str, Any]]
    """Options of each policy."""
    answers: list[TaskAnswer]

    def rows(self) -> list[TaskRow]:
        """Return averages over each task's questions, then over all questions as task "all"."""
        ways: dict[tuple[str, str, int | None], list[TaskAnswer]] = {}
        for answer in self.answers:
            for task in (answer.task, "all"):
                ways.setdefault((task, answer.policy, answer.budget), []).append(answer)
        ordered = sorted(ways.items(), key=lambda way: way[0][0] == "all")
        return [_row(*way, those) for way, those in ordered]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON."""
        rows, answers = self.rows(), [asdict(answer) for answer in self.answers]
        return {**vars(self), "rows": [asdict(row) for row in rows], "answers": answers}


def run_tasks(
    model: LanguageModel,
    names: Sequence[str],
    variants: Sequence[Variant],
    budgets: Sequence[int],
    *,
    length: int,
    repeats: int,
    seed: int = 0,
    kernels: bool = False,
    advance: Callable[[int], object] = nothing,
) -> TaskResult:
    """Ask `repeats` questions of each task, at depths spread over documents of `length` tokens.

    On a GPU generated kernels decode if `kernels` says so, and the plain PyTorch operators if not.
    `advance` is called with 1 after each answer. Raise `EvaluationError` for an unknown task or a
    length that does not fit, and `OptionError` for a budget that a policy cannot have.
    """
    check_tasks(names)
    check_budgets(variants, budgets)
    ways = _Ways(model, variants, budgets, kernels)
    answers = []
    with unlimited_recompiles():
        for question in make_questions(model, names, length, repeats, seed):
            answers += ways.ask(question, advance)
    configs = {v.label: describe(v.backend_options(max(budgets))) for v in variants}
    return TaskResult(model.name, length, configs, answers)


class _Ways:
    """Model under every policy at every budget, compiled at the first question."""

    def __init__(
        self,
        model: LanguageModel,
        variants: Sequence[Variant],
        budgets: Sequence[int],
        kernels: bool,
    ) -> None:
        self._model = model
        self._reference = model.device.type != "cpu" and not kernels
        self._ways = list(itertools.product(variants, budgets))
        self._compiled: dict[tuple[str, int], tuple[Callable[..., Any], Any]] = {}

    def ask(self, question: Question, advance: Callable[[int], object]) -> list[TaskAnswer]:
        """Return the answers to a question by dense attention and by every policy and budget."""
        encoded = encode(question, self._model)
        cache = prefill(self._model.model, encoded.document)
        dense = read_densely(self._model, cache, encoded)
        tokens = len(encoded.document)
        wanted = question.answers
        said = self._said(
            question, dense, lambda: answer_densely(self._model, cache, encoded, wanted)
        )
        answers = [self._answer(question, DENSE, None, tokens, dense, dense, said)]
        advance(1)
        for variant, budget in self._ways:
            forward, config = self._compiled_for(variant, budget)
            own = cache
            if config.prefill == "sparse":
                own = prefill_at_once(forward, self._model.model, encoded.document)
            reading = read_sparsely(forward, self._model, own, encoded, config)
            asked = forward, self._model, own, encoded, config, wanted
            said = self._said(question, reading, partial(answer_sparsely, *asked))
            way = variant.label, budget
            answers.append(self._answer(question, *way, tokens, reading, dense, said))
            advance(1)
        return answers

    def _said(self, question: Question, reading: Reading, answer: Callable[[], str]) -> str:
        """Return what greedy decoding says: the expected answer if it is exact, or `answer()`.

        Without strings to find in a free answer it is the likeliest tokens of the expected one.
        """
        if not question.answers:
            return self._model.tokenizer.decode(reading.predicted.tolist())
        return question.answer if reading.exact else answer()

    def _compiled_for(self, variant: Variant, budget: int) -> tuple[Callable[..., Any], Any]:
        key = (variant.label, budget)
        if key not in self._compiled:
            # An index is looked up by its options: they have to be those of the compiled model.
            table, reference = self._model.boundaries, self._reference
            options = variant.backend_options(budget, tokenizer=table, reference=reference)
            forward = torch.compile(
                self._model.model, backend="lychee", options=dict(vars(options))
            )
            self._compiled[key] = forward, options.index_config()
        return self._compiled[key]

    def _answer(
        self,
        question: Question,
        policy: str,
        budget: int | None,
        document_tokens: int,
        reading: Reading,
        dense: Reading,
        said: str,
    ) -> TaskAnswer:
        wanted = question.answers
        return TaskAnswer(
            task=question.task,
            policy=policy,
            budget=budget,
            depth=question.depth,
            document_tokens=document_tokens,
            expected=question.answer,
            predicted=said,
            exact=reading.exact,
            found=found_share(said, wanted) if wanted else float(reading.exact),
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
        found=fmean(answer.found for answer in answers),
        log_likelihood=fmean(answer.log_likelihood for answer in answers),
        agreement=fmean(answer.agreement for answer in answers),
        divergence=fmean(answer.divergence for answer in answers),
    )
