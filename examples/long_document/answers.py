"""Answers to a question about a document that is read once, through `generate()`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

import lychee_compile
from examples.long_document.prompt import Prompt
from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.generation.forced import Forced
from lychee_compile.recorder import Call

Advance = Callable[[], object]
Stage = Callable[[str, int], AbstractContextManager[Advance]]
"""Function that opens a progress bar, given its description and number of parts."""
PREFILL_TOKENS = 1024
"""Number of tokens in one pass; more are no faster on a CPU, and show no progress."""
DENSE_BACKEND = "inductor"
"""Backend that compiles the dense steps."""
WARM_UP_STEPS = 4
"""Number of steps that compile every graph."""


@dataclass(frozen=True)
class Way:
    """A way to decode with `generate()`."""

    name: str
    """Name in the results."""
    new_cache: Callable[..., Any]
    """Class of cache that `generate()` gets; it is called with the configuration and a length."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `generate()`."""
    options: Mapping[str, Any] | None = None
    """Options with which the model is prepared for this package; None if it is not."""

    def prepared(self, model: Any) -> AbstractContextManager[Any]:
        """Return the context in which `generate()` of the model decodes in this way."""
        if self.options is None:
            return nullcontext()
        return lychee_compile.prepare(model, **self.options)

    def without_graphs(self) -> Way:
        """Return the same way without CUDA graphs, whose replays tell nobody what they read."""
        return replace(self, options={**(self.options or {}), "mode": "default"})


def all_ways(options: Mapping[str, Any], device: str) -> list[Way]:
    """Return the dense ways, and as the last one that of this package with its `options`."""
    mode = "reduce-overhead" if device == "cuda" else "default"
    name = f"lychee, budget {options['budget']:,}"
    return [
        Way("transformers as it is", _dynamic, {"disable_compile": True}),
        Way("Inductor, dense", StaticCache, {"compile_config": compiled_with(DENSE_BACKEND, mode)}),
        Way(name, lychee_compile.LycheeCache, options=options),
    ]


def _dynamic(config: Any, _: int) -> DynamicCache:
    return DynamicCache(config=config)


@dataclass(frozen=True)
class Run:
    """Result of one `generate()`."""

    answer: list[int]
    """Token ids of the answer."""
    first_seconds: float
    """Time of the step of the document's last token, at which an index is built."""
    seconds: list[float]
    """Time of each later step: first the question's tokens, then the answer's."""


@dataclass(frozen=True)
class Measured:
    """Answer and the time it took."""

    answer: list[int]
    """Token ids of the answer."""
    compile_seconds: float
    """Time of the first few steps, in which graphs are compiled."""
    first_seconds: float
    """Time of the first step once all is compiled; an index is built in it."""
    seconds_per_token: float
    """Tenth percentile over decode steps, as other work of the machine prolongs many of them."""
    steps: int
    """Number of those decode steps."""


@dataclass(frozen=True)
class Recording:
    """Record of what decode steps of an answer read.

    Steps that read every key, as the first ones do on a GPU, are not recorded.
    """

    prompt: Prompt
    answer: list[int]
    """Token ids of the answer."""
    steps: list[list[Call]]
    """The sparse attentions of each of the last steps, in the order of the layers."""

    @property
    def decoded(self) -> list[int]:
        """Token that each recorded step decodes: the question's, then all of the answer but one."""
        every = self._every
        return every[len(every) - len(self.steps) :]

    @property
    def asked(self) -> int:
        """Number of recorded steps that decode the question."""
        return max(len(self.steps) - len(self.answer) + 1, 0)

    @property
    def tokens(self) -> list[int]:
        """Token ids in the cache at the end."""
        return [*self.prompt.document[0].tolist(), *self._every]

    @property
    def _every(self) -> list[int]:
        """Token of every step, recorded or not."""
        return [*self.prompt.question[0].tolist(), *self.answer[:-1]]


