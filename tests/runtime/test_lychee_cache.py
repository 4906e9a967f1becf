"""A cache that grows in place: the tokens of a dynamic one, eagerly and through the backend."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import triton_interpreter
from cache_names import CACHE
from small_decoders import SMALL, model_of, transformers
from torch import Tensor
from torch._dynamo.utils import counters

import lychee_compile
from lychee_compile import LycheeCache

triton_interpreter.use()
pytestmark = [
    pytest.mark.usefixtures("uncompiled_graphs", "seeded"),
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero) encountered:RuntimeWarning"),
]
growing_layer = sys.modules["lychee_compile.cache.growing_layer"]
SHAPE = {"sinks": 2, "recent": 16, "chunk": (4, 8)}
EVERYTHING = {"budget": 20_000, **SHAPE}


def some_ids(tokens: int, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(1, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def dynamic(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


def feed(
    model: Any, cache: Any, ids: Tensor, steps: Sequence[int], mask: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield logits of forwards over the next `steps` tokens of `ids`, whatever `cache` holds."""
    done = int(cache.get_seq_length())
    for count in steps:
        given: dict[str, Any] = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, done : done + count]
            given = {"attention_mask": mask[:, : done + count], "position_ids": positions}
        yield model(ids[:, done : done + count], **{CACHE: cache}, **given).logits
        done += count


