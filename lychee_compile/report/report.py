"""What became of every attention of a graph, for people: a table, a dictionary, a page."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lychee_compile.kernels.gpu.common.module_cache import source_of
from lychee_compile.passes.site import RejectedSite, Site
from lychee_compile.report.name_patterns import collapse

DECISIONS = ("sparse", "exact", "kept")
STYLES = {"sparse": "green", "exact": "cyan", "kept": "yellow"}


@dataclass
class Report:
    """Every attention found in a compiled graph, none left out."""

    sites: list[Site]
    graph_name: str = ""
    """Which graph this is about, in words."""
    notes: list[str] = field(default_factory=list)
    """Remarks on the graph as a whole, "no attention found"."""
    rejected: list[RejectedSite] = field(default_factory=list)
    """Softmaxes that belong to no attention: a router's, a classifier's."""

    def counts(self) -> dict[str, int]:
        """How many sites there are, in all ("found") and by decision."""
        decided = [site.decision for site in self.sites]
        return {"found": len(decided)} | {each: decided.count(each) for each in DECISIONS}

    def summary(self) -> str:
        """The counts in a line, "18 attentions: 3 sparse, 15 kept"."""
        counts = self.counts()
        found = counts.pop("found")
        noun = "attention" if found == 1 else "attentions"
        parts = ", ".join(f"{count} {decision}" for decision, count in counts.items() if count)
        line = f"{found} {noun}: {parts}" if found else "no attention found"
        return f"{self.graph_name}: {line}" if self.graph_name else line

    def rejections(self) -> list[str]:
        """A line for each kind of softmax that is no attention, with its reason."""
        alike: dict[tuple[str, str], list[str]] = {}
        for each in self.rejected:
            alike.setdefault((each.source, each.reason), []).append(each.name)
        return [
            f"- no attention: {pattern} ({source}): {reason}"
            for (source, reason), names in alike.items()
            for pattern, _ in collapse(names)
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it, in types that JSON knows."""
        return {
            "graph_name": self.graph_name,
            "counts": self.counts(),
            "notes": list(self.notes),
            "sites": [asdict(site) for site in self.sites],
            "rejected": [asdict(each) for each in self.rejected],
        }

    def sources(self) -> dict[str, str]:
        """The source of every generated kernel, by the name that sites have it under."""
        found = {site.kernel: source_of(site.kernel) for site in self.sites}
        return {kernel: source for kernel, source in found.items() if source is not None}

    def to_html(self, path: str | Path) -> Path:
        """Write a page that needs no other file, with every site in a row of its own."""
        from lychee_compile.report.html import render

        target = Path(path)
        target.write_text(render(self), encoding="utf-8")
        return target

    def __str__(self) -> str:
        """The table as plain text, as wide as the terminal, within reason."""
        columns = shutil.get_terminal_size(fallback=(120, 24)).columns
        page = io.StringIO()
        console = Console(file=page, width=min(max(columns, 100), 160), color_system=None)
        console.print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())

    def __rich__(self) -> Group:
        """The table, with sites that differ in nothing but their name in one row."""
        parts: list[Any] = [Text(self.summary(), style="bold")]
        if self.sites:
            parts.append(_table(self.sites))
        parts.extend(Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in self.rejections())
        parts.extend(Padding(Text(f"- {note}"), (0, 0, 0, 2)) for note in self.notes)
        return Group(*parts)


def group_sites(sites: Sequence[Site]) -> list[tuple[str, list[Site]]]:
    """Sites equal but for their names, in order of appearance, each group with its name pattern."""
    alike: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        facts = tuple(value for name, value in vars(site).items() if name != "name")
        alike.setdefault(facts, []).append(site)
    groups = []
    for members in alike.values():
        for pattern, indices in collapse([site.name for site in members]):
            groups.append((pattern, [members[index] for index in indices]))
    return groups


def _table(sites: Sequence[Site]) -> Table:
    groups = group_sites(sites)
    # Names and operators stay in one piece where they can; masks and reasons are prose and wrap.
    name_width = max(*(len(pattern) for pattern, _ in groups), 16)
    kernel_width = max(*(len(site.kernel) for site in sites), 28)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), leading=1)
    table.add_column("attention", overflow="fold", width=min(name_width, 40))
    table.add_column("form, heads", overflow="fold")
    table.add_column("tokens", overflow="fold")
    table.add_column("score, mask, cache", overflow="fold")
    table.add_column("decision", overflow="fold", width=min(kernel_width, 48))
    for pattern, members in groups:
        table.add_row(*_cells(pattern, members))
    return table


def _cells(pattern: str, members: Sequence[Site]) -> list[Text]:
    site = members[0]
    count = f"×{len(members)} " if len(members) > 1 else ""
    decision = Text(site.decision, style=f"bold {STYLES.get(site.decision, '')}")
    return [
        _lines(Text(pattern or "(unnamed)"), Text(f"{count}{site.source}", style="dim")),
        Text(f"{site.form}\n{site.query_heads} q, {site.kv_heads} kv\n× {site.head_dim}"),
        Text(f"{site.query_len} q\n{site.kv_len} kv"),
        Text(f"{site.score}\n{_named(site.mask, 'mask')}\n{_named(site.cache, 'cache')}"),
        _lines(decision, Text(site.kernel), Text(site.reason, style="dim")),
    ]


def _lines(*parts: Text) -> Text:
    return Text("\n").join(part for part in parts if part.plain)


def _named(kind: str, noun: str) -> str:
    """No cache, static cache; a mask that is described in several words needs no noun."""
    if kind == "none":
        return f"no {noun}"
    return f"{kind} {noun}" if kind.isalpha() else kind
