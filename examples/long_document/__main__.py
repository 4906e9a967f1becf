"""Demo: a question about a long document, answered with dense and with sparse attention.

    python -m examples.long_document
    python -m examples.long_document --document notes.txt --question "Who signed it?" --budget 512

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

import lychee_compile
from examples.long_document import gemma
from examples.long_document.task import (
    RefusedError,
    Task,
    compose,
    first_paragraphs,
    read_document,
    reference_manual,
)
from lychee_compile.options import OptionError, Options

if TYPE_CHECKING:
    from examples.long_document.prompt import Prompt

PROGRAM = "python -m examples.long_document"
DEFAULT_TOKENS = 6000
"""Number of tokens of the default document, planted fact and question included."""
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
    add("--budget", type=int, default=1024, metavar="N", help="tokens read per KV head and step")
    add("--policy", default="lychee", metavar="NAME", help="how the chunks are chosen")
    add("--model", type=Path, metavar="DIR", help="a model that transformers saved")
    add("--new-tokens", type=int, default=48, metavar="N", help="length of the answer")
    picture = Path("long_document_chunks.png")
    add("--output", type=Path, default=picture, metavar="FILE", help="the picture, a PNG")
    return parser.parse_args(arguments)


def check(chosen: argparse.Namespace) -> None:
    """Raise an error for every wrong option that can be told without loading a model."""
    Options(budget=chosen.budget, policy=chosen.policy)
    if chosen.new_tokens < 1:
        raise RefusedError(f"--new-tokens {chosen.new_tokens}: at least 1 is needed")
    if chosen.question is not None and not chosen.question.strip():
        raise RefusedError("--question: nothing in it")
    folder = chosen.output.absolute().parent
    if chosen.output.is_dir() or not os.access(folder, os.W_OK):
        raise RefusedError(f"--output {chosen.output}: not a file in a folder to be written to")
    if chosen.model is not None and not (chosen.model / "config.json").is_file():
        raise RefusedError(f"--model {chosen.model}: no folder with a config.json in it")
    missing = [name for name in ("transformers", "matplotlib") if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise RefusedError(f"{names} not installed: pip install 'lychee_compile[demo]'")
    if chosen.model is None:
        gemma.check()


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
    from examples.long_document.answers import Answerer, compiled_with
    from examples.long_document.prompt import encode

    models.quiet()
    console = view.make_console()
    stage = partial(view.stage, console)
    folder = chosen.model or _gemma_folder(stage)
    with stage("Loading the tokenizer", 2) as advance:
        config, tokenizer = models.load_tokenizer(folder)
        advance()
        table = lychee_compile.boundary_table(tokenizer)
    limit = models.longest_sequence(config)
    task = _task(chosen, document, tokenizer, limit)
    prompt = encode(task, tokenizer)
    _check_length(prompt, chosen, limit)
    view.show_task(console, str(chosen.document or "Python's language reference"), prompt, task)

    with stage("Loading the model", 1):
        model = models.load_model(folder)
    answerer = Answerer(model, prompt, chosen.new_tokens, stage)
    options = {"budget": chosen.budget, "policy": chosen.policy, "tokenizer": table}
    lychee = compiled_with("lychee", mode=None, options=options)
    lychee_compile.reset()
    answers = {
        "Inductor, dense": answerer.measure("Inductor", compiled_with("inductor", mode="default")),
        f"lychee, budget {chosen.budget:,}": answerer.measure("lychee", lychee),
    }
    recording = answerer.record("lychee", lychee)

    view.show_reports(console, lychee_compile.reports())
    view.show_answers(console, tokenizer, answers, task.expected)
    view.show_steps(console, recording, tokenizer)
    view.show_times(console, answers)
    if recording.steps:
        from examples.long_document.picture import draw

        draw(chosen.output, recording, tokenizer, Options(**options))
        console.print(f"Which chunks each step read: {chosen.output}", markup=False)


def _gemma_folder(stage: Any) -> Path:
    """Return the folder of the converted model; the first run converts it."""
    if gemma.cache_folder().is_dir():
        return gemma.cache_folder()
    with stage("Unpacking Gemma-3-270M (the first time)", gemma.STEPS) as advance:
        return gemma.converted(advance)


def _task(
    chosen: argparse.Namespace, document: str | None, tokenizer: Any, limit: int | None
) -> Task:
    if document is None:
        most = DEFAULT_TOKENS if limit is None else min(DEFAULT_TOKENS, limit - chosen.new_tokens)
        document = first_paragraphs(reference_manual(), tokenizer, most - TOKENS_TO_ASK)
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
