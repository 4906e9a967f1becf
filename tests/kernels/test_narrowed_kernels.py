"""Kernels by which chunks narrow a long context of "lychee" choose as the plain form does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton_interpreter
from decode_problems import Sizes
from level_fits import table_of
from level_steps import follow
from narrowed_steps import NarrowedCase, NarrowedSteps, short_contexts

from lychee_compile.kernels.gpu.lychee.layout import (
    NARROWED_ROW,
    NARROWED_SLOTS,
    SketchLayout,
)
from lychee_compile.kernels.gpu.lychee.narrowed import narrows
from lychee_compile.kernels.gpu.methods import layout_for
from lychee_compile.kernels.gpu.owners import _moved
from lychee_compile.kernels.levels.groups import GroupSettings

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def short(request: pytest.FixtureRequest) -> Iterator[None]:
    if "alone_decide" in request.node.name:
        yield  # lengths are as they are
        return
    with short_contexts():
        yield


CASES = {
    "plain": (NarrowedCase("lychee", Sizes(1, 2, 2, 1, 230, 16, 16), budget=24), 200),
    "rows": (
        NarrowedCase(
            "lychee", Sizes(2, 1, 4, 1, 220, 24, 16), budget=30, mask="rows", dtype="float16"
        ),
        180,
    ),
    "two positions": (
        NarrowedCase(
            "lychee", Sizes(1, 1, 3, 2, 200, 16, 16), budget=24, recent=3, score="soft-cap"
        ),
        150,
    ),
    "mask": (
        NarrowedCase(
            "lychee", Sizes(1, 1, 2, 1, 220, 16, 16), budget=40, mask="mask", overfetch=3, seed=3
        ),
        200,
    ),
    "window": (
        NarrowedCase(
            "lychee", Sizes(2, 1, 1, 1, 200, 16, 16), budget=28, mask="padded", chunk=(3, 7)
        ),
        160,
    ),
    "few are seen": (
        NarrowedCase("lychee", Sizes(1, 1, 1, 1, 220, 16, 16), budget=24, flat_tokens=190),
        120,
    ),
}
HISTORIES = [["step", "rewind far", "refit"], ["written by another", "step", "rewind"]]
"""Events before steps; cases take them in turn."""


@pytest.mark.parametrize("name", list(CASES))
def test_kernels_choose_as_the_plain_form_does(name):
    case, length = CASES[name]
    follow(NarrowedSteps(case, length), HISTORIES[list(CASES).index(name) % 2])


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(CASES))
def test_kernels_choose_as_the_plain_form_does_for_long(name):
    case, length = CASES[name]
    follow(NarrowedSteps(case, length), [*HISTORIES[0], *HISTORIES[1], *HISTORIES[0]])


@pytest.mark.thorough
def test_chunks_are_followed_while_the_context_is_scanned_flat():
    case = NarrowedCase("lychee", Sizes(2, 2, 1, 1, 150, 16, 16), mask="rows", chunk=(3, 7))
    steps = NarrowedSteps(case, 90)
    for slots in (1000, 20):  # of both ways to look for tokens
        case.flat_tokens = slots
        for _ in range(9):
            steps.write()
            steps.decode()
            steps.length += 1
    end = torch.tensor([steps.length, steps.length - 5])
    span, used = table_of(steps.index, 2)
    once = case.at_once(steps.key, end)
    for head in range(2):
        found = torch.where(used, span, 0)[:, head, : once.span.shape[1]]
        assert torch.equal(found, once.span)


@pytest.mark.parametrize(("mask", "expected"), [("causal", True), ("mask by head", False)])
def test_chunks_follow_what_each_site_writes_though_not_all_can_narrow(mask, expected):
    case = NarrowedCase("lychee", Sizes(1, 1, 2, 1, 100, 16, 16), mask=mask, chunk=(3, 7))
    problem = case.problem(90)
    module = problem.module()
    name = module.__name__.rpartition(".")[2]
    assert hasattr(module, "index_chunks")
    layout = layout_for(name, problem.key)
    assert narrows(module, layout, 100) is expected
    assert (layout.settings == case.settings) is expected
    assert not narrows(module, layout, case.flat_tokens)


def test_an_index_that_grows_knows_how_many_chunks_were_clustered():
    steps = NarrowedSteps(NarrowedCase("lychee", Sizes(1, 1, 1, 1, 150, 16, 16)), 120)
    larger = _moved(steps.sketches, steps.sketches.layout.resized(1024))
    assert larger.chunks.clustered == steps.sketches.chunks.clustered > 0
    ends = [steps.length + 16]
    larger.refit(steps.case.problem(120).module(), steps.key, ends)
    assert larger.chunks.clustered == steps.sketches.chunks.clustered, "no chunk is new"


def long_key(batch, slots):
    return torch.empty(batch, 8, slots, 128, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("batch", "slots", "flat_tokens", "expected"),
    [
        (1, NARROWED_SLOTS // 8, 65536, True),
        (1, NARROWED_SLOTS // 8 - 512, 65536, False),
        (16, NARROWED_ROW, 65536, True),
        (64, NARROWED_ROW - 512, 65536, False),
        (1, 2**23, 2**23, False),
        (1, 2**23, 2**22, True),
    ],
)
def test_sizes_alone_decide_if_chunks_narrow(batch, slots, flat_tokens, expected):
    key, settings = long_key(batch, slots), GroupSettings(chunk=(4, 9))
    layout = SketchLayout.over(key, settings, flat_tokens)
    assert (layout.settings is not None) is expected
    assert SketchLayout.over(key).settings is None
    assert (layout.size > SketchLayout.over(key).size) is expected, "nothing is built in vain"
    assert layout.of(long_key(batch, slots)) == layout
    if expected:
        assert layout.chunks is not None
        assert layout.chunks.settings == settings
