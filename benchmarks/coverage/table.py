"""Coverage table for people: rows on the terminal, and Markdown for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.text import Text

from benchmarks.coverage.measure import IMPLEMENTATIONS, Result
from benchmarks.coverage.models import Architecture

BEGIN, END = "<!-- coverage:begin -->", "<!-- coverage:end -->"
NOTHING = "–"
COMMAND = "python -m benchmarks.coverage --update-docs"


class MarkersError(ValueError):
    """A page lacks the markers between which the table belongs."""


def tally(results: Iterable[Result]) -> str:
    """Return the sums of attentions found and there, "6/6"; a dash if there are none."""
    results = list(results)
    found, seen = sum(each.found for each in results), sum(each.seen for each in results)
    return f"{found}/{seen}" if found or seen else NOTHING


def row(name: str, results: Sequence[Result]) -> Text:
    """Return a line for the terminal: for each implementation, a cell for each phase."""
    line = Text(f"{name:<17}")
    for implementation, group in groupby(results, lambda result: result.implementation):
        line.append(f" {implementation} ", style="dim")
        for result in group:
            style = "bold red" if not result.complete else "green" if result.seen else "dim"
            line.append(f"{tally([result]):<6}", style=style)
    return line


def total(results: Sequence[Result], architectures: int) -> str:
    """Return the last line for the terminal."""
    parts = [f"{name} {tally(_of(results, name))}" for name in IMPLEMENTATIONS]
    return f"{architectures} architectures: {', '.join(parts)}; in all {tally(results)}"


def markdown(
    architectures: Sequence[Architecture], results: Sequence[Result], versions: str
) -> str:
    """Return tables of families and of architectures, and notes on why some cells are empty."""
    notes = _Notes()
    families = [
        (family, list(members))
        for family, members in groupby(architectures, lambda architecture: architecture.family)
    ]
    title = (
        f"Attentions found / attentions there, in {len(architectures)} architectures ({versions}), "
        "summed over a prefill or plain forward, a decoding step over a static cache and one over "
        "a dynamic cache. What is there is counted while the model runs uncompiled, without the "
        "matcher."
    )
    lines = [title, "", *_heading("family")]
    for family, members in families:
        lines.append(_line(f"{family} ({len(members)})", _select(results, members)))
    lines += [_line("**all**", results), "", "<details><summary>Every architecture</summary>", ""]
    lines += _heading("architecture")
    for family, members in families:
        lines.append(f"| **{family}** |" + " |" * len(IMPLEMENTATIONS))
        lines += [_line(each.name, _select(results, [each]), notes) for each in members]
    lines += ["", *notes.lines(), "", "</details>", "", f"Made by `{COMMAND}`."]
    return "\n".join(lines)


def replace_table(page: str, table: str) -> str:
    """Return `page` with `table` between the markers. Raise `MarkersError` if it lacks them."""
    return replace_between(page, BEGIN, END, table)


def replace_between(page: str, begin: str, end: str, text: str) -> str:
    """Return `page` with `text` between two markers. Raise `MarkersError` if it lacks them."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise MarkersError(f"the page needs the lines {begin} and {end}, in this order")
    return f"{before}{begin}\n{text}\n{end}{after}"


class _Notes:
    """Numbers of reasons in the order in which they come; equal reasons share a number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, reasons: Iterable[str]) -> str:
        unique = dict.fromkeys(reason for reason in reasons if reason)
        numbers = sorted(self._numbers.setdefault(each, len(self._numbers) + 1) for each in unique)
        return f" <sup>{', '.join(map(str, numbers))}</sup>" if numbers else ""

    def lines(self) -> list[str]:
        return [f"{number}. {reason}" for reason, number in self._numbers.items()]


def _heading(first: str) -> list[str]:
    columns = len(IMPLEMENTATIONS)
    return [f"| {first} | {' | '.join(IMPLEMENTATIONS)} |", "|---|" + "---|" * columns]


def _line(name: str, results: Sequence[Result], notes: _Notes | None = None) -> str:
    cells = []
    for implementation in IMPLEMENTATIONS:
        group = _of(results, implementation)
        count = tally(group)
        if not all(result.complete for result in group):
            count = f"**{count}**"
        cells.append(count + (notes.mark(result.note for result in group) if notes else ""))
    return f"| {name} | {' | '.join(cells)} |"


def _of(results: Sequence[Result], implementation: str) -> list[Result]:
    return [result for result in results if result.implementation == implementation]


def _select(results: Sequence[Result], members: Sequence[Architecture]) -> list[Result]:
    names = {architecture.name for architecture in members}
    return [result for result in results if result.architecture in names]
