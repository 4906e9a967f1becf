"""Tables of `explain` for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lychee_compile.cli.explain.explanation import Explanation, Kind
from lychee_compile.cli.lengths import length_name
from lychee_compile.cli.units import size_name, time_name
from lychee_compile.report.table import STYLES


def page(title: str, facts: Sequence[str], explanations: Sequence[Explanation]) -> Group:
    """Return a title, facts on the model, and the tables of all contexts."""
    parts: list[RenderableType] = [Text(title, "bold")]
    parts += [Text(fact) for fact in facts]
    if any(each.kinds for each in explanations):
        parts += [attention_table(explanations), costs_table(explanations)]
    else:
        parts.append(Text("no attention found: nothing to do for this backend"))
    notes = dict.fromkeys(note for each in explanations for note in each.notes)
    parts += [Padding(Text(f"- {note.removeprefix('- ')}"), (0, 0, 0, 2)) for note in notes]
    return Group(*parts)


def attention_table(explanations: Sequence[Explanation]) -> Table:
    """Return a table of each kind of attention at each context: what becomes of it, and why."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), leading=1)
    for name in ("context", "attention", "heads", "mask", "decision"):
        table.add_column(name, overflow="fold")
    for name in ("keys read", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for explanation in explanations:
        for kind in explanation.kinds:
            table.add_row(length_name(explanation.context), *_cells(kind))
    return table


def _cells(kind: Kind) -> list[Text]:
    site, costs = kind.site, kind.costs
    heads = f"{site.query_heads} q, {site.kv_heads} kv\n× {site.head_dim}"
    if site.value_head_dim not in (site.head_dim, ""):
        heads += f", values × {site.value_head_dim}"
    cache = "no cache" if site.cache == "none" else f"{site.cache} cache"
    count = Text(f"×{kind.count} {site.source}", "dim")
    return [
        Text(kind.pattern) + Text("\n") + count,
        Text(heads),
        Text(f"{site.mask}\n{cache}"),
        _decision(kind),
        Text(f"{costs.keys_read // kind.count:,}"),
        Text(f"{costs.keys // kind.count:,}"),
    ]


def _decision(kind: Kind) -> Text:
    """Return the decision with its reason and what to do about it."""
    site = kind.site
    by_design = " by design" if site.decision == "kept" and site.by_design else ""
    shown = Text(f"{site.decision}{by_design}", f"bold {STYLES[site.decision]}")
    if site.reason is None:
        return shown + Text(f"\n{site.note}" if site.note else "", "dim")
    shown += Text(f" [{site.reason.code}]") + Text(f"\n{site.reason.words}", "dim")
    return shown + Text(f"\n-> {site.reason.remedy}" if site.reason.remedy else "")


def costs_table(explanations: Sequence[Explanation]) -> Table:
    """Return a table of memory and bytes read at each context, of all attentions together."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("context")
    names = ("cache", "a token", "index", "a token", "index built in", "dense reads a step")
    for name in (*names, "this reads", "share"):
        table.add_column(name, justify="right")
    for each in explanations:
        costs = each.costs
        table.add_row(
            length_name(each.context),
            size_name(each.cache_bytes),
            size_name(each.cache_bytes / each.context),
            size_name(costs.index_bytes),
            size_name(costs.index_bytes / each.context),
            f"about {time_name(costs.index_seconds)}" if costs.index_bytes else "",
            size_name(costs.dense_bytes),
            size_name(costs.bytes_read),
            f"{costs.share:.1%}",
        )
    return table
