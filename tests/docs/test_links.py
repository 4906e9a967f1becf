"""Relative links of the documents lead to files that exist."""

from __future__ import annotations

import re

import pytest

from tools.links import ROOT, relative_links, resolve, rewrite_links

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("benchmarks/**/*.md")),
    *sorted(ROOT.glob("examples/*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    name = page.relative_to(ROOT).as_posix()
    broken = [
        target
        for target in relative_links(page.read_text(encoding="utf-8"))
        if not (ROOT / resolve(target, name)).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_anchors_are_headings(page):
    name = page.relative_to(ROOT).as_posix()
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", text):
        other = ROOT / resolve(target, name) if target else page
        assert anchor in slugs(other.read_text(encoding="utf-8")), f"{target}#{anchor}"


def slugs(page):
    """Return the anchors that headings of a page get."""
    headings = re.findall(r"^#+ (.*)", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in headings}


def test_links_in_code_are_none():
    assert list(relative_links("`[a](b.md)` and [c](d.md#e)\n```\n[f](g.md)\n```\n")) == ["d.md"]


def test_links_are_rewritten_and_dropped():
    page = "[a](a.md#x) [b](b.py) [c](https://c) ![d](d.png)"
    changed = rewrite_links(page, {"a.md": "new.md", "b.py": None, "d.png": "e.png"}.get)
    assert changed == "[a](new.md#x) b [c](https://c) ![d](e.png)"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []
