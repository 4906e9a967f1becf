"""The Llama that whole-model benchmarks decode with."""

from __future__ import annotations

from transformers import LlamaConfig


def llama_config(layers: int, hidden: int, least_kv_heads: int = 1) -> LlamaConfig:
    """Return a Llama with groups of four query heads; 32 layers of 4,096 are Llama-3.1-8B."""
    heads = hidden // 128
    return LlamaConfig(
        vocab_size=128256 if hidden >= 4096 else 1024,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, least_kv_heads),
        head_dim=128,
        max_position_embeddings=1 << 20,
        rope_theta=500000.0,
    )
