"""Model classes of diffusers: autoencoders."""

from __future__ import annotations

from typing import Any

from benchmarks.coverage.libraries.entries import Entry, Made, floats, ids, image

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


def _entry(
    name: str, inputs: list[Any], named: dict[str, Any] | None = None, **kwargs: Any
) -> Entry:
    return Entry(name, Made(f"diffusers.{name}", **kwargs), inputs, named or {})


TWO_DOWN, TWO_UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
TEXT = {"encoder_hidden_states": floats(2, 8, 32)}

AUTOENCODERS = [
    _entry(
        "AutoencoderKL",
        [image(32)],
        **VAE,
        down_block_types=(TWO_DOWN,) * 2,
        up_block_types=(TWO_UP,) * 2,
    ),
    _entry("AutoencoderTiny", [image(32)]),
    _entry(
        "AutoencoderDC",
        [image(32)],
        in_channels=3,
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(16, 32),
        decoder_block_out_channels=(16, 32),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ),
    _entry(
        "AutoencoderKLTemporalDecoder",
        [image(32)],
        {"num_frames": 1},
        block_out_channels=(32, 64),
        down_block_types=(TWO_DOWN,) * 2,
        layers_per_block=1,
    ),
    _entry(
        "AutoencoderKLCogVideoX",
        [floats(1, 3, 5, 32, 32)],
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
        layers_per_block=1,
    ),
    _entry(
        "AutoencoderKLMochi",
        [floats(1, 3, 7, 32, 32)],
        latent_channels=4,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ),
    _entry(
        "AutoencoderKLWan",
        [floats(1, 3, 5, 32, 32)],
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
    ),
    _entry(
        "AutoencoderKLHunyuanVideo",
        [floats(1, 3, 5, 32, 32)],
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ),
    _entry(
        "AsymmetricAutoencoderKL",
        [image(32)],
        down_block_types=(TWO_DOWN,) * 2,
        up_block_types=(TWO_UP,) * 2,
        down_block_out_channels=(32, 64),
        up_block_out_channels=(32, 64),
        norm_num_groups=8,
    ),
    _entry(
        "VQModel",
        [image(32)],
        **VAE,
        down_block_types=(TWO_DOWN,) * 2,
        up_block_types=(TWO_UP,) * 2,
    ),
]
