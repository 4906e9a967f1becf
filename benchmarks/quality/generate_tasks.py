"""Comparison of answers through `generate()` with those of the evaluation harness.

    python -m benchmarks.quality.generate_tasks [--length 5950] [--repeats 5] [--budget 1024]
        [--tasks pass-key json-lookup function-lookup] [--model DIR] [--device cuda]

A real model reads each document densely. Question and answer are then decoded sparsely over it:
token by token, as `python -m lychee_compile evaluate tasks` does, and by `generate()` over a static
cache. `generate()` is forced to choose the question's tokens and then chooses freely. Both have to
choose the same tokens up to the first that the harness gets wrong, after which it is given the
right one. The harness uses plain PyTorch operators; on a GPU `generate()` runs once with them and
once with kernels. The model is Gemma-3-270M unless --model names another, in float32. The exit
status is 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import StaticCache

from benchmarks.common.lengths import positive, tokens
from benchmarks.common.provenance import device_name
from examples.long_document import gemma
from examples.long_document.answers import compiled_with
from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.evaluate.models import LanguageModel, compiled, load, prefill, read_on
from lychee_compile.evaluate.reading import Encoded, Reading, encode, read_densely, read_sparsely
from lychee_compile.evaluate.task_questions import make_questions
from lychee_compile.evaluate.task_texts import TASKS
from lychee_compile.generation.forced import Forced
from lychee_compile.options import Options


@torch.no_grad()
def generated(model: LanguageModel, encoded: Encoded, options: dict[str, Any]) -> Tensor:
    """Return the answer, int64 [A], of `generate()` over a cache that was filled densely."""
    document, question = encoded.document[None], encoded.question[None]
    room = document.shape[1] + question.shape[1] + len(encoded.answer) + 1
    cache = StaticCache(model.model.config, max_cache_len=room)
    read_on(model.model, cache, encoded.document[:-1])
    config = compiled_with("lychee", mode=None, options=options)
    output = model.model.generate(
        document.to(model.device),
        attention_mask=torch.ones_like(document, device=model.device),
        **{cache_argument(model.model): cache},
        do_sample=False,
        max_new_tokens=question.shape[1] + len(encoded.answer),
        min_new_tokens=question.shape[1] + len(encoded.answer),
        logits_processor=[Forced(document.shape[1], question[0].to(model.device))],
        compile_config=config,
    )
    return output[0, document.shape[1] + question.shape[1] :].cpu()


def agree(free: Tensor, reading: Reading) -> bool:
    """True if both choose the same tokens up to the first that the harness gets wrong."""
    wrong = (reading.predicted != reading.expected).nonzero()
    upto = int(wrong[0]) + 1 if len(wrong) else len(reading.expected)
    return torch.equal(free[:upto], reading.predicted[:upto])


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add, tasks = parser.add_argument, ["pass-key", "json-lookup", "function-lookup"]
    add("--model", type=Path, metavar="DIR", help="a model that transformers saved (Gemma-3-270M)")
    add("--length", type=tokens, default=5950, metavar="N", help="tokens of a document (5950)")
    add("--repeats", type=positive, default=5, metavar="N", help="questions of each task (5)")
    add("--budget", type=tokens, default=1024, metavar="N", help="tokens read per step (1024)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--tasks", nargs="+", choices=TASKS, default=tasks)
    return parser.parse_args()


def main() -> int:
    """Run the benchmark and return its exit status."""
    chosen = parse()
    model = load(str(chosen.model or gemma.converted()), chosen.device, "float32")
    options = {"budget": chosen.budget, "tokenizer": model.boundaries}
    forward, config = compiled(model.model, options), Options.parse(None, options).index_config()
    ways = {"generate(), sparse": options}
    if chosen.device == "cuda":
        plain = {"generate(), plain operators": options | {"reference": True}}
        ways = plain | {"generate(), kernels": options}
    results: dict[str, list[list[bool]]] = {name: [] for name in chosen.tasks}
    questions = make_questions(model, chosen.tasks, chosen.length, chosen.repeats)
    console, same = Console(highlight=False), True
    for question in track(questions, "Questions", console=console):
        encoded = encode(question, model)
        cache = prefill(model.model, encoded.document)
        dense = read_densely(model, cache, encoded)
        sparse = read_sparsely(forward, model, cache, encoded, config)
        outcome = [dense.exact, sparse.exact]
        for way_options in ways.values():
            free = generated(model, encoded, way_options)
            outcome += [torch.equal(free, encoded.answer), agree(free, sparse)]
            same = same and outcome[-1]
        results[question.task].append(outcome)
        console.print(question.task, repr(model.tokenizer.decode(free)), outcome)
    columns = [name for way in ways for name in (way, "as the harness")]
    title = f"{chosen.length} tokens, budget {chosen.budget}, {device_name(model.device)}"
    table = Table("task", "dense", "harness, sparse", *columns, title=title)
    for task, answers in results.items():
        sums = (sum(column) for column in zip(*answers, strict=True))
        table.add_row(task, *(f"{each} of {len(answers)}" for each in sums))
    console.print(table)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
