"""A hook of mkdocs: pages of the repository outside docs/ become pages of the site.

A link from a page to such a file works in the repository and on the site. A link to a file that is
no page, such as source code, becomes plain text on the site.
"""

from __future__ import annotations

import posixpath
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # mkdocs runs hooks by their path

from mkdocs.structure.files import File

from tools.links import ROOT, resolve, rewrite_links

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

FOLDER = "repository"
"""Folder of the site for pages outside docs/."""
PUBLISHED = (
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "benchmarks/results/figures/*",
    "examples/README.md",
)
"""Files outside docs/ that are part of the site."""


def published() -> list[str]:
    """Return the paths of all files outside docs/ that the site has."""
    found = [path for pattern in PUBLISHED for path in sorted(ROOT.glob(pattern))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the published files to those of the site."""
    for path in published():
        files.append(File.generated(config, f"{FOLDER}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Return the page with links to published files outside docs/ leading to their pages."""
    uri = page.file.src_uri
    outside = uri.startswith(f"{FOLDER}/")
    source = uri.removeprefix(f"{FOLDER}/") if outside else f"docs/{uri}"

    def on_site(target: str) -> str | None:
        path = resolve(target, source)
        in_docs = path.startswith("docs/")
        path = path.removeprefix("docs/") if in_docs else f"{FOLDER}/{path}"
        if not in_docs and files.get_file_from_path(path) is None:
            return None
        return posixpath.relpath(path, posixpath.dirname(uri))

    return rewrite_links(markdown, on_site)