class _Stopwatch(BaseStreamer):
    """Streamer that keeps the time at which each token came."""

    def __init__(self, advance: Advance) -> None:
        self.ticks: list[float] = []
        self._advance = advance

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 - how a streamer is called
        if self.ticks:  # the first call has the prompt
            self._advance()
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing, as no token is held back."""


def compiled_with(backend: str, mode: str | None = None, **settings: Any) -> CompileConfig:
    """Return the `compile_config` for `generate()`."""
    config = CompileConfig(backend=backend, mode=mode, fullgraph=False, dynamic=None, **settings)
    # Without this generate() compiles on accelerators alone.
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


class Answerer:
    """Model that has read a document and answers a question about it any number of times."""

    def __init__(self, model: Any, prompt: Prompt, new_tokens: int, stage: Stage) -> None:
        """Read all of the document but its last token, densely."""
        self._model = model
        self._prompt = prompt
        self._new_tokens = new_tokens
        self._stage = stage
        self._argument = cache_argument(model)
        self._room = prompt.document.shape[1] + prompt.question.shape[1] + new_tokens
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
        # What a sliding window has dropped cannot be copied to a cache of another class.
        self._whole = all(kind == "full_attention" for kind in kinds)
        reads_into = _dynamic if self._whole else StaticCache
        self._cache = reads_into(model.config, self._room)
        parts = prompt.document[:, :-1].split(PREFILL_TOKENS, dim=1)
        with torch.no_grad(), stage("Reading the document", len(parts)) as advance:
            for part in parts:
                model(part, **{self._argument: self._cache}, logits_to_keep=1)
                advance()

    def measure(self, way: Way) -> Measured:
        """Answer twice and measure the second time, when everything is compiled."""
        with way.prepared(self._model):
            started = time.perf_counter()
            self.answer(f"{way.name}: first steps", way, WARM_UP_STEPS)
            compiled = time.perf_counter()
            run = self.answer(f"{way.name}: answering", way)
        seconds = sorted(run.seconds)[len(run.seconds) // 10]
        return Measured(
            run.answer, compiled - started, run.first_seconds, seconds, len(run.seconds)
        )

    def record(self, way: Way) -> Recording:
        """Answer once more and record what is read, which takes longer."""
        with way.prepared(self._model), lychee_compile.record(mass=True) as recorder:
            run = self.answer(f"{way.name}: recording what is read", way)
        # A step before them may have had the document's last token.
        most = self._prompt.question.shape[1] + len(run.answer) - 1
        return Recording(self._prompt, run.answer, decode_steps(recorder.calls)[-most:])

    def answer(self, label: str, way: Way, steps: int | None = None) -> Run:
        """Answer greedily, in at most `steps` steps, those of the question included.

        `generate()` reads a prompt in one piece and densely. Therefore the question is no part of
        the prompt: it is forced token by token. Each of its tokens, like each token of the answer,
        attends to the document in a decode step.
        """
        document, question = self._prompt.document, self._prompt.question
        total = steps or question.shape[1] + self._new_tokens
        with self._stage(label, total) as advance:
            stopwatch = _Stopwatch(advance)
            output = self._model.generate(
                document,
                attention_mask=torch.ones_like(document),
                **{self._argument: self._cache_for(way)},
                logits_processor=[Forced(document.shape[1], question[0])],
                streamer=stopwatch,
                max_new_tokens=total,
                do_sample=False,
                **way.settings,
            )
        first, *seconds = [after - before for before, after in pairwise(stopwatch.ticks)]
        return Run(output[0, document.shape[1] + question.shape[1] :].tolist(), first, seconds)

    def _cache_for(self, way: Way) -> Any:
        """Return a cache of the way's class with the keys and values of the document."""
        if not self._whole:
            return copy.deepcopy(self._cache)
        cache = way.new_cache(self._model.config, self._room)
        for number, layer in enumerate(self._cache.layers):
            cache.update(layer.keys, layer.values, number)
        return cache


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
