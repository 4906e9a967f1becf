"""Hypothesis profiles, and a fresh torch.compile for every test."""

from __future__ import annotations

import atexit
import gc
import os
import sys

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
# Operators that break PyTorch's rules fail, as where $CI is set; else it warns.
os.environ.setdefault("TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING", "1")

settings.register_profile("ci", max_examples=6, deadline=None, derandomize=True)
settings.register_profile("quick", max_examples=3, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=3000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


gc.set_threshold(20_000, 20, 50)  # imports and traces make objects that stay: seldom is enough


def pytest_collection_finish() -> None:
    """Leave modules and collected tests out of every later garbage collection, which is slow."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # what is frozen at the end would be reported as leaked


def _quiet_dynamo() -> None:
    """Skip what Dynamo makes for logs and statistics alone, a twentieth of its time."""
    from torch._dynamo import config, guards
    from torch._logging import _internal

    if hasattr(config, "side_effect_replay_policy"):
        config.side_effect_replay_policy = "silent"
    config.run_gc_after_compile = False  # which goes through all young objects each time
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0
    _internal.trace_log.handlers.clear()


@pytest.fixture(autouse=True)
def fresh_torch():
    """One thread, so that parallel workers do not fight, and nothing compiled in another test."""
    torch.set_num_threads(1)
    if "torch._dynamo" in sys.modules:
        _quiet_dynamo()
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    if "lychee_compile.backend" in sys.modules:
        sys.modules["lychee_compile.backend"].reset()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what the backend makes of a graph through AOTAutograd alone: quick to compile."""
    from torch._dynamo.backends.debugging import aot_eager

    from lychee_compile import torch_private

    monkeypatch.setattr(
        torch_private, "inductor", lambda gm, inputs, mode, patches: aot_eager(gm, list(inputs))
    )


@pytest.fixture
def uncompiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what the backend makes of a graph as it is, an operator at a time: quickest of all.

    It is for tests of what is read and decided. Those of what graphs become, of writes and of their
    order keep AOTAutograd, by `without_inductor`.
    """
    from lychee_compile import torch_private

    monkeypatch.setattr(torch_private, "inductor", lambda gm, inputs, mode, patches: gm.forward)


@pytest.fixture
def seeded():
    """The same random weights in every run, and no gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def kernels_on_cpu(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Decode through generated kernels, as on a GPU, in Triton's interpreter."""
    import triton_interpreter

    triton_interpreter.hasten()
    from lychee_compile.kernels.operators.decode import KERNEL_DEVICES

    monkeypatch.setenv("LYCHEE_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
    KERNEL_DEVICES.add("cpu")
    yield
    KERNEL_DEVICES.discard("cpu")


@pytest.fixture(scope="module")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory):
    """Generated kernels are stored where nobody else looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LYCHEE_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield
