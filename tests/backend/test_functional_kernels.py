"""The functional API on a GPU: an index that kernels read, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.functional import (
    KernelIndex,
    KernelSelection,
    build_index,
    select,
    sparse_attention,
    update_index,
)

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")
OPTIONS = {"budget": 96, "sinks": 4, "recent": 8, "chunk": (4, 8)}


def tensors(kv_len: int, query_len: int = 1, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [B, 4, T, 32] and keys and values [B, 2, L, 32]."""
    random = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(batch, 4, query_len, 32, generator=random)
    key, value = torch.randn(2, batch, 2, kv_len, 32, generator=random)
    return query, key, value


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def built(key: Tensor, **more: object) -> KernelIndex:
    index = build_index(key, options={**OPTIONS, **more})
    assert isinstance(index, KernelIndex)
    return index


@pytest.mark.parametrize("policy", ["lychee", "quest", "streaming"])
def test_a_decoding_loop_reads_what_it_says(policy: str) -> None:
    query, key, value = tensors(203)
    index = built(key[:, :, :200], policy=policy)
    for end in (200, 201, 203):
        now, own = key[:, :, :end], value[:, :, :end]
        assert update_index(index, now) is index
        narrow = select(index, query)
        assert isinstance(narrow, KernelSelection)
        read = narrow.token_mask()
        assert read.any()
        assert read.sum(-1).max() <= 96
        output = sparse_attention(query, now, own, narrow)
        expected = dense(query, now, own, read.repeat_interleave(2, 1))
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
        everything = sparse_attention(query, now, own, select(index, query, budget=512))
        torch.testing.assert_close(everything, dense(query, now, own), rtol=1e-3, atol=1e-3)


def test_many_new_keys_are_indexed_at_once() -> None:
    query, key, value = tensors(260)
    index = update_index(built(key[:, :, :100]), key)
    output = sparse_attention(query, key, value, select(index, query, budget=300))
    torch.testing.assert_close(output, dense(query, key, value), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["causal", "additive", "by head", "lengths"])
def test_masks_hide_what_they_hide(kind: str) -> None:
    """The causal mask is one of more query positions than a step has."""
    count = 17 if kind == "causal" else 2
    query, key, value = tensors(120, count, batch=2 if kind == "lengths" else 1)
    mask = torch.arange(120) <= torch.arange(120 - count, 120)[:, None]
    lengths = None
    if kind == "additive":
        mask = torch.where(mask, torch.linspace(-1, 1, 120), -torch.inf)
    if kind == "by head":
        mask = mask & (
            torch.rand(1, 4, count, 120, generator=torch.Generator().manual_seed(1)) < 0.8
        )
    if kind == "lengths":
        lengths = torch.tensor([120, 90])
        mask = (torch.arange(120) < lengths[:, None])[:, None, None].expand(2, 1, count, 120)
    index = build_index(key, lengths=lengths, options=OPTIONS | {"policy": "quest"})
    chosen = select(index, query, budget=200, mask=None if kind == "lengths" else mask)
    output = sparse_attention(query, key, value, chosen)
    torch.testing.assert_close(output, dense(query, key, value, mask), rtol=1e-3, atol=1e-3)


def true_shares(query: Tensor, key: Tensor, read: Tensor, scale: float = 32**-0.5) -> Tensor:
    """Return the share of the softmax outside of the slots `read`, bool [B, Hkv, T, L]."""
    weight = (query.double() @ key.double().repeat_interleave(2, 1).mT * scale).softmax(-1)
    return (weight * ~read.repeat_interleave(2, 1)).sum(-1)


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ("quest", {}),
        ("lychee", {}),
        pytest.param("lycheecluster", {}, marks=pytest.mark.thorough),
        ("quest", {"coverage": 0.7}),
    ],
)
def test_kernels_return_certificates(policy: str, more: dict[str, object]) -> None:
    query, key, value = tensors(203, 2)
    index = built(key[:, :, :199], policy=policy, **more)
    for end in (199, 203):
        now, own = key[:, :, :end], value[:, :, :end]
        mask = torch.ones(2, end, dtype=torch.bool).tril(end - 2)
        selection = select(update_index(index, now), query, mask=mask)
        assert isinstance(selection, KernelSelection)
        read = selection.token_mask()
        output, missed = sparse_attention(query, now, own, selection, return_certificate=True)
        assert "plain" not in selection.__dict__
        assert missed.shape == (1, 4, 2)
        assert missed.dtype == torch.float32
        logits = query.double() @ now.double().repeat_interleave(2, 1).mT / 32**0.5
        weight = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        unread = ~(selection.token_mask() & mask).repeat_interleave(2, 1)
        assert ((weight * unread).sum(-1) <= missed).all()
        assert (missed > 0).all()
        assert (missed <= 1).all()
        read = (read & mask).repeat_interleave(2, 1)
        torch.testing.assert_close(output, dense(query, now, own, read), rtol=1e-3, atol=1e-3)
    if more:
        return
    everything = select(index, query, budget=512)
    _, missed = sparse_attention(query, key, value, everything, return_certificate=True)
    assert not missed.any()


