"""Graphs a step away from an attention that is understood: and eager's output all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import lychee_compile
from lychee_compile.passes import reasons

SIZE = 40
EVERYTHING = {"budget": SIZE - 1, "sinks": 2, "recent": 8, "chunk": (2, 4)}

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def flex_of_scaled_queries(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return flex_attention(query * 3, key, value)


def flex_of_scaled_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return flex_attention(query, key * 0.5, value, scale=1.0)


def scaled_keys_written_through_a_view(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scaled = key * 2
    scaled[:, :, 3].fill_(5.0)
    return F.scaled_dot_product_attention(query, scaled, value)


def scaled_queries_written_through_a_view(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scaled = query * 2
    scaled[:, :, :, 1].fill_(5.0)
    return F.scaled_dot_product_attention(query=scaled, key=key, value=value)


def times_the_sum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.exp(query @ key.mT)
    total = weights.sum(-1, keepdim=True)
    return (weights @ value) * total + 1 / total


def times_the_sum_beside_its_inverse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.exp(query @ key.mT)
    total = weights.sum(-1, keepdim=True)
    return (weights @ value) * total + total.reciprocal() * value[:, :, :1]


def over_the_logarithm_of_the_sum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.exp(query @ key.mT)
    total = weights.sum(-1, keepdim=True)
    return (weights @ value) / total.log() + value[:, :, :1] / total


NEAR_MISSES = [
    flex_of_scaled_queries,
    flex_of_scaled_keys,
    scaled_keys_written_through_a_view,
    scaled_queries_written_through_a_view,
    times_the_sum,
    times_the_sum_beside_its_inverse,
    over_the_logarithm_of_the_sum,
]


@pytest.mark.parametrize("query_len", [1, 30])
@pytest.mark.parametrize("attend", NEAR_MISSES, ids=lambda attend: attend.__name__)
def test_the_output_is_eagers(attend: Callable[..., Tensor], query_len: int) -> None:
    query = torch.randn(1, 2, query_len, 8)
    key, value = torch.randn(2, 1, 2, SIZE, 8)
    if query_len == 1:
        key[:, :, 20:28] = -20 * query  # one of these is left out, and weighs nothing
        key[:, :, 20:28, 1] = 0
    compiled = torch.compile(attend, backend="lychee", options=EVERYTHING)
    got, expected = compiled(query, key, value), attend(query, key, value)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sink", [False, True])
def test_dense_attention_hides_no_nan(softcap: float | None, sink: bool) -> None:
    from lychee_compile.kernels.reference.attention import dense_attention
    from lychee_compile.kernels.reference.operands import Operands

    query, key, value = torch.randn(3, 1, 2, 20, 8)
    key[0, 1, 4] = torch.nan
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    extra = torch.zeros(2, 1) if sink else None
    output = dense_attention(Operands(query, key, value, seen, 0.3, softcap, extra))
    assert output[0, 0].isfinite().all()
    assert output[0, 1, 4:].isnan().all()


class TwoProducts(torch.nn.Module):
    """Weights go into a product with a parameter and into one that sums over the queries."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(SIZE, 8))
        self.order = order

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        weights = (query @ key.mT).softmax(-1)
        products = {
            "looked up": lambda: weights @ self.table,
            "other axis": lambda: weights.mT @ query,
        }
        return tuple(products[each]() for each in self.order.split(", "))


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("looked up, other axis", reasons.VALUES_LINEAR()),
        ("other axis, looked up", reasons.VALUES_LINEAR()),
        ("other axis", reasons.OTHER_AXIS_SUMMED()),
    ],
)
@torch.no_grad()
def test_the_nearest_miss_is_told(order: str, reason: reasons.Reason) -> None:
    query, key = torch.randn(1, 2, 30, 8), torch.randn(1, 2, SIZE, 8)
    report = lychee_compile.explain(TwoProducts(order), query, key)
    assert report.sites == []
    assert [each.reason for each in report.rejected] == [reason]


def with_extra_logit(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = change(query @ key.mT)
        sink = torch.zeros(1, 2, query.shape[2], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ value

    return attend


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (with_extra_logit(lambda scores: scores), None),
        (with_extra_logit(lambda scores: scores + 3), reasons.EXTRA_LOGIT_UNSHIFTED()),
        (
            lambda query, key, value: ((query @ key.mT).tanh() * 2).tanh().softmax(-1) @ value,
            reasons.SOFTCAP_AFTER_BIAS(),
        ),
    ],
    ids=["extra logit", "number and extra logit", "two soft-caps"],
)
def test_a_score_that_is_not_supported_has_its_reason(
    attend: Callable[..., Tensor], reason: reasons.Reason | None
) -> None:
    query, key, value = torch.randn(1, 2, 1, 8), *torch.randn(2, 1, 2, SIZE, 8)
    (site,) = lychee_compile.explain(attend, query, key, value, options=EVERYTHING).sites
    assert site.reason == reason


