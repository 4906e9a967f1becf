"""Values of summaries and estimates as tensors: the algebras of `kernels/levels/expressions.py`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import sympy
import torch
from torch import Tensor

from lychee_compile.kernels.levels.declaration import Level
from lychee_compile.kernels.levels.expressions import (
    dot,
    evaluate,
    field,
    greatest,
    key,
    least,
    mean,
)
from lychee_compile.kernels.reference.nodes import rounding_slack


class _Elementwise:
    """Operations that broadcast, which all algebras of tensors have in common."""

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, device="cpu")

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right

    def power(self, base: Tensor, exponent: float) -> Tensor:
        return base.pow(exponent)

    def exp(self, value: Tensor) -> Tensor:
        return value.exp()

    def log(self, value: Tensor) -> Tensor:
        return value.log()

    def absolute(self, value: Tensor) -> Tensor:
        return value.abs()

    def maximum(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.maximum(left, right)

    def minimum(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.minimum(left, right)


class _OfGroups(_Elementwise):
    """Values [..., T, D] over keys and channels; an axis without values has size 1."""

    def __init__(self, valid: Tensor | None) -> None:
        self.valid = valid
        """Keys that count, bool [..., T, 1]; None: all."""

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        if left is right:
            return torch.linalg.vector_norm(left, dim=-1, keepdim=True).square_()
        return (left * right).sum(-1, keepdim=True)

    def mean(self, value: Tensor) -> Tensor:
        if self.valid is None:  # on a CPU `mean` takes several times as long as `sum`
            return value.sum(-2, keepdim=True) / value.shape[-2]
        value = torch.where(self.valid, value, 0).sum(-2, keepdim=True)
        return value / self.valid.sum(-2, keepdim=True).clamp(min=1)

    def least(self, value: Tensor) -> Tensor:
        value = value if self.valid is None else torch.where(self.valid, value, torch.inf)
        return value.amin(-2, keepdim=True)

    def greatest(self, value: Tensor) -> Tensor:
        value = value if self.valid is None else torch.where(self.valid, value, -torch.inf)
        return value.amax(-2, keepdim=True)


class _ByLabel(_Elementwise):
    """Values [L, D] of keys; what is taken over a group stands at each of its keys."""

    def __init__(self, label: Tensor, count: int, weight: Tensor | None) -> None:
        self.label, self.count = label, count
        """Group of each key, int64 [L], and number of groups; that number: no group."""
        self.weight = None if weight is None else weight[:, None]
        """Number of keys that each one stands for, float32 [L, 1]; None: one."""
        each = torch.ones(len(label), 1, device=label.device) if weight is None else weight[:, None]
        self.held = each.new_zeros(count + 1, 1).index_add_(0, label, each)

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(-1, keepdim=True)

    def mean(self, value: Tensor) -> Tensor:
        value = value.expand(len(self.label), -1)
        value = value if self.weight is None else value * self.weight
        total = value.new_zeros(self.count + 1, value.shape[-1]).index_add_(0, self.label, value)
        return (total / self.held.clamp(min=1)).index_select(0, self.label)

    def least(self, value: Tensor) -> Tensor:
        return -self.greatest(-value)

    def greatest(self, value: Tensor) -> Tensor:
        value = value.expand(len(self.label), -1)
        floor = value.new_full((self.count + 1, value.shape[-1]), -torch.inf)
        place = self.label[:, None].expand_as(value)
        return floor.scatter_reduce(0, place, value, "amax").index_select(0, self.label)


class _OfPairs(_Elementwise):
    """Values [..., R, N, D] over queries, groups and channels, with axes of size 1 likewise."""

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        for rows, groups in ((left, right), (right, left)):
            if rows.dim() > 2 and groups.dim() > 2 and rows.shape[-2] == groups.shape[-3] == 1:
                product = rows[..., 0, :] @ groups[..., 0, :, :].transpose(-1, -2)
                return product[..., None]
        return (left * right).sum(-1, keepdim=True)

    def mean(self, value: Tensor) -> Tensor:
        raise ValueError("an estimate has no keys to take a mean of: only a field has")

    least = greatest = mean


class _Sizes(_OfPairs):
    """Sizes of all terms of an estimate, which bound the rounding of their sum."""

    def number(self, value: float) -> Tensor:
        return torch.tensor(abs(value), device="cpu")

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        return super().dot(left.abs(), right.abs())


def summaries(
    level: Level, keys: Tensor, valid: Tensor | None, stored: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the fields of groups by name, float32 [..., D] or, without channels, [..., 1].

    `keys` is [..., T, D], the keys of each group. Those that are not `valid`, bool broadcastable to
    [..., T], do not count, and may be any number; None: all count. Fields with channels are rounded
    to the dtype in which they are `stored` before others are made of them.
    """
    keys = keys.float() if valid is None else torch.where(valid[..., None], keys.float(), 0)
    count = keys.new_tensor(keys.shape[-2]) if valid is None else valid.sum(-1)[..., None, None]
    values = {"key": keys, "count": count.float()}
    values["head_dim"] = torch.tensor(float(keys.shape[-1]), device="cpu")
    algebra = _OfGroups(None if valid is None else valid[..., None])
    found: dict[str, Tensor] = {}
    known: dict[sympy.Expr, Tensor] = {}
    for name, summary in level.fields.items():
        found[name] = values[name] = _rounded(
            level, name, evaluate(summary, algebra, values, known), stored
        )
    width = {name: keys.shape[-1] if wide else 1 for name, wide in level.channels.items()}
    return {
        name: value[..., 0, :].expand(*keys.shape[:-2], width[name])
        for name, value in found.items()
    }


