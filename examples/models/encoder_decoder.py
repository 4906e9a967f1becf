"""PyTorch's own `nn.Transformer`, as its tutorials translate with it.

    python examples/models/encoder_decoder.py

In evaluation mode the encoder runs PyTorch's fused operators, a layer each. The decoder's self- and
cross-attention are scaled dot-product attentions. This file is the input of a compilation, so it
only shows what `explain` finds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import lychee_compile

VOCABULARY, PADDING, WIDTH, HEADS, LAYERS = 100, 0, 64, 4, 2


class Translator(nn.Module):
    """Translator of token ids of one language to logits over those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.transformer = nn.Transformer(
            WIDTH, HEADS, LAYERS, LAYERS, dim_feedforward=128, batch_first=True
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits [B, T, vocabulary] after each of `target` [B, T], given `source` [B, S]."""
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(
            self._embed(source),
            self._embed(target),
            tgt_mask=causal,
            src_key_padding_mask=source == PADDING,
            memory_key_padding_mask=source == PADDING,
            tgt_is_causal=True,
        )
        return self.head(hidden)

    def _embed(self, ids: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1])[:, None]
        frequencies = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10000.0) / WIDTH))
        angles = position * frequencies
        positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return self.words(ids) * math.sqrt(WIDTH) + positions


@torch.no_grad()
def main() -> None:
    """Show what the backend finds."""
    torch.manual_seed(0)
    source, target = torch.randint(1, VOCABULARY, (2, 20)), torch.randint(1, VOCABULARY, (2, 12))
    source[1, 15:] = PADDING
    print(lychee_compile.explain(Translator().eval(), source, target))


if __name__ == "__main__":
    main()
