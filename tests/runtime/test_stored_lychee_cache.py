"""`LycheeCache` whose numbers have 8 or 4 bits: what it holds, what attention reads, its bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cache_names import CACHE
from hypothesis import given
from hypothesis import strategies as st
from small_decoders import model_of, transformers
from torch import Tensor

import lychee_compile
from lychee_compile import LycheeCache
from lychee_compile.cache import stored_layer
from lychee_compile.cache.number_formats import FORMATS
from lychee_compile.cache.stored_layer import StoredLayer
from lychee_compile.kernels.host_memory import zeros_on_host
from lychee_compile.runtime import host_caches

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")
SHAPE = {"sinks": 2, "recent": 16, "chunk": (4, 8)}
DTYPES = ("fp8", "int8", "int4")
THOROUGHLY = ("int4", *(pytest.param(name, marks=pytest.mark.thorough) for name in DTYPES[:2]))
STEP = {"fp8": 2**-4, "int8": 0.5 / 127, "int4": 0.5 / 15}
"""Largest error of a number, relative to the largest or to the spread of its group."""


@given(
    name=st.sampled_from(DTYPES),
    head_dim=st.sampled_from([8, 32, 48, 80, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    offset=st.sampled_from([0.0, 30.0]),
)
def test_numbers_come_back_within_half_a_step(
    name: str, head_dim: int, dtype: torch.dtype, offset: float
) -> None:
    states = (torch.randn(2, 3, 5, head_dim) + offset).to(dtype)
    states[0, 0, 0] = 0
    form = FORMATS[name]
    found = form.decode(form.encode(states), dtype)
    assert found.dtype is dtype
    assert found.shape == states.shape
    assert bool((found[0, 0, 0] == 0).all())
    groups, ours = (
        each.float().unflatten(-1, (-1, torch.gcd(torch.tensor(head_dim), torch.tensor(32))))
        for each in (states, found)
    )
    most = groups.abs().amax(-1, keepdim=True)
    spread = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    rounded = most * torch.finfo(dtype).eps
    allowed = STEP[name] * (spread if name == "int4" else most) * 1.01 + 2 * rounded
    assert bool(((groups - ours).abs() <= allowed + 1e-3 * (name == "fp8")).all())


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_not_a_number_stays_so(name: str) -> None:
    form, states = FORMATS[name], torch.randn(1, 1, 2, 32)
    states[0, 0, 1, 3] = torch.nan
    found = form.decode(form.encode(states), torch.float32)
    assert bool(found[0, 0, 1].isnan().any())
    assert not bool(found[0, 0, 0].isnan().any())


def ids_of(count: int, rows: int = 2) -> Tensor:
    return torch.randint(1, 128, (rows, count), generator=torch.Generator().manual_seed(1))


def forward(model: Any, cache: Any, ids: Tensor, begin: int, end: int) -> Tensor:
    return model(ids[:, begin:end], **{CACHE: cache}).logits


def wider(model: Any) -> Any:
    """Return a random model of the same kind with 48 channels a head: three groups of 16."""
    model.config.head_dim = 48
    return type(model)(model.config).eval()


@pytest.mark.parametrize("name", THOROUGHLY)
def test_steps_are_sparse_and_read_what_is_held(name: str) -> None:
    """Steps, tokens that are taken back, and rows that are reordered, beside uncompiled forwards.

    The budget holds all tokens, but not the capacity.
    """
    model, ids = wider(model_of("llama")), ids_of(90)
    step = torch.compile(model, backend="lychee", options={"budget": 200, **SHAPE})
    ours, other = (LycheeCache(model.config, capacity=512, dtype=name) for _ in range(2))
    with torch.no_grad(), lychee_compile.record() as recorder:
        for cache in (ours, other):
            forward(model, cache, ids, 0, 80)
        for place in (80, 81, 82, 83, 84):
            if place == 82:
                for cache in (ours, other):
                    cache.crop(-2)
                    cache.reorder_cache(torch.tensor([1, 0]))
            ours.reserve(1)
            got, want = (
                forward(call, held, ids, place, place + 1)
                for call, held in ((step, ours), (model, other))
            )
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert len(recorder.calls) == 10
    assert all(site.decision == "sparse" for site in lychee_compile.reports()[-1].sites)


def test_a_small_budget_reads_few_of_the_numbers_that_are_held() -> None:
    model, ids = model_of("llama"), ids_of(304)
    step = torch.compile(model, backend="lychee", options={"budget": 40, **SHAPE})
    cache = LycheeCache(model.config, dtype="int4")
    with torch.no_grad(), lychee_compile.record() as recorder:
        forward(model, cache, ids, 0, 300)
        for place in range(300, 304):
            cache.reserve(1)
            forward(step, cache, ids, place, place + 1)
    assert len(recorder.calls) == 8
    assert all(int(call.tokens_read.max()) <= 40 for call in recorder.calls)


@pytest.mark.parametrize(("name", "share"), [(None, 4), ("fp8", 1), ("int8", 1.25), ("int4", 1)])
def test_bytes_are_those_that_were_promised(name: str | None, share: float) -> None:
    """Numbers of a float32 model with 16 channels: groups are of 16, and scales of 4 bytes."""
    model, ids = model_of("llama"), ids_of(20)
    cache = LycheeCache(model.config, capacity=512, dtype=name)
    with torch.no_grad():
        forward(model, cache, ids, 0, 20)
    numbers = 2 * 2 * cache.capacity * 16  # rows, KV heads, slots, channels
    for layer in cache.layers:
        for kind in ("keys", "values"):
            assert sum(each.nbytes for each in layer.parts(kind)) == numbers * share
        stored = {each.untyped_storage().data_ptr(): each for each in layer.buffers()}
        assert sum(each.untyped_storage().nbytes() for each in stored.values()) == (
            2 * numbers * share
        )


def test_bytes_beside_bfloat16() -> None:
    states = torch.randn(1, 8, 4, 128, dtype=torch.bfloat16)
    sizes = {
        name: sum(each.nbytes for each in form.encode(states)) / states.numel()
        for name, form in FORMATS.items()
    }
    assert sizes == {None: 2, "fp8": 1, "int8": 1 + 1 / 16, "int4": 5 / 8}


def test_the_first_tokens_are_read_as_they_come_and_copies_are_independent() -> None:
    model, ids = model_of("llama"), ids_of(30)
    cache, other = LycheeCache(model.config, dtype="int4"), LycheeCache(model.config)
    with torch.no_grad():
        assert torch.equal(forward(model, cache, ids, 0, 29), forward(model, other, ids, 0, 29))
        twin = copy.deepcopy(cache)
        before = [each.clone() for each in twin.layers[0].buffers()]
        forward(model, cache, ids, 29, 30)
    for each, then in zip(twin.layers[0].buffers(), before, strict=True):
        assert torch.equal(each, then)
    assert isinstance(twin.layers[0], StoredLayer)
    assert twin.get_seq_length() == 29


def test_rows_are_repeated_and_selected() -> None:
    model, ids = model_of("llama"), ids_of(30)
    cache = LycheeCache(model.config, dtype="fp8")
    with torch.no_grad():
        forward(model, cache, ids, 0, 29)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        again = LycheeCache(model.config, dtype="fp8")
        forward(model, again, ids, 0, 29)
        got, want = (forward(model, each, ids, 29, 30) for each in (cache, again))
    torch.testing.assert_close(got, want)


def test_changes_of_the_batch_and_copies_stay_in_memory_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Take buffers for memory of the host if they come from `zeros_on_host`, or were there before.

    Copies keep the marks by which CUDA graphs know buffers that stay where they are.
    """
    model, ids = model_of("llama"), ids_of(30)
    cache = LycheeCache(model.config, dtype="fp8")
    with torch.no_grad():
        forward(model, cache, ids, 0, 29)
    held = [each for layer in cache.layers for each in layer.buffers()]

    def zeros(shape: tuple[int, ...], dtype: torch.dtype, _: torch.device) -> Tensor:
        held.append(torch.zeros(shape, dtype=dtype))
        return held[-1]

    def lies_on_host(tensor: Tensor) -> bool:
        return any(each is tensor for each in held)

    monkeypatch.setattr(stored_layer, "zeros_on_host", zeros)
    monkeypatch.setattr(stored_layer, "lies_on_host", lies_on_host)
    twin = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    for layer, copied in zip(cache.layers, twin.layers, strict=True):
        for now, then in zip(layer.buffers(), copied.buffers(), strict=True):
            assert lies_on_host(now)
            assert lies_on_host(then)
            assert torch.equal(now.float(), then.float()[[1, 0, 1]])
            assert vars(now) == vars(then) != {}


