"""Parser of the command line, and the options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lychee_compile.cli.errors import CommandError
from lychee_compile.evaluate.models import DTYPES
from lychee_compile.evaluate.variants import Variant, literal
from lychee_compile.options import OptionError, Options

Commands = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """Parser of a command line whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise `CommandError` with `message`, without the usage; a missing command has choices."""
        for action in self._actions:
            if isinstance(action, Commands) and message.endswith(f"required: {action.metavar}"):
                message += (
                    f" (choose from {', '.join(map(repr, action.choices))}; --help says more)"
                )
        raise CommandError(message)


def add_command(
    commands: Commands[Any], name: str, summary: str, description: str, examples: str = ""
) -> argparse.ArgumentParser:
    """Add a command with its help to those of a parser, and return its parser."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model as a positional argument."""
    parser.add_argument(
        "model",
        metavar="MODEL_DIR",
        help="a folder in which transformers saved a causal language model; its config.json is "
        "enough if no weights are loaded. Or the name of one that is cached here",
    )


def add_device(parser: argparse.ArgumentParser, dtypes: str) -> None:
    """Add device and dtype; `dtypes` says what the dtype is without the option."""
    summary = "cpu, cuda or cuda:N (cuda if there is a GPU, else cpu)"
    parser.add_argument("--device", metavar="NAME", help=summary)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help=f"of weights and cache ({dtypes})")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    summary = "print JSON on stdout instead of tables; progress goes to stderr"
    parser.add_argument("--json", action="store_true", help=summary)


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """Add one group for all options of the backend."""
    add = parser.add_argument_group(
        "options of the backend", "as in torch.compile(model, options={...}); see docs/options.md"
    ).add_argument
    add("--budget", metavar="N", help="tokens read per KV head and step, or None (1024)")
    add("--policy", metavar="NAME", help='how tokens are chosen (lychee); "lychee:recent=32" also')
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="any; repeatable")


def backend_options(settings: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the backend that were given. Raise `OptionError` for wrong ones."""
    chosen: dict[str, Any] = {}
    if settings.policy is not None:
        variant = Variant.parse(settings.policy)
        chosen |= {"policy": variant.policy, **variant.options}
    for text in settings.option:
        name, separator, value = text.partition("=")
        if not (separator and name.strip() and value.strip()):
            raise OptionError(f"--option {text!r}: expected NAME=VALUE, as recent=128")
        chosen[name.strip()] = literal(value.strip())
    if settings.budget is not None:
        chosen["budget"] = literal(settings.budget)
    Options.parse(None, chosen)
    return chosen


def shown_options(options: Mapping[str, Any]) -> str:
    """Return options in words, "policy lychee, budget 1024, recent 128"."""
    parsed = Options.parse(None, options)
    pairs = {"policy": parsed.policy, "budget": parsed.budget, **options}
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


def parse_line(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the settings of a command line; `command_line` among them is the list itself."""
    settings = parser.parse_args(arguments)
    settings.arguments = list(arguments)
    return settings
