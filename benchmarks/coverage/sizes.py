"""Arguments of small configurations, shared by the architectures of the coverage table."""

from __future__ import annotations

from typing import Any

BATCH = 2
LAYERS = 2
IMAGE_SIZE = 32
IMAGE_TOKEN = 100
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
WORDS: dict[str, Any] = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 16}
"""Sliding window that is shorter than the prompt, so that it moves while decoding."""
ONE_OF_EACH = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
TEXT = SIZES | WORDS
IMAGE = SIZES | {"image_size": IMAGE_SIZE, "patch_size": 8, "num_channels": 3}
BOTH_SIDES = WORDS | {
    "d_model": 64,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
RELATIVE = WORDS | {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
STATE_SPACE = {"head_dim": 16, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
XLNET = WORDS | {"d_model": 64, "n_layer": LAYERS, "n_head": 4, "d_inner": 128}
FUNNEL = WORDS | {
    "d_model": 64,
    "d_head": 16,
    "n_head": 4,
    "d_inner": 128,
    "block_sizes": [1, 1],
    "num_decoder_layers": 1,
}
LOW_RANK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SPEECH = SIZES | {
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
WHISPER = BOTH_SIDES | {
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 128,
    "begin_suppress_tokens": None,
}
WINDOWED = {
    "image_size": IMAGE_SIZE,
    "patch_size": 2,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [32, 64],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
DETECTION = {
    "num_queries": 10,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "out_features": ["stage2"],
    },
}
MULTI_AXIS_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
