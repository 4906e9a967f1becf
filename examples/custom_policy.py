"""A policy of one's own: chunks ranked by their mean key, and how it compares.

    python examples/custom_policy.py

The policy is the class `MeanKeyIndex`: what summarises a chunk, and what estimates its share of the
softmax. Caches, rewinds, masks, budgets and attention are those of every policy. On a GPU too it
runs the plain PyTorch operators (`"reference": True`): kernels are generated for "lychee" alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from generate_llama import random_llama
from rich.box import SIMPLE_HEAD
from rich.table import Table
from showing import console, mean_mass, mean_read, options, show_reports
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

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


def decode(
    model: PreTrainedModel, forward: Callable[..., Any], ids: Tensor, tokens: Tensor
) -> Tensor:
    """Logits [steps, vocabulary] after each of `tokens` [steps], given the prompt `ids` [1, L]."""
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    logits = [forward(token.view(1, 1), past_key_values=cache).logits for token in tokens]
    return torch.cat(logits)[:, 0]


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> dict[str, float]:
    """Decode a few tokens of a random model; the mean share of the softmax each policy reads."""
    parser = options(__doc__)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--context", type=int, default=2000, metavar="N", help=f"tokens of prompt {default}")
    add("--budget", type=int, default=512, metavar="N", help=f"tokens read per step {default}")
    given = parser.parse_args(arguments)
    lychee_compile.register_policy("mean-key", MeanKeyIndex)
    model, ids = random_llama(given.context)
    model, ids = model.eval().to(given.device), ids.to(given.device)
    tokens = torch.randint(1000, (4,), device=given.device)
    dense = decode(model, model, ids, tokens)

    shares = {}
    table = Table("policy", "tokens read", "share of the softmax", "error", box=SIMPLE_HEAD)
    for policy in ("mean-key", "lychee", "streaming"):
        chosen = {"policy": policy, "budget": given.budget, "reference": True}
        compiled = torch.compile(model, backend="lychee", options=chosen)
        with lychee_compile.record(mass=True) as recorder:
            logits = decode(model, compiled, ids, tokens)
        shares[policy] = mean_mass(recorder.calls)
        error = ((logits - dense).norm() / dense.norm()).item()
        read = mean_read(recorder.calls)
        table.add_row(policy, f"{read:,.0f}", f"{shares[policy]:.3f}", f"{error:.3f}")

    screen = console()
    show_reports(screen, lychee_compile.reports()[:1])
    screen.print(table)
    screen.print("error: of the logits, relative to those of the uncompiled model")
    return shares


if __name__ == "__main__":
    main(sys.argv[1:])
