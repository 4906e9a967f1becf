"""`prepare` on models with encoders, with images, in pipelines and in adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import small_decoders
import torch
from generating import (
    EVERYTHING,
    NEW,
    PROMPT,
    VOCABULARY,
    assert_everything_read,
    beside_dense,
    decoder,
    generate,
    greedy,
    lookup,
    padded,
    tokens,
    transformers,
)
from torch import Tensor, nn

import lychee_compile

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")
STEPS = NEW - 1


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        initializer_factor=3.0, pad_token_id=0, eos_token_id=None,
        decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.3,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [t5, pytest.param(bart, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "cache",
    [
        "growing",
        *(pytest.param(each, marks=pytest.mark.thorough) for each in ("static", "dynamic")),
    ],
)
def test_an_encoder_before_the_decoder(make: Callable[[], Any], cache: str) -> None:
    """Texts of several lengths, with and without beams."""
    plain, model = make(), make()
    with lychee_compile.prepare(model, cache=cache, **EVERYTHING):
        for length, given in ((40, {}), (25, {"num_beams": 2})):
            source = tokens(2, length, length) % 60 + 3
            given |= {"max_new_tokens": 24, "do_sample": False}
            given["attention_mask"] = torch.ones_like(source)
            assert torch.equal(model.generate(source, **given), plain.generate(source, **given))
    assert any(
        site.decision != "kept" for report in lychee_compile.reports() for site in report.sites
    )


@pytest.mark.thorough
@pytest.mark.parametrize("given", [{}, {"prefill_chunk": 20}, {"cache": "static"}], ids=str)
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "bloom", "gpt2", "mistral"])
def test_windows_sinks_and_positions_of_other_kinds(name: str, given: dict[str, Any]) -> None:
    """With left padding and drafts, too: a window that has moved on takes nothing back."""
    attention = "eager" if name in ("gpt_oss", "bloom") else "sdpa"
    plain, model = (small_decoders.model_of(name, attention) for _ in range(2))
    with lychee_compile.prepare(model, **given, **EVERYTHING), lychee_compile.record() as recorder:
        for way in (greedy, padded) if given else (greedy, lookup):
            assert torch.equal(way(model, None, {}), way(plain, None, {})), way.__name__
    assert recorder.calls


IMAGE, PATCHES = VOCABULARY - 1, 4


def llava() -> Any:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    text = transformers.LlamaConfig(**small_decoders.SMALL, initializer_range=0.3)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_an_image_before_the_text() -> None:
    plain, model = llava(), llava()
    ids = tokens(1, PROMPT) % (IMAGE - 1) + 1
    ids[:, 3 : 3 + PATCHES] = IMAGE
    given = {"pixel_values": torch.randn(1, 3, 8, 8)}
    with lychee_compile.prepare(model, **EVERYTHING), lychee_compile.record() as recorder:
        got = generate(model, None, ids, **given)
    assert torch.equal(got, generate(plain, None, ids, **given))
    assert_everything_read(recorder, STEPS)


def test_a_pipeline() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(number): number for number in range(VOCABULARY)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="0")
    text = " ".join(map(str, tokens(1, PROMPT)[0].tolist()))

    def answer(model: Any) -> str:
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        (result,) = pipe(text, max_new_tokens=NEW, do_sample=False)
        return result["generated_text"]

    model = decoder()
    with lychee_compile.prepare(model, **EVERYTHING), lychee_compile.record() as recorder:
        got = answer(model)
    assert got == answer(decoder())
    assert_everything_read(recorder, STEPS)


class Adapter(nn.Module):
    """A linear layer with a low-rank addition."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.up(self.down(inputs))


class Adapted(nn.Module):
    """A wrapper of the shape of PEFT's: it injects adapters, and generates through the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model
        torch.manual_seed(3)
        for layer in model.model.layers:
            layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)

    def get_base_model(self) -> Any:
        return self.base_model

    @property
    def config(self) -> Any:
        return self.base_model.config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)


def test_a_wrapper_with_adapters() -> None:
    plain, model = Adapted(decoder()), Adapted(decoder())
    with lychee_compile.prepare(model, **EVERYTHING), lychee_compile.record() as recorder:
        got = greedy(model, None, {})
    assert torch.equal(got, greedy(plain, None, {}))
    assert_everything_read(recorder, STEPS)
    assert "generate" not in vars(model.base_model)


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)

    def adapted() -> Any:
        base = decoder()
        torch.manual_seed(3)
        return peft.get_peft_model(base, config)

    model = adapted()
    with lychee_compile.prepare(model, **EVERYTHING), lychee_compile.record() as recorder:
        got = greedy(model, None, {})
    assert torch.equal(got, greedy(adapted(), None, {}))
    assert_everything_read(recorder, STEPS)


@pytest.mark.thorough
def test_a_compiled_model_is_looked_through() -> None:
    model = decoder()
    compiled = torch.compile(model)
    with lychee_compile.prepare(compiled, **EVERYTHING):
        got, dense, recorder = beside_dense(greedy, None, compiled, {})
    assert torch.equal(got, dense)
    assert_everything_read(recorder, STEPS)
