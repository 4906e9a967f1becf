"""Summaries of groups too large to hold at once: kernels take them in passes over the keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton_interpreter
from decode_problems import Sizes, make_problem
from sympy import Max, exp, log, sqrt

import lychee_compile
from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.level_source import summary_source
from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.methods import gpu_method
from lychee_compile.kernels.levels.declaration import Level, LevelStack, Pages
from lychee_compile.kernels.levels.expressions import (
    dot,
    field,
    greatest,
    head_dim,
    key,
    least,
    mean,
    norm,
    query,
    weighted_mean,
)
from lychee_compile.kernels.policies import registry
from lychee_compile.kernels.policies.decode.longheads import LONGHEADS
from lychee_compile.kernels.reference.level_values import summaries

triton_interpreter.use()

CPU = torch.device("cpu")
CENTRE = field("centre")
FIELDS = {
    "lowest": least(key),
    "highest": greatest(key),
    "centre": mean(key),
    "spread": mean((key - CENTRE) ** 2),
    "radius": sqrt(greatest(dot(key - CENTRE, key - CENTRE))),
    "middle": mean(norm(key)),
    "longest": greatest(norm(key)),
    "bent": weighted_mean(key, exp(dot(key, CENTRE) / head_dim)),
    "mass": log(mean(exp(dot(key, CENTRE) / head_dim))) / sqrt(head_dim),
    "positive": mean(Max(key, 0)),
    "numbers": mean(dot(key, key)) / head_dim,
}


@pytest.fixture
def declared(monkeypatch):
    """Function that registers a policy of one level until the test is over."""
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))

    def declare(name, size, fields):
        estimate = sum(
            dot(query, field(each)) if wide else field(each)
            for each, wide in Level(Pages(size), query, fields).channels.items()
        )
        registry.register_policy(name, LevelStack((Level(Pages(size), estimate, fields),)))

    return declare


@pytest.mark.usefixtures("kernel_folder")
@pytest.mark.parametrize(("size", "dtype"), [(4, "float32"), (64, "bfloat16"), (256, "float32")])
def test_a_step_summarises_as_building_does(size, dtype, declared):
    declared("passes", size, FIELDS)
    sparse = SparseSpec("passes", 100, 4, 8, 16, 65536)
    sizes = Sizes(2, 2, 2, 1, size + 1, 40 if size < 256 else 136, 16)
    problem = make_problem(dtype, sizes, sparse=sparse)
    problem.key = problem.key / 2
    method = gpu_method("passes")
    index = method.new_index(method.layout_of(problem.key), CPU)
    index.build(problem.module(), problem.key, [size - 1] * 2)
    used = IndexOperands(index.layout, index.parts, torch.tensor([size - 1]))
    method.run(problem.module(), problem.operands(), used)
    level = registry.levels_of("passes").levels[0]
    expected = summaries(level, problem.key[:, :, None, :size], torch.ones(1, size, dtype=bool))
    for each, value in expected.items():
        part = getattr(index.parts, f"summary_{each}")[:, :, :1]
        built = (value if level.channels[each] else value[..., 0]).to(part.dtype)
        close = {"rtol": 2e-5, "atol": 1e-5} if part.dtype == torch.float32 else {}
        torch.testing.assert_close(part, built, **close)


def test_passes_share_what_they_have_in_common():
    match = dot(key, mean(key))
    level = Level(Pages(64), dot(query, field("f")), {"f": weighted_mean(key, exp(match))})
    passes = summary_source(level, 64, None).passes
    assert [len(each) for each in passes] == [1, 2]
    twice = Level(Pages(64), dot(query, field("a") + field("b")),
                  {"a": mean(key), "b": mean(key) * 2 + mean(key * 0 + 3)})  # fmt: skip
    assert [len(each) for each in summary_source(twice, 64, None).passes] == [1]


def test_a_field_that_is_no_summary_has_no_kernel():
    with pytest.raises(Unprintable, match="is not taken over the keys"):
        summary_source(Level(Pages(16), dot(query, field("f")), {"f": 2 * key}), 64, None)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_representative_is_among_the_keys_however_large_they_are(scale):
    """Its weights are those of a softmax, whose largest exponent is 0."""
    keys = scale * torch.randn(3, 5, 256, 32, generator=torch.Generator().manual_seed(0)) + scale
    level = LONGHEADS.levels[0]
    found = summaries(level, keys, torch.ones(256, dtype=bool))["representative"]
    match = (keys.double() * keys.double().mean(-2, keepdim=True)).sum(-1) / 32**0.5
    expected = (match.softmax(-1)[..., None] * keys.double()).sum(-2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * scale)


def test_chunks_of_longheads_need_room():
    least = LONGHEADS.least_budget(sinks=16, recent=64)
    assert least == 3 * 256
    for budget in (least, 1024, None):
        lychee_compile.Options(policy="longheads", budget=budget)
    with pytest.raises(lychee_compile.options.OptionError, match="give that, or None") as raised:
        lychee_compile.Options(policy="longheads", budget=least - 1)
    assert "a group of 256 tokens that it reads whole needs at least 768" in str(raised.value)
    lychee_compile.Options(policy="quest", budget=81)
    lychee_compile.Options(policy="streaming", budget=81)


def test_the_least_budget_has_room_for_a_group():
    pages = Level(Pages(32), dot(query, field("f")), {"f": mean(key)})
    assert LevelStack((pages,)).least_budget(sinks=4, recent=8) == 4 + 32 + 32
    assert LevelStack((pages,)).least_budget(sinks=4, recent=80) == 4 + 80 + 32
    assert replace(LevelStack((pages,)), sinks=0, recent=1).least_budget(4, 80) == 64
