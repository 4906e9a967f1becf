"""gpt-fast's loop: prefill, then one compiled function per token over the model's own cache.

    python examples/gpt_fast.py

The model is a Llama as gpt-fast writes it. Keys and values are written into buffers at `positions`,
the mask is rows of a precomputed triangle, and key heads are repeated for the query heads. Nothing
in the model knows of lychee; `backend="lychee"` is all that changes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile
from lychee_compile.recorder import Recorder
from lychee_compile.report.report import Report

VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 16
WIDTH = HEADS * HEAD_DIM


class KVCache(nn.Module):
    """Buffers for the keys and values of one layer."""

    def __init__(self, batch: int, size: int) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(batch, KV_HEADS, size, HEAD_DIM))
        self.register_buffer("v_cache", torch.zeros(batch, KV_HEADS, size, HEAD_DIM))

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v, [B, Hkv, T, D], at `positions` [T], and return both buffers."""
        self.k_cache[:, :, positions] = k
        self.v_cache[:, :, positions] = v
        return self.k_cache, self.v_cache


class Attention(nn.Module):
    """Grouped-query attention over the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [WIDTH, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
        self.query_key_value = nn.Linear(WIDTH, sum(self.sizes), bias=False)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        self.cache = KVCache(0, 0)

    def forward(self, x: Tensor, rotations: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Attend from x [B, T, width] to the cache, and return [B, T, width]."""
        B, T, _ = x.shape
        q, k, v = self.query_key_value(x).split(self.sizes, dim=-1)
        q = rotate(q.view(B, T, HEADS, HEAD_DIM), rotations).transpose(1, 2)
        k = rotate(k.view(B, T, KV_HEADS, HEAD_DIM), rotations).transpose(1, 2)
        v = v.view(B, T, KV_HEADS, HEAD_DIM).transpose(1, 2)
        k, v = self.cache.update(positions, k, v)
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.project(y.transpose(1, 2).contiguous().view(B, T, WIDTH))


def rotations_of(size: int) -> Tensor:
    """Return cosines and sines of the rotary angles, [size, D / 2, 2]."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(size), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate neighbouring features of x [B, T, H, D] by `rotations` [T, D / 2, 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotations[:, None].unbind(-1)
    rotated = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
    return rotated.flatten(3)


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each with a norm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, rotations: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Map x [B, T, width] to the same shape."""
        x = x + self.attention(self.norm_1(x), rotations, mask, positions)
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """Decoder of token ids to logits; call `setup_caches` first."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def setup_caches(self, batch: int, size: int) -> None:
        """Allocate caches of `size` tokens, and what depends on positions alone."""
        for block in self.layers:
            block.attention.cache = KVCache(batch, size)
        self.register_buffer("rotations", rotations_of(size), persistent=False)
        causal = torch.tril(torch.ones(size, size, dtype=torch.bool))
        self.register_buffer("causal_mask", causal, persistent=False)
        self.to(self.head.weight.device)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return logits [B, T, vocabulary] after each of `ids` [B, T] at `positions` [T]."""
        mask = self.causal_mask[None, None, positions]
        rotations = self.rotations[positions]
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x, rotations, mask, positions)
        return self.head(self.norm(x))


Step = Callable[[Transformer, Tensor, Tensor], Tensor]


def decode_one_token(model: Transformer, token: Tensor, position: Tensor) -> Tensor:
    """Return the likeliest token, [B, 1], after `token` [B, 1] at `position` [1]."""
    return model(token, position)[:, -1:].argmax(-1)


def generate(model: Transformer, prompt: Tensor, count: int, step: Step) -> Tensor:
    """Return the next `count` tokens, int64 [B, count]."""
    position = torch.arange(prompt.shape[1], device=prompt.device)
    tokens = [decode_one_token(model, prompt, position)]  # the prefill, uncompiled
    position = position[-1:] + 1
    for _ in range(count - 1):
        tokens.append(step(model, tokens[-1], position))
        position = position + 1
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
    model = Transformer(layers=2).eval().to(chosen.device)
    for layer in model.layers:  # random queries attend to all alike, as trained ones do not
        layer.attention.query_key_value.weight[:WIDTH] *= 12
    model.setup_caches(1, chosen.context + chosen.new_tokens)
    prompt = torch.randint(VOCABULARY, (1, chosen.context), device=chosen.device)

    dense = generate(model, prompt, chosen.new_tokens, decode_one_token)

    # On a GPU "mode": "reduce-overhead" among the options puts each step into a CUDA graph.
    options = {"budget": chosen.budget, "reference": chosen.reference}
    compiled = torch.compile(decode_one_token, backend="lychee", fullgraph=True, options=options)
    with lychee_compile.record(mass=True) as recorder:  # only to see what is read
        sparse = generate(model, prompt, chosen.new_tokens, compiled)

    result = Generated(dense, sparse, recorder, lychee_compile.reports())
    show(result)
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
