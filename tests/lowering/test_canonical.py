"""Windows and heads of symbolic sizes: operands tell the sizes that a rewrite needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lychee_compile
from lychee_compile.passes.site import Site

HEADS, SIDE, DIM, WINDOWS = 2, 6, 8, 4
TOKENS = SIDE * SIDE
WIDTH = HEADS * DIM

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")


def only_site(
    model: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    dynamic: dict[int, tuple[int, ...]] | None,
) -> Site:
    """Return the one attention of a model, compiled once for the sizes of both calls.

    `dynamic` holds the dynamic dimensions of some inputs; with None, all sizes are dynamic.
    """
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="lychee", dynamic=True if dynamic is None else None, options={"strict": True}
    )
    for place, dims in (dynamic or {}).items():
        torch._dynamo.mark_dynamic(inputs[place], list(dims))
    with torch.no_grad():
        for each in (inputs, others):
            torch.testing.assert_close(compiled(*each), model(*each), atol=1e-5, rtol=1e-5)
    (report,) = lychee_compile.reports()
    assert not report.rejections()
    (site,) = report.sites
    return site


def attend(scores: Tensor, value: Tensor) -> Tensor:
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


class ShiftedWindows(nn.Module):
    """Four windows of an image of 12 x 12 pixels, those at the border with a mask."""

    def __init__(self, fill: float, scaled: bool = False) -> None:
        super().__init__()
        self.qkv, self.scaled = nn.Linear(WIDTH, 3 * WIDTH), scaled
        hidden = torch.rand(WINDOWS, TOKENS, TOKENS) > 0.7
        self.register_buffer("mask", torch.where(hidden, fill, 0.0))
        self.register_buffer("bias", torch.randn(HEADS, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = (
            x.view(batch, 2, SIDE, 2, SIDE, WIDTH)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(-1, TOKENS, WIDTH)
        )
        qkv = self.qkv(x).view(-1, TOKENS, 3, HEADS, DIM)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.scaled:
            query, key = (nn.functional.normalize(each, dim=-1) for each in (query, key))
        scores = query @ key.mT * 0.25 + self.bias
        scores = scores.view(-1, WINDOWS, HEADS, TOKENS, TOKENS) + self.mask[None, :, None]
        return attend(scores.view(-1, HEADS, TOKENS, TOKENS), value)


def image(batch: int) -> Tensor:
    return torch.randn(batch, 2 * SIDE, 2 * SIDE, WIDTH)


@pytest.mark.parametrize(
    ("dynamic", "fill", "scaled"),
    [
        pytest.param({0: (0,)}, -100.0, False, id="batch"),
        pytest.param(None, -torch.inf, True, id="all sizes, scaled", marks=pytest.mark.thorough),
        pytest.param({0: (0,)}, -torch.inf, True, id="batch, scaled", marks=pytest.mark.thorough),
        pytest.param(None, -100.0, False, id="all sizes", marks=pytest.mark.thorough),
    ],
)
def test_shifted_windows_of_any_batch_are_one_operator(dynamic, fill, scaled) -> None:
    model = ShiftedWindows(fill, scaled).eval()
    site = only_site(model, (image(2),), (image(3),), dynamic)
    assert (site.decision, site.query_heads, site.query_len) == ("exact", HEADS, TOKENS)
    assert site.kernel == "aten.scaled_dot_product_attention"


def windows_of_any_number(qkv: Tensor, mask: Tensor) -> Tensor:
    """Operands [3, B, windows, H, T, D], and a mask [windows, T, T]: folded, then unfolded."""
    _, batch, windows = qkv.shape[:3]
    query, key, value = qkv.flatten(1, 2).unbind(0)
    scores = (query @ key.mT).unflatten(0, (batch, windows)) + mask[:, None]
    return attend(scores.flatten(0, 1), value)


def masked_windows(batch: int, windows: int) -> tuple[Tensor, Tensor]:
    hidden = torch.rand(windows, TOKENS, TOKENS) > 0.7
    operands = torch.randn(3, batch, windows, HEADS, TOKENS, DIM)
    return operands, torch.where(hidden, -1e9, 0.0)


@pytest.mark.parametrize(
    ("dynamic", "windows"),
    [({0: (1,)}, 3), ({0: (2,), 1: (0,)}, 5), ({0: (1, 2), 1: (0,)}, 5)],
    ids=["batch", "windows", "batch and windows"],
)
def test_batch_and_windows_may_be_symbolic(dynamic, windows: int) -> None:
    batch = 4 if 1 in dynamic[0] else 2
    site = only_site(
        windows_of_any_number, masked_windows(2, 3), masked_windows(batch, windows), dynamic
    )
    assert (site.decision, site.query_len) == ("exact", TOKENS)
    assert site.kernel == "aten.scaled_dot_product_attention"


def test_sizes_that_only_a_guard_relates_are_a_reason() -> None:
    def attend_all(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = query @ key.mT
        scores = scores.unflatten(0, (-1, HEADS)) + mask[:, None]
        return scores.flatten(0, 1).softmax(-1) @ value

    operands = torch.randn(3, 2 * HEADS, TOKENS, DIM).unbind(0)
    mask = torch.zeros(2, TOKENS, TOKENS)
    for each in (*operands, mask):
        torch._dynamo.mark_dynamic(each, 0)
    compiled = torch.compile(attend_all, backend="lychee")
    torch.testing.assert_close(compiled(*operands, mask), attend_all(*operands, mask))
    (report,) = lychee_compile.reports()
    assert [each.reason.code for each in report.rejected] == ["operands-layout"]
