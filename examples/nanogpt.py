"""nanoGPT's attention, products and a softmax by hand: a fused prefill, then sparse steps.

    python examples/nanogpt.py

The model is a GPT as nanoGPT writes it. One projection gives queries, keys and values, the causal
mask is a slice of a triangular buffer, and the cache grows by concatenation. The prefill becomes
one scaled dot-product attention, which writes no score matrix. Nothing in the model knows of
lychee.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile
from lychee_compile.recorder import Recorder
from lychee_compile.report.report import Report

VOCABULARY, WIDTH, BLOCK_SIZE = 256, 64, 512

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [B, H, L, D]."""
Forward = Callable[..., tuple[Tensor, Past]]


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the tokens so far, written as products and a softmax."""

    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("seen", torch.tril(torch.ones(1, 1, block_size, block_size)))

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend from x; return [B, T, width], and past keys and values with those of x."""
        B, T, C = x.shape
        q, k, v = self.query_key_value(x).split(C, dim=2)
        q, k, v = (
            each.view(B, T, self.heads, C // self.heads).transpose(1, 2) for each in (q, k, v)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        L = k.shape[2]
        attention = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.shape[-1]))
        attention = attention.masked_fill(self.seen[:, :, L - T : L, :L] == 0, -math.inf)
        attention = self.dropout(F.softmax(attention, dim=-1))
        y = (attention @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.project(y), (k, v)


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a norm and a residual."""

    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads, block_size)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map x [B, T, width] to the same shape, and return the grown keys and values."""
        attended, present = self.attention(self.norm_1(x), past)
        x = x + attended
        return x + self.feed_forward(self.norm_2(x)), present


class NanoGPT(nn.Module):
    """Decoder of token ids to logits."""

    def __init__(
        self, layers: int = 3, width: int = WIDTH, heads: int = 4, block_size: int = BLOCK_SIZE
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, block_size) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Return logits [B, vocabulary] of the token after `ids` [B, T], and the grown cache."""
        done = 0 if past is None else past[0][0].shape[2]
        positions = torch.arange(done, done + ids.shape[1], device=ids.device)
        x = self.words(ids) + self.positions(positions)
        presents: Past = []
        for layer, block in enumerate(self.blocks):
            x, present = block(x, None if past is None else past[layer])
            presents.append(present)
        return self.head(self.norm(x[:, -1])), presents


def generate(forward: Forward, prompt: Tensor, count: int) -> Tensor:
    """Return the next `count` tokens, int64 [B, count]."""
    logits, past = forward(prompt)
    tokens = [logits.argmax(-1, keepdim=True)]
    while len(tokens) < count:
        logits, past = forward(tokens[-1], past)
        tokens.append(logits.argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


@dataclass
class Generated:
    """Tokens of both runs, int64 [B, tokens], and what the sparse one read."""

    dense: Tensor
    sparse: Tensor
    recorder: Recorder
    reports: list[Report]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu or cuda (%(default)s)")
    add("--context", type=int, default=2000, metavar="N", help="tokens of prompt (%(default)s)")
    add("--new-tokens", type=int, default=16, metavar="N", help="tokens to generate (%(default)s)")
    add("--budget", type=int, default=512, metavar="N", help="tokens read per step (%(default)s)")
    add("--reference", action="store_true", help="on a GPU, run the plain operators, not kernels")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> Generated:
    """Generate densely and sparsely, and show what was read."""
    chosen = parse(arguments)
    torch.manual_seed(0)
    model = NanoGPT(layers=2, block_size=chosen.context + chosen.new_tokens)
    for block in model.blocks:  # random queries attend to all alike, as trained ones do not
        block.attention.query_key_value.weight[:WIDTH] *= 12
    model = model.eval().to(chosen.device)
    prompt = torch.randint(VOCABULARY, (1, chosen.context), device=chosen.device)

    dense = generate(model, prompt, chosen.new_tokens)

    options = {"budget": chosen.budget, "reference": chosen.reference}
    compiled = torch.compile(model, backend="lychee", options=options)
    with lychee_compile.record(mass=True) as recorder:  # only to see what is read
        sparse = generate(compiled, prompt, chosen.new_tokens)

    result = Generated(dense, sparse, recorder, lychee_compile.reports())
    show(result)
    error = (compiled(prompt)[0] - model(prompt)[0]).abs().max().item()
    print(f"Prefill, logits: largest difference {error:.1e}")
    return result


def show(result: Generated) -> None:
    """Print the reports, the tokens, and what each attention read, mean over steps and heads."""
    print(*dict.fromkeys(map(str, result.reports)), sep="\n\n")
    print("\ndense: ", *result.dense[0].tolist())
    print("lychee:", *result.sparse[0].tolist())
    agreeing = (result.dense == result.sparse).long().cumprod(1).sum(1).min()
    print(f"The first {agreeing} of {result.dense.shape[1]} tokens are the same.")
    print(result.recorder)


if __name__ == "__main__":
    main(sys.argv[1:])
