"""Coverage table: attentions of transformers' models that the backend finds.

    python -m benchmarks.coverage [--only NAME ...] [--implementations sdpa eager flex] [--jobs 2]
        [--json PATH] [--markdown PATH] [--update-docs [PATH]] [--verbose]

Each architecture is built with random weights, a few layers of width 64, in each attention
implementation that its class has. It is called three times: a plain forward or prefill, a decoding
step over a static cache, one over a dynamic cache. The attentions that run are counted without our
matcher (truth.py says how); `lychee_compile.explain` has to find as many. A dash stands for calls
that transformers or Dynamo cannot do without us, either. The exit status is 1 if an attention is
missed. The whole table takes about 25 minutes of processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from benchmarks.coverage.calls import phases
from benchmarks.coverage.measure import IMPLEMENTATIONS, Result
from benchmarks.coverage.models import ARCHITECTURES, Architecture
from benchmarks.coverage.processes import in_processes
from benchmarks.coverage.table import MarkersError, markdown, replace_table, row, total

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"
VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    chosen = _parse(arguments)
    console = Console()
    known = [each for each in ARCHITECTURES if not chosen.only or each.name in chosen.only]
    architectures = [architecture for architecture in known if architecture.offered]
    console.print(f"{VERSIONS}; in each cell: forward or prefill, static cache, dynamic cache")
    for absent in sorted({each.name for each in known} - {each.name for each in architectures}):
        console.print(f"{absent}: skipped, as transformers {transformers.__version__} lacks it")
    results = _measure_all(architectures, chosen, console)
    console.print(total(results, len(architectures)), style="bold")
    _write(chosen, architectures, results)
    return 0 if all(result.complete for result in results) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [architecture.name for architecture in ARCHITECTURES]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=[])
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS)
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes, 2 by default")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every result")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the table as Markdown")
    parser.add_argument("--update-docs", type=Path, metavar="PATH", nargs="?", const=PAGE)
    parser.add_argument("--verbose", action="store_true", help="show what was there and found")
    chosen = parser.parse_args(arguments)
    if chosen.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {chosen.jobs}")
    if chosen.update_docs:
        if chosen.only or set(chosen.implementations) != set(IMPLEMENTATIONS):
            parser.error("--update-docs needs the whole table: no --only, no --implementations")
        try:
            replace_table(chosen.update_docs.read_text(encoding="utf-8"), "")
        except (OSError, MarkersError) as error:
            parser.error(f"--update-docs {chosen.update_docs}: {error}")
    return chosen


def _measure_all(
    architectures: Sequence[Architecture], chosen: argparse.Namespace, console: Console
) -> list[Result]:
    """Return all results in the table's order, and print each row when it is complete."""
    tasks = [(each, name) for each in architectures for name in chosen.implementations]
    rows: defaultdict[str, list[Result]] = defaultdict(list)
    expected = {
        each.name: len(phases(each)) * len(chosen.implementations) for each in architectures
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("coverage", total=len(tasks))
        for results in in_processes(tasks, chosen.jobs):
            progress.advance(bar)
            name = results[0].architecture
            rows[name] += results
            if len(rows[name]) == expected[name]:
                rows[name].sort(key=lambda each: chosen.implementations.index(each.implementation))
                console.print(row(name, rows[name]), soft_wrap=True)
                _print_remarks(rows[name], console, chosen.verbose)
    return [result for architecture in architectures for result in rows[architecture.name]]


def _print_remarks(results: Sequence[Result], console: Console, verbose: bool) -> None:
    """Print what was missed; if `verbose`, also details and why calls are not offered."""
    phases_alike: defaultdict[tuple[str, str, bool, str], list[str]] = defaultdict(list)
    for each in results:
        remark = each.remark if verbose else each.failure
        if remark:
            details = each.details if verbose else ""
            phases_alike[each.implementation, remark, each.complete, details].append(each.phase)
    for (implementation, remark, complete, details), alike in phases_alike.items():
        line = f"    {implementation}, {', '.join(alike)}: {remark}"
        console.print(Text(line, style="dim" if complete else "red"), soft_wrap=True)
        if details:
            console.print(Padding(Text(details), (0, 0, 0, 6)))


def _write(
    chosen: argparse.Namespace, architectures: Sequence[Architecture], results: Sequence[Result]
) -> None:
    table = markdown(architectures, results, VERSIONS)
    if chosen.json:
        page = {"versions": VERSIONS, "results": [asdict(result) for result in results]}
        chosen.json.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    if chosen.markdown:
        chosen.markdown.write_text(table + "\n", encoding="utf-8")
    if chosen.update_docs:
        page = chosen.update_docs.read_text(encoding="utf-8")
        chosen.update_docs.write_text(replace_table(page, table), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
