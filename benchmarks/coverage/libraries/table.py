"""Table of the libraries for people: lines for the terminal, and Markdown for a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.text import Text

from benchmarks.coverage.libraries.trial import Trial

BEGIN, END = "<!-- libraries:begin -->", "<!-- libraries:end -->"
COMMAND = "python -m benchmarks.coverage.libraries --install --update-docs"


def line(trial: Trial) -> Text:
    """Return a line for the terminal."""
    style = "dim" if trial.note else "green" if trial.good else "bold red"
    count = f"{trial.found}/{trial.there - trial.unseen}"
    words = [f"{trial.library} {trial.name}"[:58].ljust(58), count.ljust(8), *_faults(trial)]
    return Text(" ".join([*words, trial.note]), style=style)


def _faults(trial: Trial) -> list[str]:
    faults = []
    if trial.missed:
        faults.append(f"{trial.missed} missed")
    if trial.wrong:
        faults.append(f"error {trial.error:.1e}")
    if trial.breaks > 0:
        faults.append(f"{trial.breaks} graphs more")
    if trial.failure:
        faults.append(trial.failure)
    return faults


def total(trials: Sequence[Trial]) -> str:
    """Return the last line for the terminal."""
    tried = [each for each in trials if not each.note]
    there = sum(each.there - each.unseen for each in tried)
    found = there - sum(each.missed for each in tried)
    share = f"{found / there:.1%}" if there else "none"
    return (
        f"{len(tried)} builds of model classes of "
        f"{len({each.library for each in tried})} libraries, "
        f"{sum(each.there > 0 for each in tried)} of them with attention: "
        f"{found} of {there} attentions with several keys found ({share}), "
        f"{sum(each.rewritten for each in tried)} of them rewritten; "
        f"{sum(each.wrong for each in tried)} wrong, "
        f"{sum(bool(each.failure) for each in tried)} exceptions, "
        f"{sum(each.breaks > 0 for each in tried)} with graph breaks added"
    )


def markdown(trials: Sequence[Trial], versions: Mapping[str, str], remark: str) -> str:
    """Return the tables: of libraries, of what is missed and why, and of every class.

    `versions` has the version of each library, `remark` says with what graphs were compiled.
    """
    tried = [each for each in trials if not each.note]
    libraries = list(dict.fromkeys(each.library for each in tried))
    lines = [f"{total(trials)}. {remark}", ""]
    lines += [
        "| library | builds | found / there | one key | rewritten |",
        "|---|---|---|---|---|",
    ]
    for library in libraries:
        own = [each for each in tried if each.library == library]
        name = f"{library} {versions.get(library, '')}".strip()
        lines.append(f"| {name} | {len(own)} | {_cells(own)} |")
    lines += [f"| **all** | {len(tried)} | {_cells(tried)} |", ""]
    lines += ["<details><summary>Every class</summary>", ""]
    lines += ["| class | found / there | one key | rewritten | fault |", "|---|---|---|---|---|"]
    for library in libraries:
        lines.append(f"| **{library}** | | | | |")
        own = [each for each in tried if each.library == library]
        lines += [f"| {each.name} | {_cells([each])} | {_words(each)} |" for each in own]
    lines += ["", "</details>", ""]
    lines += _reasons("Attentions that stay as they are, by reason", [each.kept for each in tried])
    title = "Softmaxes that are said to be no attention, by reason"
    lines += _reasons(title, [each.rejected for each in tried])
    return "\n".join([*lines, f"Made by `{COMMAND}`."])


def _cells(trials: Sequence[Trial]) -> str:
    there = sum(each.there - each.unseen for each in trials)
    found = there - sum(each.missed for each in trials)
    share = f"{found}/{there}" if found == there else f"**{found}/{there}**"
    single, rewritten = (
        sum(getattr(each, it) for each in trials) for it in ("single", "rewritten")
    )
    return f"{share} | {single or ''} | {rewritten}"


def _words(trial: Trial) -> str:
    words = [each.splitlines()[-1] for each in _faults(trial)]
    if trial.unseen:
        words.append(f"{trial.unseen} in no graph")
    return "; ".join(words).replace("|", "/")


def _reasons(title: str, reasons: Sequence[Mapping[str, int]]) -> list[str]:
    counts: Counter[str] = Counter()
    for each in reasons:
        counts.update(each)
    lines = [f"| {count} | {words} |" for words, count in counts.most_common()]
    return [f"{title}:", "", "| times | reason |", "|---|---|", *lines, ""] if lines else []
