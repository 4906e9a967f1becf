"""The plain form of declared policies: summaries that follow a cache, budgets, expressions."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch
from plain_caches import SMALL_BLOCK, SMALL_HISA, SmallHISA
from strategies import CPU, random

from lychee_compile.kernels.config import IndexConfig
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
    weighted_mean,
)
from lychee_compile.kernels.policies.registry import index_class
from lychee_compile.kernels.reference.declared_index import declared_index
from lychee_compile.kernels.reference.level_index import LevelIndex
from lychee_compile.kernels.reference.level_values import bound, estimate, summaries
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import select

SHAPE = (2, 2, 8)
"""Batch, KV heads, head_dim."""
MIDDLE = field("middle")
TWO = LevelStack(
    levels=(
        Level(
            Pages(32), fields={"coarse": mean(key)}, estimate=dot(query, field("coarse")),
            keep=Keep(2, 64),
        ),
        Level(
            Pages(8),
            fields={"middle": mean(key), "radius": greatest(norm(key - MIDDLE))},
            estimate=dot(query, MIDDLE),
            bound=dot(query, MIDDLE) + norm(query) * field("radius"),
        ),
    ),
    recent=1,
)  # fmt: skip
TwoLevels = declared_index("two", TWO)


def make(index_type: type[LevelIndex], **given: object) -> LevelIndex:
    return index_type(*SHAPE, IndexConfig(**given), CPU)


def assert_same_summaries(index: LevelIndex, other: LevelIndex) -> None:
    for number, level in enumerate(index.stack.levels):
        assert torch.equal(index.full[number], other.full[number])
        for name in level.fields:
            for row, count in enumerate(index.full[number].tolist()):
                mine, theirs = (
                    each.summaries[number][name][row, :, :count] for each in (index, other)
                )
                assert torch.equal(mine, theirs), name


def assert_bounded(index: LevelIndex, keys: torch.Tensor) -> None:
    rows = random(9, 2, 2, 3, 8)
    found = index.score_bound(rows, 0.5)
    assert found is not None
    slots = found.shape[-1]
    score = 0.5 * rows @ keys[:, :, :slots].transpose(-1, -2)
    known = (torch.arange(slots) < index.tail[:, None])[:, None, None]
    assert (~known | (score <= found)).all()


@pytest.mark.parametrize("name", ["quest", "two"])
def test_a_page_closed_before_it_is_full_is_summarised_anew_as_it_grows(name: str) -> None:
    """A ring that was full, and then grows: its last page had a summary of fewer keys."""
    index_type = TwoLevels if name == "two" else index_class(name)
    keys, end = random(0, 2, 2, 120, 8), torch.tensor([37, 61])
    index = make(index_type)
    index.extend(keys, end)
    index.close(keys, torch.tensor([True, False]))
    assert index.tail[0] == 37
    assert_bounded(index, keys)
    for step in (1, 10, 30):
        end = end + step
        index.extend(keys, end)
        fresh = make(index_type)
        fresh.extend(keys, end)
        assert_same_summaries(index, fresh)
        assert torch.equal(index.tail, fresh.tail)
        assert_bounded(index, keys)


@pytest.mark.parametrize("name", ["quest", "two"])
def test_keys_written_anew_change_the_summaries_of_their_pages(name: str) -> None:
    index_type = TwoLevels if name == "two" else index_class(name)
    keys, end = random(0, 2, 2, 120, 8), torch.tensor([120, 100])
    index = make(index_type)
    index.extend(keys, end)
    slots = torch.tensor([[3, 40], [95, -1]])
    keys[0, :, slots[0]] *= 5
    keys[1, :, 95] *= -3
    index.rewrite(keys, slots)
    fresh = make(index_type)
    fresh.extend(keys, end)
    assert_same_summaries(index, fresh)
    assert_bounded(index, keys)


def test_keys_in_front_of_a_row_count_in_the_page_that_it_begins_in() -> None:
    """Kernels do not know where a row begins, and summarise pages as they are in the cache."""
    keys = random(0, 2, 2, 64, 8)
    index, whole = make(TwoLevels), make(TwoLevels)
    index.restart(torch.tensor([True, True]), torch.tensor([19, 3]))
    for each in (index, whole):
        each.extend(keys, torch.tensor([64, 64]))
    for name in ("middle", "radius"):
        mine, theirs = (each.summaries[1][name] for each in (index, whole))
        assert torch.equal(mine[0, :, 2:], theirs[0, :, 2:])
        assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("policy", ["streaming", "quest", "hisa", "tokenselect"])
@pytest.mark.parametrize("budget", [48, 100])
def test_the_budget_of_a_choice_counts_not_that_of_the_options(policy: str, budget: int) -> None:
    index, keys = make(index_class(policy), budget=80, sinks=4, recent=8), random(0, 2, 2, 200, 8)
    index.extend(keys, torch.tensor([200, 190]))
    mask = (torch.arange(200) < torch.tensor([[200], [190]]))[:, None, None]
    inputs = ScoreInputs(random(1, 2, 4, 1, 8), keys, 200, mask, 0.3)
    read = select(index, inputs, budget).token_mask()
    count = read.sum(-1)
    assert (count <= budget).all()
    assert (count > budget - 16).all()
    if policy == "streaming":
        assert read[0, :, :, 200 - (budget - 4) :].all()


def test_more_groups_are_kept_for_a_larger_budget() -> None:
    index, keys = make(SmallHISA, budget=9), random(0, 2, 2, 200, 8)
    index.extend(keys, torch.tensor([200, 200]))
    inputs = ScoreInputs(random(1, 2, 4, 1, 8), keys, 200, None, 0.3)
    for budget in (5, 10, 20):
        read = select(index, inputs, torch.full((2, 2, 1), budget)).token_mask()
        blocks = read.unflatten(-1, (-1, SMALL_BLOCK)).any(-1).sum(-1)
        assert (read.sum(-1) == budget).all()
        assert (blocks <= max(4 * budget // SMALL_BLOCK, 3) + 1).all()  # and that of its own token


def test_expressions_have_the_values_that_they_say() -> None:
    keys, queries = random(0, 3, 5, 8), random(1, 2, 8)
    weight = sympy.exp(dot(key, key) / 8)
    spread = mean((key - MIDDLE) ** 2)
    level = Level(
        Pages(8),
        fields={
            "middle": mean(key), "spread": spread, "low": least(key),
            "length": greatest(norm(key)), "weighted": weighted_mean(key, weight),
        },
        estimate=dot(query, MIDDLE) + softmax_scale * dot(query**2, field("spread")) / 2,
        bound=norm(query) * field("length"),
    )  # fmt: skip
    assert dict(level.channels) == {
        "middle": True, "spread": True, "low": True, "length": False, "weighted": True,
    }  # fmt: skip
    valid = torch.tensor([True, True, True, False, True])
    found, kept = summaries(level, keys, valid), keys[:, valid]
    torch.testing.assert_close(found["middle"], kept.mean(1))
    torch.testing.assert_close(found["spread"], kept.var(1, correction=0))
    torch.testing.assert_close(found["low"], kept.amin(1))
    torch.testing.assert_close(found["length"], kept.norm(dim=-1).amax(1, keepdim=True))
    weights = (kept.square().sum(-1, keepdim=True) / 8).exp()
    torch.testing.assert_close(found["weighted"], (kept * weights).sum(1) / weights.sum(1))
    score = estimate(level, queries, found, 0.25)
    expected = queries @ found["middle"].T + 0.125 * queries.square() @ found["spread"].T
    torch.testing.assert_close(score, expected)
    most = bound(level, queries, found, 0.25)
    assert most is not None
    assert (most[:, :, None] >= 0.25 * (queries @ kept.mT).transpose(0, 1)).all()


LAST = Level(Tokens(), estimate=dot(query, key))
MEAN = Level(Pages(16), fields={"m": mean(key)}, estimate=dot(query, field("m")))
KEPT = dataclasses.replace(MEAN, keep=Keep(4))


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: Pages(24), "a power of two of slots"),
        (lambda: Pages(1), "a power of two of slots"),
        (lambda: Level(Tokens(), dot(query, key), {"m": mean(key)}), "a token has no fields"),
        (lambda: Level(Pages(8), dot(query, field("m"))), "estimate has m"),
        (lambda: Level(Pages(8), dot(query, key), {"m": mean(key)}), "estimate has key"),
        (lambda: Level(Pages(8), query, {"key": mean(key)}), "cannot be called 'key'"),
        (lambda: Level(Pages(8), query, {"m": mean(query)}), "field 'm' has query"),
        (lambda: LevelStack((KEPT, dataclasses.replace(LAST, keep=Keep(1)))), "`keep` is for"),
        (lambda: LevelStack((MEAN, LAST)), "`keep` is for"),
        (lambda: LevelStack((KEPT, MEAN)), "from coarse to fine"),
        (
            lambda: LevelStack((KEPT, dataclasses.replace(MEAN, groups=Pages(8)))),
            "a name of its own",
        ),
        (lambda: LevelStack((LAST,), vote="all"), "expected one of group, layer"),
    ],
)
def test_a_declaration_that_says_nothing_of_use_is_refused(declare, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        declare()


def test_enough_groups_are_kept_for_any_range_that_the_budget_holds() -> None:
    for budget, size in ((1, 8), (8, 8), (9, 8), (30, 64), (1024, 128)):
        touched = max((first + budget - 1) // size + 1 for first in range(size))
        assert touched <= Keep(0).groups(budget, size) <= touched + 1
    assert Keep(4, 8192).groups(1024, 128) == 64


def test_bytes_count_what_each_level_reads() -> None:
    assert SMALL_HISA.bytes_per_step(800, 10, 64) == 2 * 64 * (800 // 8 + 40)
    assert TWO.bytes_per_step(3200, 100, 64) == 2 * (64 * 100 + 65 * 200 // 8)
    assert LevelStack().bytes_per_step(3200, 100, 64) == 0
