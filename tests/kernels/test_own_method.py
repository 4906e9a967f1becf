"""A GPU method that a user writes, by `lychee_compile.extend` alone, against its policy."""

from __future__ import annotations

import ast
import inspect

import own_method
import pytest
import torch
import triton_interpreter
from decode_problems import Sizes, make_problem
from kernel_steps import KV_HEADS, Cache, assert_exact, assert_sparse, compiled, read_by

import lychee_compile
from lychee_compile.codegen import module as emitters
from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.extend import PAGE, IndexOperands
from lychee_compile.kernels.policies import registry as policies

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder", "mean_pages"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture
def mean_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy is known until the test is over."""
    monkeypatch.setattr(policies, "_policies", dict(policies._policies))
    monkeypatch.setattr(emitters, "_decode_emitters", dict(emitters._decode_emitters))
    own_method.register()


def test_it_imports_nothing_of_ours_but_what_is_offered() -> None:
    imports = {
        each.module
        for each in ast.walk(ast.parse(inspect.getsource(own_method)))
        if isinstance(each, ast.ImportFrom) and (each.module or "").startswith("lychee_compile")
    }
    assert imports == {"lychee_compile.extend"}


@pytest.mark.usefixtures("kernels_on_cpu", "seeded")
def test_the_kernels_read_the_pages_of_the_policy() -> None:
    """All that is read is sinks, recent tokens, whole pages and no more than one part of one."""
    cache = Cache().fill(100)
    step = compiled(policy="mean-pages", dense_layers=0, budget=68)
    assert_exact(cache.step(step))
    for _ in range(14):  # a page becomes full
        got, dense = cache.step(step)
        assert_sparse((got, dense), cache, budget=68)
    (site,) = lychee_compile.reports()[-1].sites
    assert site.kernel.startswith("decode_mean_pages_f32_")

    twin = Cache().fill(100)
    twin.keys.copy_(cache.keys)
    twin.values.copy_(cache.values)
    twin.length, twin._generator = cache.length, cache._generator.clone_state()
    got, _ = cache.step(step)
    reference = compiled(policy="mean-pages", dense_layers=0, budget=68, reference=True)
    expected, _ = twin.step(reference)
    by_kernel, by_policy = read_by(got, cache), read_by(expected, twin)
    assert by_kernel[..., :4].all()
    assert by_kernel[..., cache.length - 16 : cache.length].all()
    whole = by_policy[..., 16:96].unflatten(-1, (-1, PAGE)).all(-1)
    mine = by_kernel[..., 16:96].unflatten(-1, (-1, PAGE)).sum(-1)
    assert whole.sum() >= KV_HEADS
    assert (mine[whole] > PAGE // 2).all()


@pytest.mark.usefixtures("kernels_on_cpu", "seeded")
def test_kernels_that_cover_no_share_leave_attention_exact() -> None:
    cache = Cache().fill(100)
    step = compiled(policy="mean-pages", dense_layers=0, budget=68, coverage=0.9)
    for _ in range(2):
        assert_exact(cache.step(step))
    (site,) = lychee_compile.reports()[-1].sites
    wanted = (
        "no GPU kernel of policy='mean-pages' supports coverage (got 0.9); set coverage=None or"
    )
    assert wanted in str(site.reason)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("mask", ["causal", "rows", "window"])
def test_with_room_for_all_or_no_index_all_is_read(trusted: bool, mask: str) -> None:
    sparse = SparseSpec("mean-pages", 1024 if trusted else 48, 4, 16, 16, 65536)
    problem = make_problem(sizes=Sizes(2, 2, 2, 1, 600, 32), mask=mask, sparse=sparse)
    method = own_method.MeanMethod()
    index = method.new_index(method.layout_of(problem.key), torch.device("cpu"))
    index.build(problem.module(), problem.key, [599, 599])
    if not trusted:
        index.distrust()
    used = IndexOperands(index.layout, index.parts, torch.tensor([599]))
    problem.assert_as_good_as_eager(method.run(problem.module(), problem.operands(), used))


def test_a_step_leaves_the_index_as_building_it_does() -> None:
    sparse = SparseSpec("mean-pages", 48, 4, 16, 16, 65536)
    problem = make_problem(sizes=Sizes(2, 2, 1, 5, 179, 32), sparse=sparse)
    method = own_method.MeanMethod()
    index, anew = (
        method.new_index(method.layout_of(problem.key), torch.device("cpu")) for _ in range(2)
    )
    index.build(problem.module(), problem.key, [174, 174])
    anew.build(problem.module(), problem.key, [179, 179])
    used = IndexOperands(index.layout, index.parts, torch.arange(174, 179))
    method.run(problem.module(), problem.operands(), used)
    assert index.parts.header.tolist() == anew.parts.header.tolist()
    torch.testing.assert_close(index.parts.mean, anew.parts.mean)


def test_a_mask_with_holes_is_refused() -> None:
    sparse = SparseSpec("mean-pages", 48, 4, 16, 16, 65536)
    spec = make_problem(sizes=Sizes(kv_len=64), mask="mask", sparse=sparse).spec
    with pytest.raises(ValueError, match="masks with holes"):
        emitters.emit_module(spec)
