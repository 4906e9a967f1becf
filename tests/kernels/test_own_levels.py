"""A policy of one's own, declared outside of the package, through the backend and by kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton_interpreter
from kernel_steps import Cache, assert_exact, assert_sparse, compiled, read_by

import lychee_compile
from lychee_compile.extend import (
    DominantPairs,
    Keep,
    Level,
    LevelStack,
    Pages,
    Tokens,
    describe,
    dot,
    field,
    greatest,
    key,
    mean,
    query,
)
from lychee_compile.kernels.levels.words import describe_always
from lychee_compile.kernels.policies import registry
from lychee_compile.kernels.policies.registry import levels_of

triton_interpreter.use()

NARROWED = LevelStack(
    (
        Level(
            Pages(8),
            fields={"middle": mean(key), "longest": greatest(dot(key, key))},
            estimate=dot(query, field("middle")) + field("longest") / 100,
            keep=Keep(1, 40),
        ),
        Level(Tokens(DominantPairs(2)), dot(query, key)),
    )
)
PAGED = LevelStack((Level(Pages(8), dot(query, field("middle")), {"middle": mean(key)}),), sinks=3)


@pytest.fixture
def own(monkeypatch):
    """Function that registers a declaration until the test is over, and returns its name."""
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))

    def register(stack):
        name = f"own{len(stack.levels)}"
        lychee_compile.register_policy(name, stack, words="mine")
        return name

    return register


@pytest.mark.usefixtures("without_inductor", "kernels_on_cpu", "seeded")
@pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("stack", [NARROWED, PAGED], ids=["narrowed", "paged"])
def test_a_declared_policy_decodes_by_kernels(stack, own):
    name = own(stack)
    cache, step = Cache().fill(100), compiled(policy=name, budget=60)
    assert_exact(cache.step(step))
    for _ in range(2):
        got = cache.step(step)
        assert_sparse(got, cache, budget=60)
        if stack is PAGED:
            middle = read_by(got[0], cache)[..., 8:80].unflatten(-1, (-1, 8))
            assert torch.equal(middle.any(-1), middle.all(-1))
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "sparse"
    assert site.kernel.startswith(f"decode_{name}_")


@pytest.mark.usefixtures("without_inductor", "seeded")
@pytest.mark.parametrize("stack", [NARROWED, PAGED], ids=["narrowed", "paged"])
def test_a_declared_policy_decodes_on_a_cpu(stack, own):
    cache, step = Cache().fill(100), compiled(policy=own(stack), budget=60)
    for _ in range(3):
        got = cache.step(step)
    assert_sparse(got, cache, budget=60)


WORDS = {
    "quest": "pages of 16 by least, greatest; read whole",
    "longheads": "pages of 256 by representative; read whole",
    "tokenselect": "tokens by their keys; all heads of a layer vote",
    "fasa": "tokens by one in 4 pairs of channels of their keys",
    "streaming": "the last tokens, as many as the budget says",
    "hisa": "pages of 128 by mean, of which 4 times the budget, at least 8,192 tokens, are kept; "
    "then tokens by their keys",
}


@pytest.mark.parametrize("policy", WORDS)
def test_declarations_have_words(policy):
    assert describe(levels_of(policy)) == WORDS[policy]


def test_what_is_always_read_has_words():
    assert describe_always(LevelStack()) == "first `sinks`, last `recent`"
    assert describe_always(levels_of("hisa")) == "the newest"
    assert describe_always(levels_of("longheads")) == "first 256, the page of 256 being written"
    assert describe_always(PAGED) == "first 3, last `recent`, the page of 8 being written"
    kept = Level(Pages(4), dot(query, field("m")), {"m": mean(key)}, keep=Keep(2))
    words = describe(LevelStack((kept, Level(Tokens(), dot(query, key)))))
    assert (
        words == "pages of 4 by m, of which 2 times the budget is kept; then tokens by their keys"
    )


def test_the_policy_of_the_example_is_short():
    source = (Path(__file__).parents[2] / "examples" / "custom_policy.py").read_text("utf-8")
    declared = source.partition("\nGAUSSIAN = ")[2].partition('"""')[0]
    assert 5 < len(declared.strip().splitlines()) <= 30
