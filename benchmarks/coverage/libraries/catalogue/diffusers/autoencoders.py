"""Model classes of diffusers: autoencoders."""

from __future__ import annotations

from benchmarks.coverage.libraries.catalogue.diffusers.common import TWO_DOWN, TWO_UP, VAE, entry
from benchmarks.coverage.libraries.entries import floats, image

AUTOENCODERS = [
    entry(
        "AutoencoderKL",
        [image(32)],
        **VAE,
        down_block_types=(TWO_DOWN,) * 2,
        up_block_types=(TWO_UP,) * 2,
    ),
    entry("AutoencoderTiny", [image(32)]),
    entry(
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
    entry(
        "AutoencoderKLTemporalDecoder",
        [image(32)],
        {"num_frames": 1},
        block_out_channels=(32, 64),
        down_block_types=(TWO_DOWN,) * 2,
        layers_per_block=1,
    ),
    entry(
        "AutoencoderKLCogVideoX",
        [floats(1, 3, 5, 32, 32)],
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
        layers_per_block=1,
    ),
    entry(
        "AutoencoderKLMochi",
        [floats(1, 3, 7, 32, 32)],
        latent_channels=4,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ),
    entry(
        "AutoencoderKLWan",
        [floats(1, 3, 5, 32, 32)],
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
    ),
    entry(
        "AutoencoderKLHunyuanVideo",
        [floats(1, 3, 5, 32, 32)],
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ),
    entry(
        "AsymmetricAutoencoderKL",
        [image(32)],
        down_block_types=(TWO_DOWN,) * 2,
        up_block_types=(TWO_UP,) * 2,
        down_block_out_channels=(32, 64),
        up_block_out_channels=(32, 64),
        norm_num_groups=8,
    ),
    entry(
        "VQModel",
        [image(32)],
        **VAE,
        down_block_types=(TWO_DOWN,) * 2,
        up_block_types=(TWO_UP,) * 2,
    ),
]
