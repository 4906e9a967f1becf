"""Model classes of monai and segment-anything."""

from __future__ import annotations

from benchmarks.coverage.libraries.entries import Entry, Library, Made, floats, ids, image

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
            "ViTAutoEnc",
            Made(
                "monai.networks.nets.ViTAutoEnc",
                **PATCHES,
                patch_size=(16, 16, 16),
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
            [floats(1, 1, 64, 64, 64)],
        ),
        Entry(
            "MIL, attention",
            Made(
                "monai.networks.nets.MILModel",
                num_classes=3,
                mil_mode="att_trans",
                pretrained=False,
            ),
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
