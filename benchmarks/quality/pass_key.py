"""Pass keys in a long text that a real model finds, by dense and by sparse decoding.

    python -m benchmarks.quality.pass_key [--budget 1024] [--positions 10] [--tokens 5950]

Gemma-3-270M reads Python source densely, with a pass key at one of several depths. Question and
answer are then decoded token by token over that cache: by eager dense attention, and sparsely in
each of the three ways that a user has. The exit status is 1 if a way misses a key that dense
attention finds.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, StaticCache

from benchmarks.common.lengths import positive, tokens
from examples.long_document import gemma
from examples.long_document import model as models
from examples.long_document.answers import compiled_with
from examples.long_document.task import EXPECTED, FACT, QUESTION_FOR_FACT
from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.evaluate.models import read_on
from lychee_compile.generation.forced import Forced

ANSWER_TOKENS = 6
SPARE_SLOTS = 300
"""Slots of a static cache beyond the text, for the fact, the question and the answer."""
WAYS = ("dense", "generate, static", "compiled model, dynamic", "own loop, static")


def document(tokenizer: Any, length: int, depth: float) -> Tensor:
    """Return ids [1, T] of about `length` tokens of source code, with the fact at `depth`."""
    text = inspect.getsource(argparse)
    ends = tokenizer(text, return_offsets_mapping=True).offset_mapping
    paragraphs = text[: ends[min(length, len(ends) - 1)][1]].split("\n\n")[:-1]
    paragraphs.insert(round(depth * len(paragraphs)), FACT)
    return tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids


class Answerer:
    """Model that answers a question in each of the ways."""

    def __init__(self, model: Any, question: Tensor, budget: int, slots: int) -> None:
        """Compile `model`; `question` are ids, int64 [1, T]; static caches have `slots` slots."""
        self.slots = slots
        self.model, self.question, self.options = model, question, {"budget": budget}
        self.compiled = torch.compile(model, backend="lychee", options=self.options)
        self.argument = cache_argument(model)

    def answers(self, ids: Tensor) -> tuple[list[int], ...]:
        """Return the answers in all `WAYS` about the document `ids` [1, L]."""
        static = StaticCache(self.model.config, max_cache_len=self.slots)
        dynamic = DynamicCache(config=self.model.config)
        for cache in (static, dynamic):
            read_on(self.model, cache, ids[0, :-1])
        return (
            self.by_hand(self.model, ids, copy.deepcopy(static)),
            self.by_generate(ids, copy.deepcopy(static)),
            self.by_hand(self.compiled, ids, dynamic),
            self.by_hand(self.compiled, ids, static),
        )

    def by_hand(self, forward: Callable[..., Any], ids: Tensor, cache: Any) -> list[int]:
        """Return the answer of a greedy loop that decodes the question token by token."""
        cached = {self.argument: cache}
        for token in torch.cat((ids[:, -1:], self.question), 1).split(1, dim=1):
            logits = forward(token, **cached).logits
        answer = []
        for _ in range(ANSWER_TOKENS):
            token = logits[:, -1:].argmax(-1)
            answer.append(int(token))
            logits = forward(token, **cached).logits
        return answer

    def by_generate(self, ids: Tensor, cache: Any) -> list[int]:
        """Return the answer of `generate()`, which is forced to choose the question first."""
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{self.argument: cache},
            do_sample=False,
            max_new_tokens=self.question.shape[1] + ANSWER_TOKENS,
            logits_processor=[Forced(ids.shape[1], self.question[0])],
            compile_config=compiled_with("lychee", mode=None, options=self.options),
        )
        return output[0, ids.shape[1] + self.question.shape[1] :].tolist()


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=tokens, default=1024, help="tokens read per step (1024)")
    parser.add_argument("--positions", type=positive, default=10, help="depths of the key (10)")
    parser.add_argument("--tokens", type=tokens, default=5950, help="tokens of the text (5950)")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    """Run the benchmark and return its exit status."""
    chosen = parse()
    models.quiet()
    folder = gemma.converted()
    _, tokenizer = models.load_tokenizer(folder)
    model = models.load_model(folder)
    question = tokenizer(QUESTION_FOR_FACT, add_special_tokens=False, return_tensors="pt").input_ids
    answerer = Answerer(model, question, chosen.budget, chosen.tokens + SPARE_SLOTS)
    hits: dict[str, list[bool]] = {way: [] for way in WAYS}
    for number in track(range(chosen.positions), "Pass keys"):
        ids = document(tokenizer, chosen.tokens, (number + 0.5) / chosen.positions)
        answers = [tokenizer.decode(answer) for answer in answerer.answers(ids)]
        for way, answer in zip(WAYS, answers, strict=True):
            hits[way].append(EXPECTED in answer)
        print(number, answers, flush=True)
    table = Table("way", "found", title=f"{ids.shape[1]} tokens, budget {chosen.budget}")
    for way, of_way in hits.items():
        table.add_row(way, f"{sum(of_way)} of {sum(hits['dense'])} that dense finds")
    Console().print(table)
    missed = (
        dense and not hit
        for of_way in hits.values()
        for dense, hit in zip(hits["dense"], of_way, strict=True)
    )
    return 1 if any(missed) else 0


if __name__ == "__main__":
    sys.exit(main())
