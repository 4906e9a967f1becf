"""Scales that only a run of the graph tells: a number that Dynamo made symbolic, or a tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lychee_compile
from lychee_compile.passes.site import Site

BATCH, HEADS, DIM, LENGTH = 2, 2, 16, 120
WIDTH = HEADS * DIM
OPTIONS = {"budget": 32, "sinks": 2, "recent": 4, "chunk": (2, 4), "dense_layers": 0}
EVERYTHING = OPTIONS | {"budget": LENGTH}

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


class Decoder(nn.Module):
    """One step over keys that the caller keeps, with a scale that a Python float holds."""

    def __init__(self, scale: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.qkv, self.scale = nn.Linear(WIDTH, 3 * WIDTH, dtype=dtype), scale

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        return (query @ key.mT * self.scale).softmax(-1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.weights(query, key) @ value

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        key, value = (
            torch.cat((past, new), -2)
            for past, new in zip((key, value), qkv[1:].unbind(0), strict=True)
        )
        return self.attend(qkv[0], key, value).transpose(1, 2).flatten(2), key, value


class Divided(Decoder):
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        return (query @ key.mT / self.scale).softmax(-1)


class ScaledByProduct(Decoder):
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        return (query @ key.mT * (self.scale * 0.5) * 2).softmax(-1)


class ScaledQueries(Decoder):
    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        return (query * self.scale @ key.mT).softmax(-1)


class OneOperator(Decoder):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=self.scale)


class Biased(Decoder):
    """Slopes times distances after the scale."""

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        distance = torch.arange(key.shape[-2]) - (key.shape[-2] - 1)
        slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
        return (query @ key.mT * self.scale + slopes[:, None, None] * distance).softmax(-1)


def caches(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    key, value = torch.randn(2, BATCH, HEADS, length, DIM, dtype=dtype).unbind(0)
    return torch.randn(BATCH, 1, WIDTH, dtype=dtype), key, value


def decoded(model: Decoder, options: dict, *scales: float, band: float = 1e-5) -> Site:
    """Decode a step with each scale, without a recompilation, and return the one attention."""
    dtype = model.qkv.weight.dtype
    compiled = torch.compile(model, backend="lychee", dynamic=True, options=options)
    with torch.no_grad():
        for place, scale in enumerate(scales or (model.scale,)):
            model.scale = scale
            inputs = caches(LENGTH - 20 + place, dtype)
            got, expected = compiled(*inputs), model(*inputs)
            torch.testing.assert_close(got[0], expected[0], atol=band, rtol=band)
    (report,) = lychee_compile.reports()
    (site,) = report.sites
    assert not report.rejections()
    return site


@pytest.mark.parametrize(
    ("kind", "score"),
    [
        (Decoder, "s*scale"),
        (Divided, "s/scale"),
        pytest.param(ScaledByProduct, "s*scale", marks=pytest.mark.thorough),
        (ScaledQueries, "s"),
        (OneOperator, "0.3*s"),  # Dynamo takes this scale for a constant
    ],
)
def test_a_symbolic_scale_decodes_sparsely(kind: type[Decoder], score: str) -> None:
    site = decoded(kind(0.3), EVERYTHING)
    assert (site.decision, site.score) == ("sparse", score)


def test_a_bias_after_a_symbolic_scale_is_none_of_the_scale() -> None:
    site = decoded(Biased(0.3), EVERYTHING, 0.3, 0.8)
    assert site.decision == "sparse"
    assert "s*scale" in site.score


def test_a_scale_may_be_anything_in_later_calls() -> None:
    site = decoded(Decoder(0.3), EVERYTHING, 0.3, -0.4, 0.0, 3.0)
    assert site.decision == "sparse"


@pytest.mark.parametrize(
    ("dtype", "band"),
    [
        (torch.bfloat16, 2e-2),
        pytest.param(torch.float16, 4e-3, marks=pytest.mark.thorough),
    ],
)
def test_a_symbolic_scale_costs_one_rounding_of_the_query(dtype: torch.dtype, band: float) -> None:
    site = decoded(Decoder(0.3, dtype), EVERYTHING, 0.3, 0.7, band=band)
    assert site.decision == "sparse"


def test_a_negative_scale_selects_the_keys_with_the_least_products() -> None:
    model = Decoder(-8.0)
    x, key, value = caches(LENGTH)
    with torch.no_grad():
        model.qkv.weight[WIDTH : 2 * WIDTH] = 0
        query = model.qkv(x).view(BATCH, 1, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)[0]
        key *= 0.01
        key[:, :, 40] = -query[:, :, 0] * 4  # far from sinks and recent tokens
        expected = model(x, key, value)[0]
        got = torch.compile(model, backend="lychee", dynamic=True, options=OPTIONS)(x, key, value)
    torch.testing.assert_close(got[0], expected, atol=1e-3, rtol=1e-3)
    (report,) = lychee_compile.reports()
    assert report.sites[0].decision == "sparse"


def test_a_symbolic_soft_cap_is_kept_with_the_reason() -> None:
    class Capped(Decoder):
        def weights(self, query: Tensor, key: Tensor) -> Tensor:
            return ((query @ key.mT / self.scale).tanh() * self.scale).softmax(-1)

    site = decoded(Capped(5.0), EVERYTHING)
    assert site.decision == "kept"
    assert site.reason is not None
    assert site.reason.code == "scores-scaled-late"


def test_a_symbolic_scale_of_an_encoder_is_part_of_its_queries() -> None:
    class Encoder(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x).view(*x.shape[:2], 3, HEADS, DIM).unbind(2)
            return self.attend(*(each.transpose(1, 2) for each in (query, key, value)))

    model = Encoder(0.3)
    compiled = torch.compile(model, backend="lychee", dynamic=True, options={"strict": True})
    with torch.no_grad():
        for scale in (0.3, -0.2):
            model.scale = scale
            x = torch.randn(BATCH, 50, WIDTH)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    (report,) = lychee_compile.reports()
    assert [site.decision for site in report.sites] == ["exact"]
