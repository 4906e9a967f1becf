"""Answers to a question about a document that is read once, through `generate()`."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import CompileConfig, LogitsProcessor, StaticCache
from transformers.generation.streamers import BaseStreamer

import lychee_compile
from examples.long_document.prompt import Prompt
from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.recorder import Call

Advance = Callable[[], object]
Stage = Callable[[str, int], AbstractContextManager[Advance]]
"""Function that opens a progress bar, given its description and number of parts."""
PREFILL_TOKENS = 512
"""Number of tokens in one pass; more are no faster on a CPU, and show no progress."""
WARM_UP_TOKENS = 4
"""Number of tokens of the answer that compiles every graph."""


@dataclass(frozen=True)
class Run:
    """Result of one `generate()`."""

    answer: list[int]
    """Token ids of the answer."""
    seconds: list[float]
    """Time of each compiled decode step: first the question's tokens, then the answer's."""


@dataclass(frozen=True)
class Measured:
    """Answer and the time it took."""

    answer: list[int]
    """Token ids of the answer."""
    seconds_per_token: float
    """Median over decode steps, as other work of the machine prolongs some of them."""
    steps: int
    """Number of those decode steps."""


@dataclass(frozen=True)
class Recording:
    """Record of what each decode step of an answer read."""

    prompt: Prompt
    answer: list[int]
    """Token ids of the answer."""
    steps: list[list[Call]]
    """The sparse attentions of each step, in the order of the layers."""

    @property
    def decoded(self) -> list[int]:
        """Token that each step decodes: the question's, then all of the answer but its last."""
        return [*self.prompt.question[0].tolist(), *self.answer[:-1]]

    @property
    def tokens(self) -> list[int]:
        """Token ids in the cache at the end."""
        return [*self.prompt.document[0].tolist(), *self.decoded]


class Forced(LogitsProcessor):
    """Logits processor that makes greedy decoding choose the tokens `forced` [1, N] first."""

    def __init__(self, prompt_length: int, forced: torch.Tensor) -> None:
        self.prompt_length = prompt_length
        self.forced = forced

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores, float [1, vocabulary], that allow the next forced token alone."""
        step = input_ids.shape[1] - self.prompt_length
        if step >= self.forced.shape[1]:
            return scores
        return torch.full_like(scores, -torch.inf).index_fill_(1, self.forced[:, step], 0.0)


class _Stopwatch(BaseStreamer):
    """Streamer that keeps the time at which each token came."""

    def __init__(self, advance: Advance) -> None:
        self.ticks: list[float] = []
        self._advance = advance
        self._started = False

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 - how a streamer is called
        if self._started:
            self.ticks.append(time.perf_counter())
            self._advance()
        self._started = True  # the first call has the prompt

    def end(self) -> None:
        """Do nothing, as no token is held back."""


def compiled_with(backend: str, **settings: Any) -> CompileConfig:
    """Return the `compile_config` for `generate()`."""
    config = CompileConfig(backend=backend, fullgraph=False, dynamic=None, **settings)
    # Without this generate() compiles on accelerators alone.
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


class Answerer:
    """Model that has read a document and answers a question about it any number of times."""

    def __init__(self, model: Any, prompt: Prompt, new_tokens: int, stage: Stage) -> None:
        """Read all of the document but its last token, densely, into a static cache."""
        self._model = model
        self._prompt = prompt
        self._new_tokens = new_tokens
        self._stage = stage
        room = prompt.document.shape[1] + prompt.question.shape[1] + new_tokens
        self._cache = StaticCache(config=model.config, max_cache_len=room)
        self._argument = cache_argument(model)
        parts = prompt.document[:, :-1].split(PREFILL_TOKENS, dim=1)
        with torch.no_grad(), stage("Reading the document (eager prefill)", len(parts)) as advance:
            for part in parts:
                model(part, **{self._argument: self._cache}, logits_to_keep=1)
                advance()

    def measure(self, name: str, config: CompileConfig) -> Measured:
        """Answer twice and measure the second time, when everything is compiled."""
        self.answer(f"{name}: compiling", config, WARM_UP_TOKENS)
        run = self.answer(f"{name}: answering", config)
        return Measured(run.answer, statistics.median(run.seconds), len(run.seconds))

    def record(self, name: str, config: CompileConfig) -> Recording:
        """Answer once more and record what is read, which takes longer."""
        with lychee_compile.record(mass=True) as recorder:
            run = self.answer(f"{name}: answering under the recorder", config)
        return Recording(self._prompt, run.answer, decode_steps(recorder.calls))

    def answer(self, label: str, config: CompileConfig, new_tokens: int | None = None) -> Run:
        """Answer greedily, in `new_tokens` tokens at most.

        `generate()` runs a prompt eagerly and compiles single steps alone. Therefore the question
        is no part of the prompt: it is forced token by token. Each of its tokens, like each token
        of the answer, attends to the document in a compiled decode step.
        """
        document, question = self._prompt.document, self._prompt.question
        new_tokens = self._new_tokens if new_tokens is None else min(new_tokens, self._new_tokens)
        steps = question.shape[1] + new_tokens
        with self._stage(label, steps) as advance:
            stopwatch = _Stopwatch(advance)
            output = self._model.generate(
                document,
                attention_mask=torch.ones_like(document),
                **{self._argument: copy.deepcopy(self._cache)},
                logits_processor=[Forced(document.shape[1], question)],
                streamer=stopwatch,
                compile_config=config,
                max_new_tokens=steps,
                do_sample=False,
            )
        # The first tick follows the document's last token, whose step is eager.
        ticks = stopwatch.ticks
        seconds = [after - before for before, after in pairwise(ticks)]
        return Run(output[0, document.shape[1] + question.shape[1] :].tolist(), seconds)


def decode_steps(calls: Sequence[Call]) -> list[list[Call]]:
    """Return the recorder's calls by decode step: a step begins when a site occurs again."""
    steps: list[list[Call]] = []
    seen: set[str] = set()
    for call in calls:
        if not steps or call.site in seen:
            steps.append([])
            seen.clear()
        steps[-1].append(call)
        seen.add(call.site)
    return steps
