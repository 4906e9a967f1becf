"""The command line of `bench`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from lychee_compile.cli.bench.ways import WAYS, Way, ways
from lychee_compile.cli.configurations import (
    chosen_device,
    dtype_of,
    load_configuration,
    new_model,
)
from lychee_compile.cli.errors import CommandError
from lychee_compile.cli.lengths import length_name, lengths, listed, numbers, positive
from lychee_compile.cli.parser import (
    Commands,
    add_backend_options,
    add_command,
    add_device,
    add_json,
    add_model,
    backend_options,
    shown_options,
)
from lychee_compile.evaluate.errors import EvaluationError

if TYPE_CHECKING:
    from rich.console import Console

    from lychee_compile.cli.bench.measure import Cell

DESCRIPTION = """\
Measure the time per token of a model on this machine, dense and sparse, all in one run: greedy
decoding over a static cache. The ways to decode are
{ways}

No prompt is read. The cache is full of random keys and values, with the mean and the deviation of
those of the model. A step reads as many keys whatever they are, unless --option coverage or epsilon
is given. What does not fit into memory is left out, with a line that says so.
"""
EXAMPLES = """\
examples:
  %(prog)s MODEL_DIR --context 32k,128k --batch 1,8
  %(prog)s MODEL_DIR --random-weights --ways compiled,lychee --budget 2048 --json
"""
CACHE = (
    "Caches hold random keys of the model's mean and deviation, not a prompt; {room} slots of each "
    "are empty at first."
)


def add_bench(commands: Commands[Any]) -> None:
    """Add the command to those of `python -m lychee_compile`."""
    listing = "\n".join(f"  {name:<9}{words}" for name, words in WAYS.items())
    summary = "time per token of a model on this machine, dense and sparse"
    parser = add_command(commands, "bench", summary, DESCRIPTION.format(ways=listing), EXAMPLES)
    add = parser.add_argument
    add_model(parser)
    slots = "slots of the cache, as 8192 or 8k (32k)"
    add("--context", type=lengths, default="32k", metavar="LIST", help=slots)
    add("--batch", type=numbers, default="1", metavar="LIST", help="rows (1)")
    add("--new-tokens", type=positive, default=80, metavar="N", help="timed tokens (80)")
    names = "eager,compiled,flash,lychee"
    summary = f"of {', '.join(WAYS)} ({names})"
    add("--ways", type=listed(WAYS), default=names, metavar="LIST", help=summary)
    add("--random-weights", action="store_true", help="load none: config.json is enough")
    add_device(parser, "float32 on a CPU, else bfloat16")
    add_json(parser)
    add_backend_options(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> None:
    """Measure. Raise `CommandError` or `OptionError` if that is impossible."""
    from lychee_compile.cli.bench.tables import page
    from lychee_compile.evaluate.progress import make_console, stage

    options = backend_options(settings)
    room = _room(settings)
    device = chosen_device(settings.device)
    config = load_configuration(settings.model)
    console = make_console(sys.stderr)
    with stage(console, f"Loading {settings.model}", 1):
        model = _model(settings, config, device)
    chosen = ways(settings.ways, options)
    cells = _measured(settings, model, chosen, console)
    facts = _facts(settings, model, options, room)
    if settings.json:
        content = {**facts, "cells": [cell.to_dict() for cell in cells]}
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
        return
    title = f"Time per token: {settings.model}"
    make_console().print(page(title, _lines(facts, options), cells, chosen))


def _room(settings: argparse.Namespace) -> int:
    """Return the slots that are empty at first. Raise `CommandError` if a context is too short."""
    from lychee_compile.cli.bench.measure import room_for

    room, shortest = room_for(settings.new_tokens), min(settings.context)
    if shortest <= room:
        raise CommandError(
            f"--context {shortest}: expected more than {room} tokens, so that "
            f"--new-tokens {settings.new_tokens} fit"
        )
    return room


def _measured(
    settings: argparse.Namespace, model: Any, chosen: Sequence[Way], console: Console
) -> list[Cell]:
    """Measure all cells, and show how far that has come."""
    from lychee_compile.cli.bench.measure import measure
    from lychee_compile.evaluate.progress import stage

    cells = []
    grid = list(product(settings.batch, settings.context, chosen))
    with stage(console, "Decoding", len(grid)) as advance:
        for batch, context, way in grid:
            name = f"{way.label}, batch {batch}, context {length_name(context)}"
            console.print(name, markup=False)
            cells.append(measure(model, way, batch, context, settings.new_tokens))
            advance(1)
    return cells


def _facts(
    settings: argparse.Namespace, model: Any, options: Mapping[str, Any], room: int
) -> dict[str, Any]:
    """Return what the times depend on, as plain values."""
    from lychee_compile.evaluate.session import environment

    return {
        "model": settings.model,
        "architecture": type(model).__name__,
        "random_weights": settings.random_weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "environment": environment(str(model.device)),
        "options": {name: str(value) for name, value in options.items()},
        "new_tokens": settings.new_tokens,
        "threads": torch.get_num_threads(),
        "cache": CACHE.format(room=room),
    }


def _lines(facts: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Return the facts in two lines."""
    weights = "random weights" if facts["random_weights"] else "loaded weights"
    machine = facts["environment"]["device"]
    threads = f", {facts['threads']} threads" if machine == "cpu" else ""
    parts = [
        f"{facts['architecture']}, {weights}, {facts['dtype']}",
        f"{machine}{threads}",
        f"torch {torch.__version__}",
        shown_options(options),
    ]
    return ["; ".join(parts), facts["cache"]]


def _model(settings: argparse.Namespace, config: Any, device: torch.device) -> Any:
    """Return the model, loaded or with random weights. Raise `CommandError` if there is none."""
    from lychee_compile.evaluate.models import load_model

    if not settings.random_weights:
        try:
            return load_model(settings.model, str(device), settings.dtype)
        except EvaluationError as error:
            words = str(error).removeprefix("--model ").rstrip(".")
            raise CommandError(f"{words}; --random-weights needs none") from error
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = dtype_of(None, settings.dtype, default)
    return new_model(config, dtype, device)
