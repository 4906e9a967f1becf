"""Render a report as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from lychee_compile.passes.site import Site

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --sparse: #1a7f37; --exact: #0969da;
  --kept: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --sparse: #56d364; --exact: #79c0ff;
  --kept: #e3b341; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.5rem;
  max-width: 110rem; }
h1 { font-size: 1.35rem; margin-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; position: sticky; top: 0; background: Canvas; }
th, td { padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { white-space: nowrap; }
code { font: 13px/1.45 ui-monospace, monospace; }
.soft { color: var(--soft); font-size: 13px; }
.why { min-width: 20rem; }
.sparse, .exact, .kept { font-weight: 600; }
.sparse { color: var(--sparse); } .exact { color: var(--exact); } .kept { color: var(--kept); }
"""

HEADINGS = (
    "attention",
    "form",
    "heads",
    "tokens",
    "score",
    "mask",
    "cache",
    "decision",
    "why, and what to do",
    "kernel",
)
"""Columns of the table of sites."""


def render(
    summary: str,
    notes: Sequence[str],
    sites: Sequence[Site],
    rejections: Sequence[str],
    sources: Mapping[str, str],
) -> str:
    """Return the page: summary, notes, a row for every site, rejections and generated kernels.

    `rejections` has a line for each kind of softmax that is no attention, `sources` the source of
    each generated kernel by name.
    """
    title = escape(summary)
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + (f"<ul>{listed}</ul>\n" if listed else "")
        + (_table(sites) if sites else "")
        + "".join(f'<p class="soft">{escape(line)}</p>\n' for line in rejections)
        + "".join(_kernel(*each) for each in sources.items())
        + "</body>\n</html>\n"
    )


def _kernel(name: str, source: str) -> str:
    """Return a generated kernel that is shown when its name is clicked."""
    return (
        f"<details><summary><code>{escape(name)}</code></summary>"
        f"<pre><code>{escape(source)}</code></pre></details>\n"
    )


def _table(sites: Sequence[Site]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    rows = "".join(_row(site) for site in sites)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table></div>\n"
    )


def _mask(site: Site) -> str:
    """Return the mask in words, and below them its condition on each key."""
    detail = f'<br><code class="soft">{escape(site.predicate)}</code>' if site.predicate else ""
    return f"{escape(site.mask)}{detail}"


def _why(site: Site) -> str:
    """Return the reason of a site with its code and remedy, or how much a sparse one reads."""
    if site.reason is None:
        return escape(site.reads) + (f"<br>{escape(site.note)}" if site.note else "")
    remedy = f"<br>&rarr; {escape(site.reason.remedy)}" if site.reason.remedy else ""
    code = f'<code class="soft">{escape(site.reason.code)}</code>'
    return f"{escape(site.reason.words)}{remedy}<br>{code}"


def _row(site: Site) -> str:
    heads = (
        f"{escape(str(site.query_heads))} query, {escape(str(site.kv_heads))} KV"
        f"<br>of {escape(str(site.head_dim))}"
    )
    tokens = f"{escape(str(site.query_len))} query<br>{escape(str(site.kv_len))} KV"
    by_design = " by design" if site.decision == "kept" and site.by_design else ""
    name = escape(site.name) or "(unnamed)"
    source = f'<span class="soft">{escape(site.source)}</span>'
    cells = (
        f"<td><code>{name}</code><br>{source}</td>",
        f"<td>{escape(site.form)}</td>",
        f'<td class="number">{heads}</td>',
        f'<td class="number">{tokens}</td>',
        f"<td><code>{escape(site.score)}</code></td>",
        f"<td>{_mask(site)}</td>",
        f"<td>{escape(site.cache)}</td>",
        f'<td class="{site.decision}">{site.decision}{by_design}</td>',
        f'<td class="why">{_why(site)}</td>',
        f"<td><code>{escape(site.kernel)}</code></td>",
    )
    return f"<tr>{''.join(cells)}</tr>\n"