def assert_same_steps(model: Any, cache: Any, other: Any, ids: Tensor, *given: Any) -> None:
    pairs = zip(feed(model, cache, ids, *given), feed(model, other, ids, *given), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def device_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry each time a length is read from the device."""
    reads: list[int] = []
    count = growing_layer.GrowingLayer.count

    def counted(layer: Any) -> int:
        if layer.length is None:
            reads.append(1)
        return count(layer)

    monkeypatch.setattr(growing_layer.GrowingLayer, "count", counted)
    return reads


# eagerly


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "name", ["llama", "gemma3", pytest.param("gpt2", marks=pytest.mark.thorough)]
)
def test_logits_are_those_of_a_dynamic_cache_over_several_growths(name: str, padded: bool) -> None:
    model = model_of(name)
    model.config.max_position_embeddings = 4096
    if name == "gpt2":
        steps = [20, 1, 1, 1, 200, 1, 1, 7]
    else:
        steps = [20, 1, 1, 1, 30, 1, 1, 480, *[1] * 4, 1600, 1, 1, 1]
    ids = some_ids(sum(steps), 2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache = LycheeCache(model.config, capacity=200)
    assert cache.capacity == 512
    assert_same_steps(model, cache, dynamic(model), ids, steps, mask if padded else None)
    assert cache.get_seq_length() == sum(steps)
    assert cache.capacity == (512 if name == "gpt2" else 4096)


def test_a_first_prompt_may_be_longer_than_the_capacity() -> None:
    model, ids = model_of("llama"), some_ids(700)
    cache = LycheeCache(model.config, capacity=512)
    assert_same_steps(model, cache, dynamic(model), ids, [690, 1, 9])
    assert cache.capacity == 2048


def test_the_past_is_not_copied_between_growths(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("llama"), some_ids(1100)
    cache = LycheeCache(model.config, capacity=512)
    moved: list[int] = []
    move = growing_layer.GrowingLayer.move
    monkeypatch.setattr(
        growing_layer.GrowingLayer,
        "move",
        lambda self: (moved.append(self.used), move(self)),
    )
    addresses = set()
    for _ in feed(model, cache, ids, [500, *[1] * 40]):
        addresses.add((cache.layers[0].keys.data_ptr(), cache.layers[1].values.data_ptr()))
        shown = cache.layers[0].keys
        assert shown.shape[2] == cache.capacity
        assert shown.is_contiguous()
    assert len(addresses) == 2
    assert moved == [512, 512]  # once for each layer
    stored = cache.layers[0].keys.untyped_storage().nbytes() // cache.layers[0].keys[0, :, 0].nbytes
    assert stored == cache.capacity == 2048


def test_attention_reads_what_is_filled_and_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("llama"), some_ids(60)
    seen: list[tuple[int, Any]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, *args: Any, **given: Any) -> Tensor:
        seen.append((key.shape[2], given.get("attn_mask")))
        return attend(query, key, *args, **given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for _ in feed(model, LycheeCache(model.config), ids, [40, 1, 1, 1, 1]):
        pass
    assert seen[0] == seen[1] == (40, None)  # the prompt
    assert seen[-1] == (44, None)


def test_crop_reorder_select_repeat_and_reset() -> None:
    model, ids = model_of("llama"), some_ids(60, 3)
    cache, other = LycheeCache(model.config), dynamic(model)
    assert_same_steps(model, cache, other, ids, [30, 1, 1])
    address = cache.layers[0].keys.data_ptr()
    for each in (cache, other):
        each.crop(0)
        each.crop(-7)
        each.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.get_seq_length() == 25
    assert cache.layers[0].keys.data_ptr() == address
    assert_same_steps(model, cache, other, ids, [1, 5])
    for each in (cache, other):
        each.batch_select_indices(torch.tensor([2, 1]))
        each.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    assert_same_steps(model, cache, other, some_ids(60, 4), [1, 3])
    with pytest.raises(ValueError, match="negative number of tokens"):
        cache.crop(3)
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    address = cache.layers[0].keys.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0].keys.data_ptr() == address
    assert_same_steps(model, cache, dynamic(model), ids, [20, 1])


def test_a_window_can_be_cropped_until_tokens_have_left_it() -> None:
    model, ids = model_of("gemma3"), some_ids(60)
    cache, other = LycheeCache(model.config), dynamic(model)
    assert_same_steps(model, cache, other, ids, [20, 1])
    assert cache.is_croppable
    cache.crop(-5)
    other.crop(-5)
    assert_same_steps(model, cache, other, ids, [1, 30])
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match="use a DynamicCache"):
        cache.crop(-1)


def test_copies_are_independent() -> None:
    model, ids = model_of("llama"), some_ids(60)
    cache, other = LycheeCache(model.config), dynamic(model)
    assert_same_steps(model, cache, other, ids, [20])
    copied = copy.deepcopy(cache)
    assert_same_steps(model, cache, copy.deepcopy(other), ids.flip(1), [1, 1])
    assert copied.get_seq_length() == 20
    assert_same_steps(model, copied, other, ids, [1, 1])


def test_what_it_cannot_hold_is_refused() -> None:
    config = transformers.LlamaConfig(**SMALL)
    with pytest.raises(ValueError, match="at least 1 slot, not 0"):
        LycheeCache(config, capacity=0)
    config.layer_types = ["full_attention", "hybrid"]
    with pytest.raises(ValueError, match="layer 1 of this model needs a LinearAttentionAndStatic"):
        LycheeCache(config)


# through the backend


def through(way: str, model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by which `generate()` decodes in one of the ways."""
    if way == "forward":
        model.forward = torch.compile(model.forward, backend="lychee", options=options)
    if way != "config":
        return {"disable_compile": True}
    config = transformers.CompileConfig(backend="lychee", mode=None, options=options)
    config._compile_all_devices = True
    return {"compile_config": config}


@pytest.mark.parametrize(
    ("name", "padded", "way"),
    [
        ("llama", False, "eager"),
        pytest.param("gemma3", True, "eager", marks=pytest.mark.thorough),
        pytest.param("llama", False, "config", marks=pytest.mark.thorough),
        pytest.param("gemma3", True, "config", marks=pytest.mark.thorough),
        pytest.param("llama", True, "forward", marks=pytest.mark.thorough),
        pytest.param("gemma3", False, "forward", marks=pytest.mark.thorough),
    ],
)
def test_generate_gives_the_dense_tokens(
    name: str, padded: bool, way: str, device_reads: list[int]
) -> None:
    model, ids = model_of(name), some_ids(500, 2)
    given: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    given["attention_mask"] = torch.ones_like(ids)
    if padded:
        given["attention_mask"][1, :7] = 0
    dense = model.generate(ids, max_new_tokens=26, **given)
    cache = LycheeCache(model.config, capacity=512)
    options = {**SHAPE, "budget": 600}
    given.update(through(way, model, options))
    tokens = model.generate(ids, **{CACHE: cache}, max_new_tokens=26, **given)
    assert torch.equal(tokens, dense)
    assert cache.get_seq_length() == 525
    assert cache.capacity == 2048
    assert len(device_reads) <= 2 * len(cache.layers)  # at the growth, and just now
    if way != "eager":
        last = [site for site in lychee_compile.reports()[-1].sites if not site.by_design]
        assert last
        for site in last:
            assert (site.decision, site.cache) == ("sparse", "static")
        assert not counters["graph_break"]


@pytest.mark.thorough
def test_a_conversation_goes_on_and_a_cache_serves_again() -> None:
    model, ids = model_of("llama"), some_ids(100)
    given: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}
    first = model.generate(ids, **given)
    longer = torch.cat([first, some_ids(20, seed=2)], 1)
    second = model.generate(longer, **given)
    given.update(through("forward", model, EVERYTHING))
    cache = LycheeCache(model.config)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **{CACHE: cache}, **given), first)
        assert torch.equal(model.generate(longer, **{CACHE: cache}, **given), second)
        cache.reset()
    graphs = counters["stats"]["unique_graphs"]
    fresh = LycheeCache(model.config)
    assert torch.equal(model.generate(ids, **{CACHE: fresh}, **given), first)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("beams", "eager"),
        ("drafts", "eager"),
        ("beams", "forward"),
        pytest.param("drafts", "forward", marks=pytest.mark.thorough),
    ],
)
def test_beams_and_drafts(kind: str, way: str) -> None:
    model, draft, ids = model_of("llama of one layer"), model_of("qwen3"), some_ids(40)
    draft.generation_config.num_assistant_tokens = 2
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    given: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5}
    given.update({"num_beams": 3} if kind == "beams" else {"assistant_model": draft})
    dense = model.generate(ids, **given)
    given.update(through(way, model, EVERYTHING))
    cache = LycheeCache(model.config)
    assert torch.equal(model.generate(ids, **{CACHE: cache}, **given), dense)


