"""Calls of a model: its inputs, and the cache that a decoding step continues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from benchmarks.coverage.models import Architecture
from benchmarks.coverage.sizes import BATCH, IMAGE_SIZE
from lychee_compile.evaluate.cache_argument import cache_argument

PROMPT, CACHE = 24, 64
"""Number of tokens of the prompt, and of slots of a static cache."""
PHASES = ("forward", "static", "dynamic")
"""Names of the calls: a plain forward or prefill, a decoding step over a cache of either kind."""

Arguments = dict[str, Any]


def phases(architecture: Architecture) -> tuple[str, ...]:
    """Return the phases that the architecture has."""
    return PHASES if architecture.inputs in DECODED else PHASES[:1]


def arguments(model: Any, architecture: Architecture, phase: str) -> Arguments:
    """Return the arguments of a call of `model`; a decoding step has a cache that holds a prompt.

    The arguments are the same at every call of this function, except for a new cache, which the
    model writes. Raise whatever the model raises on the prompt.
    """
    torch.manual_seed(1)
    flex = model.config._attn_implementation == "flex_attention"
    batch = architecture.flex_batch if flex else BATCH
    inputs = INPUTS[architecture.inputs](model.config, batch)
    if phase == "forward":
        return inputs
    if model.config.is_encoder_decoder:
        return _encoder_decoder_step(model, inputs, phase, batch)
    cache = {cache_argument(model): _cache(model.config, phase, CACHE)}
    model(**inputs, **cache)
    return {"input_ids": _words(batch, 1), **cache}


def _encoder_decoder_step(model: Any, inputs: Arguments, phase: str, batch: int) -> Arguments:
    start = inputs.pop("decoder_input_ids")
    encoded = model.get_encoder()(**inputs)
    source_len = encoded.last_hidden_state.shape[1]
    own, cross = _cache(model.config, phase, CACHE), _cache(model.config, phase, source_len)
    step = {"encoder_outputs": encoded, cache_argument(model): EncoderDecoderCache(own, cross)}
    if "attention_mask" in inputs:
        step["attention_mask"] = inputs["attention_mask"]
    model(decoder_input_ids=start, **step)
    return {"decoder_input_ids": _words(batch, 1), **step}


def _cache(config: Any, phase: str, length: int) -> Any:
    decoder = config.get_text_config(decoder=True)
    if phase == "static":
        return StaticCache(config=decoder, max_cache_len=length)
    return DynamicCache(config=decoder)


def _words(batch: int, count: int) -> Tensor:
    """Return ids [B, count] of ordinary words, none of which is special to any model here."""
    return torch.randint(3, 96, (batch, count))


def _tokens(_config: Any, batch: int) -> Arguments:
    return {"input_ids": _words(batch, PROMPT)}


def _text(_config: Any, batch: int) -> Arguments:
    padding = torch.ones(batch, PROMPT, dtype=torch.int64)
    padding[-1, -4:] = 0
    return {"input_ids": _words(batch, PROMPT), "attention_mask": padding}


def _text_to_text(config: Any, batch: int) -> Arguments:
    return {**_text(config, batch), "decoder_input_ids": _words(batch, PROMPT)}


def _image(_config: Any, batch: int) -> Arguments:
    return {"pixel_values": torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)}


def _image_and_text(config: Any, batch: int) -> Arguments:
    return {**_text(config, batch), **_image(config, batch)}


def _tokens_with_image(config: Any, batch: int) -> Arguments:
    patches = (IMAGE_SIZE // config.vision_config.patch_size) ** 2
    ids = _words(batch, patches + PROMPT)
    ids[:, 1 : 1 + patches] = config.image_token_index
    return {"input_ids": ids, **_image(config, batch)}


def _waveform(_config: Any, batch: int) -> Arguments:
    return {"input_values": torch.randn(batch, 400)}


def _speech_to_text(config: Any, batch: int) -> Arguments:
    features = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "decoder_input_ids": _words(batch, PROMPT)}


INPUTS: dict[str, Callable[[Any, int], Arguments]] = {
    "tokens": _tokens,
    "text": _text,
    "text to text": _text_to_text,
    "image": _image,
    "image and text": _image_and_text,
    "tokens with image": _tokens_with_image,
    "waveform": _waveform,
    "speech to text": _speech_to_text,
}
DECODED = {"tokens", "text to text", "tokens with image", "speech to text"}
