"""Commands of `python -m lychee_compile`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lychee_compile.cli.bench.command import add_bench
from lychee_compile.cli.errors import CommandError
from lychee_compile.cli.evaluate import add_evaluate
from lychee_compile.cli.explain.command import add_explain
from lychee_compile.cli.parser import Parser, parse_line
from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.options import OptionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2, with one line on stderr, if it is refused."""
    command_line = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="python -m lychee_compile", description="Tools of lychee_compile.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_explain(commands)
    add_bench(commands)
    add_evaluate(commands)
    try:
        settings = parse_line(parser, command_line)
        settings.run(settings)
    except (CommandError, EvaluationError, OptionError) as error:
        sys.stderr.write(f"{parser.prog}: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