@pytest.mark.parametrize("dynamic_sizes", [None, pytest.param(False, marks=pytest.mark.thorough)])
def test_growing_compiles_once_more_and_not_again(dynamic_sizes: bool | None) -> None:
    model, ids = model_of("llama of one layer"), some_ids(3200)
    options = {**SHAPE, "budget": 20_000}
    step = torch.compile(model, backend="lychee", options=options, dynamic=dynamic_sizes)
    cache, other = LycheeCache(model.config, capacity=512), dynamic(model)
    graphs, capacities = [], []
    for chunk in (500, 600, 2000):
        assert_same_steps(model, cache, other, ids, [chunk])
        cache.reserve(3)
        got = list(feed(step, cache, ids, [1, 1, 1]))
        for one, dense in zip(got, feed(model, other, ids, [1, 1, 1]), strict=True):
            torch.testing.assert_close(one, dense, atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
        capacities.append(cache.capacity)
    assert capacities == [512, 2560, 5120]
    assert graphs == ([1, 2, 2] if dynamic_sizes is None else [1, 2, 3])


def test_a_loop_reserves_step_by_step(device_reads: list[int]) -> None:
    model, ids = model_of("llama"), some_ids(700)
    step = torch.compile(model, backend="lychee", options=EVERYTHING)
    cache, other = LycheeCache(model.config, capacity=512), dynamic(model)
    assert_same_steps(model, cache, other, ids, [500])
    addresses = set()
    for at in range(500, 530):
        cache.reserve(1)
        got = step(ids[:, at : at + 1], **{CACHE: cache}).logits
        expected = model(ids[:, at : at + 1], **{CACHE: other}).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        addresses.add(cache.layers[0].keys.data_ptr())
    assert len(addresses) == 2
    assert len(device_reads) == len(cache.layers)
    assert counters["stats"]["unique_graphs"] == 2


def test_steps_that_nobody_announced_do_not_overwrite_the_past() -> None:
    model, ids = model_of("llama"), some_ids(520)
    step = torch.compile(model, backend="lychee", options=EVERYTHING)
    cache = LycheeCache(model.config, capacity=512)
    for _ in feed(model, cache, ids, [509]):
        pass
    outputs = [step(ids[:, at : at + 1], **{CACHE: cache}).logits for at in range(509, 515)]
    assert [bool(each.isnan().any()) for each in outputs] == [False] * 3 + [True] * 3
    with pytest.raises(RuntimeError, match="wrote 515 tokens to a LycheeCache with room for 512"):
        cache.get_seq_length()
    for _ in range(2):  # until it is reset
        with pytest.raises(RuntimeError, match=r"call cache\.reserve"):
            cache.reserve(1)
    cache.reset()
    assert_same_steps(model, cache, dynamic(model), ids, [20, 1])


def test_a_compiled_prompt_may_make_the_buffers() -> None:
    model, ids = model_of("llama of one layer"), some_ids(60)
    step = torch.compile(model, backend="lychee", options=EVERYTHING)
    cache, other = LycheeCache(model.config, capacity=512), dynamic(model)
    got = list(feed(step, cache, ids, [40, 1]))
    address = cache.layers[0].keys.data_ptr()
    cache.reserve(1)  # which takes them out of the memory of graphs, with all that nobody announced
    assert cache.layers[0].keys.data_ptr() != address
    got += feed(step, cache, ids, [1])
    for one, dense in zip(got, feed(model, other, ids, [40, 1, 1]), strict=True):
        torch.testing.assert_close(one, dense, atol=1e-5, rtol=1e-5)


def test_a_compiled_prompt_fills_a_cache_made_beforehand() -> None:
    model, ids = model_of("llama of one layer"), some_ids(60)
    step = torch.compile(model, backend="lychee", options=EVERYTHING)
    cache, other = LycheeCache(model.config, capacity=512), dynamic(model)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    address = cache.layers[0].keys.data_ptr()
    for got, dense in zip(
        feed(step, cache, ids, [40, 1, 1]), feed(model, other, ids, [40, 1, 1]), strict=True
    ):
        torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)
    assert cache.layers[0].keys.data_ptr() == address


@pytest.mark.usefixtures("kernels_on_cpu")
def test_kernels_read_it_before_and_after_a_growth() -> None:
    model, ids = model_of("llama"), some_ids(520)
    mask = torch.ones(1, 2048, dtype=torch.int64)
    mask[:, :40] = 0  # so that the budget covers what is visible, and is still below the capacity
    step = torch.compile(model, backend="lychee", options=EVERYTHING | {"budget": 511})
    cache, other = LycheeCache(model.config, capacity=512), dynamic(model)

    def forward(call: Any, held: Any, begin: int, end: int) -> Tensor:
        given = {"attention_mask": mask, "position_ids": torch.arange(begin, end)[None]}
        return call(ids[:, begin:end], **{CACHE: held}, **given).logits[:, -1]

    torch.testing.assert_close(forward(model, cache, 0, 511), forward(model, other, 0, 511))
    for at in (511, 512):
        cache.reserve(1)
        got, expected = forward(step, cache, at, at + 1), forward(model, other, at, at + 1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert cache.capacity == 2048
    assert counters["stats"]["unique_graphs"] == 2
    for report in lychee_compile.reports():
        assert [(site.decision, site.cache) for site in report.sites] == [("sparse", "static")] * 2