@pytest.mark.parametrize("own", [-5e4, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("future", [-torch.inf, -1e9])
def test_a_query_that_sees_nothing_else_sees_its_own_key(own: float, future: float) -> None:
    """The first token of a Reformer sees its own key alone, which is hidden less than others."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        at = torch.arange(query.shape[2])
        scores = (query @ key.mT).masked_fill(at[:, None] < at, future)
        return scores.masked_fill(at[:, None] == at, own).softmax(-1) @ value

    query, key, value = torch.randn(3, 2, 2, 8, 16)
    options = {"prefill": "sparse", "prefill_from": 0, "prefill_budget": 1.0}
    compiled = torch.compile(attend, backend="lychee", options=options)
    assert torch.equal(compiled(query, key, value), attend(query, key, value))
    (site,) = lychee_compile.reports()[-1].sites
    assert (site.decision, site.reason) == ("kept", reasons.SCORES_OWN_KEY())


ROW = torch.randperm(8, generator=torch.Generator().manual_seed(0))
"""Positions of eight tokens that were gathered in no order."""
LEVELS: dict[str, Callable[..., Tensor]] = {
    "filled twice": lambda scores, future, own, far: scores.masked_fill(future, -1e9).masked_fill(
        own, -5e4
    ),
    "filled with infinity": lambda scores, future, own, far: scores.masked_fill(
        future, -torch.inf
    ).masked_fill(own, -1e4),
    "the lower one last": lambda scores, future, own, far: scores.masked_fill(
        own, -5e4
    ).masked_fill(future, torch.finfo(torch.float32).min),
    "three levels": lambda scores, future, own, far: (
        scores.masked_fill(far, -1e6).masked_fill(future, -1e9).masked_fill(own, -5e4)
    ),
    "chosen": lambda scores, future, own, far: torch.where(
        own, -5e4, torch.where(future, -1e9, scores)
    ),
    "added": lambda scores, future, own, far: (
        scores + torch.where(own, -5e4, torch.where(future, -1e9, 0.0))
    ),
    "added one by one": lambda scores, future, own, far: (
        scores + future * -1e9 + torch.where(own, -1e9, 0.0)
    ),
    "filled and added": lambda scores, future, own, far: (
        scores.masked_fill(future, -1e9) + torch.zeros(8, 8).masked_fill(own, -1e5)
    ),
    "by index": lambda scores, future, own, far: scores.masked_fill(future, -1e9).index_put(
        (own.expand_as(scores),), torch.tensor(-5e4)
    ),
}
"""Ways to hide keys by numbers of different size, under masks that are tensors."""


@pytest.mark.parametrize("name", LEVELS)
def test_masks_of_two_levels_that_are_data_hide_in_order(name: str) -> None:
    """A row that has no other keys sees those that the smaller number hides."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Tensor:
        return LEVELS[name](query @ key.mT, *masks).softmax(-1) @ value

    masks = ROW[:, None] < ROW, ROW[:, None] == ROW, ROW[:, None] > ROW + 3
    query, key, value = torch.randn(3, 2, 2, 8, 16)
    options = {"prefill": "sparse", "prefill_from": 0, "prefill_budget": 1.0}
    compiled = torch.compile(attend, backend="lychee", options=options)
    expected = attend(query, key, value, *masks)
    torch.testing.assert_close(compiled(query, key, value, *masks), expected)
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "kept"
    assert site.reason is not None
    assert site.reason.code == reasons.SCORES_LEVELS.code


ONE_LEVEL: dict[str, Callable[..., Tensor]] = {
    "the same number": lambda scores, future, padding: scores.masked_fill(future, -1e9).masked_fill(
        padding, -1e9
    ),
    "infinity": lambda scores, future, padding: (
        scores.masked_fill(future, -torch.inf) + torch.where(padding, -torch.inf, 0.0)
    ),
    "filled anew": lambda scores, future, padding: (
        scores.masked_fill(future, -1e4).masked_fill(future, -1e9).masked_fill(padding, -1e9)
    ),
    "added within a choice": lambda scores, future, padding: (
        scores + torch.where(future | padding, -1e9, 0.0)
    ),
    "positions that leave a key": lambda scores, future, padding: scores.masked_fill(
        torch.ones(8, 8, dtype=torch.bool).triu(1), -1e9
    ).masked_fill(torch.ones(8, 8, dtype=torch.bool).tril(-3), -1e4),
}


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_masks_of_one_level_do_not_keep_an_attention(name: str) -> None:
    """Neither do two levels if positions prove that each row sees its own key."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Tensor:
        return ONE_LEVEL[name](query @ key.mT, *masks).softmax(-1) @ value

    masks = ROW[:, None] < ROW, (ROW == 6)[None]
    query, key, value = torch.randn(3, 2, 2, 8, 16)
    options = {"prefill": "sparse", "prefill_from": 0, "prefill_budget": 1.0}
    compiled = torch.compile(attend, backend="lychee", options=options)
    expected = attend(query, key, value, *masks)
    torch.testing.assert_close(compiled(query, key, value, *masks), expected)
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "sparse"


def test_a_tensor_that_holds_two_levels_stays_a_bias() -> None:
    """Nothing tells its numbers: they are added, and each row measures from its largest."""
    mask = (
        torch.zeros(8, 8)
        .masked_fill(ROW[:, None] < ROW, -1e9)
        .masked_fill(ROW[:, None] == ROW, -1e4)
    )

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return (query @ key.mT + mask).softmax(-1) @ value

    query, key, value = torch.randn(3, 2, 2, 8, 16)
    options = {"prefill": "sparse", "prefill_from": 0, "prefill_budget": 1.0}
    compiled = torch.compile(attend, backend="lychee", options=options)
    expected = attend(query, key, value, mask)
    torch.testing.assert_close(compiled(query, key, value, mask), expected, atol=1e-2, rtol=1e-2)
    (site,) = lychee_compile.reports()[-1].sites
    assert site.decision == "sparse"
