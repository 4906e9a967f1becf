"""A policy of your own: chunks ranked by their mean key, and how it compares with others.

    python examples/custom_policy.py

The policy is the class `MeanKeyIndex`. It says what summarises a chunk of keys, and how a query
scores a chunk. Caches, rewinds, masks, budgets and attention work as with every policy.

The file needs nothing but torch and lychee_compile. With `"reference": True` a GPU runs the plain
PyTorch operators too: this policy has no kernels of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

import lychee_compile
from lychee_compile.extend import GroupedIndex, register_policy

KV_HEADS, GROUP, HEAD_DIM, STEPS = 2, 4, 64, 4

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""A step of decoding, such as `decode`."""


class MeanKeyIndex(GroupedIndex):
    """Chunks of neighbouring keys, summarised and ranked by the mean of their keys."""

    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Return the mean key of each chunk, [B, Hkv, M, D].

        `keys` is float32 [B, Hkv, M, T, D]; `valid`, bool [B, M, T], is False for padding.
        """
        present = torch.where(valid[:, None, :, :, None], keys, 0)
        return {"mean": present.sum(3) / valid.sum(-1).clamp(min=1)[:, None, :, None]}

    def log_estimate(self, query: Tensor, scale: float) -> Tensor:
        """Return the score of the mean key of each chunk, [B, Hkv, R, C].

        It stands for the log of the mean of exp(score) over the keys of the chunk.
        """
        return scale * query @ self.summaries["mean"].transpose(-1, -2)

    def bytes_per_step(self, tokens: int, budget: int) -> int:  # noqa: ARG002
        """Return the bytes read to choose among `tokens`: one vector for some twelve tokens."""
        return 2 * self.head_dim * tokens // 12


def decode(
    query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor, position: Tensor
) -> Tensor:
    """Write the newest key and value to a static cache, and attend to all that it holds."""
    keys.index_copy_(2, position, key)
    values.index_copy_(2, position, value)
    visible = torch.arange(keys.shape[2], device=keys.device) <= position[:, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, enable_gqa=True)


def some_steps(step: Step, context: int, device: str) -> Tensor:
    """Decode `STEPS` tokens over a cache of `context` tokens through `step`; [STEPS, Hq, D]."""
    random = torch.Generator().manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, HEAD_DIM, generator=random).to(device)

    # Neighbouring keys are alike, as those of a text are, and queries attend to few of them.
    topics = normal(KV_HEADS, context // 16 + 1).repeat_interleave(16, 2)[:, :, :context]
    keys = F.pad(topics + normal(KV_HEADS, context), (0, 0, 0, STEPS))
    values = F.pad(normal(KV_HEADS, context), (0, 0, 0, STEPS))
    outputs = []
    for position in range(context, context + STEPS):
        query, key, value = (normal(heads, 1) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
        newest = torch.tensor([position], device=device)
        outputs.append(step(2 * query, keys, values, key, value, newest))
    return torch.cat(outputs)[:, :, 0]


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> dict[str, float]:
    """Compare policies; return the mean share of the softmax that each of them reads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda (default: %(default)s)")
    default = "(default: %(default)s)"
    parser.add_argument("--context", type=int, default=2000, help=f"tokens in the cache {default}")
    parser.add_argument("--budget", type=int, default=512, help=f"tokens read a step {default}")
    chosen = parser.parse_args(arguments)

    register_policy("mean-key", MeanKeyIndex, words="chunks, ranked by their mean key")

    dense = some_steps(decode, chosen.context, chosen.device)
    shares = {}
    print("policy     tokens read  share of the softmax  relative error")
    for policy in ("mean-key", "lychee", "streaming"):
        options = {"policy": policy, "budget": chosen.budget, "reference": True}
        compiled = torch.compile(decode, backend="lychee", options=options)
        with lychee_compile.record(mass=True) as recorder:
            output = some_steps(compiled, chosen.context, chosen.device)
        masses = [call.mass.mean().item() for call in recorder.calls if call.mass is not None]
        read = fmean(call.tokens_read.float().mean().item() for call in recorder.calls)
        shares[policy] = fmean(masses)
        error = ((output - dense).norm() / dense.norm()).item()
        print(f"{policy:<10} {read:>11,.0f}  {shares[policy]:>20.3f}  {error:>14.3f}")
    print()
    print(lychee_compile.reports()[0])
    return shares


if __name__ == "__main__":
    main(sys.argv[1:])
