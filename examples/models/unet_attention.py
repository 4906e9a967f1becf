"""A U-Net as diffusion models have it: attention among the pixels of a feature map.

    python examples/models/unet_attention.py

Queries, keys and values come from 1 x 1 convolutions, channels before pixels. The single-head block
is that of DDPM, the multi-head block that of guided diffusion; a third block attends to a prompt.
This file is the input of a compilation, so it only shows what `explain` finds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lychee_compile


class SingleHeadAttention(nn.Module):
    """Attention with all channels in one head, and three convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.query, self.key, self.value, self.project = (
            nn.Conv2d(channels, channels, kernel_size=1) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to the same shape."""
        B, C, H, W = x.shape
        h = self.norm(x)
        q = self.query(h).reshape(B, C, H * W).permute(0, 2, 1)
        k = self.key(h).reshape(B, C, H * W)
        v = self.value(h).reshape(B, C, H * W)
        weights = torch.softmax(torch.bmm(q, k) * C**-0.5, dim=2)
        attended = torch.bmm(v, weights.permute(0, 2, 1)).reshape(B, C, H, W)
        return x + self.project(attended)


class MultiHeadAttention(nn.Module):
    """Attention with heads in the channels: one convolution, one einsum over batch and heads."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.query_key_value = nn.Conv1d(channels, 3 * channels, kernel_size=1)
        self.project = nn.Conv1d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to the same shape."""
        B, C, *grid = x.shape
        x = x.reshape(B, C, -1)
        qkv = self.query_key_value(self.norm(x)).reshape(B * self.heads, 3 * C // self.heads, -1)
        q, k, v = qkv.chunk(3, dim=1)
        scale = q.shape[1] ** -0.25
        weights = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weights = torch.softmax(weights.float(), dim=-1).type(weights.dtype)
        attended = torch.einsum("bts,bcs->bct", weights, v).reshape(B, C, -1)
        return (x + self.project(attended)).reshape(B, C, *grid)


class PromptAttention(nn.Module):
    """Attention from pixels to the prompt's tokens, with heads folded into the batch."""

    def __init__(self, channels: int, prompt_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(prompt_width, channels, bias=False)
        self.value = nn.Linear(prompt_width, channels, bias=False)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Map images [B, C, H, W] and a prompt [B, S, prompt_width] to images."""
        pixels = x.flatten(2).transpose(1, 2)
        q = self._heads_to_batch(self.query(self.norm(pixels)))
        k = self._heads_to_batch(self.key(prompt))
        v = self._heads_to_batch(self.value(prompt))
        unused = torch.empty(q.shape[0], q.shape[1], k.shape[1])
        scores = torch.baddbmm(unused, q, k.transpose(-1, -2), beta=0, alpha=self.scale)
        attended = torch.bmm(scores.softmax(dim=-1), v)
        attended = attended.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        return x + self.project(attended).transpose(1, 2).unflatten(2, x.shape[2:])

    def _heads_to_batch(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1)


class UNet(nn.Module):
    """U-Net of one level: down, attention in the middle, up again with a skip connection."""

    def __init__(self, channels: int = 32, prompt_width: int = 24) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, channels, kernel_size=3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1)
        self.single = SingleHeadAttention(2 * channels)
        self.prompt = PromptAttention(2 * channels, prompt_width, heads=4)
        self.multi = MultiHeadAttention(2 * channels, heads=4)
        self.up = nn.ConvTranspose2d(2 * channels, channels, kernel_size=2, stride=2)
        self.leave = nn.Conv2d(2 * channels, 3, kernel_size=3, padding=1)

    def forward(self, image: Tensor, prompt: Tensor) -> Tensor:
        """Map images [B, 3, H, W] of even sides and a prompt [B, S, prompt_width] to images."""
        beside = self.enter(image)
        x = self.single(self.down(beside))
        x = self.multi(self.prompt(x, prompt))
        return self.leave(torch.cat([beside, self.up(x)], dim=1))


@torch.no_grad()
def main() -> None:
    """Show what the backend finds."""
    torch.manual_seed(0)
    image, prompt = torch.randn(2, 3, 16, 16), torch.randn(2, 7, 24)
    print(lychee_compile.explain(UNet().eval(), image, prompt))


if __name__ == "__main__":
    main()
