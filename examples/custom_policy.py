"""A policy of your own: declared in a few lines, for a CPU and for kernels on a GPU.

    python examples/custom_policy.py

The policy is the `LevelStack` called `GAUSSIAN`. It says what summarises a page of keys, and how a
query estimates the score of a page from that. Everything else is made from it: the plain PyTorch
form that a CPU runs, the Triton kernels of a GPU, which run inside CUDA graphs, and the memory that
an index takes. Caches, rewinds, masks, budgets and attention work as with every policy.

The file needs nothing but torch and lychee_compile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile
from lychee_compile.extend import (
    Keep,
    Level,
    LevelStack,
    Pages,
    Tokens,
    dot,
    field,
    key,
    mean,
    query,
    register_policy,
    softmax_scale,
)

GAUSSIAN = LevelStack(
    levels=(
        Level(
            Pages(16),
            fields={"centre": mean(key), "spread": mean((key - field("centre")) ** 2)},
            # log of the mean of exp(score) over keys of a normal distribution, without the scale
            estimate=dot(query, field("centre"))
            + softmax_scale * dot(query**2, field("spread")) / 2,
            keep=Keep(per_token=4),
        ),
        Level(Tokens(), estimate=dot(query, key)),
    )
)
"""Pages of 16 keys, ranked as if their scores were normally distributed. From the best pages, which
hold four times the budget, the tokens of largest score are read."""

KV_HEADS, GROUP, HEAD_DIM = 2, 4, 64
WARM_UP, STEPS = 6, 4
"""Steps before those that are compared: kernels read every key until an index is built."""


class Attention(nn.Module):
    """Attention of one new token over a static cache, which the token is written to first."""

    def __init__(self, context: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)

        def normal(tokens: int) -> Tensor:
            return torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=random)

        # Neighbouring keys are alike, as those of a text are, and queries attend to few of them.
        topics = normal(context // 16 + 1).repeat_interleave(16, 2)[:, :, :context]
        room = (0, 0, 0, WARM_UP + STEPS)
        self.register_buffer("keys", F.pad(topics + normal(context), room))
        self.register_buffer("values", F.pad(normal(context), room))

    def forward(self, new: Tensor, position: Tensor) -> Tensor:
        """Attend at `position`, int64 [1], for heads of queries, keys, values [1, H, 1, D]."""
        q, k, v = new.split((KV_HEADS * GROUP, KV_HEADS, KV_HEADS), dim=1)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        seen = torch.arange(self.keys.shape[2], device=new.device) <= position[:, None]
        return F.scaled_dot_product_attention(
            2 * q, self.keys, self.values, attn_mask=seen, enable_gqa=True
        )


def decode(step: Callable[[Tensor, Tensor], Tensor], context: int, device: str) -> Tensor:
    """Decode over a cache of `context` tokens; return the last `STEPS` outputs [STEPS, Hq, D]."""
    random = torch.Generator().manual_seed(1)
    outputs = []
    for position in range(context, context + WARM_UP + STEPS):
        new = torch.randn(1, KV_HEADS * (GROUP + 2), 1, HEAD_DIM, generator=random)
        at = torch.tensor([position], device=device)
        outputs.append(step(new.to(device), at)[:, :, 0].clone())
    return torch.cat(outputs[WARM_UP:])


def microseconds(step: Callable[[Tensor, Tensor], Tensor], context: int, device: str) -> float:
    """Return the time of one more step over the last token, on average."""
    new = torch.randn(1, KV_HEADS * (GROUP + 2), 1, HEAD_DIM, device=device)
    at = torch.tensor([context + WARM_UP + STEPS - 1], device=device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    begin, repeats = perf_counter(), 100
    for _ in range(repeats):
        step(new, at)
    wait()
    return (perf_counter() - begin) / repeats * 1e6


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> dict[str, float]:
    """Compare policies; return the relative error of what each of them puts out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda (default: %(default)s)")
    default = "(default: %(default)s)"
    parser.add_argument("--context", type=int, default=2000, help=f"tokens in the cache {default}")
    parser.add_argument("--budget", type=int, default=512, help=f"tokens read a step {default}")
    chosen = parser.parse_args(arguments)

    register_policy("gaussian", GAUSSIAN, words="pages by mean and variance, then tokens")

    dense = decode(Attention(chosen.context).to(chosen.device), chosen.context, chosen.device)
    errors = {}
    print("policy     relative error  us per step")
    for policy in ("gaussian", "lychee", "streaming"):
        options = {"policy": policy, "budget": chosen.budget}
        if chosen.device.startswith("cuda"):
            options["mode"] = "reduce-overhead"  # each step is a CUDA graph
        model = Attention(chosen.context).to(chosen.device)
        step = torch.compile(model, backend="lychee", options=options)
        output = decode(step, chosen.context, chosen.device)
        errors[policy] = ((output - dense).norm() / dense.norm()).item()
        time = microseconds(step, chosen.context, chosen.device)
        print(f"{policy:<10} {errors[policy]:>14.3f}  {time:>11,.0f}")
    print()
    print(lychee_compile.reports()[0])
    return errors


if __name__ == "__main__":
    main(sys.argv[1:])
