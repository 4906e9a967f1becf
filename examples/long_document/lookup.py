"""A model that looks things up at any length: two layers of attention, with weights set by hand.

We know of no package with a model that reads a long document on two cores in seconds and answers
from it. A minute of training on one core does not make one: a model of a million parameters still
guessed every digit. What looks facts up in trained models is known, however: induction heads (arXiv
2209.11895). This module writes them down.

- Layer 0 has rotary positions. Head h attends to the token h + 1 places before, so that each
  place knows the `HEADS` tokens before it.
- Layer 1 has no positions. Its query is made of the last tokens, its key of those before each
  place. It thus finds the places that follow the same tokens, anywhere in the document.
- The head of the language model names the token at these places.

Such a model continues a text as an earlier passage went on. It is no language model, and its
weights hold no knowledge. Its attention is that of transformers' SmolLM3, with 8 query heads and 4
KV heads, and looks at all keys in both layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

WORDS = 2048
"""Number of tokens that the tokenizer knows."""
LONGEST = 262_144
"""Number of positions of the model."""
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
HIDDEN = HEAD_DIM * (HEADS + 2)
"""Channels: the token of a place, the `HEADS` tokens before it, and what was looked up."""
COMPARED = (4, 5, 6, 7)
"""Number of tokens that the queries of each KV head of layer 1 compare."""
ROTARY_BASE = 100.0
LOCAL_SCALE, MATCH_SCALE = 5.0, 6.0
"""Sharpness of the heads of layer 0 and of layer 1."""


def make_tokenizer(texts: Iterable[str]) -> Any:
    """Return a tokenizer of byte pairs, with a token for each digit, made from `texts`."""
    pairs = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.pre_tokenizer = pre_tokenizers.Sequence([digits, of_bytes])
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=["<end>"],
        initial_alphabet=of_bytes.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>")


def make_config() -> SmolLM3Config:
    """Return the configuration of the model."""
    return SmolLM3Config(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=LONGEST,
        no_rope_layers=[1, 0],
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        attention_bias=True,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


@torch.no_grad()
def make_model() -> Any:
    """Return the model, in float32, with the same weights on every machine."""
    model = SmolLM3ForCausalLM(make_config()).eval()
    for parameter in model.parameters():
        parameter.zero_()  # both MLPs stay zero
    generator = torch.Generator().manual_seed(0)
    tokens = normalize(torch.randn(WORDS, HEAD_DIM, generator=generator), dim=1)
    model.model.embed_tokens.weight[:, _channels(0)] = tokens
    model.lm_head.weight[:, _channels(HEADS + 1)] = 10 * tokens
    first, second = model.model.layers
    # The norms then leave every vector as it is: its squared length is known.
    first.input_layernorm.weight.fill_(math.sqrt(1 / HIDDEN))
    second.input_layernorm.weight.fill_(math.sqrt((1 + HEADS) / HIDDEN))
    model.model.norm.weight.fill_(1.0)
    _look_back(first.self_attn)
    _match(second.self_attn, generator)
    return model


def _channels(block: int) -> slice:
    """Return the channels of the hidden state that hold one token."""
    return slice(HEAD_DIM * block, HEAD_DIM * (block + 1))


def _values_are_tokens(attention: Any) -> None:
    for head in range(KV_HEADS):
        attention.v_proj.weight[_channels(head), _channels(0)] = torch.eye(HEAD_DIM)


def _look_back(attention: Any) -> None:
    """Let head h read the token h + 1 places before.

    Key and query are constants. Once both are rotated, their product is largest at that distance.
    """
    _values_are_tokens(attention)
    half = HEAD_DIM // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half) / half)
    still = torch.cat((torch.ones(half), torch.zeros(half)))
    attention.k_proj.bias.copy_(LOCAL_SCALE * still.repeat(KV_HEADS))
    for head in range(HEADS):
        angles = -(head + 1) * frequencies
        query = torch.cat((angles.cos(), angles.sin()))
        attention.q_proj.bias[_channels(head)] = LOCAL_SCALE * query
        attention.o_proj.weight[_channels(head + 1), _channels(head)] = torch.eye(HEAD_DIM)


def _match(attention: Any, generator: torch.Generator) -> None:
    """Let each head read the tokens at places that follow the same tokens as the query."""
    _values_are_tokens(attention)
    group = HEADS // KV_HEADS
    for kv_head, compared in enumerate(COMPARED):
        for back in range(compared):
            mixed = _random_map(generator)
            attention.k_proj.weight[_channels(kv_head), _channels(back + 1)] = mixed
            for head in range(group * kv_head, group * (kv_head + 1)):
                attention.q_proj.weight[_channels(head), _channels(back)] = mixed
    for head in range(HEADS):
        attention.o_proj.weight[_channels(HEADS + 1), _channels(head)] = torch.eye(HEAD_DIM)


def _random_map(generator: torch.Generator) -> Tensor:
    """Return a map [HEAD_DIM, HEAD_DIM] that keeps products of vectors nearly as they are."""
    square = torch.randn(HEAD_DIM, HEAD_DIM, generator=generator)
    return MATCH_SCALE * square / math.sqrt(HEAD_DIM)
