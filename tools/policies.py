"""Write the table of decode policies in docs/policies.md from their declarations.

python -m tools.policies            # write the table
python -m tools.policies --check    # exit with 1 if the table is not up to date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import resources

import torch

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.methods import policies_with_kernels
from lychee_compile.kernels.levels.words import describe, describe_always
from lychee_compile.kernels.policies import decode
from lychee_compile.kernels.policies.registry import Policy, make_index, policies
from tools.links import ROOT

PAGE = ROOT / "docs" / "policies.md"
BEGIN = "<!-- Written by `python -m tools.policies` from the declarations. -->\n"
END = "<!-- The end of what is written. -->\n"
HEADING = (
    "| policy | chooses | kernel | always reads | bytes | paper |",
    "|---|---|---|---|---|---|",
)
TOKENS, BUDGET, HEAD_DIM = 32768, 1024, 128
"""Sizes that the column of bytes is for."""


def table() -> str:
    """Return the table as Markdown."""
    return "\n".join([*HEADING, *map(_row, _decoding())]) + "\n"


def page() -> str:
    """Return the whole page, with the table in its place."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def _decoding() -> Iterator[Policy]:
    """Yield the built-in policies that decode, without those that other parts register."""
    for each in policies():
        if each.index is not None and each.index.__module__.startswith("lychee_compile.kernels."):
            yield each


def _row(policy: Policy) -> str:
    levels = policy.levels
    cells = (
        f"`{policy.name}`",
        policy.words if levels is None else describe(levels),
        "yes" if policy.name in policies_with_kernels() else "no",
        "first `sinks`, last `recent`" if levels is None else describe_always(levels),
        f"{_bytes(policy.name):,.1f}",
        _paper(policy.name),
    )
    return f"| {' | '.join(cells)} |".replace("  ", " ")


def _bytes(name: str) -> float:
    """Return the bytes per token that a choice reads."""
    config = IndexConfig(policy=name, budget=BUDGET)
    index = make_index(1, 1, HEAD_DIM, config, torch.device("cpu"))
    return index.bytes_per_step(TOKENS, BUDGET) / TOKENS


def _paper(name: str) -> str:
    """Return a link to the paper that is called like the policy, if its file names one."""
    file = resources.files(decode) / f"{name}.py"
    text = file.read_text("utf-8") if file.is_file() else ""
    found = re.search(rf"(?i){name}\w* \(arXiv (\d{{4}}\.\d{{5}})", text)
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the table. Return the exit status."""
    parser = argparse.ArgumentParser(description="Write the table of policies.")
    parser.add_argument("--check", action="store_true", help="only compare the page")
    chosen = parser.parse_args(arguments)
    text = page()
    if not chosen.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write("docs/policies.md is not up to date: run python -m tools.policies\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