def test_memory_that_the_host_does_not_have_is_told_of() -> None:
    with pytest.raises(RuntimeError, match=r'storage="host" could not lock .* GB.*"device"'):
        zeros_on_host((1 << 60,), torch.uint8, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"storage": "disk"}, r"storage='disk' \(str\): expected 'device' or 'host'"),
        ({"dtype": "int2"}, r"dtype='int2' \(str\): expected None or 'fp8' or 'int8' or 'int4'"),
    ],
)
def test_errors_name_the_option_and_its_choices(wrong: dict[str, Any], words: str) -> None:
    config = model_of("llama").config
    with pytest.raises(ValueError, match=words):
        LycheeCache(config, **wrong)
    renamed = {"cache_dtype" if name == "dtype" else name: each for name, each in wrong.items()}
    with pytest.raises(ValueError, match=words):
        lychee_compile.prepare(model_of("llama"), **renamed)


@pytest.mark.parametrize("given", [{"cache_dtype": "int8"}, {"storage": "host"}])
def test_a_form_belongs_to_a_growing_cache(given: dict[str, Any]) -> None:
    ((name, value),) = given.items()
    words = rf"option {name}='{value}' .* cache='static' .* use cache=\"growing\""
    with pytest.raises(ValueError, match=words):
        lychee_compile.prepare(model_of("llama"), cache="static", **given)


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_a_form_that_another_cache_does_not_have_is_told_of(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """BLOOM counts positions from the mask, so that it gets a `DynamicCache`."""
    model, ids = model_of(name, "eager"), ids_of(20)
    with lychee_compile.prepare(model, budget=1000, cache_dtype="int8", **SHAPE):
        model.generate(ids, max_new_tokens=2, pad_token_id=0, attention_mask=ids > 0)
    told = [each for each in caplog.records if "cache_dtype have no effect" in each.getMessage()]
    assert len(told) == (name == "bloom")


def test_keys_of_an_encoder_are_not_rounded_in_silence() -> None:
    config = transformers.BartConfig(
        vocab_size=128, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    pair = transformers.EncoderDecoderCache(
        LycheeCache(config, dtype="int8"), LycheeCache(config, dtype="int8")
    )
    with torch.no_grad(), pytest.raises(ValueError, match=r"DynamicCache\(\)"):
        model(ids_of(9), decoder_input_ids=ids_of(3), **{CACHE: pair})


@pytest.mark.parametrize(
    "given",
    [{"cache_dtype": "int8"}, pytest.param({"storage": "host"}, marks=pytest.mark.thorough)],
)
def test_generate_of_a_prepared_model(given: dict[str, Any]) -> None:
    """On a CPU memory of the host is the ordinary one."""
    model = transformers.LlamaForCausalLM(model_of("llama").config).eval()
    ids, usual = ids_of(120), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    usual["attention_mask"] = torch.ones_like(ids)
    held = LycheeCache(model.config, dtype=given.get("cache_dtype"))
    dense = model.generate(ids, **usual, **{CACHE: held}, disable_compile=True)
    with lychee_compile.prepare(model, budget=1000, **SHAPE, **given):
        got = model.generate(ids, **usual, return_dict_in_generate=True)
    assert torch.equal(got.sequences, dense)
    cache = got["cache" if "cache" in got else "past_key_values"]
    assert cache.layers[0].keys.dtype is (torch.int8 if "cache_dtype" in given else torch.float32)


def test_attention_that_reads_all_of_host_memory_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Take the keys of the first layer, and nothing else, for memory of the host."""
    model, ids = model_of("llama"), ids_of(40, rows=1)
    cache = LycheeCache(model.config, capacity=512)
    monkeypatch.setattr(host_caches, "any_on_host", lambda: True)
    monkeypatch.setattr(host_caches, "lies_on_host", lambda each: each is cache.layers[0].keys)
    host_caches.warn_of_reading.cache_clear()
    for budget, told in ((40, 0), (None, 1)):
        step = torch.compile(model, backend="lychee", options={"budget": budget, **SHAPE})
        cache.reset()
        with torch.no_grad():
            forward(model, cache, ids, 0, 37)
            for place in (37, 38, 39):
                cache.reserve(1)
                forward(step, cache, ids, place, place + 1)
        messages = [each.getMessage() for each in caplog.records]
        about = [each for each in messages if "in host memory" in each]
        assert len(about) == told
    assert "layers.0.self_attn reads all keys" in about[0]
    assert "budget" in about[0]
