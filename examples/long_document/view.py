"""Terminal output of the demo."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from examples.long_document.answers import Measured, Recording
from examples.long_document.prompt import Prompt
from examples.long_document.task import Task
from lychee_compile.recorder import Call
from lychee_compile.report.report import Report


def make_console() -> Console:
    """Return a console as wide as the terminal; 120 columns if the output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@contextmanager
def stage(console: Console, description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar, and yield a function to call for each of `total` parts."""
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield partial(progress.advance, task)
        progress.update(task, completed=total)


def show_task(console: Console, source: str, prompt: Prompt, task: Task) -> None:
    """Print the document's length, the planted fact and the question."""
    length = prompt.document.shape[1]
    console.print(f"Document: {source}, {length:,} tokens", markup=False)
    if prompt.fact is not None:
        where = f"tokens {prompt.fact.start:,} to {prompt.fact.stop - 1:,}"
        console.print(f"Planted: a fact in the middle, {where}")
    console.print(f"Asked: {' '.join(task.question.split())} ...\n", markup=False)


def show_model(console: Console, name: str, device: str) -> None:
    """Print which model answers, on which device, and what decodes sparsely there."""
    console.print(f"Model: {name}", markup=False)
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}; sparse steps run generated Triton kernels"
    else:
        where = f"CPU, {torch.get_num_threads()} threads; sparse steps run PyTorch operators"
    console.print(f"Device: {where}\n", markup=False)


def show_reports(console: Console, reports: Sequence[Report]) -> None:
    """Print the decision on each attention; graphs compiled alike are shown once."""
    _heading(console, "What lychee_compile found")
    tables = {str(report): report for report in reports}
    for report in tables.values():
        console.print(report)
    console.print(f"Graphs compiled: {len(reports)}\n")


def show_answers(
    console: Console, tokenizer: Any, answers: dict[str, Measured], expected: str | None
) -> None:
    """Print the answers, if they hold the planted fact, and where their tokens part."""
    _heading(console, "Answers")
    for name, measured in answers.items():
        text = tokenizer.decode(measured.answer, skip_special_tokens=True)
        verdict = Text()
        if expected is not None:
            found = expected in text
            verdict = Text(" fact found", "green") if found else Text(" fact missed", "red")
        console.print(Text(name, "bold") + verdict)
        console.print(Text(text.strip()), style="dim")
    *_, dense, sparse = (measured.answer for measured in answers.values())
    console.print(f"Token streams: {_parting(tokenizer, dense, sparse)}\n", markup=False)


def _parting(tokenizer: Any, dense: Sequence[int], sparse: Sequence[int]) -> str:
    """Return words on the first token in which two streams differ."""
    for index, (left, right) in enumerate(zip_longest(dense, sparse)):
        if left != right:
            words = (
                "the end" if token is None else repr(tokenizer.decode([token]))
                for token in (left, right)
            )
            return "part at token {}: {} and {}".format(index, *words)
    return f"identical, {len(dense)} tokens"


def show_steps(console: Console, recording: Recording, tokenizer: Any) -> None:
    """Print what each step of the answer read, and the mass that these tokens hold.

    Its first step decodes the last token of the question.
    """
    _heading(console, "What each step of the answer read")
    if not recording.steps:
        console.print(
            "Nothing was recorded: no attention was sparse, for the reasons above, or its steps "
            "were replays of a CUDA graph.\n"
        )
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in (
        "step",
        "token",
        "tokens read",
        "in cache",
        "share",
        "captured mass",
        "worst head",
    ):
        table.add_column(name, justify="left" if name in ("token", "worst head") else "right")
    last_asked = max(recording.asked - 1, 0)
    decoded = list(zip(recording.steps, recording.decoded, strict=True))[last_asked:]
    for number, (calls, token) in enumerate(decoded):
        read, cached = mean_read(calls), calls[0].kv_len
        mass, worst, where = _captured(calls)
        table.add_row(
            str(number),
            Text(repr(tokenizer.decode([token]))),
            f"{read:,.0f}",
            f"{cached:,}",
            f"{read / cached:.1%}",
            f"{mass:.3f}",
            f"{worst:.3f} {where}",
        )
    console.print(table)
    console.print(
        "Tokens read: mean over the sparse layers and their KV heads. Captured mass: the share of\n"
        "the dense softmax that these tokens hold, mean over the query heads.\n"
    )


def mean_read(calls: Sequence[Call]) -> float:
    """Return the tokens read, mean over layers and KV heads."""
    return fmean(call.tokens_read.float().mean().item() for call in calls)


def mean_mass(calls: Sequence[Call]) -> float:
    """Return the captured attention mass, mean over layers and query heads."""
    return fmean(call.mass.mean().item() for call in calls if call.mass is not None)


def _captured(calls: Sequence[Call]) -> tuple[float, float, str]:
    """Return mean and least captured mass of a step, and the layer and query head of the least."""
    masses = [(call, call.mass[0, :, 0]) for call in calls if call.mass is not None]
    call, mass = min(masses, key=lambda each: each[1].min().item())
    where = f"{layer_name(call.site)}, head {mass.argmin().item()}"
    return mean_mass(calls), mass.min().item(), where


def layer_name(site: str) -> str:
    """Return the layer in a module path: "layer 5" for "model.layers.5.self_attn"."""
    number = re.search(r"\.(\d+)\.", f".{site}.")
    return f"layer {number[1]}" if number else site


def show_times(console: Console, answers: dict[str, Measured], recording: Recording) -> None:
    """Print what each way costs, measured apart from the recorder; the last way is the sparse one.

    Speed-ups are over the fastest of the dense ways.
    """
    _heading(console, "Time")
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in ("", "time per token", "keys read", "speed", "first token", "compiling"):
        table.add_column(name, justify="right" if name else "left")
    *dense, sparse = answers.values()
    fastest = min(each.seconds_per_token for each in dense)
    for name, each in answers.items():
        share = _share_read(recording) if each is sparse else 1.0
        table.add_row(
            name,
            f"{each.seconds_per_token * 1e3:.1f} ms",
            "not recorded" if share is None else f"{share:.1%}",
            f"{fastest / each.seconds_per_token:.2f}x",
            f"{each.first_seconds:.2f} s",
            f"{each.compile_seconds:.0f} s",
            style="bold" if each is sparse else None,
        )
    console.print(table)
    console.print(
        f"Time per token: tenth percentile of {sparse.steps} decode steps, compiled before. Speed: "
        "over the fastest dense way.\n"
        "First token: of lychee, with the index of all keys built. Compiling: first steps, once.\n"
        "Inductor needs a static cache, over which transformers copies the keys of each group of "
        "heads.\n"
    )
    if sparse.seconds_per_token > fastest:
        console.print(
            "To choose costs more here than it saves: try a longer document, --tokens 48000, on a "
            "machine without other work.\n"
        )


def _share_read(recording: Recording) -> float | None:
    """Return the share of the cache that sparse steps read; None if none was recorded."""
    shares = [mean_read(calls) / calls[0].kv_len for calls in recording.steps]
    return fmean(shares) if shares else None


def _heading(console: Console, text: str) -> None:
    console.print(Text(text, style="bold underline"))
