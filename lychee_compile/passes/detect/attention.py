"""Records of an attention in a graph, and of a softmax that belongs to none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum

import sympy
import torch.fx

from lychee_compile.passes.detect.axis_roles import Roles
from lychee_compile.passes.detect.operands import Layout, Operand
from lychee_compile.passes.detect.score import Score
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.axes import Axes, Axis, plain


@dataclass(frozen=True)
class KeyPart:
    """Keys of an attention that lie side by side, with their values: a part of all its keys."""

    axes: tuple[Axis, ...]
    """Axis over these keys; none if there is one key."""
    key_forms: tuple[Operand, ...]
    """All tensors that show these keys, the farthest from the attention last."""
    value: Operand


@dataclass(frozen=True)
class Products:
    """The two products of an attention as the graph has them, one node if it is one operator."""

    scores: torch.fx.Node
    """The product of queries and keys."""
    query: torch.fx.Node
    """Operand that holds queries."""
    key: torch.fx.Node
    values: torch.fx.Node
    """The product of weights and values."""
    value: torch.fx.Node


@dataclass(frozen=True)
class Attention:
    """One attention: softmax(score(Q K^T)) V."""

    node: torch.fx.Node
    """The node that computes the output."""
    form: str
    """Form in which it is written: "sdpa", "eager", "flex" or "fused"."""
    axes: Axes
    roles: Roles
    query: Operand
    key: Operand
    """The keys before they are repeated for the query heads."""
    value: Operand
    output: Layout
    """Axes that the dimensions of `node` hold."""
    score: Score
    names: Names = field(compare=False)
    """Names of its tensors."""
    key_forms: tuple[Operand, ...] = ()
    """All tensors that show the keys, `key` included; one of them may be a cache."""
    parts: tuple[KeyPart, ...] = ()
    """Keys in front and keys behind them if keys and values are concatenations of both."""
    is_causal: bool = False
    """True if PyTorch's own causal mask applies: query i sees keys 0 to i."""
    dropout: float = 0.0
    """Probability with which weights are dropped."""
    products: Products | None = None
    """Its products; None if it has none that can be told apart."""
    refused: Reason | None = None
    """Reason to keep it, if its dataflow rules out a rewrite."""

    def size(self, axes: Iterable[Axis]) -> int | sympy.Expr:
        """Return the number of values that some of its axes have together."""
        return plain(self.axes.product(axes))

    def over(self, part: KeyPart) -> Attention:
        """Return the attention over a part of the keys, without any mask or bias."""
        return replace(
            self,
            roles=replace(self.roles, key=part.axes),
            key=part.key_forms[-1],
            value=part.value,
            key_forms=part.key_forms,
            score=replace(self.score, biases=(), masks=()),
            parts=(),
        )

    @property
    def query_len(self) -> int | sympy.Expr:
        """Number of query positions, Tq."""
        return self.size(self.roles.query)

    @property
    def kv_len(self) -> int | sympy.Expr:
        """Number of keys, L."""
        return self.size(self.roles.key)


@dataclass(frozen=True)
class Unread:
    """An operator that is or holds an attention and cannot be read in full."""

    node: torch.fx.Node
    form: str
    query_heads: int | sympy.Expr
    kv_heads: int | sympy.Expr
    head_dim: int | sympy.Expr
    query_len: int | sympy.Expr
    kv_len: int | sympy.Expr
    mask: str
    reason: Reason
    by_design: bool


class Stage(IntEnum):
    """Stages of a softmax on its way to an attention, the later the nearer."""

    WEIGHTS = 0
    """A softmax whose weights may go anywhere."""
    PRODUCT = 1
    """A softmax whose weights go into a product."""
    SCORES = 2
    """The product sums over the axis of the softmax, whose scores are read."""
    OPERANDS = 3
    """The scores are a product of queries and keys, and the roles of the axes are read."""


@dataclass(frozen=True)
class Rejected:
    """A softmax that belongs to no attention."""

    node: torch.fx.Node
    reason: Reason
    stage: Stage
    """The stage at which it turned out to be none."""
