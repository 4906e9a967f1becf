"""A document read once, then answers through `generate()` with one backend or another."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from long_document_task import RefusedError, Task
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    LogitsProcessor,
    StaticCache,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import lychee_compile
from lychee_compile.recorder import Call

Advance = Callable[[], object]
Stage = Callable[[str, int], AbstractContextManager[Advance]]
"""A progress bar over so many parts, given its description."""
PREFILL_TOKENS = 512  # in one pass; more are no faster on a CPU, and show no progress
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Prompt:
    """Token ids, int64 [1, tokens] each."""

    document: torch.Tensor
    question: torch.Tensor
    fact: range | None = None
    """Where the planted fact is in `document`."""


@dataclass(frozen=True)
class Run:
    """What one `generate()` did."""

    answer: list[int]
    """Token ids."""
    seconds: list[float]
    """Of each compiled decode step: of the question's tokens, then of the answer's."""


@dataclass(frozen=True)
class Measured:
    """An answer and its times."""

    answer: list[int]
    """Token ids."""
    seconds_per_token: float
    """The median: a step in which the machine was busy with something else tells nothing."""
    steps: int
    """How many decode steps that is the median of."""


@dataclass(frozen=True)
class Recording:
    """What each decode step of an answer read."""

    prompt: Prompt
    answer: list[int]
    """Token ids."""
    steps: list[list[Call]]
    """The sparse attentions of each step, in the order of the layers."""

    @property
    def decoded(self) -> list[int]:
        """The token that each step decodes: the question's, then the answer's but for the last."""
        return [*self.prompt.question[0].tolist(), *self.answer[:-1]]

    @property
    def tokens(self) -> list[int]:
        """All that was in the cache in the end."""
        return [*self.prompt.document[0].tolist(), *self.decoded]


class Forced(LogitsProcessor):
    """Makes greedy decoding "choose" given tokens first."""

    def __init__(self, prompt_length: int, forced: torch.Tensor) -> None:
        self.prompt_length = prompt_length
        self.forced = forced

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores, float [1, vocabulary], that leave the next forced token alone possible."""
        step = input_ids.shape[1] - self.prompt_length
        if step >= self.forced.shape[1]:
            return scores
        return torch.full_like(scores, -torch.inf).index_fill_(1, self.forced[:, step], 0.0)


class _Stopwatch(BaseStreamer):
    """Notes when each token came."""

    def __init__(self, advance: Advance) -> None:
        self.ticks: list[float] = []
        self._advance = advance
        self._started = False

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 - how a streamer is called
        if self._started:
            self.ticks.append(time.perf_counter())
            self._advance()
        self._started = True  # the first call brings the prompt

    def end(self) -> None:
        """Nothing is held back."""


def quiet() -> None:
    """Leave progress bars to us, and keep remarks on models in general from between them."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_tokenizer(folder: Path) -> tuple[Any, Any]:
    """The configuration and the tokenizer of the model in `folder`."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RefusedError(f"--model {folder}: {error}") from error


def load_model(folder: Path) -> Any:
    """The model in `folder`, in float32: what a CPU is fastest at."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise RefusedError(f"--model {folder}: {error}") from error
    return model.eval()


def longest_sequence(config: Any) -> int | None:
    """How many tokens the model was made for, None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def encode(task: Task, tokenizer: Any) -> Prompt:
    """The task's tokens."""

    def ids(text: str, special: bool = True) -> torch.Tensor:
        encoded = tokenizer(text, return_tensors="pt", add_special_tokens=special)
        return torch.as_tensor(encoded.input_ids)

    fact: range | None = None
    if task.fact_start is not None:
        start = ids(task.document[: task.fact_start]).shape[1]
        rest = task.document[task.fact_start :].partition("\n\n")[0]
        fact = range(start, start + ids(rest, special=False).shape[1])
    return Prompt(ids(task.document), ids(task.question, special=False), fact)


def compiled_with(backend: str, **settings: Any) -> CompileConfig:
    """The `compile_config` for `generate()`."""
    config = CompileConfig(backend=backend, fullgraph=False, dynamic=None, **settings)
    # generate() compiles on accelerators alone otherwise.
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


class Answerer:
    """A model that has read a document, and answers a question about it any number of times."""

    def __init__(self, model: Any, prompt: Prompt, new_tokens: int, stage: Stage) -> None:
        """Read the document: dense, eager, into a static cache, all but its last token."""
        self._model = model
        self._prompt = prompt
        self._new_tokens = new_tokens
        self._stage = stage
        room = prompt.document.shape[1] + prompt.question.shape[1] + new_tokens
        self._cache = StaticCache(config=model.config, max_cache_len=room)
        parts = prompt.document[:, :-1].split(PREFILL_TOKENS, dim=1)
        with torch.no_grad(), stage("Reading the document (eager prefill)", len(parts)) as advance:
            for part in parts:
                model(part, past_key_values=self._cache, logits_to_keep=1)
                advance()

    def measure(self, name: str, config: CompileConfig) -> Measured:
        """Answer twice, the second time with everything compiled."""
        self.answer(f"{name}: compiling", config, WARM_UP_TOKENS)
        run = self.answer(f"{name}: answering", config)
        return Measured(run.answer, statistics.median(run.seconds), len(run.seconds))

    def record(self, name: str, config: CompileConfig) -> Recording:
        """Answer once more and record what is read; that takes longer."""
        with lychee_compile.record(mass=True) as recorder:
            run = self.answer(f"{name}: answering under the recorder", config)
        return Recording(self._prompt, run.answer, decode_steps(recorder.calls))

    def answer(self, label: str, config: CompileConfig, new_tokens: int | None = None) -> Run:
        """Answer greedily, in `new_tokens` tokens at most.

        `generate()` computes whatever it is given as a prompt eagerly and compiles single steps
        alone. So the question is no part of the prompt but forced upon it token by token: each of
        its tokens, as each of the answer's, attends to the document in a compiled decode step.
        """
        document, question = self._prompt.document, self._prompt.question
        new_tokens = self._new_tokens if new_tokens is None else min(new_tokens, self._new_tokens)
        steps = question.shape[1] + new_tokens
        with self._stage(label, steps) as advance:
            stopwatch = _Stopwatch(advance)
            output = self._model.generate(
                document,
                attention_mask=torch.ones_like(document),
                past_key_values=copy.deepcopy(self._cache),
                logits_processor=[Forced(document.shape[1], question)],
                streamer=stopwatch,
                compile_config=config,
                max_new_tokens=steps,
                do_sample=False,
            )
        # The first tick follows the document's last token, which makes an eager step.
        ticks = stopwatch.ticks
        seconds = [after - before for before, after in pairwise(ticks)]
        return Run(output[0, document.shape[1] + question.shape[1] :].tolist(), seconds)


def decode_steps(calls: Sequence[Call]) -> list[list[Call]]:
    """The recorder's calls by decode step: a step begins where a site comes again."""
    steps: list[list[Call]] = []
    seen: set[str] = set()
    for call in calls:
        if not steps or call.site in seen:
            steps.append([])
            seen.clear()
        steps[-1].append(call)
        seen.add(call.site)
    return steps
