"""The reference, the kernels and detection hide the same keys under an additive mask."""

from __future__ import annotations

from functools import cache

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_values import evaluate, traced
from torch import Tensor

from lychee_compile.kernels.reference.hidden import HIDDEN, shown, shown_to_step
from lychee_compile.kernels.reference.visible import visible_keys
from lychee_compile.passes.detect.score import hides
from lychee_compile.passes.lower.kernel_expressions import (
    KernelExpressions,
    fused_terms,
    mask_terms,
)

KEYS, DIM = 6, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS = {"recovered": fused_terms, "read": mask_terms}


@cache
def terms_of(dtype: torch.dtype, way: str) -> KernelExpressions:
    """Return the terms of a kernel for SDPA with an additive mask [1, 1, 1, L]."""
    query, key = torch.ones(1, 1, 1, DIM, dtype=dtype), torch.ones(1, 1, KEYS, DIM, dtype=dtype)
    mask = torch.zeros(1, 1, 1, KEYS, dtype=dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    (outcome,) = traced(attend, query, key, key, mask, how=WAYS[way])
    return outcome.terms


def of_kernel(mask: Tensor, way: str) -> Tensor:
    """Return the keys that a kernel takes for visible: bool [L]."""
    terms = terms_of(mask.dtype, way)
    (captured,) = terms.captured
    zero = torch.zeros(KEYS, dtype=torch.long)
    values = {"b": zero, "h": zero, "q": zero, "kv": torch.arange(KEYS), captured.name: mask}
    return evaluate(terms.visible, values).bool().expand(KEYS)


def of_reference(mask: Tensor) -> Tensor:
    """Return the keys that the reference takes for visible: bool [L]."""
    seen = visible_keys(mask, 1, 1, KEYS, mask.device).mask
    assert seen is not None
    return seen[0, 0, 0]


@st.composite
def biases(draw: st.DrawFn, dtype: torch.dtype) -> list[float]:
    """Draw rows of biases: usual ones, those that hide, and those next to the threshold."""
    low = torch.finfo(dtype).min
    near = torch.tensor(HIDDEN, dtype=dtype)
    beside = [
        float(torch.nextafter(near.float(), torch.tensor(to)).to(dtype)) for to in (0.0, -torch.inf)
    ]
    step = -HIDDEN * torch.finfo(dtype).eps
    beside += [HIDDEN, HIDDEN - 2 * step, HIDDEN + 2 * step]
    hiding = [-torch.inf, low, low / 2, -1e4, -9984.0, *([-1e9] if low < -1e9 else [])]
    usual = [0.0, -0.5, -3.0, 1.5, 40.0]
    odd = [-100.0, HIDDEN / 2, 2 * HIDDEN]
    kinds = st.sampled_from([usual + hiding, usual + beside, hiding, usual + beside + hiding + odd])
    return draw(st.lists(st.sampled_from(draw(kinds)), min_size=KEYS, max_size=KEYS))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_kernels_hide_what_the_reference_hides(dtype: torch.dtype, way: str, data) -> None:
    mask = torch.tensor(data.draw(biases(dtype)), dtype=dtype).view(1, 1, 1, KEYS)
    seen, printed, wide = of_reference(mask), of_kernel(mask, way), mask.flatten().float()
    if wide.max() >= 0:
        assert torch.equal(printed, seen)
    else:  # only the reference knows that the row has no bias near zero
        assert (seen | ~printed).all()
    if wide.max() > HIDDEN / 2:
        assert not wide.double().softmax(-1)[~printed].any()


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), seed=st.integers(0, 99))
def test_the_reference_hides_no_key_that_has_weight(dtype: torch.dtype, data, seed: int) -> None:
    """Also in rows that are hidden as a whole, whose weights PyTorch makes of what is left."""
    mask = torch.tensor(data.draw(biases(dtype)), dtype=dtype).float()
    scores = torch.randn(KEYS, generator=torch.Generator().manual_seed(seed)) + mask
    seen = shown(mask)
    if seen.any():
        weight = scores.softmax(-1)
        torch.testing.assert_close(weight, scores.masked_fill(~seen, -torch.inf).softmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [-torch.inf, "lowest", -1e4, -1e9])
def test_what_masks_are_written_with_hides(dtype: torch.dtype, low: float | str) -> None:
    number = max(-1e9, torch.finfo(dtype).min) if low == -1e9 else low
    number = torch.finfo(dtype).min if low == "lowest" else number
    mask = torch.tensor([0.0, number] * (KEYS // 2), dtype=dtype).view(1, 1, 1, KEYS)
    expected = torch.tensor([True, False] * (KEYS // 2))
    assert torch.equal(of_reference(mask), expected)
    for way in WAYS:
        assert torch.equal(of_kernel(mask, way), expected)


@given(st.floats(allow_nan=False, max_value=0, width=32))
@example(HIDDEN)
@example(-torch.inf)
def test_detection_draws_the_same_line(bias: float) -> None:
    """A number in the graph hides its key if that number in a mask tensor does."""
    row = torch.tensor([0.0, bias])
    assert hides(sympy.Float(bias) if bias > -torch.inf else -sympy.oo) == (not shown(row)[1])


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_row_without_any_key_shows_none(low: float) -> None:
    assert not shown(torch.full((2, KEYS), low)).any()


@pytest.mark.parametrize("low", [-1e4, -1e9])
def test_a_row_of_equal_low_numbers_shows_all(low: float) -> None:
    """Equal biases take no key's weight away, so that a row that is all padding shows all keys."""
    assert shown(torch.full((2, KEYS), low)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [-torch.inf, "lowest", -1e4, HIDDEN])
def test_a_decoding_step_shows_nothing_of_a_row_that_one_low_number_fills(
    dtype: torch.dtype, low: float | str
) -> None:
    """So say kernels, which measure from zero."""
    number = torch.finfo(dtype).min if low == "lowest" else low
    mask = torch.full((1, 1, 1, KEYS), number, dtype=dtype)
    assert not shown_to_step(mask).any()
    assert not of_reference(mask).any()
    for way in WAYS:
        assert not of_kernel(mask, way).any()


@given(data=st.data())
def test_other_rows_of_a_step_show_what_rows_of_a_prefill_show(data) -> None:
    row = torch.tensor(data.draw(biases(torch.float32)))
    if row.unique().numel() > 1 or row[0] > HIDDEN:
        assert torch.equal(shown_to_step(row), shown(row))
