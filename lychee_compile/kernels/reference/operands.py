"""Records of what an attention call computes from: all its operands, or those that scores need."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lychee_compile.kernels.reference.visible import Visible, visible_keys


@dataclass(frozen=True)
class ScoreInputs:
    """Operands that the scores of one attention call depend on: no values, no extra logits."""

    query: Tensor
    """Queries [B, Hq, Tq, D]."""
    key: Tensor | None
    """Keys [B, Hkv, L, D], Hkv dividing Hq; None if the caller does not have them, which is an
    error only for a policy that reads keys."""
    kv_len: int
    """Number of key slots L that the mask covers."""
    mask: Tensor | None
    """SDPA mask, bool or additive, broadcastable to [B, Hq, Tq, L]; None if every key is seen."""
    scale: float
    """Softmax scale: the factor of q.k."""
    softcap: float | None = None
    """Bound that scores are bent to before mask and bias, softcap tanh(score / softcap); None: no
    bound."""

    def visible(self) -> Visible:
        """Return which keys each query position may see."""
        batch, _, query_len, _ = self.query.shape
        return visible_keys(self.mask, batch, query_len, self.kv_len, self.query.device)


@dataclass(frozen=True)
class Operands:
    """All tensors and numbers of one attention call."""

    query: Tensor
    """Queries [B, Hq, Tq, D]."""
    key: Tensor
    """Keys [B, Hkv, L, D], Hkv dividing Hq."""
    value: Tensor
    """Values [B, Hkv, L, Dv]."""
    mask: Tensor | None
    """SDPA mask, bool or additive, broadcastable to [B, Hq, Tq, L]; None if every key is seen."""
    scale: float
    """Softmax scale: the factor of q.k."""
    softcap: float | None = None
    """Bound that scores are bent to before mask and bias, softcap tanh(score / softcap); None: no
    bound."""
    extra: Tensor | None = None
    """Logit of one more key, broadcastable to [B, Hq, Tq], which takes its share of the softmax."""
    extra_value: Tensor | None = None
    """Value of that key, [B, Hq, Tq, Dv]; None: it adds nothing to the output, like an attention
    sink."""

    @property
    def kv_len(self) -> int:
        """Number of key slots, L."""
        return self.key.shape[2]

    @property
    def group(self) -> int:
        """Number of query heads that share a KV head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def score_inputs(self) -> ScoreInputs:
        """Operands that scores depend on."""
        return ScoreInputs(self.query, self.key, self.kv_len, self.mask, self.scale, self.softcap)
