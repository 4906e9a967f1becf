"""The table of a report, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lychee_compile.passes.site import Decision, Site
from lychee_compile.report.grouping import group_sites

STYLES: dict[Decision, str] = {"sparse": "green", "exact": "cyan", "kept": "yellow"}
"""Colour of each decision."""

LONGEST_FORMULA = 100
"""Largest number of letters of a formula of keys or values that is shown."""


def site_table(sites: Sequence[Site]) -> Table:
    """Return a table of sites, with those that differ in nothing but their name in one row."""
    groups = group_sites(sites)
    # Names and operators stay in one piece if they can; masks and reasons are prose and wrap.
    words = (word for pattern, (site, *_) in groups for word in (pattern, *site.source.split()))
    name_width = max(*map(len, words), 16)
    kernel_width = max(*(len(word) for site in sites for word in _unbroken(site)), 28)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), leading=1)
    table.add_column("attention", overflow="fold", width=min(name_width, 40))
    table.add_column("form, heads", overflow="fold")
    table.add_column("tokens", overflow="fold")
    table.add_column("score, mask, cache", overflow="fold")
    table.add_column("decision", overflow="fold", width=min(kernel_width, 48))
    for pattern, members in groups:
        table.add_row(*_cells(pattern, members))
    return table


def _unbroken(site: Site) -> list[str]:
    """Return the kernel and the words of the remedy, which people copy."""
    remedy = site.reason.remedy if site.reason is not None else ""
    return [site.kernel, *remedy.split()]


def _cells(pattern: str, members: Sequence[Site]) -> list[Text]:
    site = members[0]
    count = f"×{len(members)} " if len(members) > 1 else ""
    return [
        _lines(Text(pattern or "(unnamed)"), Text(f"{count}{site.source}", style="dim")),
        Text(f"{site.form}\n{site.query_heads} q, {site.kv_heads} kv\n× {site.head_dim}"),
        Text(f"{site.query_len} q\n{site.kv_len} kv"),
        _lines(
            Text(f"{site.score}\n{_named(site.mask, 'mask')}\n{_named(site.cache, 'cache')}"),
            _formula("keys", site.keys),
            _formula("values", site.values),
        ),
        _decision(site),
    ]


def _formula(noun: str, words: str) -> Text:
    """Return how keys or values are computed, unless that is long."""
    return Text(f"{noun} {words}" if 0 < len(words) <= LONGEST_FORMULA else "", style="dim")


def _decision(site: Site) -> Text:
    """Return the decision with its code, the kernel, why, and what to do about it."""
    by_design = " by design" if site.decision == "kept" and site.by_design else ""
    head = Text(f"{site.decision}{by_design}", style=f"bold {STYLES[site.decision]}")
    if site.reason is None:
        reads, note = Text(site.reads, style="dim"), Text(site.note, style="dim")
        return _lines(head, Text(site.kernel), reads, note)
    head.append(f" [{site.reason.code}]", style="not bold")
    remedy = f"-> {site.reason.remedy}" if site.reason.remedy else ""
    return _lines(head, Text(site.kernel), Text(site.reason.words, style="dim"), Text(remedy))


def _lines(*parts: Text) -> Text:
    return Text("\n").join(part for part in parts if part.plain)


def _named(kind: str, noun: str) -> str:
    """Return "no cache" or "static cache"; a mask of several words needs no noun."""
    if kind == "none":
        return f"no {noun}"
    return f"{kind} {noun}" if kind.isalpha() else kind
