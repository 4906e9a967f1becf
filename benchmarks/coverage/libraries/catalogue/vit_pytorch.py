"""Model classes of vit-pytorch: image encoders."""

from __future__ import annotations

from typing import Any

from benchmarks.coverage.libraries.entries import Entry, Floats, Library, Made, floats, image

PLAIN = {"image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 32, "depth": 2, "heads": 4}
MLP = {"mlp_dim": 64}
BLOCKS = {"dim": 32, "depth": 2, "heads": 4}
ROW = {"seq_len": 64, "patch_size": 8, "num_classes": 10, **BLOCKS}
CLIP = floats(2, 3, 4, 32, 32)
VIDEO = {
    "image_size": 32,
    "image_patch_size": 8,
    "frames": 4,
    "frame_patch_size": 2,
    "num_classes": 10,
}


def _entry(path: str, *inputs: Floats, **arguments: Any) -> Entry:
    name = path.replace(".", " ") if path.islower() else path.rpartition(".")[2]
    module = path.partition(".")[0]
    title = name if module == "vit" else f"{name} ({module})"
    channels = arguments.pop("not_attentions", 0)
    return Entry(
        title,
        Made(f"vit_pytorch.{path}", **arguments),
        list(inputs) or [image(64)],
        not_attentions=channels,
    )


VIT_PYTORCH = Library(
    "vit-pytorch",
    ["vit-pytorch", "einops", "torchvision", "torch-einops-utils", "hyper-connections"],
    [
        _entry("vit.ViT", **PLAIN, **MLP),
        _entry("simple_vit.SimpleViT", **PLAIN, **MLP),
        _entry("simple_vit_with_qk_norm.SimpleViT", **PLAIN, **MLP),
        _entry("simple_vit_with_register_tokens.SimpleViT", **PLAIN, **MLP),
        _entry("simple_vit_with_value_residual.SimpleViT", **PLAIN, **MLP),
        _entry("simple_vit_with_patch_dropout.SimpleViT", **PLAIN, **MLP, patch_dropout=0.0),
        _entry("simple_vit_with_fft.SimpleViT", **PLAIN, **MLP, freq_patch_size=16),
        _entry(
            "simple_vit_with_hyper_connections.SimpleViT", **PLAIN, **MLP, num_residual_streams=2
        ),
        _entry("simple_vit_1d.SimpleViT", floats(2, 3, 64), **ROW, **MLP),
        _entry(
            "simple_vit_3d.SimpleViT",
            CLIP,
            **VIDEO,
            dim=48,
            depth=2,
            heads=4,
            mlp_dim=64,
        ),
        _entry("vit_1d.ViT", floats(2, 3, 64), **ROW, **MLP),
        _entry("vit_3d.ViT", CLIP, **VIDEO, **BLOCKS, **MLP),
        _entry(
            "vit_nd.ViTND",
            floats(2, 3, 4, 32, 32),
            ndim=3,
            input_shape=(4, 32, 32),
            patch_size=(2, 8, 8),
            num_classes=10,
            **BLOCKS,
            **MLP,
        ),
        _entry("vit_with_patch_dropout.ViT", **PLAIN, **MLP, patch_dropout=0.0),
        _entry(
            "vit_with_patch_merger.ViT",
            **PLAIN,
            **MLP,
            patch_merge_layer=1,
            patch_merge_num_tokens=4,
        ),
        _entry("vit_with_decorr.ViT", **PLAIN, **MLP),
        _entry("vit_for_small_dataset.ViT", **PLAIN, **MLP),
        _entry(
            "normalized_vit.nViT",
            image_size=64,
            patch_size=16,
            num_classes=10,
            dim=32,
            depth=2,
            heads=4,
            dim_head=8,
            mlp_dim=64,
        ),
        _entry("deepvit.DeepViT", **PLAIN, **MLP),
        _entry("cait.CaiT", **PLAIN, **MLP, cls_depth=1),
        _entry("parallel_vit.ViT", **PLAIN, **MLP),
        _entry(
            "look_vit.LookViT",
            image_size=64,
            patch_size=16,
            num_classes=10,
            dim=32,
            depth=2,
            heads=4,
            highres_patch_size=8,
        ),
        _entry(
            "max_vit.MaxViT",
            num_classes=10,
            dim=16,
            depth=(1, 1),
            dim_head=8,
            dim_conv_stem=8,
            window_size=4,
        ),
        _entry(
            "max_vit_with_registers.MaxViT",
            num_classes=10,
            dim=16,
            depth=(1, 1),
            dim_head=8,
            dim_conv_stem=8,
            window_size=4,
            num_register_tokens=2,
        ),
        _entry(
            "nest.NesT",
            image_size=64,
            patch_size=4,
            num_classes=10,
            dim=16,
            heads=2,
            num_hierarchies=3,
            block_repeats=(1, 1, 1),
        ),
        _entry(
            "t2t.T2TViT",
            image_size=64,
            num_classes=10,
            **BLOCKS,
            **MLP,
            t2t_layers=((7, 4), (3, 2), (3, 2)),
        ),
        _entry(
            "cross_vit.CrossViT",
            image_size=64,
            num_classes=10,
            depth=1,
            sm_dim=32,
            lg_dim=48,
            sm_patch_size=16,
            lg_patch_size=32,
        ),
        _entry(
            "pit.PiT",
            image(70),
            image_size=70,
            patch_size=14,
            num_classes=10,
            dim=32,
            depth=(1, 1),
            heads=2,
            mlp_dim=64,
        ),
        _entry(
            "cvt.CvT",
            num_classes=10,
            s1_heads=1,
            s2_heads=1,
            s3_heads=1,
            s1_depth=1,
            s2_depth=1,
            s3_depth=1,
        ),
        _entry(
            "regionvit.RegionViT",
            image(128),
            num_classes=10,
            dim=(16, 32, 32, 32),
            depth=(1, 1, 1, 1),
            window_size=4,
        ),
        _entry(
            "scalable_vit.ScalableViT",
            num_classes=10,
            dim=16,
            heads=(1, 2),
            depth=(1, 1),
            ssa_dim_key=(8, 8),
            reduction_factor=(4, 2),
            window_size=(8, None),
        ),
        _entry(
            "mobile_vit.MobileViT",
            image_size=(64, 64),
            dims=[32, 48, 64],
            channels=[8, 8, 16, 16, 24, 24, 32, 32, 48, 48, 64],
            num_classes=10,
        ),
        _entry(
            "xcit.XCiT",
            not_attentions=2,
            image_size=64,
            patch_size=16,
            num_classes=10,
            dim=32,
            depth=2,
            cls_depth=1,
            heads=4,
            mlp_dim=64,
        ),
        _entry("ats_vit.ViT", **PLAIN, **MLP, max_tokens_per_depth=(8, 6)),
        _entry("learnable_memory_vit.ViT", **PLAIN, **MLP),
        _entry("rvt.RvT", **PLAIN, **MLP),
        _entry("jumbo_vit.JumboViT", **PLAIN, **MLP, num_jumbo_cls=1, jumbo_cls_k=2),
        _entry("simple_uvit.SimpleUViT", **PLAIN, **MLP),
    ],
)
