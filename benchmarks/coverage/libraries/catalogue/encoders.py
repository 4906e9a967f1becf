"""Model classes of torchvision, torchaudio, open_clip, fair-esm, monai and segment-anything."""

from __future__ import annotations

from typing import Any

from benchmarks.coverage.libraries.entries import Entry, Library, Made, Named, floats, ids, image

SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": [4, 4],
    "num_classes": 10,
}
VIT = {
    "image_size": 64,
    "patch_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
    "mlp_dim": 64,
    "num_classes": 10,
}

TORCHVISION = Library(
    "torchvision",
    ["torchvision"],
    [
        Entry(
            "VisionTransformer", Made("torchvision.models.VisionTransformer", **VIT), [image(64)]
        ),
        Entry("SwinTransformer", Made("torchvision.models.SwinTransformer", **SWIN), [image(64)]),
        Entry(
            "SwinTransformer, v2",
            Made(
                "torchvision.models.SwinTransformer",
                **SWIN,
                block=Named("torchvision.models.swin_transformer.SwinTransformerBlockV2"),
                downsample_layer=Named("torchvision.models.swin_transformer.PatchMergingV2"),
            ),
            [image(64)],
        ),
        Entry(
            "SwinTransformer3d",
            Made(
                "torchvision.models.video.SwinTransformer3d",
                patch_size=[2, 4, 4],
                embed_dim=24,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=[2, 4, 4],
                num_classes=10,
            ),
            [floats(2, 3, 8, 32, 32)],
        ),
        Entry(
            "MaxVit",
            Made(
                "torchvision.models.MaxVit",
                input_size=(64, 64),
                stem_channels=16,
                partition_size=2,
                block_channels=[16, 32],
                block_layers=[1, 1],
                head_dim=8,
                stochastic_depth_prob=0.0,
                num_classes=10,
            ),
            [image(64)],
        ),
        Entry(
            "MViT, v2",
            Made("torchvision.models.video.mvit_v2_s", num_classes=10),
            [floats(1, 3, 16, 224, 224)],
        ),
        Entry("ConvNeXt", Made("torchvision.models.convnext_tiny", num_classes=10), [image(64)]),
        Entry("SqueezeNet", Made("torchvision.models.squeezenet1_1", num_classes=10), [image(64)]),
        Entry(
            "RegNet, squeeze and excitation",
            Made("torchvision.models.regnet_y_400mf", num_classes=10),
            [image(64)],
        ),
    ],
)

LENGTHS = Made("torch.tensor", [40, 30])
TORCHAUDIO = Library(
    "torchaudio",
    ["torchaudio"],
    [
        Entry(
            "Conformer",
            Made("torchaudio.models.Conformer", 16, 4, 32, 2, 7),
            [floats(2, 40, 16), LENGTHS],
        ),
        Entry(
            "Emformer",
            Made("torchaudio.models.Emformer", 16, 4, 32, 2, 8, right_context_length=4),
            [floats(2, 44, 16), LENGTHS],
        ),
        Entry(
            "HDemucs",
            Made("torchaudio.models.HDemucs", ["a", "b"], channels=8, nfft=1024, depth=5),
            [floats(1, 2, 16000)],
        ),
        Entry(
            "Wav2Vec2Model",
            Made(
                "torchaudio.models.wav2vec2_model",
                "group_norm",
                [(32, 10, 5), (32, 3, 2)],
                False,
                32,
                0.0,
                16,
                4,
                2,
                4,
                0.0,
                64,
                0.0,
                0.0,
                False,
                0.0,
                None,
            ),
            [floats(2, 800)],
        ),
        Entry(
            "WavLM",
            Made(
                "torchaudio.models.wavlm_model",
                "group_norm",
                [(32, 10, 5), (32, 3, 2)],
                False,
                32,
                0.0,
                16,
                4,
                2,
                4,
                16,
                32,
                0.0,
                0.0,
                64,
                0.0,
                0.0,
                False,
                0.0,
                None,
            ),
            [floats(2, 800)],
        ),
        Entry(
            "Tacotron2",
            Made(
                "torchaudio.models.Tacotron2",
                n_mels=8,
                symbol_embedding_dim=16,
                encoder_embedding_dim=16,
                attention_rnn_dim=16,
                attention_hidden_dim=16,
                decoder_rnn_dim=16,
                prenet_dim=8,
                postnet_embedding_dim=8,
            ),
            [
                ids(2, 12, high=100),
                Made("torch.tensor", [12, 9]),
                floats(2, 8, 10),
                Made("torch.tensor", [10, 8]),
            ],
        ),
        Entry(
            "ConvTasNet",
            Made(
                "torchaudio.models.ConvTasNet",
                enc_num_feats=16,
                msk_num_feats=16,
                msk_num_hidden_feats=16,
                msk_num_layers=2,
                msk_num_stacks=1,
            ),
            [floats(1, 1, 800)],
        ),
        Entry("DeepSpeech", Made("torchaudio.models.DeepSpeech", 16, 32), [floats(2, 1, 20, 16)]),
        Entry(
            "SquimObjective",
            Made(
                "torchaudio.models.squim_objective_model",
                feat_dim=16,
                win_len=16,
                d_model=16,
                nhead=2,
                hidden_dim=16,
                num_blocks=1,
                rnn_type="LSTM",
                chunk_size=8,
            ),
            [floats(2, 800)],
        ),
    ],
)

