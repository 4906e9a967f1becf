"""Model classes of torchvision and torchaudio."""

from __future__ import annotations

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
