"""Reports: nothing left out, nothing unreadable."""

from __future__ import annotations

import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lychee_compile.passes import reasons
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.site import RejectedSite, Site
from lychee_compile.report.grouping import group_sites, reason_lines
from lychee_compile.report.name_patterns import collapse
from lychee_compile.report.report import Report

KEPT = Site(
    name="model.layers.0.self_attn",
    source="modeling_gemma3.py:275, in forward",
    form="sdpa",
    query_heads=4,
    kv_heads=1,
    head_dim=256,
    query_len=1,
    kv_len=512,
    mask="bool tensor [1, 1, 1, 512]",
    cache="static",
    reason=reasons.WITHIN_BUDGET(kv_len=512, budget=1024),
    by_design=True,
    kernel="aten.scaled_dot_product_attention",
)
SPARSE = replace(
    KEPT,
    kv_len="s44 + 1",
    mask="none",
    decision="sparse",
    reason=None,
    by_design=False,
    reads="budget 1024 of up to s44 + 1 tokens",
    kernel="lychee::decode",
)
ODD = Reason("odd-one", 'a & b < "c"', "write [red]less[/]")


def gemma():
    """18 layers, every sixth of them global."""
    return [
        replace(SPARSE if layer % 6 == 5 else KEPT, name=f"model.layers.{layer}.self_attn")
        for layer in range(18)
    ]


def expand(pattern):
    """Return all names that a pattern stands for, from what a reader takes it to mean."""
    options = []
    for piece in re.split(r"(\{[^}]*\})", pattern):
        if not piece.startswith("{"):
            options.append([piece])
            continue
        numbers = []
        for run in piece[1:-1].split(","):
            first, _, last = run.partition("-")
            numbers.extend(str(n) for n in range(int(first), int(last or first) + 1))
        options.append(numbers)
    return ["".join(parts) for parts in itertools.product(*options)]


def test_counts():
    report = Report(gemma(), "graph 1")
    assert report.counts() == {"found": 18, "sparse": 3, "exact": 0, "kept": 15}
    assert report.summary() == "graph 1: 18 attentions: 3 sparse, 15 kept"
    assert Report([KEPT]).summary() == "1 attention: 1 kept"


def test_equal_layers_share_a_row():
    text = str(Report(gemma()))
    assert "model.layers.{0-4,6-10,12-16}.self_attn" in text
    assert "model.layers.{5,11,17}.self_attn" in text
    assert re.findall(r"×\d+ ", text)[:1] == ["×15 "]
    assert "×3 " in text
    assert text.count("aten.scaled_dot_product_attention") == 1


