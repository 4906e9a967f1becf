"""Docstrings begin as sentences or noun phrases do, and ruled-out words appear nowhere."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tools.links import ROOT

FOLDERS = ("lychee_compile", "benchmarks", "examples", "tools", "tests")
PAGES = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/*.md", "lychee_compile/**/*.md")
FRAGMENT = r"\s*(What|Whether|Of|And|In|From|Those|As|Which|How|Where|That|Likewise)\b"
"""Pattern of first words that make a docstring a part of a sentence."""
RULED_OUT = re.compile(r"\bin\s+any\s+case\b|\bwhole\s+sequences?\b", re.IGNORECASE)
"""Pattern of words with a plainer substitute: "always", "prefill"."""
QUOTED = re.compile(r'"[^"]*"')
"""Pattern of words of others, such as messages, that a text repeats."""


def sources() -> Iterator[tuple[Path, str]]:
    """Yield paths and texts of all Python files but generated ones."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "golden" not in path.parts:
                yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def pages() -> Iterator[tuple[Path, str]]:
    """Yield paths and texts of all documents; only the newest version of the changelog."""
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        if path.name == "CHANGELOG.md":
            text = "\n## ".join(text.split("\n## ")[:2])
        yield path.relative_to(ROOT), text


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield lines and texts of all docstrings, those below an assignment among them."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def comments(source: str) -> str:
    """Return the comments of a source, without their marks, so that they may be searched as one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(each.string.lstrip("# ") for each in tokens if each.type == tokenize.COMMENT)


def is_ruled_out(text: str) -> bool:
    return RULED_OUT.search(QUOTED.sub("", text)) is not None


def fragments(source: str) -> list[int]:
    """Return the lines of docstrings that begin as a part of a sentence."""
    if not re.search(rf"[\"']\\?{FRAGMENT}", source):  # parsing all files would take seconds
        return []
    return [line for line, text in docstrings(source) if re.match(FRAGMENT, text)]


def ruled_out(source: str) -> bool:
    """True if a docstring or a comment of a source has words that are ruled out."""
    if not RULED_OUT.search(source.replace("#", " ")):
        return False
    texts = [text for _, text in docstrings(source)]
    return any(map(is_ruled_out, [*texts, comments(source)]))


def test_no_docstring_begins_as_a_part_of_a_sentence():
    found = [f"{path}:{line}" for path, source in sources() for line in fragments(source)]
    assert found == []


def test_no_docstring_or_comment_has_ruled_out_words():
    assert [str(path) for path, source in sources() if ruled_out(source)] == []


def test_no_document_has_ruled_out_words():
    assert [str(path) for path, text in pages() if is_ruled_out(text)] == []


def test_parts_of_sentences_are_found():
    source = 'x = 1\n"""Whether it is so."""\n\n\ndef f():\n    """\n    As others do.\n    """\n'
    assert fragments(source) == [2, 6]
    assert fragments('"""Whatever is asked."""\nx = "What"\n') == []


def test_ruled_out_words_are_found():
    assert ruled_out('"""Read in any\n\n    case."""\n')
    assert ruled_out("# A whole\n# sequence.\n")
    assert not ruled_out("'''It says \"a whole sequence\".'''\nx = 'in any case'\n")
