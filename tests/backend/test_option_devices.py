"""Options that have no effect on a device, and the notes about them in a report."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lychee_compile
from lychee_compile.option_devices import OPTION_DEVICES, without_effect
from lychee_compile.options import Options

SIZE = 100
UNLESS_HUGE = ", unless a cache has millions of slots"
OPERANDS = torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, SIZE, 8)


TOO_FEW_TO_DRAW = (
    "option prefill_coverage has no effect with prefill_budget=511: keys are drawn from a budget "
    "of 512 on"
)


def test_the_table_names_every_option() -> None:
    assert set(OPTION_DEVICES) == {each.name for each in dataclasses.fields(Options)}
    assert all(OPTION_DEVICES.values())


@pytest.mark.parametrize(
    ("options", "devices", "notes"),
    [
        ({}, {"cpu"}, []),
        ({}, {"cuda"}, []),
        ({"chunk": (2, 4)}, {"cpu"}, []),
        ({"chunk": (2, 4)}, {"cuda"}, [f"option chunk has no effect on a GPU{UNLESS_HUGE}"]),
        ({"repair": False}, {"cuda"}, ["option repair has no effect on a GPU"]),
        ({"chunk": (2, 4), "policy": "quest"}, {"cuda"}, ["option chunk has no effect on a GPU"]),
        ({"chunk": (2, 4)}, {"cpu", "cuda"}, []),
        ({"chunk": (2, 4), "policy": "lycheecluster"}, {"cuda"}, []),
        ({"chunk": (2, 4)}, set(), []),
        ({"chunk": (8, 16), "seed": 0}, {"cuda"}, []),
        (
            {"seed": 3, "repair": False, "chunk": (2, 4), "budget": 99},
            {"cuda"},
            [f"options chunk, seed and repair have no effect on a GPU{UNLESS_HUGE}"],
        ),
        (
            {"tokenizer": torch.ones(9, dtype=torch.uint8), "boundaries": "tokens"},
            {"cuda"},
            [f"options boundaries and tokenizer have no effect on a GPU{UNLESS_HUGE}"],
        ),
        ({"coverage": 0.9}, {"cpu", "cuda"}, []),
        (
            {"coverage": 0.9, "policy": "streaming"},
            {"cpu"},
            ["option coverage has no effect with policy='streaming', which ranks nothing"],
        ),
        (
            {"draw": True, "budget": None},
            {"cpu"},
            ["option draw has no effect with budget=None, which reads all tokens"],
        ),
        (
            {"prefill_coverage": 0.9, "prefill_budget": 511},
            {"cuda"},
            [TOO_FEW_TO_DRAW],
        ),
        ({"prefill_coverage": 0.9}, {"cuda"}, []),
        ({"reference": True}, {"cpu"}, ["option reference has no effect on a CPU"]),
    ],
)
def test_options_set_in_vain_are_told(
    options: dict[str, Any], devices: set[Any], notes: list[str]
) -> None:
    assert list(without_effect(Options(**options), devices)) == notes


def explained(**options: Any) -> lychee_compile.Report:
    return lychee_compile.explain(F.scaled_dot_product_attention, *OPERANDS, options=options)


@torch.no_grad()
def test_a_report_notes_them_in_text_and_data(tmp_path: Any) -> None:
    note = "option reference has no effect on a CPU"
    report = explained(reference=True, chunk=(2, 4))
    assert report.notes == [note]
    assert note in str(report)
    assert report.to_dict()["notes"] == [note]
    assert note in report.to_html(tmp_path / "report.html").read_text()
    assert explained(chunk=(2, 4)).notes == []


@torch.no_grad()
def test_graphs_without_attention_have_no_notes() -> None:
    report = lychee_compile.explain(torch.tanh, torch.ones(3), options={"reference": True})
    assert report.notes == []


@torch.no_grad()
def test_a_note_comes_once_for_several_graphs() -> None:
    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        attended = F.scaled_dot_product_attention(*inputs)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(attended, *inputs[1:])

    report = lychee_compile.explain(broken, *OPERANDS, options={"reference": True})
    assert [note for note in report.notes if "reference" in note] == [report.notes[-1]]


@torch.no_grad()
def test_kernels_use_fewer_options(kernels_on_cpu: None) -> None:
    assert explained(seed=1).notes == [f"option seed has no effect on a GPU{UNLESS_HUGE}"]
