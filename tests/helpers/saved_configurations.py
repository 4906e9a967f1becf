"""Configurations of tiny causal language models, as transformers saves them, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Gemma3TextConfig, GptOssConfig, LlamaConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def save_llama(folder: Path, layers: int = 5, **more: Any) -> Path:
    """Save a Llama of four query heads and two KV heads of 8 in bfloat16."""
    given = {"num_hidden_layers": layers, "dtype": "bfloat16", **SIZES, **HEADS, **more}
    LlamaConfig(**given).save_pretrained(folder)
    return folder


def save_gemma(folder: Path, layers: int = 7) -> Path:
    """Save a Gemma 3 of which each third layer attends to all, and the others to a window of 64."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * layers
    config = Gemma3TextConfig(
        num_hidden_layers=layers, layer_types=kinds[:layers], sliding_window=64, **SIZES, **HEADS
    )
    config.save_pretrained(folder)
    return folder


def save_gpt_oss(folder: Path, layers: int = 4) -> Path:
    """Save a mixture of experts in which windows and full attention take turns, with sinks."""
    config = GptOssConfig(
        num_hidden_layers=layers, sliding_window=16, num_local_experts=2, num_experts_per_tok=1,
        **SIZES, **HEADS,
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder
