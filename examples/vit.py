"""A vision transformer with attention by hand: one fused attention, no score matrix, same logits.

    python examples/vit.py
    python examples/vit.py --image 224 --patch 8
    python examples/vit.py --sparse --image 1024 --patch 16 --batch 1

The model is a vision transformer as timm writes it: queries, keys and values come from one
projection. With `--sparse` every block of 16 x 8 patches reads the patches that matter to it, a
fifth of all. Weights are random and images noise, so that hardly a patch matters more than another:
the error is not that of a trained model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lychee_compile
from lychee_compile.report.report import Report

HEADS = 4


class Attention(nn.Module):
    """Attention of every patch to every patch, written as products and a softmax."""

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
        """Map x [B, N, width] to the same shape."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q) * self.scale, self.k_norm(k)
        attention = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        x = self.drop(attention) @ v
        return self.project(x.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a norm and a residual."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, qk_norm)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, width] to the same shape."""
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(self.norm_2(x))


class VisionTransformer(nn.Module):
    """Classifier of images by their patches and a class token."""

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
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, qk_norm) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [B, classes] of images [B, 3, H, W]."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


@dataclass
class Compared:
    """Output of the compiled model beside that of the model as it is."""

    error: float
    """Largest difference of the outputs."""
    relative_error: float
    """Norm of the difference over the norm of the uncompiled model's output."""
    report: Report


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu or cuda (%(default)s)")
    share = "128 patches read this share of the patches, 0.2 if none is given (default: all)"
    add("--sparse", type=float, nargs="?", const=0.2, metavar="SHARE", help=share)
    short = "with --sparse, fewer patches are all read (%(default)s)"
    add("--from", type=int, default=1024, dest="prefill_from", metavar="N", help=short)
    add("--image", type=int, default=192, metavar="N", help="pixels each way (%(default)s)")
    add("--patch", type=int, default=8, metavar="N", help="pixels of a patch (%(default)s)")
    add("--batch", type=int, default=2, metavar="N", help="images (%(default)s)")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> Compared:
    """Classify random images without and with lychee, and compare the logits."""
    chosen = parse(arguments)
    torch.manual_seed(0)
    model = VisionTransformer(image=chosen.image, patch=chosen.patch, heads=HEADS, layers=2)
    model = model.eval().to(chosen.device)
    images = torch.randn(chosen.batch, 3, chosen.image, chosen.image, device=chosen.device)
    options = {}
    if chosen.sparse is not None:
        options = {"prefill": "sparse", "prefill_budget": chosen.sparse}
        options["prefill_from"] = chosen.prefill_from

    expected = model(images)
    output = torch.compile(model, backend="lychee", options=options)(images)

    result = compare(output, expected, lychee_compile.reports()[-1])
    print(result.report)
    print(
        f"Logits: largest difference {result.error:.1e}, relative error {result.relative_error:.1e}"
    )
    tokens = (chosen.image // chosen.patch) ** 2 + 1
    scores = chosen.batch * HEADS * tokens**2 * expected.element_size()
    print(f"Scores that each layer no longer writes to memory: {scores / 2**20:.1f} MiB")
    return result


def compare(output: Tensor, expected: Tensor, report: Report) -> Compared:
    """Return how far `output` is from `expected`."""
    difference = output - expected
    relative = (difference.norm() / expected.norm()).item()
    return Compared(difference.abs().max().item(), relative, report)


if __name__ == "__main__":
    main(sys.argv[1:])
