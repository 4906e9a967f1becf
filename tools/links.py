"""Relative links in Markdown pages of the repository, and where they lead."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def relative_links(page: str) -> Iterator[str]:
    """Yield the targets of the relative links in the text of a page, without their anchors."""
    for _, _, target in _LINK.findall(_CODE.sub("", page)):
        if is_relative(target):
            yield target.partition("#")[0]


def is_relative(target: str) -> bool:
    """True if a link leads to a file of the repository."""
    return not re.match(r"[a-z]+:|#|/", target)


def resolve(target: str, page: str) -> str:
    """Return the path of `target` from the root of the repository, linked from the file `page`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def rewrite_links(page: str, change: Callable[[str], str | None]) -> str:
    """Return the text of a page with `change` applied to each relative target.

    A link whose target becomes None turns into its text.
    """

    def changed(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if not is_relative(target):
            return match.group()
        path, hash_sign, anchor = target.partition("#")
        new = change(path)
        return text if new is None else f"{mark}[{text}]({new}{hash_sign}{anchor})"

    return _LINK.sub(changed, page)
