"""Model classes of x-transformers: decoders and encoders with many features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.coverage.libraries.entries import Entry, Library, Made, floats, ids, image, visible

LAYERS = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
PATH = "x_transformers"


def _decoder(title: str, wrapper: Mapping[str, Any] | None = None, **features: Any) -> Entry:
    layers = Made(f"{PATH}.Decoder", **LAYERS | features)
    model = Made(
        f"{PATH}.TransformerWrapper",
        num_tokens=64,
        max_seq_len=64,
        attn_layers=layers,
        **wrapper or {},
    )
    return Entry(f"Decoder, {title}", model, [ids(2, 24)])


def _encoder(title: str, **features: Any) -> Entry:
    layers = Made(f"{PATH}.Encoder", **LAYERS | features)
    model = Made(f"{PATH}.TransformerWrapper", num_tokens=64, max_seq_len=64, attn_layers=layers)
    return Entry(f"Encoder, {title}", model, [ids(2, 24)], {"mask": visible(2, 24)})


def _with_cache(model: Callable[..., Any], args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Any:
    """Read a prompt, then three tokens more, each with the cache that the call before returned."""
    tokens = args[0]
    logits, cache = model(tokens[:, :12], return_intermediates=True)
    outputs = [logits]
    for stop in (13, 14, 15):
        logits, cache = model(tokens[:, :stop], return_intermediates=True, cache=cache)
        outputs.append(logits)
    return torch.cat([each[:, -1] for each in outputs])


X_TRANSFORMERS = Library(
    "x-transformers",
    ["x-transformers", "einops", "einx", "loguru", "frozendict", "torch-einops-utils"],
    [
        _decoder("plain"),
        _decoder("flash", attn_flash=True),
        _decoder("rotary", rotary_pos_emb=True),
        _decoder("xpos", rotary_xpos=True),
        _decoder("ALiBi", alibi_pos_bias=True, alibi_num_heads=2),
        _decoder("T5 bias", rel_pos_bias=True),
        _decoder("dynamic bias", dynamic_pos_bias=True),
        _decoder("grouped", attn_kv_heads=2),
        _decoder("one KV head", attn_one_kv_head=True),
        _decoder("query-key norm", attn_qk_norm=True),
        _decoder("memory keys", attn_num_mem_kv=3),
        _decoder("sparse top-k", attn_sparse_topk=4),
        _decoder("talking heads before", attn_pre_talking_heads=True),
        _decoder("talking heads after", attn_post_talking_heads=True),
        _decoder("gated values", attn_gate_values=True),
        _decoder("head scale", attn_head_scale=True),
        _decoder("residual attention", residual_attn=True),
        _decoder("soft-clamped", attn_softclamp_logits=True),
        _decoder("null key", attn_add_zero_kv=True),
        _decoder("selective", attn_selective=True),
        _decoder("hybrid of values", attn_laser=True),
        _decoder("value residual", add_value_residual=True),
        _decoder("sandwich", sandwich_norm=True),
        _decoder("macaron", macaron=True),
        _decoder("shifted tokens", shift_tokens=1),
        _decoder("forgetting", attn_data_dependent_alibi=True),
        _decoder("memory tokens", {"num_memory_tokens": 4}),
        _decoder(
            "register tokens in between",
            {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 8},
        ),
        _encoder("plain"),
        _encoder("T5 bias", rel_pos_bias=True),
        _encoder("cosine", attn_qk_norm=True, attn_qk_norm_scale=10),
        Entry(
            "Decoder, growing cache",
            Made(
                f"{PATH}.TransformerWrapper",
                num_tokens=64,
                max_seq_len=64,
                attn_layers=Made(f"{PATH}.Decoder", **LAYERS, rotary_pos_emb=True),
            ),
            [ids(2, 24)],
            drive=_with_cache,
        ),
        Entry(
            "Decoder, memory keys and growing cache",
            Made(
                f"{PATH}.TransformerWrapper",
                num_tokens=64,
                max_seq_len=64,
                attn_layers=Made(f"{PATH}.Decoder", **LAYERS, attn_num_mem_kv=2),
            ),
            [ids(2, 24)],
            drive=_with_cache,
        ),
        Entry(
            "XTransformer",
            Made(
                f"{PATH}.XTransformer",
                dim=32,
                enc_num_tokens=64,
                enc_depth=1,
                enc_heads=4,
                enc_max_seq_len=64,
                dec_num_tokens=64,
                dec_depth=1,
                dec_heads=4,
                dec_max_seq_len=64,
            ),
            [ids(2, 16), ids(2, 12)],
            {"mask": visible(2, 16)},
        ),
        Entry(
            "ViTransformerWrapper",
            Made(
                f"{PATH}.ViTransformerWrapper",
                image_size=64,
                patch_size=16,
                num_classes=10,
                attn_layers=Made(f"{PATH}.Encoder", **LAYERS),
            ),
            [image(64)],
        ),
        Entry(
            "ContinuousTransformerWrapper",
            Made(
                f"{PATH}.ContinuousTransformerWrapper",
                dim_in=16,
                dim_out=16,
                max_seq_len=64,
                attn_layers=Made(f"{PATH}.Encoder", **LAYERS),
            ),
            [floats(2, 24, 16)],
        ),
        Entry(
            "CrossAttender",
            Made(f"{PATH}.CrossAttender", dim=32, depth=2, heads=4),
            [floats(2, 12, 32)],
            {"context": floats(2, 20, 32)},
        ),
        Entry(
            "GPTVAE",
            Made(
                f"{PATH}.gpt_vae.GPTVAE",
                num_tokens=64,
                dim=32,
                depth=1,
                enc_depth=1,
                max_seq_len=32,
                heads=4,
            ),
            [ids(2, 24)],
        ),
    ],
)
