"""The command line of `explain`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lychee_compile.cli.configurations import chosen_device, dtype_of, load_configuration
from lychee_compile.cli.errors import CommandError
from lychee_compile.cli.lengths import lengths, positive
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
from lychee_compile.cli.units import size_name
from lychee_compile.options import Options

if TYPE_CHECKING:
    from lychee_compile.cli.explain.explanation import Explanation
    from lychee_compile.cli.explain.trace import FakeModel

DESCRIPTION = """\
Tell what the backend would do with each attention of a model when it decodes, and why; how much
memory a cache and its index take; and how many bytes a step reads. No weights are loaded or made:
the configuration is enough, and a 70B model takes no more memory than a small one.

Bytes and keys are computed. The time to build an index is measured with random keys on the device.
"""
EXAMPLES = """\
examples:
  %(prog)s MODEL_DIR
  %(prog)s MODEL_DIR --context 8k,128k --batch 4 --policy quest --budget 2048
  %(prog)s MODEL_DIR --option dense_layers=2 --json
"""


def add_explain(commands: Commands[Any]) -> None:
    """Add the command to those of `python -m lychee_compile`."""
    summary = "what would become of each attention, and what an index costs; loads no weights"
    parser = add_command(commands, "explain", summary, DESCRIPTION, EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "--context",
        type=lengths,
        default="32k,128k",
        metavar="LIST",
        help="slots of a full static cache, as 8192 or 8k (32k,128k)",
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="rows (1)")
    add_device(parser, "as the configuration says, else bfloat16")
    add_json(parser)
    add_backend_options(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> None:
    """Explain the model. Raise `CommandError` or `OptionError` if that is impossible."""
    options = backend_options(settings)
    if min(settings.context) < 2:
        raise CommandError("--context 1: expected at least 2 tokens")
    device = chosen_device(settings.device)
    config = load_configuration(settings.model)
    # Imported late, so that errors of the command line show at once.
    from lychee_compile.cli.explain.tables import page
    from lychee_compile.evaluate.progress import make_console, stage

    steps = 1 + len(settings.context)
    with stage(make_console(sys.stderr), f"Tracing {settings.model}", steps) as advance:
        model, explanations = _explained(settings, config, device, options, advance)
    facts = _facts(settings, model, options)
    if settings.json:
        content = {**facts, "contexts": [each.to_dict() for each in explanations]}
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
        return
    title = f"{settings.model}: {facts['architecture']}"
    make_console().print(page(title, _lines(facts, options), explanations))


def _explained(
    settings: argparse.Namespace,
    config: Any,
    device: torch.device,
    options: Mapping[str, Any],
    advance: Callable[[int], object],
) -> tuple[FakeModel, list[Explanation]]:
    """Build the model without weights, and explain a step at each context."""
    from lychee_compile.cli.explain.explanation import explanation_of
    from lychee_compile.cli.explain.index_costs import IndexCosts
    from lychee_compile.cli.explain.trace import FakeModel

    parsed = Options.parse(None, options)
    dtype = dtype_of(config, settings.dtype, torch.bfloat16)
    index = IndexCosts(parsed, device.type == "cuda" and not parsed.reference)
    model = FakeModel(config, dtype, device)
    model.take_few_layers(parsed)
    advance(1)
    explanations = []
    for context in settings.context:
        decoding = model.decode(context, settings.batch, options)
        kind = settings.batch, dtype, device
        explanations.append(explanation_of(decoding, context, index, *kind))
        advance(1)
    return model, explanations


def _facts(
    settings: argparse.Namespace, model: FakeModel, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the explanations depend on, as plain values."""
    return {
        "model": settings.model,
        "architecture": type(model.model).__name__,
        "parameters": model.parameters,
        "weight_bytes": model.weight_bytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "batch": settings.batch,
        "options": {name: str(value) for name, value in options.items()},
        "layers": model.layers,
        "layers_traced": model.layers if model.depth is None else model.depth.traced,
    }


def _lines(facts: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Return the facts in a line or two."""
    parts = [
        f"{facts['layers']} layers, {size_name(facts['weight_bytes'])} of {facts['dtype']} weights",
        f"batch {facts['batch']} on {facts['device']}",
        shown_options(options),
    ]
    lines = ["; ".join(parts)]
    if facts["layers_traced"] < facts["layers"]:
        lines.append(
            f"{facts['layers_traced']} layers were traced: every other is like one of them"
        )
    return lines
