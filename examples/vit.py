"""A vision transformer with attention by hand: one fused attention, no score matrix, same logits.

    python examples/vit.py
    python examples/vit.py --image 224 --patch 8
    python examples/vit.py --sparse --image 1024 --patch 16 --batch 1

With `--sparse` every block of 16 x 8 patches reads the patches that matter to it, a fifth of all.
Weights are random here and images noise, so that hardly a patch matters more than another: the
error is not that of a trained model.
`models/vit.py` holds the model, as timm writes it: queries, keys and values from one projection.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from models.vit import VisionTransformer
from showing import (
    Compared,
    backend_options,
    compared,
    console,
    show_reports,
    whole_sequence_options,
)

import lychee_compile

HEADS = 4


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> Compared:
    """Classify random images without and with lychee, and compare the logits."""
    parser = whole_sequence_options(__doc__)
    parser.add_argument("--image", type=int, default=192, metavar="N", help="pixels each way")
    parser.add_argument("--patch", type=int, default=8, metavar="N", help="pixels of a patch")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = VisionTransformer(image=given.image, patch=given.patch, heads=HEADS, layers=2)
    model = model.eval().to(given.device)
    images = torch.randn(given.batch, 3, given.image, given.image, device=given.device)

    expected = model(images)
    got = torch.compile(model, backend="lychee", options=backend_options(given))(images)

    result = compared(got, expected, lychee_compile.reports()[-1])
    screen = console()
    show_reports(screen, [result.report])
    tokens = (given.image // given.patch) ** 2 + 1
    scores = given.batch * HEADS * tokens**2 * expected.element_size()
    screen.print(
        f"Logits: largest difference {result.error:.1e}, relative error {result.relative_error:.1e}"
    )
    screen.print(f"Scores that each layer no longer writes to memory: {scores / 2**20:.1f} MiB")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
