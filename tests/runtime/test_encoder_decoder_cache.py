"""`LycheeCache` in encoder-decoder models: in a pair, and alone refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_names import CACHE
from small_decoders import transformers
from torch import Tensor

from lychee_compile import LycheeCache

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")
OPTIONS = {"budget": 4096, "sinks": 2, "recent": 16}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.3,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def text(tokens: int) -> Tensor:
    return torch.randint(3, 60, (1, tokens))


def generated(model: Any, source: Tensor, cache: Any = None) -> Tensor:
    config = transformers.CompileConfig(backend="lychee", mode=None, options=OPTIONS)
    config._compile_all_devices = True
    given = {} if cache is None else {CACHE: cache, "compile_config": config}
    mask = torch.ones_like(source)
    result: Tensor = model.generate(
        source, attention_mask=mask, max_new_tokens=6, do_sample=False, **given
    )
    return result


def pair(model: Any, cross: Any) -> Any:
    return transformers.EncoderDecoderCache(LycheeCache(model.config), cross)


@pytest.mark.parametrize("kind", ["dynamic", "lychee"])
def test_a_pair_gives_the_dense_tokens(model: Any, kind: str) -> None:
    """The keys of the encoder may be in either cache; both serve texts of other lengths again."""
    cross = LycheeCache(model.config) if kind == "lychee" else transformers.DynamicCache()
    caches = pair(model, cross)
    for tokens in (40, 25, 60) if kind == "lychee" else (40,):
        source = text(tokens)
        assert torch.equal(generated(model, source, caches), generated(model, source))
        caches.reset()


def test_the_keys_of_an_encoder_have_no_free_slots(model: Any) -> None:
    caches = pair(model, LycheeCache(model.config))
    with torch.no_grad():
        for tokens in (30, 20):
            model(text(tokens), decoder_input_ids=text(3), **{CACHE: caches})
            held = [layer.keys.shape[2] for layer in caches.cross_attention_cache.layers]
            assert held == [tokens] * 2
            assert caches.self_attention_cache.layers[0].keys.shape[2] % 512 == 0
            caches.reset()


def test_one_cache_for_both_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"EncoderDecoderCache\(LycheeCache\(model.config\)"):
        generated(model, text(40), LycheeCache(model.config))


def tiny(name: str) -> Any:
    """Return an encoder-decoder model of another family than Bart."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 1}
    if name == "T5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    else:
        layers = {f"{part}_layers": 2 for part in ("encoder", "decoder")}
        heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
        widths = {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
        sizes = {"d_model": 32, "max_position_embeddings": 128, **layers, **heads, **widths}
    config = getattr(transformers, f"{name}Config")(**shared, **sizes)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("name", ["T5", "MBart", "Pegasus"])
def test_other_models_take_a_pair_and_refuse_one_cache(name: str) -> None:
    model = tiny(name)
    given = {"input_ids": text(40), "decoder_input_ids": text(7)}
    expected = model(**given).logits
    for cross in (transformers.DynamicCache(), LycheeCache(model.config)):
        got = model(**given, **{CACHE: pair(model, cross)}).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="for encoder-decoder models pass EncoderDecoderCache"):
        model(**given, **{CACHE: LycheeCache(model.config)})
