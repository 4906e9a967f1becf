"""Layers compiled on their own cost as many graphs, and run compiled as often, as elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lychee_compile

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

OPTIONS = {"budget": 24, "sinks": 2, "recent": 4, "chunk": (2, 4)}
LAYERS, STEPS, HELD, SLOTS = 3, 5, 40, 64


class Layer(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, new: Tensor, caches: list[Tensor], position: Tensor) -> Tensor:
        raise NotImplementedError


class Growing(Layer):
    def forward(self, new: Tensor, caches: list[Tensor], position: Tensor) -> Tensor:
        keys = torch.cat((caches[self.layer_idx], new), 2)
        caches[self.layer_idx] = keys
        return F.scaled_dot_product_attention(new, keys, keys)


class GrowingByRows(Layer):
    """Its cache is [B, L, H, D]."""

    def forward(self, new: Tensor, caches: list[Tensor], position: Tensor) -> Tensor:
        caches[self.layer_idx] = torch.cat((caches[self.layer_idx], new.transpose(1, 2)), 1)
        keys = caches[self.layer_idx].transpose(1, 2)
        return F.scaled_dot_product_attention(new, keys, keys)


class Static(Layer):
    def forward(self, new: Tensor, caches: list[Tensor], position: Tensor) -> Tensor:
        keys = caches[self.layer_idx].index_copy_(2, position, new)
        mask = torch.arange(SLOTS) <= position[:, None]
        return F.scaled_dot_product_attention(new, keys, keys, attn_mask=mask)


class StaticGivenBack(Layer):
    def forward(self, new: Tensor, caches: list[Tensor], position: Tensor) -> Tensor:
        keys = caches[self.layer_idx].index_copy(2, position, new)
        caches[self.layer_idx] = keys
        mask = torch.arange(SLOTS) <= position[:, None]
        return F.scaled_dot_product_attention(new, keys, keys, attn_mask=mask)


def caches_of(kind: type[Layer]) -> list[Tensor]:
    caches = [torch.randn(1, 2, HELD, 8) for _ in range(LAYERS)]
    if kind is GrowingByRows:
        return [cache.transpose(1, 2).contiguous() for cache in caches]
    if kind is Growing:
        return caches
    return [F.pad(cache, (0, 0, 0, SLOTS - HELD)) for cache in caches]


def decode(kind: type[Layer], **compiled: Any) -> int:
    """Decode with layers that are compiled one by one; return the number of graphs."""
    torch.compiler.reset()
    counters.clear()
    layers, caches = [kind(number) for number in range(LAYERS)], caches_of(kind)
    for layer in layers:
        layer.compile(**compiled)
    for step in range(STEPS):
        new = torch.randn(1, 2, 1, 8)
        for layer in layers:
            new = layer(new, caches, torch.tensor([HELD + step]))
    return counters["stats"]["unique_graphs"]


@pytest.fixture(params=[4, 16])
def limit(request: pytest.FixtureRequest) -> Iterator[int]:
    """Lend Dynamo's limit of graphs of one function, below and above what the layers need."""
    with torch._dynamo.config.patch(recompile_limit=request.param):
        yield request.param


@pytest.mark.parametrize("kind", [Growing, GrowingByRows, Static, StaticGivenBack])
def test_graphs_and_compiled_calls_are_those_of_another_backend(
    kind: type[Layer], limit: int
) -> None:
    calls = 0

    def counting(gm: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        def run(*args: object) -> Any:
            nonlocal calls
            calls += 1
            return gm(*args)

        return run

    expected = decode(kind, backend=counting)
    with lychee_compile.record() as recorder:
        graphs = decode(kind, backend="lychee", options=OPTIONS)
    assert graphs == expected
    assert len(recorder.calls) == calls
    assert (calls == LAYERS * STEPS) is (limit > 4 or kind in (Static, StaticGivenBack))
