"""A tiny language model with a tokenizer of single bytes, for the tests of the evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lychee_compile.evaluate.models import LanguageModel

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of which every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def tiny_llama() -> LlamaForCausalLM:
    """Return a Llama with random weights, large enough for attention that is far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=QUERY_HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def tiny_language_model() -> LanguageModel:
    """Both together."""
    return LanguageModel("tiny", tiny_llama(), byte_tokenizer())


def saved_tiny_model(folder: Path) -> Path:
    """Both together, as transformers saves them."""
    model = tiny_language_model()
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder
