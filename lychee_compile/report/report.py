"""Report on every attention of a graph, as a table, a dictionary or a page."""

from __future__ import annotations

import io
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from lychee_compile.kernels.gpu.common.module_cache import source_of
from lychee_compile.passes.site import Decision, RejectedSite, Site
from lychee_compile.report.grouping import rejection_lines
from lychee_compile.report.html import render
from lychee_compile.report.table import site_table


@dataclass
class Report:
    """Every attention found in a compiled graph, none left out."""

    sites: list[Site]
    graph_name: str = ""
    """Name of the graph that this report is about, in words."""
    notes: list[str] = field(default_factory=list)
    """Remarks on the graph as a whole: "2 graphs: the model breaks the graph", or which options
    have no effect on the device at hand."""
    rejected: list[RejectedSite] = field(default_factory=list)
    """Softmaxes that belong to no attention: a router's, a classifier's."""

    def counts(self) -> dict[str, int]:
        """Return the number of sites, in all ("found") and by decision."""
        decided = [site.decision for site in self.sites]
        return {"found": len(decided)} | {each: decided.count(each) for each in get_args(Decision)}

    def summary(self) -> str:
        """Return the counts in a line, "18 attentions: 3 sparse, 15 kept"."""
        counts = self.counts()
        found = counts.pop("found")
        noun = "attention" if found == 1 else "attentions"
        parts = ", ".join(f"{count} {decision}" for decision, count in counts.items() if count)
        line = f"{found} {noun}: {parts}" if found else "no attention found"
        return f"{self.graph_name}: {line}" if self.graph_name else line

    def rejections(self) -> list[str]:
        """Return a line for each kind of softmax that is no attention, with its reason."""
        return rejection_lines(self.rejected)

    def unsupported(self) -> list[Site]:
        """Return the sites that are kept, but not by design."""
        return [site for site in self.sites if site.decision == "kept" and not site.by_design]

    def to_dict(self) -> dict[str, Any]:
        """Return the report in types that JSON knows.

        Keys are `graph_name`, `counts` (of `counts`), `notes`, `sites` and `rejected`. A site is a
        dictionary of the fields of `Site`, a softmax in `rejected` of those of `RejectedSite`.
        Their `reason` is a dictionary of `code`, `words` and `remedy`, all of them str, or None for
        a site that is sparse: compare codes, which are stable, and show words and remedies.
        """
        return {
            "graph_name": self.graph_name,
            "counts": self.counts(),
            "notes": list(self.notes),
            "sites": [asdict(site) for site in self.sites],
            "rejected": [asdict(each) for each in self.rejected],
        }

    def sources(self) -> dict[str, str]:
        """Return the source of every generated kernel, by the name that sites give as `kernel`."""
        found = {site.kernel: source_of(site.kernel) for site in self.sites}
        return {kernel: source for kernel, source in found.items() if source is not None}

    def to_html(self, path: str | Path) -> Path:
        """Write a page that needs no other file, with every site in a row of its own."""
        target = Path(path)
        page = render(self.summary(), self.notes, self.sites, self.rejections(), self.sources())
        target.write_text(page, encoding="utf-8")
        return target

    def __str__(self) -> str:
        """Return the table as plain text, as wide as the terminal but from 100 to 160 columns."""
        columns = shutil.get_terminal_size(fallback=(120, 24)).columns
        page = io.StringIO()
        console = Console(file=page, width=min(max(columns, 100), 160), color_system=None)
        console.print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())

    def __rich__(self) -> Group:
        """Return the table, with sites that differ in nothing but their name in one row."""
        parts: list[RenderableType] = [Text(self.summary(), style="bold")]
        if self.sites:
            parts.append(site_table(self.sites))
        parts.extend(Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in self.rejections())
        parts.extend(Padding(Text(f"- {note}"), (0, 0, 0, 2)) for note in self.notes)
        return Group(*parts)
