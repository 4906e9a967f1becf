"""Kernels of declared policies, interpreted, choose what the plain form does, up to ties."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import triton_interpreter
from decode_problems import DTYPES, LAYOUTS, MASKS, SCORES, Sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from known_policies import known_policies
from level_steps import EVENTS, Case, Steps, follow
from plain_caches import SMALL_HISA
from sympy import exp

from lychee_compile.kernels.gpu.methods import policies_with_kernels
from lychee_compile.kernels.levels.declaration import Keep, Level, LevelStack, Pages, Tokens
from lychee_compile.kernels.levels.expressions import (
    dot,
    field,
    greatest,
    key,
    least,
    mean,
    norm,
    query,
    softmax_scale,
)
from lychee_compile.kernels.policies import registry

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

GAUSSIAN = dot(query, field("middle")) + softmax_scale * dot(query**2, field("spread")) / 2
"""Log of the mean of exp(score) over keys of a normal distribution."""
SMALL = {
    "small_hisa": SMALL_HISA,
    "three_levels": LevelStack(
        levels=(
            Level(
                Pages(32), fields={"coarse": mean(key)}, estimate=dot(query, field("coarse")),
                keep=Keep(2, 64),
            ),
            Level(
                Pages(8),
                fields={"middle": mean(key), "spread": mean((key - field("middle")) ** 2)},
                estimate=GAUSSIAN,
                keep=Keep(1, 24),
            ),
            Level(Tokens(), estimate=dot(query, key)),
        ),
        vote="layer",
    ),
    "odd_estimates": LevelStack(
        levels=(
            Level(
                Pages(64), fields={"far": greatest(norm(key))},
                estimate=norm(query + 1) * field("far"), keep=Keep(1),
            ),
            Level(
                Pages(2),
                fields={"low": least(key), "high": greatest(key)},
                estimate=-dot(exp(-query / 4), exp(field("low") / 4)) + dot(query, field("high")),
            ),
        ),
        recent=2,
    ),
    "pages_in_pages": LevelStack(
        levels=(
            Level(
                Pages(16), fields={"outer": mean(key)}, estimate=dot(query, field("outer")),
                keep=Keep(2), keeps_first=True,
            ),
            Level(
                Pages(4),
                fields={"inner": mean(key), "length": mean(dot(key, key))},
                estimate=dot(query, field("inner")) + field("length") / 16,
            ),
        ),
        sinks=3,
        recent=20,
    ),
}  # fmt: skip
"""Stacks with groups so small that a short cache has many of them."""
DECLARED = [each.name for each in registry.policies()
            if each.levels is not None and not each.levels.uneven
            and each.name in policies_with_kernels()
            and each.levels.least_budget(4, 9) < 200]  # fmt: skip
POLICIES = [*DECLARED, *SMALL]
EXAMPLES = max(settings().max_examples // 6, 1)
"""Interpreted kernels are slow."""
ROWS = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2), (2, 2, 1), (1, 1, 4)]
"""Batch, KV heads and query positions."""


@pytest.fixture(autouse=True, scope="module")
def small_stacks() -> Iterator[None]:
    """The small stacks are known until the tests of this file are over."""
    with known_policies(SMALL):
        yield


@st.composite
def cases(draw) -> tuple[Case, int]:
    """Draw an attention without its policy, and how many tokens it begins with."""
    slots = draw(st.integers(60, 200))
    batch, kv_heads, query_len = draw(st.sampled_from(ROWS))
    sizes = Sizes(
        batch=batch,
        kv_heads=kv_heads,
        group=draw(st.integers(1, 8)),
        query_len=query_len,
        kv_len=slots,
        head_dim=draw(st.sampled_from([16, 24, 40])),
        value_dim=16,
    )
    mask = draw(st.sampled_from([each for each in MASKS if each != "none"]))
    case = Case(
        policy="",
        sizes=sizes,
        budget=draw(st.integers(14, 130)),
        sinks=draw(st.integers(0, 4)),
        recent=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        mask=mask,
        score=draw(st.sampled_from(SCORES)),
        layout=draw(st.sampled_from([each for each in LAYOUTS if each != "one head"])),
        extra=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    return case, draw(st.integers(50, slots - 10))


events = st.lists(
    st.sampled_from(EVENTS),
    min_size=2,
    max_size=3,
)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=EXAMPLES)
@given(drawn=cases(), history=events)
def test_kernels_choose_as_the_plain_form_does(policy, drawn, history):
    case, length = drawn
    case.policy = policy
    follow(Steps(case, length), history)


@pytest.mark.parametrize("policy", ["odd_estimates", "three_levels"])
def test_a_range_that_the_budget_holds_is_read_whole(policy):
    """A window of 20 slots lies in two groups of the coarsest level."""
    sizes = Sizes(1, 1, 2, 1, 100, 16, 16)
    follow(Steps(Case(policy, sizes, budget=30, sinks=2, recent=4, mask="window"), 71), ["step"])


def test_a_page_that_a_hidden_key_has_filled_has_no_summary_yet():
    """Queries that do not see the newest keys have an older one as the first that is new."""
    sizes = Sizes(1, 2, 2, 3, 400, 32)
    case = Case("quest", sizes, budget=96, mask="mask by head", score="slopes", seed=4)
    steps = Steps(case, 300)
    follow(steps, ["step", "step", "rewind", "step"])
