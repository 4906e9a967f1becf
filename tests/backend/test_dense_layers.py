"""The option `dense_layers` counts layers of a model, also where each is compiled on its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile
from lychee_compile.passes import reasons

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")

OPTIONS = {"budget": 40, "sinks": 2, "recent": 8, "chunk": (2, 4), "policy": "quest"}


class Attention(nn.Module):
    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, query: Tensor, keys: list[Tensor]) -> Tensor:
        key = keys[0] if self.layer_idx is None else keys[self.layer_idx]
        return F.scaled_dot_product_attention(query, key, key)


class Layer(nn.Module):
    def __init__(self, layer_idx: int | None, attentions: int = 1) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention(layer_idx) for _ in range(attentions))

    def forward(self, query: Tensor, keys: list[Tensor]) -> Tensor:
        for attention in self.attention:
            query = attention(query, keys)
        return query


class Model(nn.Module):
    def __init__(self, name: str, layers: int, numbered: bool) -> None:
        super().__init__()
        self.name = name
        built = (Layer(number if numbered else None) for number in range(layers))
        setattr(self, name, nn.ModuleList(built))

    def forward(self, query: Tensor, keys: list[Tensor]) -> Tensor:
        for layer in getattr(self, self.name):
            query = layer(query, keys)
        return query


class Broken(Model):
    def forward(self, query: Tensor, keys: list[Tensor]) -> Tensor:
        layers = getattr(self, self.name)
        query = layers[0](query, keys)
        torch._dynamo.graph_break()
        query = layers[1](query, keys)
        torch._dynamo.graph_break()
        return layers[2](query, keys)


def inputs(layers: int = 4) -> tuple[Tensor, list[Tensor]]:
    return torch.randn(1, 2, 1, 8), list(torch.randn(layers, 1, 2, 100, 8))


def decisions() -> list[str]:
    return [site.decision for report in lychee_compile.reports() for site in report.sites]


@pytest.mark.parametrize("name", ["layers", "h", "blocks", "layer"])
@pytest.mark.parametrize(("given", "dense"), [(None, 2), (0, 0), (3, 3)])
def test_a_whole_model_is_counted(name: str, given: int | None, dense: int) -> None:
    options = {**OPTIONS, "dense_layers": given}
    torch.compile(Model(name, 4, numbered=False), backend="lychee", options=options)(*inputs())
    assert decisions() == ["kept"] * dense + ["sparse"] * (4 - dense)


@pytest.mark.parametrize("name", ["layers", "h"])
def test_a_path_tells_the_layer_after_a_graph_break(name: str) -> None:
    model = Broken(name, 3, numbered=False)
    torch.compile(model, backend="lychee", options=OPTIONS)(*inputs())
    assert decisions() == ["kept", "kept", "sparse"]


def test_an_attribute_tells_the_layer_that_is_compiled_alone() -> None:
    model = Model("layers", 4, numbered=True)
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(backend="lychee", options=OPTIONS)
    model(*inputs())
    assert decisions() == ["kept", "kept", "sparse", "sparse"]
    assert all(not site.note for each in lychee_compile.reports() for site in each.sites)


def test_a_layer_without_a_number_is_sparse_and_the_report_says_so() -> None:
    layer = torch.compile(Layer(None), backend="lychee", options=OPTIONS)
    layer(*inputs())
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "sparse"
    assert site.note.startswith("dense_layers=2 is not applied: ")
    assert "dense_layers=2 is not applied" in " ".join(str(lychee_compile.reports()[-1]).split())


def test_two_attentions_of_a_layer_count_from_its_number() -> None:
    """The second attention of layer 1 may be sparse: as in a whole model, each counts."""
    torch.compile(Layer(1, 2), backend="lychee", options=OPTIONS)(*inputs())
    sites = lychee_compile.reports()[-1].sites
    assert [site.decision for site in sites] == ["kept", "sparse"]
    assert sites[0].reason == reasons.DENSE_LAYERS(dense_layers=2)
