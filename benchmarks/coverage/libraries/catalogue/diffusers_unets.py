"""Model classes of diffusers: U-Nets and others."""

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

UNETS = [
    _entry(
        "UNet2DModel",
        [image(16, channels=4)],
        TIME,
        **UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    _entry(
        "UNet2DConditionModel",
        [image(16, channels=4)],
        TIME | TEXT,
        **UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    ),
    _entry(
        "UNet3DConditionModel",
        [floats(2, 4, 4, 16, 16)],
        TIME | TEXT,
        **UNET,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    ),
    _entry(
        "UNetSpatioTemporalConditionModel",
        [floats(2, 4, 8, 16, 16)],
        TIME | {"encoder_hidden_states": floats(2, 1, 32), "added_time_ids": floats(2, 3)},
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=(2, 4),
        layers_per_block=1,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    ),
    _entry(
        "ControlNetModel",
        [image(16, channels=4)],
        TIME | TEXT | {"controlnet_cond": image(128)},
        in_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    ),
    _entry(
        "PriorTransformer",
        [floats(2, 32)],
        TIME | {"proj_embedding": floats(2, 32), "encoder_hidden_states": floats(2, 8, 32)},
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        embedding_dim=32,
        num_embeddings=8,
        additional_embeddings=4,
    ),
    _entry(
        "UVit2DModel",
        [ids(2, 16, 16)],
        {
            "encoder_hidden_states": floats(2, 8, 32),
            "pooled_text_emb": floats(2, 16),
            "micro_conds": floats(2, 5),
        },
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=32,
        vocab_size=128,
        codebook_size=64,
        in_channels=32,
        block_out_channels=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        block_num_heads=2,
        num_res_blocks=1,
        sample_size=16,
    ),
    _entry(
        "T5FilmDecoder",
        [],
        {
            "encodings_and_masks": [(floats(2, 8, 32), Made("torch.ones", 2, 8))],
            "decoder_input_tokens": floats(2, 16, 8),
            "decoder_noise_time": Made("torch.rand", 2),
        },
        input_dims=8,
        targets_length=16,
        d_model=32,
        num_layers=2,
        num_heads=2,
        d_kv=16,
        d_ff=64,
        dropout_rate=0.1,
    ),
    _entry(
        "TransformerTemporalModel",
        [floats(8, 32, 4, 4)],
        {"num_frames": 4},
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=32,
        norm_num_groups=8,
    ),
]
