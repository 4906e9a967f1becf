"""A question about a long document, answered with dense and with chunk-sparse attention.

    python examples/long_document.py
    python examples/long_document.py --document notes.txt --question "Who signed it?" --budget 512

The model is Gemma-3-270M from its package-index wheels, or any causal language model that
transformers saved (--model DIR); everything runs on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import gemma
from long_document_task import (
    RefusedError,
    Task,
    compose,
    first_paragraphs,
    read_document,
    reference_manual,
)

import lychee_compile
from lychee_compile.options import OptionError, Options

if TYPE_CHECKING:
    from long_document_run import Prompt

PROGRAM = "long_document.py"
DEFAULT_TOKENS = 6000  # of the default document, with what is planted and asked
TOKENS_TO_ASK = 60


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse in one line, without the usage."""
        raise RefusedError(message)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `RefusedError` where it is wrong."""
    parser = _Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--document", type=Path, metavar="FILE", help="UTF-8 text (default: Python's reference)")
    add("--question", metavar="TEXT", help="(default: a fact is planted in the middle, asked for)")
    add("--budget", type=int, default=1024, metavar="N", help="tokens read per KV head and step")
    add("--policy", default="lychee", metavar="NAME", help="how the chunks are chosen")
    add("--model", type=Path, metavar="DIR", help="a model that transformers saved")
    add("--new-tokens", type=int, default=48, metavar="N", help="length of the answer")
    picture = Path("long_document_chunks.png")
    add("--output", type=Path, default=picture, metavar="FILE", help="the picture, a PNG")
    return parser.parse_args(arguments)


def check(given: argparse.Namespace) -> None:
    """Raise for whatever is wrong that can be told at once."""
    Options(budget=given.budget, policy=given.policy)
    if given.new_tokens < 1:
        raise RefusedError(f"--new-tokens {given.new_tokens}: at least 1 is needed")
    if given.question is not None and not given.question.strip():
        raise RefusedError("--question: nothing in it")
    folder = given.output.absolute().parent
    if given.output.is_dir() or not os.access(folder, os.W_OK):
        raise RefusedError(f"--output {given.output}: not a file in a folder to be written to")
    if given.model is not None and not (given.model / "config.json").is_file():
        raise RefusedError(f"--model {given.model}: no folder with a config.json in it")
    missing = [name for name in ("transformers", "matplotlib") if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise RefusedError(f"{names} not installed: pip install 'lychee_compile[demo]'")
    if given.model is None:
        gemma.check()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    try:
        given = parse(arguments)
        document = None if given.document is None else read_document(given.document)
        check(given)
        demonstrate(given, document)
    except (RefusedError, OptionError, gemma.ModelUnavailableError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def demonstrate(given: argparse.Namespace, document: str | None) -> None:
    """Answer densely and sparsely, once more under the recorder, and show what happened."""
    # These import transformers: not before the command line is known to be right.
    import long_document_run as run
    import long_document_view as view

    run.quiet()
    console = view.make_console()
    stage = partial(view.stage, console)
    folder = given.model or _gemma_folder(stage)
    with stage("Loading the tokenizer", 2) as advance:
        config, tokenizer = run.load_tokenizer(folder)
        advance()
        table = lychee_compile.boundary_table(tokenizer)
    limit = run.longest_sequence(config)
    task = _task(given, document, tokenizer, limit)
    prompt = run.encode(task, tokenizer)
    _check_length(prompt, given, limit)
    view.show_task(console, str(given.document or "Python's language reference"), prompt, task)

    with stage("Loading the model", 1):
        model = run.load_model(folder)
    answerer = run.Answerer(model, prompt, given.new_tokens, stage)
    options = {"budget": given.budget, "policy": given.policy, "tokenizer": table}
    lychee = run.compiled_with("lychee", mode=None, options=options)
    lychee_compile.reset()
    answers = {
        "Inductor, dense": answerer.measure(
            "Inductor", run.compiled_with("inductor", mode="default")
        ),
        f"lychee, budget {given.budget:,}": answerer.measure("lychee", lychee),
    }
    recording = answerer.record("lychee", lychee)

    view.show_reports(console, lychee_compile.reports())
    view.show_answers(console, tokenizer, answers, task.expected)
    view.show_steps(console, recording, tokenizer)
    view.show_times(console, answers)
    if recording.steps:
        from long_document_picture import draw

        draw(given.output, recording, tokenizer, Options(**options))
        console.print(f"Which chunks each step read: {given.output}", markup=False)


def _gemma_folder(stage: Any) -> Path:
    """The converted model; the first run makes it."""
    if gemma.cache_folder().is_dir():
        return gemma.cache_folder()
    with stage("Unpacking Gemma-3-270M (the first time)", gemma.STEPS) as advance:
        return gemma.converted(advance)


def _task(
    given: argparse.Namespace, document: str | None, tokenizer: Any, limit: int | None
) -> Task:
    if document is None:
        most = DEFAULT_TOKENS if limit is None else min(DEFAULT_TOKENS, limit - given.new_tokens)
        document = first_paragraphs(reference_manual(), tokenizer, most - TOKENS_TO_ASK)
    return compose(document, given.question)


def _check_length(prompt: Prompt, given: argparse.Namespace, limit: int | None) -> None:
    document = prompt.document.shape[1]
    needed = document + prompt.question.shape[1] + given.new_tokens
    if limit is not None and needed > limit:
        raise RefusedError(
            f"the document has {document:,} tokens, {needed:,} with question and answer, "
            f"and the model takes {limit:,}"
        )


if __name__ == "__main__":
    sys.exit(main())
