"""Commands of `python -m lychee_compile`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lychee_compile.evaluate.cli import Parser, add_evaluate, run
from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.options import OptionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2, with one line on stderr, if it is refused."""
    command_line = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="python -m lychee_compile", description="Tools of lychee_compile.")
    add_evaluate(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    try:
        run(parser.parse_args(command_line), command_line)
    except (EvaluationError, OptionError) as error:
        sys.stderr.write(f"{parser.prog}: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
