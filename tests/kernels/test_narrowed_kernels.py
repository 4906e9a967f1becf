"""Kernels by which chunks narrow a long context of "lychee", interpreted, choose as the plain form."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import triton_interpreter
from decode_problems import Sizes
from level_steps import follow
from narrowed_steps import NarrowedCase, NarrowedSteps, short_contexts

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def short() -> Iterator[None]:
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
HISTORY = ["step", "rewind far", "step", "refit", "written by another"]


@pytest.mark.parametrize("name", list(CASES))
def test_kernels_choose_as_the_plain_form_does(name):
    case, length = CASES[name]
    follow(NarrowedSteps(case, length), HISTORY)