def test_kernels_draw_tokens_as_the_plain_form_does() -> None:
    """A certificate is the plain form's, as kernels add a token up as often as it counts."""
    query, key, value = tensors(400)
    selection = select(built(key, draw=True), query)
    kernels, plain = selection.token_mask(), selection.plain.token_mask()
    assert (kernels.sum(-1) <= 96).all()
    assert (kernels == plain).float().mean() > 0.9, "more than ties at the last priority differ"
    output = sparse_attention(query, key, value, selection)
    certified, missed = sparse_attention(query, key, value, selection, return_certificate=True)
    exact = dense(query, key, value)
    errors = [(each - exact).abs().mean() for each in (output, certified)]
    torch.testing.assert_close(*errors, rtol=0.15, atol=0)
    largest = dense(query, key, value, kernels.repeat_interleave(2, 1))
    assert (output - largest).abs().max() > 0.05, "no token counts more than once"
    assert (true_shares(query, key, plain) <= missed).all()


def test_after_a_certificate_tokens_are_drawn_as_before() -> None:
    query, key, value = tensors(700)
    index = built(key, budget=600)
    before = sparse_attention(query, key, value, select(index, query))
    few = select(index, query, budget=96)
    _, missed = sparse_attention(query, key, value, few, return_certificate=True)
    assert "plain" not in few.__dict__
    assert (missed > 0).all()
    after = sparse_attention(query, key, value, select(index, query))
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize(("policy", "scale"), [("hisa", None), ("quest", -0.2)])
def test_without_a_bound_in_kernels_certificates_are_plain(
    policy: str, scale: float | None
) -> None:
    query, key, value = tensors(150)
    selection = select(built(key, policy=policy), query, budget=64, scale=scale)
    _, missed = sparse_attention(query, key, value, selection, return_certificate=True)
    read = selection.plain.token_mask()
    assert (true_shares(query, key, read, scale or 32**-0.5) <= missed).all()


def test_other_queries_take_the_plain_form() -> None:
    query, key, value = tensors(150)
    selection = select(built(key, policy="quest"), query, budget=64)
    other = query.clone()
    output, missed = sparse_attention(other, key, value, selection, return_certificate=True)
    read = selection.plain.token_mask()
    assert (true_shares(query, key, read) <= missed).all()
    torch.testing.assert_close(
        output, dense(query, key, value, read.repeat_interleave(2, 1)), rtol=1e-4, atol=1e-4
    )


def test_what_does_not_fit_is_named() -> None:
    query, key, value = tensors(60)
    selection = select(built(key), query)
    with pytest.raises(ValueError, match=r"v must be \[1, 2, 60, Dv\]"):
        sparse_attention(query, key, value[:, :, 1:], selection)
    with pytest.raises(ValueError, match="lengths must not shrink"):
        update_index(selection.index, key, lengths=torch.tensor([50]))


@pytest.mark.parametrize("more", [{"reference": True}, {"epsilon": 0.1}, {"policy": "oracle"}])
def test_without_kernels_the_index_is_plain(more: dict[str, object]) -> None:
    assert not isinstance(build_index(tensors(60)[1], options=OPTIONS | more), KernelIndex)


def test_keys_in_float64_have_no_kernels() -> None:
    assert not isinstance(build_index(tensors(60)[1].double(), options=OPTIONS), KernelIndex)
