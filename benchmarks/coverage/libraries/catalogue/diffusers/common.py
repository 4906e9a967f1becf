"""Words shared by the catalogues of diffusers."""

from __future__ import annotations

from typing import Any

from benchmarks.coverage.libraries.entries import Entry, Made, floats, ids

UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
}
TIME = {"timestep": ids(2)}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
VAE = {"block_out_channels": (32, 64), "norm_num_groups": 8, "latent_channels": 4}


def entry(
    name: str, inputs: list[Any], named: dict[str, Any] | None = None, **kwargs: Any
) -> Entry:
    """Return an entry of a class of diffusers, which `kwargs` build."""
    return Entry(name, Made(f"diffusers.{name}", **kwargs), inputs, named or {})


TWO_DOWN, TWO_UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
TEXT = {"encoder_hidden_states": floats(2, 8, 32)}
