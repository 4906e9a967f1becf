"""A small decoder of transformers whose attention matters, and the ways to generate with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import small_decoders
import torch
from cache_names import CACHE
from torch import Tensor

import lychee_compile
from lychee_compile.recorder import Recorder

transformers = pytest.importorskip("transformers")

VOCABULARY, LAYERS = small_decoders.SMALL["vocab_size"], small_decoders.SMALL["num_hidden_layers"]
PROMPT, NEW, SLOTS = 60, 14, 128
EVERYTHING = {"budget": SLOTS - 1, "sinks": 2, "recent": 16, "chunk": (4, 8)}
SPARSE = {**EVERYTHING, "budget": 48}

Given = dict[str, Any]
Way = Callable[[Any, str, Given], Tensor]


def decoder(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random Llama with weights so large that tokens depend on what attention reads."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**small_decoders.SMALL, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def entered(entry: str, model: Any, options: Given) -> Given:
    """Let `model` decode through the backend: what to give to `generate` for it."""
    if entry == "compile_config":
        config = transformers.CompileConfig(backend="lychee", mode=None, options=options)
        config._compile_all_devices = True
        return {"compile_config": config}
    if entry == "model.forward":
        model.forward = torch.compile(model.forward, backend="lychee", options=options)
    elif entry == "model.compile":
        model.compile(backend="lychee", options=options)
    return {}


def empty(model: Any, kind: str) -> Any:
    """Return a cache to keep between calls."""
    if kind == "static":
        return transformers.StaticCache(model.config, max_cache_len=SLOTS)
    return transformers.DynamicCache(config=model.config)


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    """Return random token ids [rows, count]; none is the padding's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, count), generator=generator)


def generate(model: Any, kind: str | None, ids: Tensor, **given: Any) -> Tensor:
    """`NEW` tokens behind `ids`, over a cache of `kind` that `generate` makes, if it makes one."""
    if kind is not None:
        given["cache_implementation"] = kind
    if kind == "static":
        given["max_cache_len"] = SLOTS
    usual = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    usual["attention_mask"] = torch.ones_like(ids)
    torch.manual_seed(1)  # for sampling
    return model.generate(ids, **{**usual, **given})


def greedy(model: Any, kind: str, given: Given) -> Tensor:
    return generate(model, kind, tokens(2, PROMPT), **given)


def sampled(model: Any, kind: str, given: Given) -> Tensor:
    return generate(model, kind, tokens(2, PROMPT, 1), do_sample=True, temperature=0.7, **given)


def beams(model: Any, kind: str, given: Given) -> Tensor:
    return generate(model, kind, tokens(1, PROMPT, 2), num_beams=2, **given)


def padded(model: Any, kind: str, given: Given) -> Tensor:
    """Generate from two rows, of which the second is shorter and padded on the left."""
    ids = tokens(2, PROMPT, 3)
    ids[1, :23] = 0
    return generate(model, kind, ids, attention_mask=(ids != 0).long(), **given)


def chunked(model: Any, kind: str, given: Given) -> Tensor:
    return generate(model, kind, tokens(2, PROMPT, 4), prefill_chunk_size=20, **given)


def conversation(model: Any, kind: str, given: Given) -> Tensor:
    """Generate in three turns over one cache."""
    cache, ids = empty(model, kind), tokens(2, PROMPT - 30, 5)
    for turn in range(3):
        ids = torch.cat((ids, tokens(2, 7, turn)), 1)
        ids = generate(model, None, ids, **{CACHE: cache}, max_new_tokens=NEW // 2, **given)
    return ids


def lookup(model: Any, kind: str, given: Given) -> Tensor:
    """Generate with drafts from the prompt itself, of which many are taken back."""
    ids = tokens(1, PROMPT // 4, 6).repeat(1, 4)
    return generate(model, None, ids, prompt_lookup_num_tokens=3, **given)


def drafted(model: Any, kind: str, given: Given) -> Tensor:
    """Generate with drafts of a model that often agrees."""
    assistant = decoder()
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.15 * torch.randn_like(assistant.lm_head.weight))
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    return generate(model, None, tokens(1, PROMPT, 7), assistant_model=assistant, **given)


def assert_everything_read(recorder: Recorder, steps: int) -> None:
    """Check that each layer has attended sparsely in as many steps, at least, and missed no key."""
    assert len(recorder.calls) >= LAYERS * steps
    for call in recorder.calls:
        assert int(call.tokens_read.max()) == call.kv_len


def beside_dense(way: Way, kind: str, model: Any, given: Given) -> tuple[Tensor, Tensor, Recorder]:
    """Return the tokens of `model`, those of a dense one with equal weights, and what was read."""
    dense = way(decoder(), kind, {"disable_compile": True})
    with lychee_compile.record(mass=True) as recorder:
        got = way(model, kind, given)
    return got, dense, recorder
