"""A vision transformer as timm writes it: queries, keys and values packed in one projection.

    python examples/models/vit.py

`explain` finds every attention; as each patch asks, they stay exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lychee_compile


class Attention(nn.Module):
    """Every patch attends to every patch."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.drop = nn.Dropout(0.1)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] to the same."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q) * self.scale, self.k_norm(k)
        attention = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        x = self.drop(attention) @ v
        return self.project(x.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, qk_norm)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] to the same."""
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(self.norm_2(x))


class VisionTransformer(nn.Module):
    """Patches of an image and a class token, through blocks, to logits."""

    def __init__(
        self,
        image: int = 32,
        patch: int = 4,
        width: int = 64,
        heads: int = 4,
        layers: int = 3,
        classes: int = 10,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, qk_norm) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W]."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


@torch.no_grad()
def main() -> None:
    """Show what the backend finds."""
    torch.manual_seed(0)
    print(lychee_compile.explain(VisionTransformer().eval(), torch.randn(2, 3, 32, 32)))


if __name__ == "__main__":
    main()