def summaries_by_label(
    level: Level,
    keys: Tensor,
    label: Tensor,
    count: int,
    stored: torch.dtype = torch.float32,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the fields of `count` groups by name, float32 [count, D] or [count, 1].

    `keys` is [L, D]; `label`, int64 [L], is the group of each key, `count` for those in none. A
    group without keys has zeros. See `summaries` for `stored`. `weight`, float32 [L], is how many
    keys each one stands for; None: for itself.
    """
    algebra, found = _ByLabel(label, count, weight), {}
    values = {"key": keys.float(), "count": algebra.held[label]}
    values["head_dim"] = torch.tensor(float(keys.shape[-1]), device="cpu")
    any_key = label.new_zeros(count + 1).scatter(
        0, label, torch.arange(len(label), device=label.device)
    )
    known: dict[sympy.Expr, Tensor] = {}
    for name, summary in level.fields.items():
        values[name] = _rounded(level, name, evaluate(summary, algebra, values, known), stored)
        one = values[name].expand(len(label), -1)[any_key]
        found[name] = torch.where(algebra.held > 0, one, 0)[:count]
    return found


def follows_from_moments(level: Level) -> bool:
    """True if means and variances of parts of a group, per channel, tell all of its fields."""
    return all(map(_of_moments, level.fields.values()))


@cache
def _of_moments(summary: sympy.Expr) -> bool:
    """True if a summary compares no keys and takes means of polynomials of second degree alone."""
    inner = [each.args[0] for each in summary.atoms(mean)]
    return not summary.has(dot, least, greatest) and all(
        each.is_polynomial(key) and sympy.degree(each, key) <= 2 for each in inner
    )


def moments(level: Level, fields: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Return the fields that are mean and variance of the keys of each group, if there are such.

    Both are [B, Hkv, N, D]. A variance is found only with the mean that it is taken around.
    """
    names = {summary: name for name, summary in level.fields.items()}
    centre = names.get(mean(key))
    if centre is None:
        return None, None
    spread = names.get(mean((key - field(centre)) ** 2))
    return fields[centre], None if spread is None else fields[spread]


def _rounded(level: Level, name: str, value: Tensor, stored: torch.dtype) -> Tensor:
    return value.to(stored).float() if level.channels[name] else value


def estimate(level: Level, query: Tensor, groups: Mapping[str, Tensor], scale: float) -> Tensor:
    """Return the estimated q.k of each query and group, float32 [..., R, N].

    `query` is float32 [..., R, D]; `groups` are the fields, [..., N, D] or [..., N, 1], and at a
    level of tokens the keys, under the name "key". `scale` is that of the softmax.
    """
    return _pairwise(level.estimate, _OfPairs(), query, groups, scale)


def bound(level: Level, query: Tensor, groups: Mapping[str, Tensor], scale: float) -> Tensor | None:
    """Return an upper bound of scale q.k over the keys of each group, [..., R, N], if there is one.

    The arguments are those of `estimate`. The bound is widened by what float32 rounding can hide. A
    negative scale bounds with -q.
    """
    if level.bound is None:
        return None
    query, scale = (query, scale) if scale >= 0 else (-query, -scale)
    size = _pairwise(level.bound, _Sizes(), query, groups, scale)
    slack = rounding_slack(query.shape[-1])
    found = scale * (_pairwise(level.bound, _OfPairs(), query, groups, scale) + slack * size)
    return found.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _pairwise(
    expression: sympy.Expr,
    algebra: _OfPairs,
    query: Tensor,
    groups: Mapping[str, Tensor],
    scale: float,
) -> Tensor:
    values = {name: each.float().unsqueeze(-3) for name, each in groups.items()}
    rows, count = query.shape[-2], next(iter(values.values())).shape[-2]
    values |= {"query": query.unsqueeze(-2), "softmax_scale": torch.tensor(scale, device="cpu")}
    values["head_dim"] = torch.tensor(float(query.shape[-1]), device="cpu")
    return evaluate(expression, algebra, values)[..., 0].expand(*query.shape[:-2], rows, count)
