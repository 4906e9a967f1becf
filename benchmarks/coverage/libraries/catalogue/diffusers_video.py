"""Model classes of diffusers: further transformers."""

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


def _entry(
    name: str, inputs: list[Any], named: dict[str, Any] | None = None, **kwargs: Any
) -> Entry:
    return Entry(name, Made(f"diffusers.{name}", **kwargs), inputs, named or {})


TWO_DOWN, TWO_UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
TEXT = {"encoder_hidden_states": floats(2, 8, 32)}

VIDEO = [
    _entry(
        "MochiTransformer3DModel",
        [floats(2, 4, 4, 16, 16)],
        TIME
        | {
            "encoder_hidden_states": floats(2, 8, 32),
            "encoder_attention_mask": Made("torch.ones", 2, 8),
        },
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        max_sequence_length=8,
    ),
    _entry(
        "LTXVideoTransformer3DModel",
        [floats(2, 32, 4)],
        TIME
        | {
            "encoder_hidden_states": floats(2, 8, 32),
            "encoder_attention_mask": Made("torch.ones", 2, 8),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
        in_channels=4,
        out_channels=4,
        **HEADS,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ),
    _entry(
        "WanTransformer3DModel",
        [floats(2, 4, 2, 16, 16)],
        TIME | TEXT,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ),
    _entry(
        "AllegroTransformer3DModel",
        [floats(2, 4, 2, 16, 16)],
        TIME
        | {
            "encoder_hidden_states": floats(2, 8, 32),
            "encoder_attention_mask": Made("torch.ones", 2, 8),
            "attention_mask": Made("torch.ones", 2, 2, 16, 16),
            "image_rotary_emb": None,
        },
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=16,
        sample_height=16,
        sample_frames=2,
        caption_channels=32,
    ),
    _entry(
        "LatteTransformer3DModel",
        [floats(2, 4, 4, 16, 16)],
        TIME | TEXT,
        sample_size=16,
        num_layers=2,
        patch_size=2,
        **HEADS,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=100,
        video_length=4,
        attention_bias=True,
    ),
    _entry(
        "StableAudioDiTModel",
        [floats(2, 4, 16)],
        {
            "timestep": floats(2),
            "encoder_hidden_states": floats(2, 8, 32),
            "global_hidden_states": floats(2, 1, 32),
        },
        sample_size=16,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=32,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=32,
    ),
    _entry(
        "ConsisIDTransformer3DModel",
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
