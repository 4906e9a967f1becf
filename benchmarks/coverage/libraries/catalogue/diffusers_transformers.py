"""Model classes of diffusers: transformers of images."""

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

TRANSFORMERS = [
    _entry(
        "DiTTransformer2DModel",
        [image(16, channels=4)],
        TIME | {"class_labels": ids(2)},
        **HEADS,
        in_channels=4,
        num_layers=2,
        sample_size=16,
        norm_num_groups=8,
        num_embeds_ada_norm=100,
    ),
    _entry(
        "PixArtTransformer2DModel",
        [image(16, channels=4)],
        TIME | TEXT | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        **HEADS,
        in_channels=4,
        num_layers=2,
        sample_size=16,
        cross_attention_dim=32,
        caption_channels=32,
        norm_num_groups=8,
        use_additional_conditions=False,
    ),
    _entry(
        "SD3Transformer2DModel",
        [image(16, channels=4)],
        TIME | {"encoder_hidden_states": floats(2, 8, 32), "pooled_projections": floats(2, 64)},
        sample_size=16,
        in_channels=4,
        num_layers=2,
        **HEADS,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ),
    _entry(
        "FluxTransformer2DModel",
        [floats(2, 16, 4)],
        TIME
        | TEXT
        | {
            "pooled_projections": floats(2, 32),
            "img_ids": floats(16, 3),
            "txt_ids": floats(8, 3),
        },
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ),
    _entry(
        "AuraFlowTransformer2DModel",
        [image(16, channels=4)],
        TIME | TEXT,
        sample_size=16,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        **HEADS,
        joint_attention_dim=32,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    ),
    _entry(
        "SanaTransformer2DModel",
        [image(16, channels=4)],
        TIME | TEXT,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **HEADS,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=16,
    ),
    _entry(
        "LuminaNextDiT2DModel",
        [image(16, channels=4)],
        TIME
        | {
            "encoder_hidden_states": floats(2, 8, 32),
            "encoder_mask": ids(2, 8),
            "image_rotary_emb": Made(
                "diffusers.models.embeddings.get_2d_rotary_pos_embed_lumina", 16, 16, 16
            ),
            "cross_attention_kwargs": {},
        },
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        cross_attention_dim=32,
    ),
    _entry(
        "CogView3PlusTransformer2DModel",
        [image(16, channels=4)],
        TIME
        | TEXT
        | {
            "original_size": floats(2, 2),
            "target_size": floats(2, 2),
            "crop_coords": floats(2, 2),
        },
        in_channels=4,
        num_layers=2,
        **HEADS,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=4,
        out_channels=4,
        pos_embed_max_size=16,
        sample_size=16,
    ),
    _entry(
        "CogVideoXTransformer3DModel",
        [floats(2, 4, 4, 16, 16)],
        TIME | TEXT,
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=13,
        max_text_seq_length=8,
    ),
]