@pytest.mark.parametrize("columns", [20, 100, 120, 400])
def test_text_is_plain_and_fits(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = str(Report(gemma(), notes=["cache written in 18 places"]))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= min(max(columns, 100), 160)
    words = set(text.split())
    assert set(KEPT.reason.words.split()) <= words
    assert set(KEPT.reason.remedy.split()) <= words
    assert set(SPARSE.reads.split()) <= words
    assert {"lychee::decode", "s44", "[within-budget]"} <= words
    assert "cache written in 18 places" in text


def test_markup_in_a_name_is_text():
    assert "[bold]x[/]" in str(Report([replace(KEPT, name="[bold]x[/]", reason=ODD)]))
    assert "-> write [red]less[/]" in str(Report([replace(KEPT, reason=ODD)]))


def test_words_of_a_remedy_stay_in_one_piece():
    reason = reasons.FUSED_MODULE()
    longest = max(reason.remedy.split(), key=len)
    assert len(longest) > 40
    assert longest in str(Report([replace(KEPT, kernel="aten.add", reason=reason)]))


def test_a_site_kept_for_two_reasons_tells_both():
    both = reasons.WITHIN_BUDGET(kv_len=9, budget=32).and_also(reasons.NO_TRITON())
    assert both.code == "within-budget"
    text = " ".join(str(Report([replace(KEPT, reason=both)])).split())
    for part in (reasons.NO_TRITON().words, reasons.NO_TRITON().remedy, "or set a smaller budget"):
        assert set(part.split()) <= set(text.replace(";", "").split())


def test_what_is_kept_by_design_is_told_from_what_is_not_supported():
    assert "kept by design [within-budget]" in str(Report([KEPT]))
    unsupported = replace(KEPT, by_design=False, reason=reasons.GRADIENTS())
    assert "kept [gradients]" in str(Report([unsupported]))
    assert Report([KEPT, unsupported, SPARSE]).unsupported() == [unsupported]
    assert reason_lines([SPARSE, unsupported, replace(unsupported, name="x")]) == [
        f"{name} (modeling_gemma3.py:275, in forward): {reasons.GRADIENTS()} [gradients]"
        for name in ("model.layers.0.self_attn", "x")
    ]


def test_a_softmax_that_is_no_attention_is_told_with_its_code():
    reason = reasons.WEIGHTS_WITHOUT_VALUES()
    rejected = [RejectedSite(f"mlp.{layer}.gate", "m.py:3, in gate", reason) for layer in (0, 1)]
    report = Report([], rejected=rejected)
    (line,) = report.rejections()
    assert line == f"- no attention: mlp.{{0-1}}.gate (m.py:3, in gate): {reason.words} [no-values]"
    assert report.to_dict()["rejected"][0]["reason"]["code"] == "no-values"


def test_rich_prints_it_with_colour():
    page = io.StringIO()
    console = Console(file=page, force_terminal=True, color_system="standard", width=120)
    console.print(Report([KEPT]))
    assert "\x1b[" in page.getvalue()
    assert "model.layers.0.self_attn" in page.getvalue()


def test_a_report_of_nothing_says_so():
    report = Report([], "graph 0", ["compiled by Inductor alone"])
    assert str(report).splitlines() == [
        "graph 0: no attention found",
        "  - compiled by Inductor alone",
    ]


def test_dictionary_survives_json():
    report = Report(gemma(), "graph 1", ["a note"])
    loaded = json.loads(json.dumps(report.to_dict()))
    told = [each.pop("reason") for each in loaded["sites"]]
    assert [reason and Reason(**reason) for reason in told] == [s.reason for s in report.sites]
    unreasoned = [replace(site, reason=None) for site in report.sites]
    assert [Site(**each) for each in loaded["sites"]] == unreasoned
    assert told[0] == {
        "code": "within-budget",
        "words": "the key length 512 is within the budget of 1024 tokens",
        "remedy": "decode a longer context, or set a smaller budget",
    }
    assert loaded["counts"] == report.counts()
    assert (loaded["graph_name"], loaded["notes"]) == ("graph 1", ["a note"])


class Page(HTMLParser):
    """Collects text and addresses, and sees that every element is closed."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.rows = 0
        self.text = ""
        self.addresses = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        self.addresses += [value for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_has_every_site(tmp_path):
    odd = replace(KEPT, name="<script>alert(1)</script>", reason=ODD)
    report = Report([*gemma(), odd], "graph <1>", ["note & more"])
    path = report.to_html(tmp_path / "report.html")
    written = path.read_text(encoding="utf-8")
    page = Page(written)
    assert page.open == []
    assert page.addresses == []
    assert "<script" not in written
    assert page.rows == 1 + len(report.sites)
    shown = [site.name for site in report.sites] + ["graph <1>", "note & more"]
    shown += [ODD.code, ODD.words, ODD.remedy, SPARSE.reads, KEPT.reason.remedy]
    assert [each for each in shown if each not in page.text] == []


def test_page_of_nothing(tmp_path):
    path = Report([]).to_html(str(tmp_path / "empty.html"))
    assert "no attention found" in Page(path.read_text()).text


def test_two_varying_numbers():
    full = [f"s.{a}.b.{b}.attn" for a in range(2) for b in range(3)]
    assert collapse(full) == [("s.{0-1}.b.{0-2}.attn", [0, 1, 2, 3, 4, 5])]
    assert collapse(full[:-1]) == [
        ("s.0.b.{0-2}.attn", [0, 1, 2]),
        ("s.1.b.{0-1}.attn", [3, 4]),
    ]


def test_a_module_called_twice():
    assert collapse(["h.0.attn", "h.0.attn"]) == [("h.0.attn", [0, 1])]
    assert collapse(["", "conv1d", ""]) == [("", [0, 2]), ("conv1d", [1])]


parts = st.sampled_from(["layers", "attn", "0", "1", "2", "10", "q2"])
names = st.lists(parts, max_size=4).map(".".join)


@given(st.lists(names, max_size=12))
def test_patterns_stand_for_exactly_their_names(given_names):
    seen = []
    for pattern, indices in collapse(given_names):
        assert set(expand(pattern)) == {given_names[index] for index in indices}
        seen.extend(indices)
    assert sorted(seen) == list(range(len(given_names)))


@given(st.lists(names, max_size=12), st.lists(st.sampled_from([KEPT, SPARSE]), max_size=12))
def test_groups_hold_each_site_once_with_equal_facts(given_names, kinds):
    sites = [replace(kind, name=name) for kind, name in zip(kinds, given_names, strict=False)]
    groups = group_sites(sites)
    members = [site for _, group in groups for site in group]
    assert sorted(map(id, members)) == sorted(map(id, sites))
    for _, group in groups:
        assert len({str(replace(site, name="")) for site in group}) == 1
