"""Tile sizes are measured where it is asked for and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import AttentionSpec, S, TileSpec
from lychee_compile.kernels.gpu.common import autotune, tuning
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import candidates, tuning_for


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch):
    monkeypatch.setattr(tuning, "_tuned", {})


def operands():
    query = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16)
    key = torch.zeros(1, 2, 1000, 128, dtype=torch.bfloat16)
    return AttentionOperands(query, key, key)


def test_the_fastest_that_runs_is_remembered(monkeypatch):
    module = SimpleNamespace(__name__="tuned", AUTOTUNE=True)
    monkeypatch.setattr(tuning, "_multiprocessors", lambda _: 132)
    given = operands()
    fast = candidates(module, "exact", given)[2]
    ran = []
    header = torch.tensor([0, ~7], dtype=torch.int32)  # a row of 7 tokens that is lost

    def bench(call, **_):
        call()
        return 1.0 if ran[-1] == fast else 2.0

    def run(tuning):
        if tuning.keys == 128:
            raise RuntimeError("out of resource: shared memory")
        assert header.tolist() == [1, 7]
        ran.append(tuning)

    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    shown = SimpleNamespace(shape=given.query.shape, device=SimpleNamespace(type="cuda"))
    on_gpu = replace(given, query=shown)
    autotune.autotune(module, "exact", run, on_gpu, header)
    assert header.tolist() == [0, ~7]
    assert tuning_for(module, "exact", given) == fast
    assert any(each.keys == 128 for each in candidates(module, "exact", given))
    count = len(ran)
    autotune.autotune(module, "exact", run, on_gpu)  # once is enough
    assert len(ran) == count


@pytest.mark.parametrize("asked", [True, False])
def test_nothing_is_measured_unasked_or_on_a_cpu(asked):
    def never(_):
        raise AssertionError

    module = SimpleNamespace(__name__="plain", AUTOTUNE=asked)
    autotune.autotune(module, "exact", never, operands())


@pytest.mark.parametrize("tiles", [None, TileSpec("lychee", 4, 8)], ids=["decode", "prefill"])
def test_modules_say_whether_to_measure(tiles):
    for asked in (True, False):
        spec = AttentionSpec("float16", 1, 64, 64, S / 8, tiles=tiles, autotune=asked)
        assert f"AUTOTUNE = {asked} " in emit_module(spec)
