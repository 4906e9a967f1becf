"""GPU methods: which policies have kernels, how modules name them, how launches find arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton_interpreter
from decode_problems import Sizes, make_problem
from kernel_steps import Cache, assert_exact, assert_sparse, compiled, read_by
from torch import Tensor

import lychee_compile
from lychee_compile.codegen import module as emitters
from lychee_compile.codegen.module import emit_module, register_emitter
from lychee_compile.codegen.parts.lychee import emit_lychee
from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.extend import GpuMethod, register_policy
from lychee_compile.kernels.gpu import methods
from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.levels.launch import run_levels
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.gpu.levels.method import LevelMethod
from lychee_compile.kernels.gpu.levels.page_index import PageDeviceIndex
from lychee_compile.kernels.gpu.lychee.index import SketchIndex
from lychee_compile.kernels.gpu.lychee.launch import run_lychee
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.gpu.methods import (
    BUILT_IN,
    gpu_method,
    method_of_kernel,
    policies_with_kernels,
)
from lychee_compile.kernels.policies import registry as policies
from lychee_compile.kernels.policies.decode.quest import QUEST
from lychee_compile.kernels.policies.registry import index_class

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("kernel_folder"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies and emitters are as they were when the test is over."""
    monkeypatch.setattr(policies, "_policies", dict(policies._policies))
    monkeypatch.setattr(emitters, "_decode_emitters", dict(emitters._decode_emitters))


def test_every_method_has_an_emitter_and_every_emitter_a_method() -> None:
    """But for policies that are declared: both are made of their levels."""
    declared = {each.name for each in policies.policies() if each.levels is not None}
    assert {"quest", "hisa", "tokenselect", "streaming"} <= declared
    assert tuple(emitters._decode_emitters) == tuple(BUILT_IN)
    assert set(policies_with_kernels()) == {*BUILT_IN, *declared}


def test_a_policy_without_kernels_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"policy 'oracle' has no GPU kernels; .* lychee, lycheecluster"
    ):
        gpu_method("oracle")


@pytest.mark.usefixtures("registries")
def test_a_method_that_lacks_something_is_refused() -> None:
    half = SimpleNamespace(multiple=1)
    register_policy("half", index_class("oracle"), gpu=half)
    with pytest.raises(TypeError, match=r"policy 'half': .* is no GpuMethod"):
        gpu_method("half")


@pytest.mark.usefixtures("registries")
def test_a_method_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check against a protocol takes longer than all else that a step does with a method."""
    checks: list[object] = []

    class Checked(type):
        def __instancecheck__(cls, method: object) -> bool:
            checks.append(method)
            return True

    monkeypatch.setattr(methods, "GpuMethod", Checked("GpuMethod", (), {}))
    for name in ("once", "once", "twice"):
        method = BUILT_IN["lychee"]
        register_policy(name, index_class("lychee"), gpu=method)
        assert gpu_method(name) is method
    assert checks == [BUILT_IN["lychee"]] * 2


@pytest.mark.usefixtures("registries")
def test_kernels_of_a_policy_are_not_replaced() -> None:
    register_policy("lychee", index_class("lychee"), gpu=BUILT_IN["lychee"])
    with pytest.raises(ValueError, match="there are kernels of a policy 'lychee' already"):
        register_policy("lychee", index_class("lychee"), gpu=LevelMethod("lychee"))
    with pytest.raises(ValueError, match="policy 'lychee' has an emitter"):
        register_emitter("lychee", emit_module)


@pytest.mark.usefixtures("registries")
def test_a_declared_policy_has_no_other_kernels_than_its_own() -> None:
    register_policy("quest", QUEST)
    assert gpu_method("quest") == LevelMethod("quest")
    for other in (QUEST, None):
        with pytest.raises(ValueError, match="policy 'quest' is declared: its kernels are made"):
            register_policy("quest", other, tiles=lambda asked: asked, gpu=BUILT_IN["lychee"])
    with pytest.raises(ValueError, match="policy 'quest' is declared: its kernels are made"):
        register_emitter("quest", emit_lychee)


@pytest.fixture
def pages_of_16(registries: None) -> GpuMethod:
    register_policy("pages_of_16", QUEST, words="pages, as Quest has them")
    return gpu_method("pages_of_16")


def test_a_module_names_a_policy_with_an_underscore(pages_of_16: GpuMethod) -> None:
    sparse = SparseSpec("pages_of_16", 64, 4, 16, 2, 65536)
    problem = make_problem(sizes=Sizes(kv_len=200), sparse=sparse)
    assert problem.spec.policy == problem.module().POLICY == "pages_of_16"
    assert method_of_kernel(problem.module().__name__.rpartition(".")[2]) is pages_of_16
    exact = make_problem(sizes=Sizes(kv_len=200))
    assert exact.spec.policy is exact.module().POLICY is None


@pytest.mark.usefixtures("kernels_on_cpu", "seeded", "pages_of_16")
def test_a_policy_of_ones_own_with_an_underscore_runs_its_kernels() -> None:
    cache = Cache().fill(100)
    step = compiled(policy="pages_of_16", dense_layers=0, budget=60)
    assert_exact(cache.step(step))
    got, dense = cache.step(step)
    assert_sparse((got, dense), cache, budget=60)
    middle = read_by(got, cache)[..., 16:80].unflatten(-1, (4, 16))
    assert torch.equal(middle.any(-1), middle.all(-1))
    (site,) = lychee_compile.reports()[-1].sites
    assert site.kernel.startswith("decode_pages_of_16_f32_")


class Shuffled(NamedTuple):
    """The fields of Quest's index in another order."""

    summary_greatest: Tensor
    summary_least: Tensor
    fingerprints: Tensor
    header: Tensor


def test_the_fields_of_a_state_are_matched_by_name() -> None:
    """Parts of an index in another order are the same parts."""
    problem = make_problem(
        sizes=Sizes(1, 1, 2, 1, 200, 32), sparse=SparseSpec("quest", 64, 4, 16, 2, 65536)
    )
    index = PageDeviceIndex(LevelLayout.over(problem.key, "quest"), torch.device("cpu"))
    index.build(problem.module(), problem.key, [200])
    other = Shuffled(**index.parts._asdict())
    assert [*map(id, other)] == [*map(id, index.parts)][::-1]
    outputs = [
        run_levels(problem.module(), problem.operands(), IndexOperands(index.layout, state))
        for state in (index.parts, other)
    ]
    assert torch.equal(*outputs)
    problem.captured = [*problem.captured, problem.key]
    with pytest.raises(ValueError, match="argument"):
        run_levels(problem.module(), problem.operands(), IndexOperands(index.layout, index.parts))


def test_a_method_refuses_the_index_of_another() -> None:
    problem = make_problem(sizes=Sizes(kv_len=200))
    sketches = SketchIndex(SketchLayout.over(problem.key), torch.device("cpu"))
    boxes = PageDeviceIndex(LevelLayout.over(problem.key, "quest"), torch.device("cpu"))
    for run, index in ((run_levels, sketches), (run_lychee, boxes)):
        with pytest.raises(TypeError, match=r"kernels .*read the index of a"):
            run(problem.module(), problem.operands(), IndexOperands(index.layout, index.parts))


def test_a_kernel_gets_the_arguments_that_it_names() -> None:
    calls: list[Any] = []

    class Kernel:
        arg_names = ("first", "SECOND")

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given, **options: calls.append((grid, given, options))

    launch(Kernel(), (2, 3), {"SECOND": 2, "third": 3, "first": 1}, num_warps=4)
    assert calls == [((2, 3), (1, 2), {"num_warps": 4})]
    with pytest.raises(TypeError, match="lacks the argument 'first'"):
        launch(Kernel(), (1,), {"SECOND": 2})
