"""Model classes of open_clip and fair-esm."""

from __future__ import annotations

from typing import Any

from benchmarks.coverage.libraries.entries import Entry, Library, Made, ids, image

TOWER = {"image_size": 64, "layers": 2, "width": 32, "patch_size": 16, "head_width": 8}
WORDS = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}


def _clip(
    title: str,
    path: str = "open_clip.model.CLIP",
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **more: Any,
) -> Entry:
    made = Made(
        path, embed_dim=32, vision_cfg=TOWER | (vision or {}), text_cfg=WORDS | (text or {}), **more
    )
    size = (vision or {}).get("image_size", 64)
    return Entry(title, made, [image(size), ids(2, 16)])


COCA = {"multimodal_cfg": {"context_length": 16, "width": 32, "heads": 4, "layers": 2}}
OPEN_CLIP = Library(
    "open-clip",
    ["open_clip_torch", "ftfy", "wcwidth", "torchvision", "timm"],
    [
        _clip("CLIP"),
        _clip("CLIP, quick GELU", quick_gelu=True),
        _clip("CLIP, layer scale", vision={"ls_init_value": 0.1}, text={"ls_init_value": 0.1}),
        _clip(
            "CLIP, attention pooling",
            vision={"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 8},
        ),
        _clip("CLIP, ResNet", vision={"layers": (1, 1, 1, 1), "width": 16, "patch_size": None}),
        _clip(
            "CLIP, timm",
            vision={
                "timm_model_name": "vit_tiny_patch16_224",
                "image_size": 224,
                "timm_pool": "token",
                "timm_proj": "linear",
            },
        ),
        _clip("CustomTextCLIP", "open_clip.model.CustomTextCLIP"),
        _clip(
            "CustomTextCLIP, class token in the text",
            "open_clip.model.CustomTextCLIP",
            text={"embed_cls": True},
        ),
        _clip(
            "CoCa",
            "open_clip.coca_model.CoCa",
            vision={"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
            text={"embed_cls": True, "output_tokens": True},
            **COCA,
        ),
    ],
)

ESM = Library(
    "fair-esm",
    ["fair-esm"],
    [
        Entry(
            "ESM2",
            Made("esm.model.esm2.ESM2", num_layers=2, embed_dim=32, attention_heads=4),
            [ids(2, 24, high=24)],
        ),
        Entry(
            "ESM2, contacts",
            Made("esm.model.esm2.ESM2", num_layers=2, embed_dim=32, attention_heads=4),
            [ids(2, 24, high=24)],
            {"return_contacts": True},
        ),
        Entry(
            "MSATransformer",
            Made(
                "esm.model.msa_transformer.MSATransformer",
                Made(
                    "argparse.Namespace",
                    layers=2,
                    embed_dim=32,
                    ffn_embed_dim=64,
                    attention_heads=4,
                    dropout=0.0,
                    attention_dropout=0.0,
                    activation_dropout=0.0,
                    max_tokens=4096,
                    embed_positions_msa=True,
                    embed_positions_msa_dim=32,
                    logit_bias=True,
                    max_tokens_per_msa=4096,
                    max_positions=64,
                ),
                Made("esm.Alphabet.from_architecture", "msa_transformer"),
            ),
            [ids(2, 4, 12, high=24)],
        ),
        Entry(
            "ProteinBertModel",
            Made(
                "esm.model.esm1.ProteinBertModel",
                Made(
                    "argparse.Namespace",
                    arch="roberta_large",
                    layers=2,
                    embed_dim=32,
                    ffn_embed_dim=64,
                    attention_heads=4,
                    max_positions=64,
                    logit_bias=True,
                    emb_layer_norm_before=True,
                    token_dropout=True,
                    final_bias=True,
                ),
                Made("esm.Alphabet.from_architecture", "ESM-1b"),
            ),
            [ids(2, 24, high=24)],
        ),
    ],
)
