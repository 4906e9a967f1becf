"""Do answers through `generate()` equal those of the evaluation harness?

    python -m benchmarks.quality.generate_tasks [--length 5950] [--repeats 5] [--budget 1024]
        [--tasks pass-key json-lookup function-lookup] [--model DIR] [--device cuda]

A real model reads each document densely. Question and answer are then decoded sparsely over it:
token by token, as `python -m lychee_compile evaluate tasks` does it, and by `generate()` over a
static cache, which is made to choose the question's tokens first and then chooses freely. Both must
choose the same, up to the first token that the harness gets wrong, as it is told the right one.
The harness uses plain PyTorch operators; on a GPU `generate()` uses them once, and once kernels.
Gemma-3-270M unless --model names another, in float32. Exits 1 where an answer differs.
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
from transformers import CompileConfig, StaticCache

from benchmarks.decode.records import device_name
from lychee_compile.evaluate.models import LanguageModel, compiled, load, prefill
from lychee_compile.evaluate.reading import Encoded, Reading, encode, read_densely, read_sparsely
from lychee_compile.evaluate.tasks import TASKS, make_questions
from lychee_compile.options import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import gemma
from long_document_run import Forced

PREFILL_TOKENS = 512


@torch.no_grad()
def generated(model: LanguageModel, encoded: Encoded, options: dict[str, Any]) -> Tensor:
    """The answer, int64 [A], of `generate()` over a cache that was filled densely."""
    document, question = encoded.document[None], encoded.question[None]
    room = document.shape[1] + question.shape[1] + len(encoded.answer) + 1
    cache = StaticCache(model.model.config, max_cache_len=room)
    for part in document[:, :-1].to(model.device).split(PREFILL_TOKENS, dim=1):
        model.model(part, past_key_values=cache, logits_to_keep=1)
    config = CompileConfig(backend="lychee", mode=None, options=options)
    config._compile_all_devices = True
    output = model.model.generate(
        document.to(model.device),
        attention_mask=torch.ones_like(document, device=model.device),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=question.shape[1] + len(encoded.answer),
        min_new_tokens=question.shape[1] + len(encoded.answer),
        logits_processor=[Forced(document.shape[1], question.to(model.device))],
        compile_config=config,
    )
    return output[0, document.shape[1] + question.shape[1] :].cpu()


def agree(free: Tensor, reading: Reading) -> bool:
    """Whether both choose the same tokens until the harness is put right for the first time."""
    wrong = (reading.predicted != reading.expected).nonzero()
    upto = int(wrong[0]) + 1 if len(wrong) else len(reading.expected)
    return torch.equal(free[:upto], reading.predicted[:upto])


def main() -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--length", type=int, default=5950)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    usual = ["pass-key", "json-lookup", "function-lookup"]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=usual)
    chosen = parser.parse_args()
    model = load(str(chosen.model or gemma.converted()), chosen.device, "float32")
    options = {"budget": chosen.budget, "tokenizer": model.boundaries}
    forward, config = compiled(model.model, options), Options.parse(None, options).index_config()
    ways = {"generate(), sparse": options}
    if chosen.device == "cuda":
        plain = {"generate(), plain operators": options | {"reference": True}}
        ways = plain | {"generate(), kernels": options}
    found: dict[str, list[list[bool]]] = {name: [] for name in chosen.tasks}
    questions = make_questions(model, chosen.tasks, chosen.length, chosen.repeats)
    console, same = Console(highlight=False), True
    for question in track(questions, "Questions", console=console):
        encoded = encode(question, model)
        cache = prefill(model.model, encoded.document)
        dense = read_densely(model, cache, encoded)
        sparse = read_sparsely(forward, model, cache, encoded, config)
        seen = [dense.exact, sparse.exact]
        for given in ways.values():
            free = generated(model, encoded, given)
            seen += [torch.equal(free, encoded.answer), agree(free, sparse)]
            same = same and seen[-1]
        found[question.task].append(seen)
        console.print(question.task, repr(model.tokenizer.decode(free)), seen)
    columns = [name for way in ways for name in (way, "as the harness")]
    title = f"{chosen.length} tokens, budget {chosen.budget}, {device_name(model.device)}"
    table = Table("task", "dense", "harness, sparse", *columns, title=title)
    for task, answers in found.items():
        sums = (sum(column) for column in zip(*answers, strict=True))
        table.add_row(task, *(f"{each} of {len(answers)}" for each in sums))
    console.print(table)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
