"""Model classes of timm: image encoders."""

from __future__ import annotations

from typing import Any

from benchmarks.coverage.libraries.entries import Entry, Library, Made, image


def _entry(name: str, size: int = 64, **arguments: Any) -> Entry:
    channels = arguments.pop("not_attentions", 0)
    model = Made("timm.create_model", name, num_classes=10, **arguments)
    return Entry(name, model, [image(size)], not_attentions=channels)


SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
PLAIN = {"img_size": 64, **SMALL}

TIMM = Library(
    "timm",
    ["timm", "torchvision"],
    [
        _entry("vit_tiny_patch16_224", **PLAIN),
        _entry("vit_base_patch16_rope_reg1_gap_256", **PLAIN),
        _entry("vit_base_patch16_siglip_224", **PLAIN),
        _entry("vit_relpos_small_patch16_224", **PLAIN),
        _entry("vit_srelpos_small_patch16_224", **PLAIN),
        _entry("vit_medium_patch16_reg4_gap_256", **PLAIN),
        _entry("vit_base_patch16_xp_224", **PLAIN),
        _entry("vitamin_small_224", 64, img_size=64),
        _entry(
            "samvit_base_patch16",
            64,
            img_size=64,
            depth=2,
            embed_dim=48,
            num_heads=3,
            global_attn_indexes=(1,),
        ),
        _entry("deit3_small_patch16_224", **PLAIN),
        _entry("deit_small_distilled_patch16_224", **PLAIN),
        _entry("beit_base_patch16_224", **PLAIN),
        _entry("beitv2_base_patch16_224", **PLAIN),
        _entry("eva02_tiny_patch14_224", 56, img_size=56, **SMALL),
        _entry("naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3),
        _entry("cait_xxs24_224", img_size=64, depth=2, embed_dim=48, num_heads=3),
        _entry("convit_tiny", img_size=64, depth=2, local_up_to_layer=1),
        _entry("xcit_nano_12_p16_224", not_attentions=2, img_size=64, depth=2),
        _entry("volo_d1_224", img_size=64),
        _entry("crossvit_tiny_240", 240),
        _entry("coat_lite_tiny", img_size=64),
        _entry("coat_tiny", img_size=64, serial_depths=(1, 1, 1, 1), parallel_depth=1),
        _entry("pit_ti_224", img_size=64, depth=(1, 1, 1)),
        _entry("pvt_v2_b0", depths=(1, 1, 1, 1)),
        _entry("twins_pcpvt_small", img_size=64, depths=(1, 1, 1, 1)),
        _entry("twins_svt_small", 128, img_size=128, depths=(1, 1, 1, 1)),
        _entry("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 2)),
        _entry(
            "swin_s3_tiny_224",
            img_size=128,
            size=128,
            depths=(2, 2),
            window_size=(4, 4),
            num_heads=(3, 6),
        ),
        _entry(
            "swinv2_tiny_window8_256", img_size=64, window_size=4, depths=(2, 2), num_heads=(3, 6)
        ),
        _entry("swinv2_cr_tiny_224", img_size=64, window_size=4, depths=(2, 2), num_heads=(3, 6)),
        _entry("maxvit_rmlp_pico_rw_256", 256),
        _entry("maxvit_tiny_tf_224", 224, depths=(1, 1, 1, 1)),
        _entry("coatnet_nano_rw_224", 224),
        _entry("coatnet_rmlp_nano_rw_224", img_size=64, depths=(1, 1, 1, 1)),
        _entry("mvitv2_tiny", img_size=64),
        _entry("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1)),
        _entry("levit_128s", 128, img_size=128),
        _entry("levit_conv_128s", 128, img_size=128),
        _entry("efficientformer_l1", 224),
        _entry("efficientformerv2_s0", 224),
        _entry("efficientvit_m0", 224),
        _entry("efficientvit_b0"),
        _entry("edgenext_xx_small", not_attentions=3),
        _entry("mobilevit_xxs"),
        _entry("mobilevitv2_050"),
        _entry("fastvit_sa12", 128),
        _entry("nest_tiny", img_size=64),
        _entry("gcvit_xxtiny", 224),
        _entry("davit_tiny", not_attentions=4, depths=(1, 1, 1, 1), window_size=4),
        _entry("tnt_s_patch16_224", img_size=64, depth=2),
        _entry("focalnet_tiny_srf"),
        _entry("caformer_s18", 128),
        _entry("shvit_s1", 128),
        _entry("rdnet_tiny", num_init_features=32),
        _entry("botnet26t_256", 256),
        _entry("lambda_resnet26t", 256),
        _entry("convnext_atto"),
        _entry("resnet50_clip", 224),
        _entry("mobilenetv4_hybrid_medium"),
        _entry("tiny_vit_5m_224", 224, depths=(1, 1, 1, 1)),
        _entry("repvit_m1"),
        _entry("swiftformer_xs", 64),
        _entry("poolformer_s12"),
        _entry("csatv2", 128),
        _entry("vit_small_patch16_dinov3", **PLAIN),
        _entry("beit3_base_patch16_224", **PLAIN),
    ],
)
