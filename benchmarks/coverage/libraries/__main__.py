"""Coverage of other libraries: attentions of their model classes that the backend finds.

    python -m benchmarks.coverage.libraries [--install] [--folder PATH] [--libraries NAME ...]
        [--classes WORD ...] [--results PATH] [--again | --known] [--inductor]
        [--limit SECONDS] [--update-docs [PATH]]

Each class is built small, with random weights, and called uncompiled, with Dynamo alone and with
the backend. Attentions are counted by the operators that run, without our matcher. With the options
of trial.py each attention is rewritten, but reads all keys: outputs must not change. `--install`
puts the libraries into a folder of their own. Outcomes go into a file of JSON lines, and what is in
it already is not tried again: a run can be ended and continued. `--known` tries nothing, and tells
what is in the file. The exit status is 1 if anything
is missed, wrong or raised. All classes take about an hour of processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.coverage.libraries import install, table
from benchmarks.coverage.libraries.catalogue import LIBRARIES
from benchmarks.coverage.libraries.entries import Library
from benchmarks.coverage.libraries.trial import Trial
from benchmarks.coverage.libraries.worker import Task, trials
from benchmarks.coverage.table import replace_between

PAGE = Path(__file__).resolve().parents[3] / "docs" / "coverage.md"
FOLDER = Path(tempfile.gettempdir()) / "lychee_coverage_libraries"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    chosen = _parse(arguments)
    console = Console()
    libraries = [
        each for each in LIBRARIES if not chosen.libraries or each.name in chosen.libraries
    ]
    tasks = [
        (library.name, entry.name)
        for library in libraries
        for entry in library.entries
        if not chosen.classes or any(word in entry.name for word in chosen.classes)
    ]
    if chosen.install:
        _install(libraries, chosen.folder, console)
    known = {} if chosen.again else _read(chosen.results)
    lacking = [] if chosen.known else [each for each in tasks if each not in known]
    outcomes = known | _try(lacking, chosen, console)
    wanted = [outcomes[each] for each in tasks if each in outcomes]
    console.print(table.total(wanted), style="bold")
    if chosen.update_docs:
        _update(chosen, wanted)
    return 0 if all(each.good for each in wanted) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [library.name for library in LIBRARIES]
    parser.add_argument("--libraries", nargs="+", metavar="NAME", choices=names, default=[])
    parser.add_argument("--classes", nargs="+", metavar="WORD", default=[])
    parser.add_argument("--install", action="store_true", help="install the libraries first")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the libraries")
    parser.add_argument("--results", type=Path, help="JSON lines; by default in the folder")
    parser.add_argument("--again", action="store_true", help="try classes with an outcome again")
    parser.add_argument("--known", action="store_true", help="try nothing, tell known outcomes")
    parser.add_argument("--inductor", action="store_true", help="compile with Inductor: slow")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a class")
    parser.add_argument("--update-docs", type=Path, metavar="PATH", nargs="?", const=PAGE)
    chosen = parser.parse_args(arguments)
    if chosen.update_docs and (chosen.libraries or chosen.classes):
        parser.error("--update-docs needs the whole table: no --libraries, no --classes")
    chosen.results = chosen.results or chosen.folder / "results.jsonl"
    return chosen


def _install(libraries: Sequence[Library], folder: Path, console: Console) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries:
        with console.status(f"installing {library.name}"):
            error = install.install(library.packages, folder)
        if error:
            console.print(f"{library.name}: {error}", style="red")


def _read(path: Path) -> dict[Task, Trial]:
    """Return the outcomes in a file of JSON lines; of two for a class the later one."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    outcomes = [Trial(**json.loads(line)) for line in lines]
    return {(each.library, each.name): each for each in outcomes}


def _try(tasks: Sequence[Task], chosen: argparse.Namespace, console: Console) -> dict[Task, Trial]:
    """Try the tasks, print each outcome, and append it to the file at once."""
    outcomes = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    with (
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
        chosen.results.open("a", encoding="utf-8") as file,
    ):
        bar = progress.add_task("coverage", total=len(tasks))
        for trial in trials(tasks, chosen.folder, inductor=chosen.inductor, limit=chosen.limit):
            outcomes[trial.library, trial.name] = trial
            print(json.dumps(trial.to_dict()), file=file, flush=True)
            console.print(table.line(trial), soft_wrap=True)
            progress.advance(bar)
    return outcomes


def _update(chosen: argparse.Namespace, outcomes: Sequence[Trial]) -> None:
    have = {each.name: install.version(each.packages[0], chosen.folder) for each in LIBRARIES}
    compiler = "Inductor" if chosen.inductor else "AOTAutograd alone"
    remark = f"PyTorch {torch.__version__.split('+')[0]}; graphs were compiled by {compiler}."
    page = chosen.update_docs.read_text(encoding="utf-8")
    text = table.markdown(outcomes, have, remark)
    written = replace_between(page, table.BEGIN, table.END, text)
    chosen.update_docs.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
