"""Caches in memory of the host: the bits of those in memory of the device, at its prices."""

from __future__ import annotations

import copy
import gc
import logging
from typing import Any

import pytest
import torch
from cache_names import CACHE
from small_decoders import SMALL, transformers

import lychee_compile
from lychee_compile import LycheeCache
from lychee_compile.kernels import host_memory
from lychee_compile.kernels.host_memory import lies_on_host, near, zeros_on_host

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 256, "head_dim": 64})
    config.max_position_embeddings = 1 << 16
    return transformers.LlamaForCausalLM(config).eval().to(CUDA, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_operators_read_and_write_memory_of_the_host(dtype: torch.dtype) -> None:
    before = torch.cuda.memory_allocated()
    held = zeros_on_host((2, 3, 1000, 64), dtype, CUDA)
    assert held.device == CUDA
    assert lies_on_host(held[1, :, 5:])
    assert torch.cuda.memory_allocated() == before
    new = torch.randn(2, 3, 8, 64, device=CUDA).to(dtype)
    held[:, :, 7:15] = new
    assert torch.equal(held[:, :, 7:15].float(), new.float())
    assert not held[:, :, 15:].float().any()
    copied = near(held)
    assert not lies_on_host(copied)
    assert torch.equal(copied.view(torch.uint8), held.view(torch.uint8))


def test_memory_is_unlocked_when_nothing_shows_it() -> None:
    gc.collect()
    before = len(host_memory._locked)
    held = zeros_on_host((1 << 20,), torch.uint8, CUDA)
    shown = held[5:]
    del held
    assert len(host_memory._locked) == before + 1
    del shown
    gc.collect()
    assert len(host_memory._locked) == before


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_generate_gives_the_tokens_of_a_cache_on_the_device(model: Any, dtype: str | None) -> None:
    ids = torch.randint(1, 128, (2, 9000), generator=torch.Generator().manual_seed(1)).to(CUDA)
    usual = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    usual |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    found = []
    for storage in ("device", "host"):
        with lychee_compile.prepare(model, budget=512, storage=storage, cache_dtype=dtype):
            output = model.generate(ids, **usual)
        cache = output["cache" if "cache" in output else "past_key_values"]
        on_host = {lies_on_host(each) for layer in cache.layers for each in layer.buffers()}
        assert on_host == {storage == "host"}
        found.append(output.sequences)
    assert torch.equal(*found)


def test_a_cache_that_is_read_whole_is_told_of(model: Any, caplog: Any) -> None:
    host_memory.warn_of_reading.cache_clear()
    ids = torch.randint(1, 128, (1, 600), device=CUDA)
    cache = LycheeCache(model.config, storage="host")
    step = torch.compile(model, backend="lychee", options={"budget": None})
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        model(ids[:, :-2], **{CACHE: cache})
        cache.reserve(2)
        for place in (598, 599):
            step(ids[:, place : place + 1], **{CACHE: cache})
    told = [record for record in caplog.records if "in host memory" in record.getMessage()]
    assert len(told) == 1


def test_copies_and_growth_stay_on_the_host(model: Any) -> None:
    ids = torch.randint(1, 128, (1, 700), device=CUDA)
    cache = LycheeCache(model.config, capacity=512, storage="host")
    with torch.no_grad():
        model(ids[:, :500], **{CACHE: cache})
        twin = copy.deepcopy(cache)
        model(ids[:, 500:], **{CACHE: cache})
    assert cache.capacity > 512
    assert all(lies_on_host(each) for layer in cache.layers for each in layer.buffers())
    assert all(lies_on_host(each) for layer in twin.layers for each in layer.buffers())
    assert torch.equal(twin.layers[0].keys[:, :, :500], cache.layers[0].keys[:, :, :500])
