"""A policy of one's own: chunks ranked by their mean key, and how it compares.

python examples/custom_policy.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lychee_compile
from lychee_compile.kernels.reference.grouped import GroupedIndex


class MeanKeyIndex(GroupedIndex):
    """Boundary-aware chunks, summarised and ranked by the mean of their keys."""

    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """The mean key of each chunk, of `keys` [B, Hkv, M, T, D] where `valid`, bool [B, M, T]."""
        chosen = torch.where(valid[:, None, :, :, None], keys, 0)
        return {"mean": chosen.sum(3) / valid.sum(-1).clamp(min=1)[:, None, :, None]}

    def log_estimate(self, query: Tensor, scale: float) -> Tensor:
        """The score of the mean key stands for those of the chunk: [B, Hkv, R, C]."""
        return scale * query @ self.summaries["mean"].transpose(-1, -2)

    def bytes_per_step(self, tokens: int, budget: int) -> int:  # noqa: ARG002
        """One vector for each chunk, of twelve tokens on average."""
        return 2 * self.head_dim * tokens // 12


@torch.no_grad()
def main() -> dict[str, float]:
    """Decode a few tokens of a random model; the mean share of the softmax each policy reads."""
    lychee_compile.register_policy("mean-key", MeanKeyIndex)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=1000, initializer_range=0.15,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(1000, (1, 2000))
    shares = {}
    for policy in ("mean-key", "lychee", "streaming"):
        compiled = torch.compile(model, backend="lychee", options={"policy": policy, "budget": 256})
        cache = DynamicCache(config=config)
        model(ids, past_key_values=cache)
        with lychee_compile.record(mass=True) as recorder:
            for token in torch.randint(1000, (4, 1, 1)):
                compiled(token, past_key_values=cache)
        mass = [call.mass.mean() for call in recorder.calls if call.mass is not None]
        shares[policy] = float(torch.stack(mass).mean())
        print(f"{policy:10} {shares[policy]:.3f} of the softmax in 256 of 2,000 tokens")
    return shares


if __name__ == "__main__":
    main()
