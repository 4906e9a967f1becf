"""Does sparse decoding find what dense decoding finds? Pass keys in a long text, by a real model.

    python -m benchmarks.quality.pass_key [--budget 1024] [--positions 10] [--tokens 5950]

Gemma-3-270M reads Python source densely, with a pass key at one of several depths. The question and
the answer are then decoded token by token over that cache: by eager dense attention, and sparsely
through each of the three ways a user has. Prints a table; exits 1 where a way misses a key that
dense attention finds.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    StaticCache,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import gemma
from long_document_run import Forced
from long_document_task import EXPECTED, FACT, QUESTION_FOR_FACT

ANSWER_TOKENS = 6
PREFILL_TOKENS = 512


def document(tokenizer: Any, tokens: int, depth: float) -> torch.Tensor:
    """Ids [1, T] of about `tokens` tokens of source code, with the fact at a share of its depth."""
    text = inspect.getsource(argparse)
    ends = tokenizer(text, return_offsets_mapping=True).offset_mapping
    paragraphs = text[: ends[min(tokens, len(ends) - 1)][1]].split("\n\n")[:-1]
    paragraphs.insert(round(depth * len(paragraphs)), FACT)
    return tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids


def prefill(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    """`cache`, holding all of `ids` but the last token."""
    for part in ids[:, :-1].split(PREFILL_TOKENS, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache


def by_hand(
    forward: Callable[..., Any], ids: torch.Tensor, question: torch.Tensor, cache: Any
) -> list[int]:
    """The answer of a hand-written greedy loop, the question fed token by token."""
    for token in torch.cat((ids[:, -1:], question), 1).split(1, dim=1):
        logits = forward(token, past_key_values=cache).logits
    answer = []
    for _ in range(ANSWER_TOKENS):
        token = logits[:, -1:].argmax(-1)
        answer.append(int(token))
        logits = forward(token, past_key_values=cache).logits
    return answer


def by_generate(
    model: Any, ids: torch.Tensor, question: torch.Tensor, cache: Any, options: dict[str, Any]
) -> list[int]:
    """The answer of `generate()`, which is made to choose the question's tokens first."""
    config = CompileConfig(backend="lychee", mode=None, options=options)
    config._compile_all_devices = True
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=question.shape[1] + ANSWER_TOKENS,
        logits_processor=[Forced(ids.shape[1], question)],
        compile_config=config,
    )
    return output[0, ids.shape[1] + question.shape[1] :].tolist()


@torch.no_grad()
def main() -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--positions", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=5950)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = gemma.converted()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    question = tokenizer(QUESTION_FOR_FACT, add_special_tokens=False, return_tensors="pt").input_ids
    options = {"budget": arguments.budget}
    compiled = torch.compile(model, backend="lychee", options=options)
    ways = ("dense", "generate, static", "compiled model, dynamic", "own loop, static")
    found: dict[str, list[bool]] = {way: [] for way in ways}
    for place in track(range(arguments.positions), "Pass keys"):
        depth = (place + 0.5) / arguments.positions
        ids = document(tokenizer, arguments.tokens, depth)
        static = prefill(
            model, ids, StaticCache(model.config, max_cache_len=arguments.tokens + 300)
        )
        answers = (
            by_hand(model, ids, question, copy.deepcopy(static)),
            by_generate(model, ids, question, copy.deepcopy(static), options),
            by_hand(
                compiled, ids, question, prefill(model, ids, DynamicCache(config=model.config))
            ),
            by_hand(compiled, ids, question, static),
        )
        for way, answer in zip(ways, answers, strict=True):
            found[way].append(EXPECTED in tokenizer.decode(answer))
        print(place, [tokenizer.decode(answer) for answer in answers], flush=True)
    table = Table("way", "found", title=f"{ids.shape[1]} tokens, budget {arguments.budget}")
    for way, hits in found.items():
        table.add_row(way, f"{sum(hits)} of {sum(found['dense'])} that dense finds")
    Console().print(table)
    missed = [
        way
        for way, hits in found.items()
        if any(dense and not hit for dense, hit in zip(found["dense"], hits, strict=True))
    ]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
