"""Demo: a question about a long document, answered with dense and with sparse attention.

    python -m examples.long_document
    python -m examples.long_document --gemma --document notes.txt --question "Who signed it?"

Without --gemma or --model the model is one that only looks things up, and is made on the spot. With
them it is Gemma-3-270M from its package-index wheels, or any causal language model that
transformers saved. It runs on a GPU if there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import lychee_compile
from examples.long_document import gemma
from examples.long_document.task import (
    RefusedError,
    Task,
    compose,
    first_paragraphs,
    read_document,
    reference_manual,
    with_others,
)
from lychee_compile.options import OptionError, Options

if TYPE_CHECKING:
    from examples.long_document.answers import Answerer, Measured, Way
    from examples.long_document.model import Source
    from examples.long_document.prompt import Prompt

PROGRAM = "python -m examples.long_document"
LANGUAGE_TOKENS = 6000
"""Number of tokens of the default document for a language model, which is slow on a CPU."""
LOOKUP_TOKENS = {"cpu": 24_000, "cuda": 120_000}
"""Number of tokens of the default document for the model of the demo, by device."""
LANGUAGE_BUDGET, LOOKUP_BUDGET = 1024, 256
"""Number of tokens that a step reads, for a language model and for the model of the demo."""
SHORTEST = 1000
"""Least number of tokens of the default document."""
TOKENS_TO_ASK = 60
"""Number of tokens kept free for the planted fact and the question."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse in one line, without the usage."""
        raise RefusedError(message)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line. Raise `RefusedError` if it is wrong."""
    parser = _Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--document", type=Path, metavar="FILE", help="UTF-8 text (default: Python's reference)")
    add("--question", metavar="TEXT", help="(default: a fact is planted in the middle, asked for)")
    add("--tokens", type=int, metavar="N", help="length of the default document")
    add("--budget", type=int, metavar="N", help="tokens read per KV head and step (256 or 1024)")
    add("--policy", default="lychee", metavar="NAME", help="how the tokens are chosen")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gemma", action="store_true", help="let Gemma-3-270M answer")
    which.add_argument("--model", type=Path, metavar="DIR", help="a model that transformers saved")
    add("--new-tokens", type=int, default=32, metavar="N", help="length of the answer")
    picture = Path("long_document_chunks.png")
    add("--output", type=Path, default=picture, metavar="FILE", help="the picture, a PNG")
    chosen = parser.parse_args(arguments)
    if chosen.budget is None:
        chosen.budget = LANGUAGE_BUDGET if chosen.gemma or chosen.model else LOOKUP_BUDGET
    return chosen


def check(chosen: argparse.Namespace) -> None:
    """Raise an error for every wrong option that can be told without loading a model."""
    Options(budget=chosen.budget, policy=chosen.policy)
    _check_at_least("--new-tokens", chosen.new_tokens, 1)
    _check_at_least("--tokens", chosen.tokens, SHORTEST)
    _check_question(chosen)
    folder = chosen.output.absolute().parent
    if chosen.output.is_dir() or not os.access(folder, os.W_OK):
        raise RefusedError(f"--output {chosen.output}: not a file in a folder to be written to")
    if chosen.model is not None and not (chosen.model / "config.json").is_file():
        raise RefusedError(f"--model {chosen.model}: no folder with a config.json in it")
    missing = [name for name in ("transformers", "matplotlib") if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise RefusedError(f"{names} not installed: pip install 'lychee_compile[demo]'")
    if chosen.gemma:
        gemma.check()


def _check_at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise RefusedError(f"{option} {value}: at least {least} is needed")


def _check_question(chosen: argparse.Namespace) -> None:
    if chosen.question is None:
        return
    if not chosen.question.strip():
        raise RefusedError("--question: nothing in it")
    if not (chosen.gemma or chosen.model):
        raise RefusedError("--question: the demo's own model knows no language: add --gemma")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    try:
        chosen = parse(arguments)
        document = None if chosen.document is None else read_document(chosen.document)
        check(chosen)
        demonstrate(chosen, document)
    except (RefusedError, OptionError, gemma.ModelUnavailableError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def demonstrate(chosen: argparse.Namespace, document: str | None) -> None:
    """Answer densely and sparsely, once more under the recorder, and show the results."""
    # These import transformers, which takes seconds: not before the options are checked.
    from examples.long_document import model as models
    from examples.long_document import view
    from examples.long_document.answers import Answerer, all_ways
    from examples.long_document.prompt import encode

    started = time.perf_counter()
    models.quiet()
    console = view.make_console()
    stage = partial(view.stage, console)
    device = models.device()
    source = _source(chosen, stage)
    limit = models.longest_sequence(source.config)
    task = _task(chosen, document, source, limit)
    prompt = encode(task, source.tokenizer)
    _check_length(prompt, chosen, limit)
    view.show_task(console, str(chosen.document or "Python's language reference"), prompt, task)
    view.show_model(console, source.name, device)
    with stage("Loading the model", 1):
        model = source.load().to(device)
    answerer = Answerer(model, prompt.to(device), chosen.new_tokens, stage)
    table = lychee_compile.boundary_table(source.tokenizer)
    options = {"budget": chosen.budget, "policy": chosen.policy, "tokenizer": table}
    ways = all_ways(options, device)
    lychee_compile.reset()
    answers = {way.name: answerer.measure(way) for way in ways}
    _show(chosen, answerer, ways[-1], answers, task, source.tokenizer)
    console.print(f"All of it took {time.perf_counter() - started:.0f} s.")


def _show(
    chosen: argparse.Namespace,
    answerer: Answerer,
    way: Way,
    answers: dict[str, Measured],
    task: Task,
    tokenizer: Any,
) -> None:
    """Show what was found, what each step read, the answers, and the times."""
    from examples.long_document import view

    console = view.make_console()
    recording = answerer.record(way.without_graphs())
    view.show_reports(console, lychee_compile.reports())
    view.show_steps(console, recording, tokenizer)
    view.show_answers(console, tokenizer, answers, task.expected)
    view.show_times(console, answers, recording)
    if recording.steps:
        from examples.long_document.picture import draw

        draw(chosen.output, recording, tokenizer, Options(**(way.options or {})))
        console.print(f"Where in the document each step read: {chosen.output}", markup=False)


def _source(chosen: argparse.Namespace, stage: Any) -> Source:
    from examples.long_document import model as models

    with stage("Loading the tokenizer", 1) as advance:
        if chosen.model is not None:
            source = models.saved(chosen.model)
        elif chosen.gemma:
            source = models.gemma_270m()
        else:
            source = models.made_here()
        advance()
    return source


def _task(
    chosen: argparse.Namespace, document: str | None, source: Source, limit: int | None
) -> Task:
    from examples.long_document import model as models

    language = chosen.gemma or chosen.model is not None
    if document is None:
        wished = LANGUAGE_TOKENS if language else LOOKUP_TOKENS[models.device()]
        most = chosen.tokens or wished
        most = most if limit is None else min(most, limit - chosen.new_tokens)
        document = first_paragraphs(reference_manual(), source.tokenizer, most - TOKENS_TO_ASK)
        document = document if language else with_others(document)
    return compose(document, chosen.question)


def _check_length(prompt: Prompt, chosen: argparse.Namespace, limit: int | None) -> None:
    document = prompt.document.shape[1]
    needed = document + prompt.question.shape[1] + chosen.new_tokens
    if limit is not None and needed > limit:
        raise RefusedError(
            f"the document has {document:,} tokens, {needed:,} with question and answer, "
            f"and the model takes {limit:,}"
        )


if __name__ == "__main__":
    sys.exit(main())
