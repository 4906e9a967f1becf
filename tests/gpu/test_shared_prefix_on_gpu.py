"""Kernels over a prefix that rows share, compiled; everything here needs a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import shared_prefixes
import torch
from cache_names import CACHE
from shared_prefixes import B, Growing, Static, caches, new, prefix
from small_decoders import model_of
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile import LycheeCache

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("seeded"),
]

PREFIX, SLOTS, STEPS = 2000, 1024, 6
OPTIONS = {"sinks": 4, "recent": 16, "dense_layers": 0}
CLOSE = {"float32": 2e-4, "bfloat16": 2e-2}


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [each.cuda() for each in tensors]


def steps(made: Any, held: list[Tensor], kind: torch.dtype, **options: Any) -> Any:
    """Yield what each compiled step gives, and what the model gives."""
    made, mode = made.cuda(), options.get("mode", "default")
    for each in held if mode == "reduce-overhead" else ():
        torch._dynamo.mark_static_address(each)
    step = torch.compile(made, backend="lychee", options={**OPTIONS, **options})
    for pos in range(600, 600 + STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        query, *fresh = on_gpu(*new(dtype=kind))
        position = torch.tensor([pos], device="cuda")
        expected = made(query, *(each.clone() for each in held), position, *fresh)
        yield step(query, *held, position, *fresh), expected


@pytest.mark.parametrize(
    ("budget", "mode", "dtype"),
    [
        (1024, "default", "float32"),
        (1024, "reduce-overhead", "bfloat16"),
        (1000, "reduce-overhead", "bfloat16"),
    ],
)
def test_a_prefix_that_is_read_whole_is_dense(budget: int, mode: str, dtype: str) -> None:
    """Own keys are read by an exact kernel, or by one that selects among them and reads all."""
    kind = getattr(torch, dtype)
    held = on_gpu(*prefix(kind, PREFIX), *caches(SLOTS, kind))
    made = Static() if budget > 1000 else shared_prefixes.WithSink().to(kind)
    for got, expected in steps(made, held, kind, budget=budget, mode=mode):
        torch.testing.assert_close(got, expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    assert counters["lychee"]["sparse"] == 1


@pytest.mark.parametrize(
    ("policy", "mode"),
    [("lychee", "default"), ("lychee", "reduce-overhead"), ("quest", "reduce-overhead")],
)
def test_each_row_finds_its_own_key_through_one_index(mode: str, policy: str) -> None:
    """Each row asks for another key of the prefix, whose value is one; all others are zeros."""
    made = Static().cuda()
    held = on_gpu(*prefix(count=PREFIX), *caches(SLOTS))
    for each in held if mode == "reduce-overhead" else ():
        torch._dynamo.mark_static_address(each)
    wanted = torch.tensor([100, 900, 1500], device="cuda")
    asked = 9 * torch.nn.functional.normalize(torch.randn(B, 16, device="cuda"), dim=-1)
    held[0][:, :, wanted], held[1][:], held[3][:] = asked, 0, 0
    held[1][:, :, wanted] = torch.eye(B, 8, device="cuda")
    options = {**OPTIONS, "budget": 256, "policy": policy, "mode": mode}
    step = torch.compile(made, backend="lychee", options=options)
    for pos in range(600, 600 + STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        _, key, value = on_gpu(*new())
        query = asked[:, None, None].expand(-1, 4, -1, -1)
        got = step(query, *held, torch.tensor([pos], device="cuda"), key, 0 * value)
        expected = torch.eye(B, 8, device="cuda")[:, None, None].expand_as(got)
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=0)
    assert counters["lychee"]["sparse"] == 1


def test_own_keys_that_grow_are_dense() -> None:
    made, shared, held = Growing().cuda(), on_gpu(*prefix(count=PREFIX)), on_gpu(*caches(700))
    step = torch.compile(made, backend="lychee", options={**OPTIONS, "budget": 1000})
    for _ in range(STEPS):
        query, *fresh = on_gpu(*new())
        expected = made(query, *shared, *held, *fresh)[0]
        got, *held = step(query, *shared, *held, *fresh)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


def test_samples_of_a_prompt_share_it_in_a_prepared_model() -> None:
    model = model_of("llama").cuda()
    model.config.max_position_embeddings = 8192
    ids = torch.randint(1, 128, (1, 3000), device="cuda")
    asked = {"max_new_tokens": 12, "do_sample": False, "num_return_sequences": 2, "num_beams": 2}
    expected = model.generate(ids, **asked)
    cache = LycheeCache(model.config)
    with torch.no_grad():
        model(ids[:, :-1], **{CACHE: cache})
    cache.share_prefix(2048)
    cache.batch_repeat_interleave(2)
    with lychee_compile.prepare(model, budget=2000, dense_layers=0):
        got = model.generate(ids, **{CACHE: cache}, **asked)
    assert torch.equal(got, expected)
    assert counters["lychee"]["sparse"] > 0
    assert cache.layers[0].prefix_keys.shape[:3] == (1, 2, 2048)