TOWER = {"image_size": 64, "layers": 2, "width": 32, "patch_size": 16, "head_width": 8}
WORDS = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
PAIR = [image(64), ids(2, 16)]


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
    return Entry(title, made, PAIR)


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
                "timm_pool": "token",
                "timm_proj": "linear",
            },
        ),
        _clip("CustomTextCLIP", "open_clip.model.CustomTextCLIP"),
        _clip(
            "CustomTextCLIP, class token in the text",
            "open_clip.model.CustomTextCLIP",
            text={"embed_cls": True, "output_tokens": True},
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
        Entry(
            "GVPTransformerDecoder layer",
            Made(
                "esm.inverse_folding.transformer_layer.TransformerDecoderLayer",
                Made(
                    "argparse.Namespace",
                    decoder_embed_dim=32,
                    encoder_embed_dim=32,
                    decoder_attention_heads=4,
                    attention_dropout=0.0,
                    dropout=0.0,
                    decoder_ffn_embed_dim=64,
                ),
            ),
            [floats(12, 2, 32)],
            {"encoder_out": floats(16, 2, 32)},
        ),
    ],
)

PATCHES = {"in_channels": 1, "img_size": (32, 32, 32)}
MONAI = Library(
    "monai",
    ["monai", "einops"],
    [
        Entry(
            "ViT",
            Made(
                "monai.networks.nets.ViT",
                **PATCHES,
                patch_size=(8, 8, 8),
                hidden_size=48,
                mlp_dim=64,
                num_layers=2,
                num_heads=4,
                classification=True,
            ),
            [floats(1, 1, 32, 32, 32)],
        ),
        Entry(
            "ViT, flash",
            Made(
                "monai.networks.nets.ViT",
                **PATCHES,
                patch_size=(8, 8, 8),
                hidden_size=48,
                mlp_dim=64,
                num_layers=2,
                num_heads=4,
                use_flash_attention=True,
            ),
            [floats(1, 1, 32, 32, 32)],
        ),
        Entry(
            "ViTAutoEnc",
            Made(
                "monai.networks.nets.ViTAutoEnc",
                **PATCHES,
                patch_size=(8, 8, 8),
                hidden_size=48,
                mlp_dim=64,
                num_layers=2,
                num_heads=4,
            ),
            [floats(1, 1, 32, 32, 32)],
        ),
        Entry(
            "UNETR",
            Made(
                "monai.networks.nets.UNETR",
                **PATCHES,
                out_channels=2,
                feature_size=8,
                hidden_size=48,
                mlp_dim=64,
                num_heads=4,
            ),
            [floats(1, 1, 32, 32, 32)],
        ),
        Entry(
            "SwinUNETR",
            Made(
                "monai.networks.nets.SwinUNETR",
                in_channels=1,
                out_channels=2,
                feature_size=12,
                depths=(2, 2, 2, 2),
                num_heads=(2, 2, 2, 2),
                window_size=4,
            ),
            [floats(1, 1, 32, 32, 32)],
        ),
        Entry(
            "MIL, attention",
            Made("monai.networks.nets.MILModel", num_classes=3, mil_mode="att_trans"),
            [floats(1, 3, 3, 64, 64)],
        ),
        Entry(
            "DiffusionModelUNet",
            Made(
                "monai.networks.nets.DiffusionModelUNet",
                spatial_dims=2,
                in_channels=1,
                out_channels=1,
                channels=(16, 32),
                attention_levels=(False, True),
                num_res_blocks=1,
                num_head_channels=8,
                norm_num_groups=8,
            ),
            [floats(2, 1, 16, 16), ids(2)],
        ),
        Entry(
            "DiffusionModelUNet, conditioned",
            Made(
                "monai.networks.nets.DiffusionModelUNet",
                spatial_dims=2,
                in_channels=1,
                out_channels=1,
                channels=(16, 32),
                attention_levels=(False, True),
                num_res_blocks=1,
                num_head_channels=8,
                norm_num_groups=8,
                with_conditioning=True,
                cross_attention_dim=16,
            ),
            [floats(2, 1, 16, 16), ids(2), floats(2, 6, 16)],
        ),
        Entry(
            "AutoencoderKL",
            Made(
                "monai.networks.nets.AutoencoderKL",
                spatial_dims=2,
                in_channels=1,
                out_channels=1,
                channels=(16, 32),
                attention_levels=(False, True),
                num_res_blocks=(1, 1),
                latent_channels=4,
                norm_num_groups=8,
            ),
            [floats(2, 1, 16, 16)],
        ),
        Entry(
            "DecoderOnlyTransformer",
            Made(
                "monai.networks.nets.DecoderOnlyTransformer",
                num_tokens=64,
                max_seq_len=32,
                attn_layers_dim=32,
                attn_layers_depth=2,
                attn_layers_heads=4,
            ),
            [ids(2, 24)],
        ),
        Entry(
            "MedNeXt",
            Made(
                "monai.networks.nets.MedNeXt",
                spatial_dims=2,
                init_filters=8,
                in_channels=1,
                out_channels=2,
            ),
            [floats(1, 1, 64, 64)],
        ),
        Entry(
            "HighResNet",
            Made("monai.networks.nets.HighResNet", spatial_dims=2, in_channels=1, out_channels=2),
            [floats(1, 1, 32, 32)],
        ),
    ],
)

SAM = "segment_anything.modeling"
DECODER = Made(f"{SAM}.TwoWayTransformer", depth=2, embedding_dim=32, num_heads=4, mlp_dim=64)
SEGMENT_ANYTHING = Library(
    "segment-anything",
    ["segment-anything", "torchvision"],
    [
        Entry(
            "ImageEncoderViT",
            Made(
                f"{SAM}.ImageEncoderViT",
                img_size=64,
                patch_size=8,
                embed_dim=32,
                depth=2,
                num_heads=4,
                out_chans=16,
                window_size=4,
                global_attn_indexes=(1,),
                use_rel_pos=True,
            ),
            [image(64)],
        ),
        Entry(
            "TwoWayTransformer",
            DECODER,
            [floats(2, 32, 8, 8), floats(2, 32, 8, 8), floats(2, 6, 32)],
        ),
        Entry(
            "MaskDecoder",
            Made(f"{SAM}.MaskDecoder", transformer_dim=32, transformer=DECODER),
            [floats(1, 32, 8, 8), floats(1, 32, 8, 8), floats(2, 3, 32), floats(2, 32, 8, 8), True],
        ),
    ],
)
