"""A GPT as nanoGPT and minGPT write it: attention spelled out, over a cache that grows.

    python examples/models/nano_gpt.py

One projection gives queries, keys and values; the causal mask is a slice of a triangular buffer;
past keys and values are concatenated with the new ones. Nothing in here knows of lychee.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile

VOCABULARY, BLOCK_SIZE = 256, 512
PROMPT, NEW_TOKENS = 384, 24
OPTIONS = {"budget": 128, "sinks": 4, "recent": 16}

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [B, H, L, D]."""


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the tokens so far."""

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
        """Attended [B, T, width], and the keys and values with those of `x` at their end."""
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
    """Attention and a feed-forward layer, each after a norm and beside a residual."""

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
        """As `CausalSelfAttention`."""
        attended, present = self.attention(self.norm_1(x), past)
        x = x + attended
        return x + self.feed_forward(self.norm_2(x)), present


class NanoGPT(nn.Module):
    """Words and places in, logits out."""

    def __init__(
        self, layers: int = 3, width: int = 64, heads: int = 4, block_size: int = BLOCK_SIZE
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, block_size) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Logits [B, vocabulary] of what follows `ids` [B, T], and the grown cache."""
        done = 0 if past is None else past[0][0].shape[2]
        places = torch.arange(done, done + ids.shape[1], device=ids.device)
        x = self.words(ids) + self.places(places)
        presents: Past = []
        for layer, block in enumerate(self.blocks):
            x, present = block(x, None if past is None else past[layer])
            presents.append(present)
        return self.head(self.norm(x[:, -1])), presents


@torch.no_grad()
def generate(model: NanoGPT, ids: Tensor, count: int, options: dict[str, int] | None) -> Tensor:
    """The `count` likeliest next tokens, [B, count]; dense where there are no `options`."""
    step = model if options is None else torch.compile(model, backend="lychee", options=options)
    logits, past = model(ids)
    tokens = [logits.argmax(-1, keepdim=True)]
    while len(tokens) < count:
        logits, past = step(tokens[-1], past)
        tokens.append(logits.argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


def main() -> None:
    """Generate densely and sparsely, and show what the backend found."""
    torch.manual_seed(0)  # random weights attend to all tokens alike: the hardest to be sparse in
    model = NanoGPT().eval()
    prompt = torch.randint(0, VOCABULARY, (1, PROMPT))
    dense = generate(model, prompt, NEW_TOKENS, None)
    sparse = generate(model, prompt, NEW_TOKENS, OPTIONS)
    print("dense: ", *dense[0].tolist())
    print("sparse:", *sparse[0].tolist())
    alike = (dense == sparse).long().cumprod(1).sum()
    print(f"the first {alike} of {NEW_TOKENS} tokens agree\n")
    with torch.no_grad():
        _, past = model(prompt)
        print(lychee_compile.explain(model, dense[:, :1], past, options=OPTIONS))


if __name__ == "__main__":
    main()
