"""The models of the paper (arXiv 2305.03701, tables 1 and 2) and of its authors' releases, at true width.

A preset holds the fields of [`LMEyeConfig`] that differ from its defaults: sizes of the frozen parts, and the variant.
Sizes alone: what a configuration of transformers leaves at its default (dropout, initialisation) is left out.
"""

import copy
from typing import Any


_CLIP_VIT_L_14_TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
# Variant 1: CLIP ViT-L/14 sees and interacts.
_CLIP_VIT_L_14 = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "clip_text_config": _CLIP_VIT_L_14_TEXT,
}
# Variant 2: BLIP-2's ViT-g/14 and Q-Former see, CLIP's text encoder interacts, without dropout. The request has a slot
# of its own, and its last outputs are read; encoder-decoders do so by themselves.
_BLIP_2 = {
    "vision_config": {
        "model_type": "blip_2_vision_model",
        "hidden_size": 1408,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
        "image_size": 224,
        "patch_size": 14,
    },
    "qformer_config": {
        "model_type": "blip_2_qformer",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "cross_attention_frequency": 2,
        "encoder_hidden_size": 1408,
    },
    "num_query_tokens": 32,
    "visual_mapping": "qformer",
    "clip_text_config": _CLIP_VIT_L_14_TEXT,
    "fine_grained_source": "qformer",
    "fine_grained_dropout": 0.0,
    "keep_request_token": True,
    "dynamic_readout": "last",
    "num_request_vectors": 5,
}
_LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
}

PRESETS: dict[str, dict[str, Any]] = {
    "opt-iml-1.3b": {
        **_CLIP_VIT_L_14,
        "text_config": {
            "model_type": "opt",
            "vocab_size": 50272,
            "hidden_size": 2048,
            "word_embed_proj_dim": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "ffn_dim": 8192,
        },
        "num_dynamic_tokens": 1,
    },
    "bloomz-7b1": {
        **_CLIP_VIT_L_14,
        "text_config": {
            "model_type": "bloom",
            "vocab_size": 250880,
            "hidden_size": 4096,
            "n_layer": 30,
            "n_head": 32,
            "pad_token_id": 3,
        },
    },
    "blip2-flan-t5-xl": {
        **_BLIP_2,
        "text_config": {
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": 2048,
            "d_kv": 64,
            "d_ff": 5120,
            "num_layers": 24,
            "num_heads": 32,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
    },
    "llama-7b": {**_CLIP_VIT_L_14, "text_config": _LLAMA_7B},
    "llama-13b": {
        **_CLIP_VIT_L_14,
        "text_config": {
            **_LLAMA_7B,
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "intermediate_size": 13824,
        },
    },
    "vicuna-7b": {**_CLIP_VIT_L_14, "text_config": _LLAMA_7B},
    "mpt-7b": {
        **_CLIP_VIT_L_14,
        "text_config": {
            "model_type": "mpt",
            "vocab_size": 50432,
            "d_model": 4096,
            "n_layers": 32,
            "n_heads": 32,
            "eos_token_id": 0,
            "use_cache": True,
        },
    },
    "chatglm2-6b": {
        **_BLIP_2,
        "text_config": {
            "model_type": "glm",
            "vocab_size": 65024,
            "hidden_size": 4096,
            "num_hidden_layers": 28,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "intermediate_size": 13696,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
    },
}

# What a preset says of its own interaction, which says nothing of another.
_OF_CLIP_TEXT = ("clip_text_config", "dynamic_readout", "fine_grained_source", "num_request_vectors")


def preset_fields(name: str, **overrides: Any) -> dict[str, Any]:
    """
    The fields of [`LMEyeConfig`] for a model of the paper.

    Args:
        name (`str`): one of `PRESETS`.
        overrides: fields to set otherwise. With another `interaction` (`"none"` is the paper's IPN*), the preset's
            settings of `clip_text` are left out.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f'There is no preset "{name}": choose one of {", ".join(sorted(PRESETS))}.')
    fields = copy.deepcopy(PRESETS[name])
    interaction = overrides.get("interaction", "clip_text")
    if interaction != "clip_text":
        dropped = (*_OF_CLIP_TEXT, "keep_request_token") if interaction == "none" else _OF_CLIP_TEXT
        fields = {field: value for field, value in fields.items() if field not in dropped}
    return {**fields, **overrides}


__all__ = ["PRESETS", "preset_fields"]
