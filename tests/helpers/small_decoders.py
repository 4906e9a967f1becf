"""Small random decoders of transformers, and decoding with them step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cache_names import CACHE
from torch import Tensor

transformers = pytest.importorskip("transformers")

PROMPT, STEPS, SLOTS = 90, 12, 128
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOWED = {
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}
EVERYTHING = {"budget": 127, "sinks": 2, "recent": 16, "chunk": (4, 8)}


def model_of(name: str, attention: str = "sdpa") -> Any:
    """Return a small random model; `attention` names the implementation of transformers."""
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**SMALL)
    elif name == "llama of one layer":
        config = transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 1})
    elif name == "qwen3":
        config = transformers.Qwen3Config(**SMALL)
    elif name == "mistral":
        config = transformers.MistralConfig(**SMALL, sliding_window=None)
    elif name == "gemma3":
        config = transformers.Gemma3TextConfig(**SMALL, **WINDOWED)
    elif name == "gemma2":
        config = transformers.Gemma2Config(**SMALL, **WINDOWED, query_pre_attn_scalar=16)
    elif name == "gpt_oss":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
        config = transformers.GptOssConfig(**SMALL, **WINDOWED, **experts)
    elif name == "bloom":
        config = transformers.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)
    else:
        config = transformers.GPT2Config(
            vocab_size=128,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=512,
            bos_token_id=None,
            eos_token_id=None,
        )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def caches(model: Any, kind: str) -> Any:
    """Return an empty cache for `model`."""
    if kind == "static":
        return transformers.StaticCache(model.config, max_cache_len=SLOTS)
    return transformers.DynamicCache(config=model.config)


def decode(model: Any, forward: Callable[..., Any], kind: str, padding: list[int]) -> Tensor:
    """Return logits of `STEPS` decoded tokens after an eager prefill, rows padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 128, (len(padding), PROMPT + STEPS), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding):
        ids[row, :pad], mask[row, :pad] = 0, 0
    given: dict[str, Any] = {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = caches(model, kind)
    logits = []
    for begin, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
        if any(padding) or model.config.model_type == "bloom":
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            if model.config.model_type == "bloom":  # which counts positions from a whole mask
                room = SLOTS if kind == "static" else end
                given = {"attention_mask": F.pad(mask[:, :end], (0, room - end), value=1)}
        call = model if begin == 0 else forward
        output = call(ids[:, begin:end], **{CACHE: cache}, use_cache=True, **given)
        logits.append(output.logits[:, -1])
    return torch.stack(logits[1:], 1)
