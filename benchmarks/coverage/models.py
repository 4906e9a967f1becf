"""Architectures of the coverage table, each a small configuration with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.coverage.sizes import (
    BATCH,
    BOTH_SIDES,
    DETECTION,
    EXPERTS,
    FUNNEL,
    GROUPED,
    IMAGE,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    LINEAR,
    LOW_RANK,
    MULTI_AXIS_ROPE,
    ONE_OF_EACH,
    PYRAMID,
    RELATIVE,
    SPEECH,
    STATE_SPACE,
    TEXT,
    WHISPER,
    WINDOW,
    WINDOWED,
    XLNET,
)


@dataclass(frozen=True)
class Architecture:
    """Model class of transformers, and its small configuration."""

    name: str
    family: str
    """Heading under which the table lists the architecture."""
    model_class: str
    inputs: str
    """Kind of the model's inputs: a key of `calls.INPUTS`."""
    config: Mapping[str, Any]
    flex_batch: int = BATCH
    """Batch size for FlexAttention."""

    @property
    def offered(self) -> bool:
        """True if the installed transformers has the model class."""
        return hasattr(transformers, self.model_class)

    def build(self, implementation: str) -> nn.Module:
        """Return the model in evaluation mode, with the same weights every time.

        Raise whatever transformers raises if the class has no such attention implementation.
        """
        model_class = getattr(transformers, self.model_class)
        config = model_class.config_class(**self.config)
        chosen: Any = implementation
        if "backbone_config" in self.config:  # convolutions, which have no attention to choose
            chosen = {"": implementation, "backbone_config": "eager"}
        torch.manual_seed(0)
        return model_class._from_config(config, attn_implementation=chosen).eval()


def _decoder(name: str, model_class: str, **config: Any) -> Architecture:
    return Architecture(name, "decoders", model_class, "tokens", TEXT | config)


def _experts(name: str, model_class: str, **config: Any) -> Architecture:
    sizes = TEXT | GROUPED | EXPERTS
    return Architecture(name, "mixtures of experts", model_class, "tokens", sizes | config)


def _hybrid(name: str, model_class: str, **config: Any) -> Architecture:
    return Architecture(name, "hybrids", model_class, "tokens", TEXT | GROUPED | config)


def _encoder(name: str, model_class: str, **config: Any) -> Architecture:
    return Architecture(name, "encoders", model_class, "text", TEXT | config)


def _both(name: str, model_class: str, **config: Any) -> Architecture:
    return Architecture(name, "encoder-decoders", model_class, "text to text", config)


def _relative(name: str, model_class: str) -> Architecture:
    # The position bias is for a batch of one, and FlexAttention indexes it by batch entry.
    return replace(_both(name, model_class, **RELATIVE), flex_batch=1)


def _vision(name: str, model_class: str, **config: Any) -> Architecture:
    return Architecture(name, "vision", model_class, "image", config)


def _pair(name: str, prefix: str) -> Architecture:
    config = {"text_config": TEXT, "vision_config": IMAGE}
    return Architecture(name, "vision", f"{prefix}Model", "image and text", config)


def _speech(name: str, model_class: str, **config: Any) -> Architecture:
    return Architecture(name, "audio", model_class, "waveform", SPEECH | config)


def _multimodal(name: str, model_class: str, inputs: str, **config: Any) -> Architecture:
    return Architecture(name, "multimodal", model_class, inputs, config)


def _tower(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type} | TEXT | GROUPED


def _eye(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type} | IMAGE


ARCHITECTURES: tuple[Architecture, ...] = (
    _decoder("llama", "LlamaForCausalLM", **GROUPED),
    _decoder("qwen2", "Qwen2ForCausalLM", **GROUPED),
    _decoder("qwen3", "Qwen3ForCausalLM", **GROUPED, head_dim=16),
    _decoder("mistral", "MistralForCausalLM", **GROUPED, **WINDOW),
    _decoder("gemma", "GemmaForCausalLM", num_key_value_heads=1, head_dim=16),
    _decoder("gemma2", "Gemma2ForCausalLM", **GROUPED, **ONE_OF_EACH, head_dim=16),
    _decoder("gemma3", "Gemma3ForCausalLM", **GROUPED, **ONE_OF_EACH, head_dim=16),
    _decoder("phi", "PhiForCausalLM", **GROUPED),
    _decoder("phi3", "Phi3ForCausalLM", **GROUPED),
    _decoder("gpt2", "GPT2LMHeadModel"),
    _decoder(
        "gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=16
    ),
    _decoder("gpt_neox", "GPTNeoXForCausalLM"),
    _decoder("gptj", "GPTJForCausalLM", rotary_dim=8),
    _decoder("opt", "OPTForCausalLM", ffn_dim=128, word_embed_proj_dim=64),
    _decoder("bloom", "BloomForCausalLM"),
    _decoder("falcon", "FalconForCausalLM"),
    _decoder("mpt", "MptForCausalLM"),
    _decoder("codegen", "CodeGenForCausalLM", rotary_dim=8),
    _decoder("gpt_bigcode", "GPTBigCodeForCausalLM"),
    _decoder("starcoder2", "Starcoder2ForCausalLM", **GROUPED),
    _decoder("stablelm", "StableLmForCausalLM", **GROUPED),
    _decoder("olmo2", "Olmo2ForCausalLM", **GROUPED),
    _decoder("cohere", "CohereForCausalLM", **GROUPED),
    _decoder("cohere2", "Cohere2ForCausalLM", **GROUPED, **ONE_OF_EACH),
    _decoder("granite", "GraniteForCausalLM", **GROUPED),
    _decoder("smollm3", "SmolLM3ForCausalLM", **GROUPED),
    _decoder("glm4", "Glm4ForCausalLM", **GROUPED, head_dim=16),
    _decoder("nemotron", "NemotronForCausalLM", **GROUPED),
    _decoder("exaone4", "Exaone4ForCausalLM", **GROUPED, **ONE_OF_EACH),
    _decoder("persimmon", "PersimmonForCausalLM"),
    _decoder("biogpt", "BioGptForCausalLM"),
    _decoder("xglm", "XGLMForCausalLM", ffn_dim=128),
    _experts("mixtral", "MixtralForCausalLM"),
    _experts("granitemoe", "GraniteMoeForCausalLM"),
    _experts("qwen3_moe", "Qwen3MoeForCausalLM", moe_intermediate_size=32, head_dim=16),
    _experts("gpt_oss", "GptOssForCausalLM", **ONE_OF_EACH, head_dim=16),
    _experts("olmoe", "OlmoeForCausalLM"),
    _experts("phimoe", "PhimoeForCausalLM"),
    _experts("deepseek_v2", "DeepseekV2ForCausalLM", **LOW_RANK),
    _experts("deepseek_v3", "DeepseekV3ForCausalLM", **LOW_RANK),
    _hybrid("jamba", "JambaForCausalLM", **EXPERTS, attn_layer_period=2, attn_layer_offset=1),
    _hybrid("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
    _hybrid("qwen3_next", "Qwen3NextForCausalLM", **EXPERTS, **LINEAR),
    _hybrid("minimax", "MiniMaxForCausalLM", **EXPERTS, **LINEAR, block_size=16),
    _hybrid("falcon_h1", "FalconH1ForCausalLM", **STATE_SPACE, mamba_d_ssm=64, mamba_n_heads=4),
    _hybrid(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        **EXPERTS,
        **STATE_SPACE,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=32,
        mamba_n_heads=8,
    ),
    _hybrid(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        head_dim=16,
        lru_width=64,
        attention_window_size=16,
        block_types=["recurrent", "attention"],
    ),
    _encoder("bert", "BertModel"),
    _encoder("roberta", "RobertaModel"),
    _encoder("xlm_roberta", "XLMRobertaModel"),
    _encoder("distilbert", "DistilBertModel", hidden_dim=128),
    _encoder("electra", "ElectraModel", embedding_size=64),
    _encoder("albert", "AlbertModel", embedding_size=64),
    _encoder("mpnet", "MPNetModel"),
    _encoder("deberta", "DebertaModel", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder("deberta_v2", "DebertaV2Model", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder("modernbert", "ModernBertModel", local_attention=8, global_attn_every_n_layers=2),
    _encoder("squeezebert", "SqueezeBertModel", embedding_size=64),
    _encoder("convbert", "ConvBertModel", embedding_size=64),
    Architecture("xlnet", "encoders", "XLNetModel", "text", XLNET),
    Architecture("funnel", "encoders", "FunnelModel", "text", FUNNEL),
    _relative("t5", "T5ForConditionalGeneration"),
    _relative("umt5", "UMT5ForConditionalGeneration"),
    _both("bart", "BartForConditionalGeneration", **BOTH_SIDES),
    _both("mbart", "MBartForConditionalGeneration", **BOTH_SIDES),
    _both("pegasus", "PegasusForConditionalGeneration", **BOTH_SIDES),
    _both("blenderbot", "BlenderbotForConditionalGeneration", **BOTH_SIDES),
    _both("m2m_100", "M2M100ForConditionalGeneration", **BOTH_SIDES),
    _both("marian", "MarianMTModel", **BOTH_SIDES),
    _vision("vit", "ViTModel", **IMAGE),
    _vision("deit", "DeiTModel", **IMAGE),
    _vision("beit", "BeitModel", **IMAGE, use_relative_position_bias=True),
    _vision("dinov2", "Dinov2Model", **IMAGE),
    _vision("dinov3_vit", "DINOv3ViTModel", **IMAGE),
    _vision("swin", "SwinModel", **WINDOWED),
    _vision("swinv2", "Swinv2Model", **WINDOWED),
    _vision("segformer", "SegformerModel", **PYRAMID),
    _vision(
        "yolos",
        "YolosModel",
        **{**IMAGE, "image_size": [IMAGE_SIZE, IMAGE_SIZE]},
        num_detection_tokens=10,
    ),
    _vision("detr", "DetrModel", **BOTH_SIDES, **DETECTION),
    _pair("clip", "CLIP"),
    _pair("siglip", "Siglip"),
    _speech("wav2vec2", "Wav2Vec2Model"),
    _speech("hubert", "HubertModel"),
    _speech("wavlm", "WavLMModel"),
    Architecture("whisper", "audio", "WhisperForConditionalGeneration", "speech to text", WHISPER),
    _multimodal(
        "llava",
        "LlavaForConditionalGeneration",
        "tokens with image",
        text_config=_tower("llama"),
        vision_config=_eye("clip_vision_model"),
        image_token_index=IMAGE_TOKEN,
    ),
    _multimodal(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "tokens with image",
        text_config=_tower("gemma"),
        vision_config=_eye("siglip_vision_model") | {"vision_use_head": False},
        image_token_index=IMAGE_TOKEN,
        projection_dim=64,
    ),
    _multimodal(
        "qwen2_vl_text",
        "Qwen2VLForConditionalGeneration",
        "tokens",
        text_config=_tower("qwen2_vl_text") | MULTI_AXIS_ROPE,
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4},
    ),
)
