"""Model classes of libraries of decoders: litgpt, torchtune, torchscale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.coverage.libraries.entries import Entry, Library, Made, ids

PROMPT, SLOTS = 12, 32


def _with_positions(
    model: Callable[..., Any], args: Sequence[Any], _kwargs: Mapping[str, Any]
) -> Any:
    """Read a prompt, then two tokens more, over the static cache of a litgpt model."""
    model.set_kv_cache(batch_size=2, max_seq_length=SLOTS)
    spans = [(0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)]
    return [model(args[0][:, a:b], torch.arange(a, b)) for a, b in spans]


def _with_caches(model: Callable[..., Any], args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Any:
    """Read a prompt, then two tokens more, over the static cache of a torchtune model."""
    model.setup_caches(batch_size=2, dtype=torch.float32, decoder_max_seq_len=SLOTS)
    causal = torch.ones(SLOTS, SLOTS, dtype=torch.bool).tril()
    outputs = []
    for a, b in [(0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)]:
        positions = torch.arange(a, b)[None].expand(2, -1)
        outputs.append(model(args[0][:, a:b], mask=causal[positions], input_pos=positions))
    return outputs


SMALL = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "padded_vocab_size": 64,
    "block_size": 64,
    "intermediate_size": 64,
}


def _litgpt(config: str, *, cache: bool = False, **changes: Any) -> Entry:
    made = Made("litgpt.Config.from_name", config, **SMALL | changes)
    name = f"GPT, {config}" + (", static cache" if cache else "")
    more = {"drive": _with_positions} if cache else {}
    return Entry(name, Made("litgpt.GPT", made), [ids(2, 24)], **more)


GROUPED = {"n_query_groups": 2, "head_size": 8}

LITGPT = Library(
    "litgpt",
    [
        "litgpt",
        "lightning",
        "lightning-utilities",
        "lightning-fabric",
        "torchmetrics",
        "jsonargparse",
        "docstring-parser",
    ],
    [
        _litgpt("pythia-14m"),
        _litgpt("pythia-14m", cache=True),
        _litgpt("Llama-3.2-1B", **GROUPED),
        _litgpt("Llama-3.2-1B", cache=True, **GROUPED),
        _litgpt("Gemma-2-2b", **GROUPED, sliding_window_size=8),
        _litgpt("Gemma-2-2b", cache=True, **GROUPED, sliding_window_size=16),
        _litgpt("Gemma-3-1b-it", **GROUPED, sliding_window_size=8, sliding_window_indices=[0, 1]),
        _litgpt("Qwen2.5-0.5B", **GROUPED),
        _litgpt("Qwen3-0.6B", **GROUPED),
        _litgpt("Mistral-7B-v0.1", **GROUPED),
        _litgpt("Mixtral-8x7B-v0.1", **GROUPED, n_expert=4, n_expert_per_token=2),
        _litgpt("falcon-7b", n_query_groups=1, head_size=8),
        _litgpt("phi-2", head_size=8),
        _litgpt("OLMo-1B-hf", head_size=8, n_query_groups=4),
        _litgpt("stablelm-3b-4e1t", head_size=8, n_query_groups=4),
    ],
)

TUNE = {"vocab_size": 64, "num_layers": 2, "num_heads": 4, "embed_dim": 32, "max_seq_len": 64}


def _torchtune(path: str, *, cache: bool = False, **changes: Any) -> Entry:
    name = path.rpartition(".")[2] + (", static cache" if cache else "")
    more = {"drive": _with_caches} if cache else {}
    return Entry(name, Made(f"torchtune.models.{path}", **TUNE | changes), [ids(2, 24)], **more)


TORCHTUNE = Library(
    "torchtune",
    [
        "torchtune",
        "torchao==0.9.*",
        "torchdata",
        "omegaconf",
        "antlr4-python3-runtime",
        "sentencepiece",
        "tiktoken",
        "blobfile",
        "kagglehub",
        "datasets",
        "tokenizers",
        "dill",
        "xxhash",
        "multiprocess",
        "pyarrow",
        "pandas",
    ],
    [
        _torchtune("llama2.llama2", num_kv_heads=4),
        _torchtune("llama2.llama2", cache=True, num_kv_heads=4),
        _torchtune("llama3.llama3", num_kv_heads=2),
        _torchtune("llama3_1.llama3_1", cache=True, num_kv_heads=2),
        _torchtune("mistral.mistral", num_kv_heads=2, intermediate_dim=64),
        _torchtune("gemma.gemma", num_kv_heads=1, head_dim=8, intermediate_dim=64),
        _torchtune(
            "gemma2.gemma2", num_kv_heads=2, head_dim=8, intermediate_dim=64, sliding_window_size=8
        ),
        _torchtune("qwen2.qwen2", num_kv_heads=2, intermediate_dim=64),
        _torchtune("phi3.phi3", num_kv_heads=4, intermediate_dim=64),
    ],
)

SCALE = {"vocab_size": 64}
ENCODER = {
    "encoder_embed_dim": 32,
    "encoder_attention_heads": 4,
    "encoder_ffn_embed_dim": 64,
    "encoder_layers": 2,
    **SCALE,
}
DECODER = {
    "decoder_embed_dim": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_embed_dim": 64,
    "decoder_layers": 2,
    **SCALE,
}
CONFIG = "torchscale.architecture.config"


def _embedding() -> Made:
    return Made("torch.nn.Embedding", 64, 32)


def _encoder(title: str, **features: Any) -> Entry:
    config = Made(f"{CONFIG}.EncoderConfig", **ENCODER, **features)
    model = Made("torchscale.architecture.encoder.Encoder", config, embed_tokens=_embedding())
    return Entry(title, model, [ids(2, 24)])


def _decoder(title: str, **features: Any) -> Entry:
    config = Made(f"{CONFIG}.DecoderConfig", **DECODER, **features)
    model = Made("torchscale.architecture.decoder.Decoder", config, embed_tokens=_embedding())
    return Entry(title, model, [ids(2, 24)])


BOTH = Made(
    f"{CONFIG}.EncoderDecoderConfig",
    **ENCODER,
    **{key: value for key, value in DECODER.items() if key != "vocab_size"},
)

TORCHSCALE = Library(
    "torchscale",
    ["torchscale", "timm", "fairscale", "einops"],
    [
        _encoder("Encoder"),
        _encoder("Encoder, relative positions", rel_pos_buckets=8, max_rel_pos=16),
        _encoder("Encoder, DeepNorm", deepnorm=True),
        _encoder("Encoder, multiway", multiway=True),
        _decoder("Decoder"),
        _decoder("Decoder, xPos", xpos_rel_pos=True),
        _decoder("Decoder, relative positions", rel_pos_buckets=8, max_rel_pos=16),
        Entry(
            "EncoderDecoder",
            Made(
                "torchscale.architecture.encoder_decoder.EncoderDecoder",
                BOTH,
                encoder_embed_tokens=_embedding(),
                decoder_embed_tokens=_embedding(),
            ),
            [ids(2, 16), ids(2, 12)],
        ),
        Entry(
            "RetNetDecoder",
            Made(
                "torchscale.architecture.retnet.RetNetDecoder",
                Made(
                    f"{CONFIG}.RetNetConfig",
                    decoder_embed_dim=32,
                    decoder_retention_heads=4,
                    decoder_ffn_embed_dim=64,
                    decoder_layers=2,
                    decoder_value_embed_dim=64,
                    **SCALE,
                ),
                embed_tokens=_embedding(),
            ),
            [ids(2, 24)],
        ),
    ],
)
