"""Tables of the results for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, JustifyMethod
from rich.table import Table
from rich.text import Text

from lychee_compile.evaluate.drift import ANEW, FOLLOWED, DriftResult
from lychee_compile.evaluate.fidelity import FidelityResult
from lychee_compile.evaluate.prefill import PrefillResult
from lychee_compile.evaluate.tasks import TaskResult

ORACLE = "oracle"
DRIFT_MARKS = (8192, 16384, 30720)
"""Numbers of generated tokens at which the error is compared with that at 2,048."""


def fidelity_table(result: FidelityResult) -> Group:
    """Return a table of every policy at every budget, over all sites together."""
    title = (
        f"Fidelity: {result.model}, {result.text}, {result.length:,} keys, "
        f"{result.steps} steps, {len(result.sites) - 1} attentions"
    )
    table = _table(("policy", "left"), ("budget", "right"))
    oracle = any(row.policy == ORACLE for row in result.rows)
    names = ["mass", "p10", "worst head", "error", "tokens", "kB index", "kB"]
    names += ["certified", "violated", "ms"]
    if oracle:
        names.insert(1, "of oracle")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(result.overall(), key=lambda row: row.budget):
        cells = [
            f"{row.mass:.3f}",
            f"{row.mass_p10:.3f}",
            f"{row.mass_worst_head:.3f}",
            f"{row.error:.3f}",
            f"{row.tokens:,.0f}",
            f"{row.index_bytes / 1e3:,.0f}",
            f"{row.bytes / 1e3:,.0f}",
            f"{row.certified:.1%}",
            str(row.violations),
            f"{row.milliseconds:.1f}",
        ]
        if oracle:
            best = result.row(ORACLE, row.budget)
            cells.insert(1, f"{row.mass / best.mass:.3f}")
        table.add_row(row.policy, f"{row.budget:,}", *cells)
    return _titled(title, table)


def sites_table(result: FidelityResult | PrefillResult) -> Group:
    """Return a table of captured mass and error at each attention, where most is read."""
    largest = max(getattr(row, result.by) for row in result.rows)
    table = _table(("policy", "left"))
    for name in result.sites:
        table.add_column(name.removeprefix("model."), justify="right")
    for policy in result.policies:
        rows = [result.row(policy, largest, name) for name in result.sites]
        table.add_row(policy, *(f"{row.mass:.3f} / {row.error:.3f}" for row in rows))
    return _titled(f"Captured mass / error at each attention, {result.by} {largest:,}", table)


def text_table(results: Sequence[FidelityResult]) -> Group:
    """Return a table of captured mass and error by kind of text."""
    budgets = sorted({row.budget for result in results for row in result.rows})
    table = _table(("text", "left"), ("policy", "left"))
    for budget in budgets:
        table.add_column(f"budget {budget:,}", justify="right")
    for result in results:
        for policy in result.policies:
            rows = [result.row(policy, budget) for budget in budgets]
            cells = (f"{row.mass:.4f} / {row.error:.4f}" for row in rows)
            table.add_row(result.text, policy, *cells)
        table.add_section()
    return _titled("Where chunks are cut: captured mass / error", table)


def drift_table(result: DriftResult) -> Group:
    """Return a table of the error by generated tokens, beside an index built anew."""
    policies = list(dict.fromkeys(point.policy for point in result.points))
    title = (
        f"Drift: {result.model}, {result.text}, prompt {result.prompt:,}, budget "
        f"{result.budget:,}; error of the index that followed / built anew"
    )
    table = _table(("generated", "right"))
    for policy in policies:
        table.add_column(policy, justify="right")
    curves = {
        policy: tuple(zip(result.curve(policy), result.curve(policy, ANEW), strict=True))
        for policy in policies
    }
    for rank, (point, _) in enumerate(curves[policies[0]]):
        pairs = [curves[policy][rank] for policy in policies]
        cells = (f"{followed.error:.3f} / {anew.error:.3f}" for followed, anew in pairs)
        table.add_row(f"{point.generated:,}", *cells)
    table.add_section()
    for mark in DRIFT_MARKS:
        ratios = [result.ratio(policy, mark) for policy in policies]
        if any(ratio is not None for ratio in ratios):
            cells = (f"{ratio:.2f}x" if ratio is not None else "-" for ratio in ratios)
            table.add_row(f"{mark:,} over 2,048", *cells)
    violations = (sum(p.violations for p in result.curve(policy, FOLLOWED)) for policy in policies)
    table.add_row("violations", *(str(count) for count in violations))
    return _titled(title, table)


def tasks_table(result: TaskResult) -> Group:
    """Return a table of the answers found, by task, policy and budget."""
    title = (
        f"Tasks: {result.model}, documents of {result.length:,} tokens, question and answer "
        "decoded over them"
    )
    table = _table(("task", "left"), ("policy", "left"), ("budget", "right"))
    for name in ("found", "log-likelihood", "as dense", "divergence"):
        table.add_column(name, justify="right")
    task = None
    for row in result.rows():
        if task not in (None, row.task):
            table.add_section()
        task = row.task
        table.add_row(
            row.task,
            row.policy,
            "" if row.budget is None else f"{row.budget:,}",
            f"{round(row.found * row.questions, 1):g} of {row.questions}",
            f"{row.log_likelihood:.2f}",
            f"{row.agreement:.1%}",
            f"{row.divergence:.4f}",
        )
    return _titled(title, table)


def lengths_table(results: Sequence[TaskResult]) -> Group:
    """Return a table of the share of answers found, by length, over all tasks."""
    table = _table(("policy", "left"), ("budget", "right"))
    for result in results:
        table.add_column(f"{result.length:,}", justify="right")
    found = [
        {(row.policy, row.budget): row for row in result.rows() if row.task == "all"}
        for result in results
    ]
    for policy, budget in found[0]:
        cells = (f"{rows[policy, budget].found:.1%}" for rows in found)
        table.add_row(policy, "" if budget is None else f"{budget:,}", *cells)
    return _titled(f"Answers found by {results[0].model}, by tokens of a document", table)


def prefill_table(result: PrefillResult) -> Group:
    """Return a table of every policy at every share of the keys, over all sites together."""
    title = (
        f"Prefill: {result.model}, {result.text}, {result.length:,} tokens, "
        f"{result.tiles} tiles of queries, {len(result.sites) - 1} attentions"
    )
    table = _table(("policy", "left"))
    for name in ("share", "pairs", "mass", "p10", "worst head", "error", "p90"):
        table.add_column(name, justify="right", no_wrap=True)
    share = None
    for row in sorted(result.overall(), key=lambda row: row.share):
        if share not in (None, row.share):
            table.add_section()
        share = row.share
        numbers = (row.mass, row.mass_p10, row.mass_worst_head, row.error, row.error_p90)
        cells = (f"{number:.3f}" for number in numbers)
        table.add_row(row.policy, f"{row.share:g}", f"{row.pairs:.3f}", *cells)
    return _titled(title, table)


def _table(*columns: tuple[str, JustifyMethod]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name, side in columns:
        table.add_column(name, justify=side, no_wrap=True)
    return table


def _titled(title: str, table: Table) -> Group:
    """Return a title above a table; a table's own title wraps to the table's width."""
    return Group(Text(title, "bold"), table)
