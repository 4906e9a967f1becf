"""The whole report on ten architectures, as text, in tests/golden: what changes is seen.

    UPDATE_GOLDEN=1 python -m pytest tests/backend/test_golden.py

writes the texts anew; `git diff tests/golden` then shows what a change did to them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lychee_compile
from benchmarks.coverage import calls as coverage_calls
from benchmarks.coverage import models as coverage_models
from lychee_compile.passes.site import Site
from lychee_compile.report.grouping import group_sites
from lychee_compile.report.report import Report

pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[1] / "golden"

ARCHITECTURES = {each.name: each for each in coverage_models.ARCHITECTURES}
OPTIONS = {"budget": 12, "sinks": 2, "recent": 4, "chunk": (2, 4)}
CALLS = {
    "llama": ["sdpa forward", "sdpa static", "sdpa dynamic"],
    "gpt2": ["eager forward", "eager static", "sdpa dynamic"],
    "gemma2": ["eager forward", "eager static"],
    "gemma3": ["sdpa forward", "sdpa static", "eager dynamic"],
    "gpt_oss": ["eager forward", "eager static"],
    "bloom": ["eager forward", "eager static"],
    "t5": ["sdpa forward", "eager forward", "eager static"],
    "bert": ["sdpa forward", "eager forward"],
    "deepseek_v3": ["eager forward", "sdpa static"],
    "whisper": ["sdpa forward", "eager static"],
}
"""Attention implementations of transformers, and calls of `benchmarks.coverage.calls`."""
SELDOM = {"gpt_oss", "llama", "gemma2", "gemma3", "gpt2", "bloom", "t5", "deepseek_v3", "whisper"}
"""Architectures left to the thorough tests, since others that are tried are of the same kind."""
SECTIONS = {
    "forward": "a forward pass",
    "static": "a decoding step over a static cache",
    "dynamic": "a decoding step over a dynamic cache",
}

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=pytest.mark.thorough if each in SELDOM else ()) for each in CALLS],
)
def test_the_report_reads_as_it_did(name: str) -> None:
    got = "\n".join(section(name, *call.split()) for call in CALLS[name])
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(got, encoding="utf-8")
    assert got == file.read_text(encoding="utf-8")


def test_no_text_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(CALLS)


def section(name: str, implementation: str, phase: str) -> str:
    """Return the report on one call of an architecture, as text under a heading."""
    architecture = ARCHITECTURES[name]
    model = architecture.build(implementation)
    given = coverage_calls.arguments(model, architecture, phase)
    torch.manual_seed(0)
    report = lychee_compile.explain(model, options=OPTIONS, **given)
    heading = f"{name} ({implementation}), {SECTIONS[phase]}"
    return "\n".join([f"=== {heading}: {report.summary()}", *_lines(report)]) + "\n"


def _lines(report: Report) -> Iterator[str]:
    for pattern, sites in group_sites(report.sites):
        yield f"\n{pattern} ({len(sites)})" if len(sites) > 1 else f"\n{pattern}"
        yield from (f"    {name:<9} {value}" for name, value in _facts(sites[0]))
    for each in dict.fromkeys((_unnumbered(each.source), each.reason) for each in report.rejected):
        source, reason = each
        yield f"\nno attention: {source}\n    {reason.code}: {reason}"
    yield from (f"\nnote: {note}" for note in report.notes)


def _facts(site: Site) -> Iterator[tuple[str, object]]:
    """Yield what is known of a site, by name; line numbers, which releases move, are left out."""
    yield "source", _unnumbered(site.source)
    yield "form", site.form
    sizes = f"{site.head_dim}" if site.value_head_dim == site.head_dim else ""
    sizes = sizes or f"{site.head_dim}, of values {site.value_head_dim}"
    yield "heads", f"{site.query_heads} of queries, {site.kv_heads} of keys, of size {sizes}"
    yield "lengths", f"{site.query_len} of queries, {site.kv_len} of keys"
    yield "score", site.score + ("" if site.monotone else " (not proved to grow with s)")
    yield "mask", site.mask
    yield "visible", site.predicate or "all"
    yield "keys", site.key_range
    yield "cache", site.cache
    yield "decision", f"{site.decision}{', by design' * site.by_design}"
    if site.reason is None:
        yield "reads", site.reads
    else:
        yield "why", f"{site.reason.code}: {site.reason.words}"
        yield "remedy", site.reason.remedy or "none"
    yield "kernel", site.kernel


def _unnumbered(source: str) -> str:
    return re.sub(r"\.py:\d+", ".py", source)
