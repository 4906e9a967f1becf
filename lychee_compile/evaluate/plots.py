"""Pictures of the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lychee_compile.evaluate.drift import ANEW, DriftResult
from lychee_compile.evaluate.errors import require
from lychee_compile.evaluate.fidelity import FidelityResult, FidelityRow
from lychee_compile.evaluate.prefill import PrefillResult
from lychee_compile.evaluate.tasks import DENSE, TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (6.0, 4.4)
"""Width and height of a panel, in inches."""
MARKERS = "osD^vP*Xhd"


def plot_mass(path: Path, results: Sequence[FidelityResult]) -> None:
    """Draw captured mass against budget for every policy, one panel a capture."""
    figure, panels = _panels(len(results))
    for axes, result in zip(panels, results, strict=True):
        for number, (policy, rows) in enumerate(_by_policy(result.overall())):
            budgets = [row.budget for row in rows]
            _line(axes, budgets, [row.mass for row in rows], policy, number)
        axes.set_xscale("log", base=2)
        _ticks(axes, {row.budget for row in result.rows})
        _name(axes, _title(result), "budget, tokens per KV head", "captured softmax mass")
    _finish(figure, panels, path)


def plot_error(path: Path, results: Sequence[FidelityResult]) -> None:
    """Draw output error against bytes read, index and attended keys together."""
    figure, panels = _panels(len(results))
    for axes, result in zip(panels, results, strict=True):
        for number, (policy, rows) in enumerate(_by_policy(result.overall())):
            megabytes = [row.bytes / 1e6 for row in rows]
            _line(axes, megabytes, [row.error for row in rows], policy, number)
        _log_errors(axes)
        _name(axes, _title(result), "MB read per KV head and step", "output error")
    _finish(figure, panels, path)


def plot_prefill(path: Path, results: Sequence[PrefillResult]) -> None:
    """Draw output error against the share of query-key pairs computed, one panel a capture."""
    figure, panels = _panels(len(results))
    for axes, result in zip(panels, results, strict=True):
        rows = result.overall()
        for number, policy in enumerate(dict.fromkeys(row.policy for row in rows)):
            mine = sorted((row for row in rows if row.policy == policy), key=lambda row: row.pairs)
            pairs = [row.pairs for row in mine]
            _line(axes, pairs, [row.error for row in mine], policy, number)
        _log_errors(axes)
        title = f"{result.model}, {result.text}, {result.length:,} tokens"
        _name(axes, title, "share of query-key pairs computed", "output error")
    _finish(figure, panels, path)


def plot_drift(path: Path, results: Sequence[DriftResult]) -> None:
    """Draw error against generated tokens; dashed lines are of an index built anew."""
    figure, panels = _panels(len(results))
    for axes, result in zip(panels, results, strict=True):
        for number, policy in enumerate(dict.fromkeys(point.policy for point in result.points)):
            curve, anew = result.curve(policy), result.curve(policy, ANEW)
            generated = [point.generated for point in curve]
            _line(axes, generated, [point.error for point in curve], policy, number)
            axes.plot(generated, [point.error for point in anew], color=f"C{number}", ls="--", lw=1)
        title = f"{result.model}, {result.text}, prompt {result.prompt:,}, budget {result.budget:,}"
        _name(axes, f"{title}\ndashed: built anew", "generated tokens", "output error")
    _finish(figure, panels, path)


def plot_tasks(path: Path, result: TaskResult) -> None:
    """Draw answers found against budget, one panel a task; black lines are dense attention."""
    rows = result.rows()
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure, panels = _panels(len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        of_task = [row for row in rows if row.task == task]
        sparse = [row for row in of_task if row.policy != DENSE]
        for row in of_task:
            if row.policy == DENSE:
                axes.axhline(row.found, color="black", lw=1, label=DENSE)
        for number, policy in enumerate(dict.fromkeys(row.policy for row in sparse)):
            mine = [row for row in sparse if row.policy == policy]
            budgets = [row.budget or result.length for row in mine]
            _line(axes, budgets, [row.found for row in mine], policy, number)
        axes.set_xscale("log", base=2)
        _ticks(axes, {row.budget or result.length for row in sparse})
        axes.set_ylim(-0.05, 1.05)
        _name(axes, task, "budget, tokens per KV head", "answers found")
    _finish(figure, panels, path)


def _by_policy(rows: Sequence[FidelityRow]) -> Iterable[tuple[str, list[FidelityRow]]]:
    for policy in dict.fromkeys(row.policy for row in rows):
        mine = [row for row in rows if row.policy == policy]
        yield policy, sorted(mine, key=lambda row: row.budget)


def _title(result: FidelityResult) -> str:
    return f"{result.model}, {result.text}, {result.length:,} keys"


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    require("matplotlib", "drawing the results")
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, number: int) -> None:
    marker = MARKERS[number % len(MARKERS)]
    size = max(9 - number, 4)  # what lies beneath another line still shows
    axes.plot(x, y, color=f"C{number}", marker=marker, ms=size, lw=1.5, label=label)


def _log_errors(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _ticks(axes: Axes, budgets: Iterable[int]) -> None:
    ticks = sorted(budgets)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def _name(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _finish(figure: Figure, panels: Sequence[Axes], path: Path) -> None:
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
