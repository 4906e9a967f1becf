"""Analysing a graph takes time in proportion to its length: seconds for a model of 80 layers."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lychee_compile import torch_private
from lychee_compile.backend import report_of
from lychee_compile.options import Options
from lychee_compile.passes.pipeline import analyse
from lychee_compile.report.report import Report

HEADS, KV_HEADS, HEAD_DIM, SIZE = 4, 2, 8, 160
WIDTH = HEADS * HEAD_DIM

pytestmark = pytest.mark.usefixtures("seeded")

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(HEAD_DIM) + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


class Layer(nn.Module):
    """A layer of Llama's over a static cache."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key_value = nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM, bias=False)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.register_buffer("keys", torch.zeros(1, KV_HEADS, SIZE, HEAD_DIM))
        self.register_buffer("values", torch.zeros(1, KV_HEADS, SIZE, HEAD_DIM))

    def forward(self, x: Tensor, position: Tensor, angles: Tensor, mask: Tensor) -> Tensor:
        normed = rms_norm(x)
        query = self.query(normed).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        fresh = self.key_value(normed).unflatten(-1, (2 * KV_HEADS, HEAD_DIM)).transpose(1, 2)
        key, value = fresh.chunk(2, dim=1)
        self.keys.index_copy_(2, position, rotated(key, angles))
        self.values.index_copy_(2, position, value)
        attended = self.attend(rotated(query, angles), self.keys, self.values, mask)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(rms_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rms_norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()


class Decoder(nn.Module):
    """Layers between which there is nothing, and what they share."""

    def __init__(self, layers: int, attend: Attend) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(attend) for _ in range(layers))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = (position[:, None] * frequencies).repeat(1, 2)
        hidden = torch.arange(SIZE) > position[:, None]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, position, angles, mask[None, None])
        return x


@dataclass(frozen=True)
class Timed:
    """One analysis."""

    report: Report
    nodes: int
    retrace: float
    """Seconds of the processor that PyTorch took to trace the graph again."""
    passes: float
    """Seconds that finding, recovering, binding and deciding took."""


def timed(layers: int, attend: Attend, monkeypatch: pytest.MonkeyPatch, repeat: int = 1) -> Timed:
    """Return the quickest of some analyses of a decoding step."""
    analyses: list[Timed] = []

    def inspect(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        analyses.extend(_analysis(gm, inputs, monkeypatch) for _ in range(repeat))
        return gm.forward

    model = Decoder(layers, attend).eval()
    torch.compile(model, backend=inspect)(torch.randn(1, 1, WIDTH), torch.tensor([SIZE // 2]))
    return min(analyses, key=lambda each: each.passes)


def _analysis(gm: torch.fx.GraphModule, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> Timed:
    spent: list[float] = []
    original = torch_private.retrace

    def retrace(*given: Any) -> torch.fx.GraphModule:
        begin = time.process_time()
        traced = original(*given)
        spent.append(time.process_time() - begin)
        return traced

    with monkeypatch.context() as patched:
        patched.setattr(torch_private, "retrace", retrace)
        begin = time.process_time()
        analysis = analyse(gm, inputs, Options(budget=32, sinks=2, recent=8, chunk=(2, 4)))
        whole = time.process_time() - begin
    nodes = len(analysis.gm.graph.nodes)
    return Timed(report_of(analysis), nodes, sum(spent), whole - sum(spent))


@pytest.mark.thorough
@pytest.mark.parametrize("attend", [eager, sdpa], ids=["eager", "sdpa"])
def test_eighty_layers(
    attend: Attend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = timed(10, attend, monkeypatch, repeat=2)  # the first one also imports parts of sympy
    many = timed(80, attend, monkeypatch)
    for layers, each in ((10, few), (80, many)):
        with capsys.disabled():
            sys.stdout.write(
                f"\n{attend.__name__}, {layers} layers, {each.nodes} nodes: "
                f"{each.passes:.2f} s, after {each.retrace:.2f} s of retracing\n"
            )
        assert [site.decision for site in each.report.sites] == ["sparse"] * layers
    assert many.passes < 2.0
    assert many.passes / 80 < 2.5 * few.passes / 10
