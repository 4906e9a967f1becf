"""A Llama as gpt-fast writes it: a static cache in the model's own buffers.

    python examples/models/gpt_fast.py

Keys and values are written where `positions` says, the mask is the same rows of a precomputed
triangle, and key heads are repeated for the query heads. Nothing in here knows of lychee.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile

VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 16
WIDTH = HEADS * HEAD_DIM
CACHE_SIZE, PROMPT, NEW_TOKENS = 512, 384, 24
OPTIONS = {"budget": 128, "sinks": 4, "recent": 16}


class KVCache(nn.Module):
    """Room for the keys and values of one layer."""

    def __init__(self, batch: int, size: int) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(batch, KV_HEADS, size, HEAD_DIM))
        self.register_buffer("v_cache", torch.zeros(batch, KV_HEADS, size, HEAD_DIM))

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v, [B, Hkv, T, D], at `positions` [T]; the whole of both."""
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
        """Attended [B, T, width]."""
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
    """Cosines and sines of the rotary angles, [size, D / 2, 2]."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(size), frequencies)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotary embedding of [B, T, H, D], of neighbouring features, by `rotations` [T, D / 2, 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotations[:, None].unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
    return turned.flatten(3)


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each after a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, rotations: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        x = x + self.attention(self.norm_1(x), rotations, mask, positions)
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """Words in, logits out; call `setup_caches` first."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def setup_caches(self, batch: int, size: int) -> None:
        """Empty caches of `size` tokens, and what depends on no token but its position."""
        for block in self.layers:
            block.attention.cache = KVCache(batch, size)
        self.register_buffer("rotations", rotations_of(size), persistent=False)
        causal = torch.tril(torch.ones(size, size, dtype=torch.bool))
        self.register_buffer("causal_mask", causal, persistent=False)
        self.to(self.head.weight.device)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of what follows each of `ids` [B, T], at `positions` [T]."""
        mask = self.causal_mask[None, None, positions]
        rotations = self.rotations[positions]
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x, rotations, mask, positions)
        return self.head(self.norm(x))


@torch.no_grad()
def generate(model: Transformer, ids: Tensor, count: int, options: dict[str, int] | None) -> Tensor:
    """The `count` likeliest next tokens, [B, count]; dense where there are no `options`."""
    step = model if options is None else torch.compile(model, backend="lychee", options=options)
    model.setup_caches(ids.shape[0], CACHE_SIZE)
    positions = torch.arange(ids.shape[1])
    tokens = [model(ids, positions)[:, -1:].argmax(-1)]
    while len(tokens) < count:
        positions = positions[-1:] + 1
        tokens.append(step(tokens[-1], positions)[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)


def main() -> None:
    """Generate densely and sparsely, and show what the backend found."""
    torch.manual_seed(0)  # random weights attend to all tokens alike: the hardest to be sparse in
    model = Transformer().eval()
    prompt = torch.randint(0, VOCABULARY, (1, PROMPT))
    dense = generate(model, prompt, NEW_TOKENS, None)
    sparse = generate(model, prompt, NEW_TOKENS, OPTIONS)
    print("dense: ", *dense[0].tolist())
    print("sparse:", *sparse[0].tolist())
    alike = (dense == sparse).long().cumprod(1).sum()
    print(f"the first {alike} of {NEW_TOKENS} tokens agree\n")
    with torch.no_grad():
        following = torch.tensor([PROMPT + NEW_TOKENS])
        print(lychee_compile.explain(model, dense[:, -1:], following, options=OPTIONS))


if __name__ == "__main__":
    main()
