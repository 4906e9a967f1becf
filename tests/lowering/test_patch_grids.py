"""Patches of images and videos: found in a graph, and tiles of queries are neighbours."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from prefill_cases import DIM, HEADS, RECENT, SINKS, compiled, only_site, recorded
from prefill_problems import prefill_config
from torch import Tensor
from torch._subclasses import FakeTensorMode

import lychee_compile
from lychee_compile.kernels.reference.prefill_attention import prefill_attention
from lychee_compile.kernels.sizes import QUERY_TILE
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.patch_grids import Grid, Orders

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")


def order_of(sizes: tuple[int, ...], prefix: int) -> list[int]:
    """Return the order that is emitted, as numbers."""
    graph = torch.fx.Graph()
    emit = Emitter(graph, FakeTensorMode())
    end = graph.output(())
    order = Orders(emit)(Grid(sizes, prefix), torch.device("cpu"))
    end.args = (order,)
    made = torch.fx.GraphModule({}, graph)()
    assert made.dtype == torch.int64
    return made.tolist()


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    "sizes", [(32, 16), (37, 21), (5, 3), (16, 9), (4, 16, 8), (3, 11, 10)], ids=str
)
def test_an_order_is_that_of_blocks(sizes: tuple[int, ...], prefix: int) -> None:
    block = Grid(sizes, prefix).block
    assert math.prod(block) == QUERY_TILE
    wanted = []
    starts = itertools.product(*map(range, (0,) * len(sizes), sizes, block))
    for start in starts:
        ends = [
            min(each) for each in zip(map(sum, zip(start, block, strict=True)), sizes, strict=True)
        ]
        for at in itertools.product(*map(range, start, ends)):
            place = 0
            for index, size in zip(at, sizes, strict=True):
                place = place * size + index
            wanted.append(prefix + place)
    wanted += range(prefix)
    assert order_of(sizes, prefix) == wanted
    assert sorted(wanted) == list(range(math.prod(sizes) + prefix))


class Patches(torch.nn.Module):
    """Self-attention of the patches of an image or a video, behind some tokens."""

    def __init__(self, prefix: int, dims: int = 2, causal: bool = False) -> None:
        super().__init__()
        convolution = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
        self.causal = causal
        self.patches = convolution(1, HEADS * DIM, kernel_size=2, stride=2)
        self.first = torch.nn.Parameter(torch.randn(1, prefix, HEADS * DIM))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels).flatten(2).mT
        tokens = torch.cat([self.first.expand(len(pixels), -1, -1), patches], 1)
        query = tokens.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, query.cos(), query, is_causal=self.causal)


@pytest.mark.parametrize(
    ("sizes", "prefix", "words"),
    [
        ((40, 42), 1, "in blocks of 16 x 8 patches"),
        ((40, 42), 0, "in blocks of 16 x 8 patches"),
        ((8, 16, 16), 4, "in blocks of 2 x 8 x 8 patches"),
    ],
    ids=str,
)
def test_tiles_are_blocks_of_patches(sizes: tuple[int, ...], prefix: int, words: str) -> None:
    model, pixels = Patches(prefix, len(sizes)), torch.randn(2, 1, *sizes)
    with recorded() as calls:
        got = compiled(model)(pixels)
    assert only_site().reads.endswith(words)
    (call,) = calls
    assert call.order.tolist() == order_of(tuple(size // 2 for size in sizes), prefix)
    config = prefill_config(sinks=SINKS, recent=RECENT)
    expected = prefill_attention(call.operands, config, order=call.order).output
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    in_rows = prefill_attention(call.operands, config).output
    assert not torch.allclose(got, in_rows, atol=1e-3)


@pytest.mark.parametrize(
    ("prefix", "causal", "pixels"),
    [
        pytest.param(1, True, (40, 42), id="causal"),
        pytest.param(17, False, (40, 42), id="many tokens before"),
        pytest.param(0, False, (2, 512), id="a line"),
        pytest.param(0, False, (16, 32), id="one tile"),
    ],
)
def test_other_sequences_keep_their_order(
    prefix: int, causal: bool, pixels: tuple[int, int]
) -> None:
    with recorded() as calls:
        compiled(Patches(prefix, causal=causal))(torch.randn(1, 1, *pixels))
    assert [call.order for call in calls] == [None]
    assert only_site().decision == "sparse"
    assert "blocks" not in only_site().reads


class Ambiguous(Patches):
    """The same number of patches in two shapes."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels + self.patches(pixels.mT).mean())


def test_patches_of_two_shapes_keep_their_order() -> None:
    compiled(Ambiguous(1))(torch.randn(1, 1, 40, 42))
    assert only_site().decision == "sparse"
    assert "blocks" not in only_site().reads


def test_a_vision_transformer_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    shape = {"image_size": 144, "patch_size": 8, "num_hidden_layers": 2}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, **shape)).eval()
    pixels = torch.randn(1, 3, 144, 144)
    with recorded() as calls:
        got = compiled(model, prefill_budget=10**9)(pixels).last_hidden_state
    torch.testing.assert_close(got, model(pixels).last_hidden_state, atol=1e-4, rtol=1e-4)
    assert [call.order.tolist() for call in calls] == [order_of((18, 18), 1)] * 2
    (report,) = lychee_compile.reports()
    assert all("blocks of 16 x 8" in site.reads for site in report.sites)


def test_patches_through_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of `without_inductor`
    model, pixels = Patches(1), torch.randn(2, 1, 40, 42)
    got = compiled(model, prefill_budget=10**9)(pixels)
    torch.testing.assert_close(got, model(pixels), atol=1e-5, rtol=1e-5)
    assert only_site().reads.endswith("in blocks of 16 x 8 patches")
