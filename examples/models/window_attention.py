"""Two Swin blocks as torchvision writes them: attention within windows, then within shifted ones.

    python examples/models/window_attention.py

A table gives the bias of each head and distance. The shift brings patches into one window that are
no neighbours, and the mask hides them from each other. This file is the input of a compilation, so
it only shows what `explain` finds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile


class ShiftedWindowAttention(nn.Module):
    """Attention within square windows of a feature map, shifted by some patches."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        table = torch.randn((2 * window - 1) ** 2, heads) * 0.02
        self.relative_position_bias_table = nn.Parameter(table)
        self.register_buffer("relative_position_index", relative_positions(window).flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, H, W, C] to the same shape; the window size divides H and W."""
        B, H, W, C = x.shape
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = partition(x, self.window)
        N = self.window * self.window
        qkv = self.qkv(windows).reshape(-1, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q * (C // self.heads) ** -0.5).matmul(k.transpose(-2, -1))
        bias = self.relative_position_bias_table[self.relative_position_index]
        attention = attention + bias.view(N, N, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.shift:
            mask = shift_mask(H, W, self.window, self.shift)
            attention = attention.view(B, mask.shape[0], self.heads, N, N)
            attention = attention + mask.unsqueeze(1).unsqueeze(0)
            attention = attention.view(-1, self.heads, N, N)
        attended = F.softmax(attention, dim=-1).matmul(v).transpose(1, 2)
        x = merge(self.project(attended.reshape(-1, N, C)), (B, H, W, C), self.window)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x


def relative_positions(window: int) -> Tensor:
    """Return the row of the bias table for each query and key of a window, int64 [N, N]."""
    grid = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    positions = torch.stack(grid).flatten(1)
    vertical, horizontal = positions[:, :, None] - positions[:, None, :] + window - 1
    return vertical * (2 * window - 1) + horizontal


def shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """Return 0 for neighbours before the shift and -100 for others, [windows, N, N]."""
    regions = torch.zeros(height, width)
    slices = ((0, -window), (-window, -shift), (-shift, None))
    count = 0
    for top, bottom in slices:
        for left, right in slices:
            regions[top:bottom, left:right] = count
            count += 1
    regions = partition(regions[None, :, :, None], window).squeeze(-1)
    apart = regions.unsqueeze(1) - regions.unsqueeze(2)
    return apart.masked_fill(apart != 0, -100.0)


def partition(x: Tensor, window: int) -> Tensor:
    """Cut x [B, H, W, C] into windows [B * windows, N, C]."""
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, C)


def merge(windows: Tensor, shape: tuple[int, int, int, int], window: int) -> Tensor:
    """Undo `partition`: join windows to the `shape` (B, H, W, C)."""
    B, H, W, C = shape
    x = windows.view(B, H // window, W // window, window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(shape)


class SwinBlock(nn.Module):
    """Window attention and a feed-forward layer, each with a norm and a residual."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = ShiftedWindowAttention(width, heads, window, shift)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, H, W, C] to the same shape."""
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(self.norm_2(x))


class Stage(nn.Module):
    """Two blocks over the patches of an image: one on windows, one on shifted windows."""

    def __init__(self, width: int = 32, heads: int = 4, window: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=2, stride=2)
        self.blocks = nn.Sequential(
            SwinBlock(width, heads, window, shift=0),
            SwinBlock(width, heads, window, shift=window // 2),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to features [B, H / 2, W / 2, width]."""
        return self.blocks(self.patches(image).permute(0, 2, 3, 1))


@torch.no_grad()
def main() -> None:
    """Show what the backend finds."""
    torch.manual_seed(0)
    print(lychee_compile.explain(Stage().eval(), torch.randn(2, 3, 16, 16)))


if __name__ == "__main__":
    main()
