"""The benchmark of error against time of policies: all of it that a CPU can run."""

from __future__ import annotations

import json

import torch
import triton_interpreter

from benchmarks.quality import policies_gpu
from lychee_compile.evaluate.tensors import Capture, SiteTensors

triton_interpreter.use()


def capture(kv_len: int = 200) -> Capture:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 3, 32, generator=random)
    key, value = torch.randn(2, 1, 2, kv_len, 32, generator=random)
    site = SiteTensors("attention", query, key, value, 32**-0.5, None)
    positions = torch.arange(kv_len - 3, kv_len)
    return Capture((site,), positions, torch.zeros(kv_len, dtype=torch.int64), None)


def test_each_policy_has_a_point_and_is_right_if_all_keys_fit(tmp_path, capsys):
    file, points = tmp_path / "capture.safetensors", tmp_path / "points.json"
    capture().save(file)
    line = f"{file} --device cpu --dtype float32 --queries 2 --policies quest streaming --quiet"
    line += f" --budgets 96 512 --seconds 0.001 --json {points} --plot {tmp_path / 'points.png'}"
    assert policies_gpu.main(line.split()) == 0
    found = json.loads(points.read_text())["points"]
    names = [(each["policy"], each["budget"]) for each in found]
    sparse = [(policy, budget) for policy in ("quest", "streaming") for budget in (96, 512)]
    assert names == [("dense", 200), *sparse]
    errors = {name: each["error"] for name, each in zip(names, found, strict=True)}
    assert all(errors[policy, 512] < 1e-5 < errors[policy, 96] for policy in ("quest", "streaming"))
    assert errors["dense", 200] < 1e-5
    assert (tmp_path / "points.png").stat().st_size > 0
    assert "streaming" in capsys.readouterr().out
