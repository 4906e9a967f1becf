"""The catalogue of reasons: stable, complete, and filled in with the facts that it asks for."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

import lychee_compile
from lychee_compile.passes import reasons
from lychee_compile.passes.reasons import Group, Reason, ReasonedError, ReasonKind

PACKAGE = Path(lychee_compile.__file__).parent
FIELD = re.compile(r"\{(\w+)[^}]*\}")
NAMES = {name: kind for name, kind in vars(reasons).items() if isinstance(kind, ReasonKind)}


def fields_of(kind: ReasonKind) -> set[str]:
    return set(FIELD.findall(kind.template + kind.remedy))


def uses() -> Iterator[tuple[str, ast.AST, ast.AST | None]]:
    """Yield every `reasons.NAME` in the package, with the node around it."""
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        around = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "reasons":
                yield node.attr, node, around.get(node)


def test_codes_are_kebab_case_and_differ() -> None:
    codes = [kind.code for kind in reasons.ALL]
    assert len(set(codes)) == len(codes) == len(NAMES)
    assert [code for code in codes if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)] == []


def test_every_reason_is_used_and_gets_the_facts_that_it_asks_for() -> None:
    seen = set()
    for name, node, parent in uses():
        if name not in NAMES:
            continue
        seen.add(name)
        if isinstance(parent, ast.Call) and parent.func is node:
            given = {keyword.arg for keyword in parent.keywords}
            assert given == fields_of(NAMES[name]), name
            assert not parent.args, name
    assert seen == set(NAMES)


@pytest.mark.parametrize("kind", reasons.ALL, ids=lambda kind: kind.code)
def test_words_read_well_in_a_table(kind: ReasonKind) -> None:
    for text in (kind.template, kind.remedy):
        assert text == text.strip()
        assert not text.endswith(".")
        assert "|" not in text
        assert "\n" not in text
    assert kind.template


def test_a_reason_as_text_has_its_remedy() -> None:
    reason = reasons.EPSILON_NO_KERNEL(epsilon=0.1)
    assert reason == Reason(
        "epsilon-no-kernel",
        "no GPU kernel of a prefill supports epsilon (got 0.1)",
        "set epsilon=None, or reference=True for the slow PyTorch path",
    )
    assert str(reason) == f"{reason.words}; {reason.remedy}"
    assert str(reasons.CACHE_ROLLS()) == reasons.CACHE_ROLLS().words
    assert str(ReasonedError(reason)) == str(reason)
    with pytest.raises(KeyError, match="epsilon"):
        reasons.EPSILON_NO_KERNEL()


WITHIN = reasons.BELOW_PREFILL_FROM(kv_len=512, prefill_from=1024)
TEXT = f"{WITHIN.words}; {WITHIN.remedy}"


@pytest.mark.parametrize(
    "taken",
    [
        lambda reason: reason[:20],
        lambda reason: reason[-1],
        len,
        lambda reason: "below prefill_from=1024" in reason,
        lambda reason: reason.startswith("the key length"),
        lambda reason: reason.upper().split(),
        lambda reason: f"{reason:>120.40}",
        lambda reason: re.search(r"prefill_from to (\d+)", reason)[1],
        lambda reason: json.dumps({"reason": reason}),
        lambda reason: sorted([reason, "a", "z"]),
        lambda reason: {reason: 1}[TEXT],
        lambda reason: "- " + reason,
    ],
)
def test_a_reason_can_be_used_as_its_text(taken: Callable[[str], object]) -> None:
    assert taken(WITHIN) == taken(TEXT)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize("reason", [WITHIN, reasons.CACHE_ROLLS()])
def test_a_copy_of_a_reason_has_its_parts(
    copied: Callable[[Reason], Reason], reason: Reason
) -> None:
    made = copied(reason)
    assert type(made) is Reason
    assert asdict(made) == asdict(reason)
    assert made == reason


def test_two_reasons_are_one_with_the_code_of_the_first() -> None:
    first, second = reasons.GRADIENTS(), reasons.CACHE_ROLLS()
    both = first.and_also(second)
    assert both == Reason("gradients", f"{first.words}; {second.words}", first.remedy)
    assert first.and_also(first).remedy == first.remedy


def test_an_error_in_brief_is_one_line() -> None:
    assert reasons.brief(ValueError("this\nthat")) == "ValueError: this"
    assert reasons.brief(ValueError()) == "ValueError"


def test_markdown_has_a_table_for_each_group_and_a_row_for_each_kind() -> None:
    page = reasons.as_markdown()
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == list(Group)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [
        kind.code for group in Group for kind in reasons.ALL if kind.group is group
    ]
    assert all(row.count("|") == 4 for row in rows)
    assert "*kv_len*" in page
    assert not re.search(r"[{}]", page)
