"""Tiny random language models of every type that transformers has, by rules on the meaning of configuration fields.

A model keeps one layer of each kind its family mixes (sliding and full attention, recurrent, dense, experts), and its
weights are drawn so that activations are of order one and generated words vary.
"""

import math
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CLIPTextConfig,
    CLIPVisionConfig,
    EncoderDecoderConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)


MODEL_TYPES = {
    "causal": list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": list(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
TABLE_ROWS = 99
WORDS = range(4, 80)  # ids before them are the tokenizer's own, ids behind them mark images and sounds

# What a field means -> its small value. Widths agree with each other: 4 heads of 16 make 64.
_WIDTH, _HEADS, _HEAD_WIDTH, _FEED_FORWARD, _LAYERS = 64, 4, 16, 96, 2
_SMALL: dict[str, int] = {
    **dict.fromkeys(
        "hidden_size n_embd d_model emb_dim embedding_dim embedding_size input_embedding_size word_embed_proj_dim "
        "output_embedding_size lru_width linear_hidden_size".split(),
        _WIDTH,
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads attention_heads num_heads encoder_attention_heads num_kv_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
        "linear_num_heads linear_num_value_heads index_n_heads num_query_groups".split(),
        _HEADS,
    ),
    **dict.fromkeys(
        "head_dim attention_head_size swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim "
        "v_head_dim qk_nope_head_dim index_head_dim kv_channels dim_head d_head global_head_dim".split(),
        _HEAD_WIDTH,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim feed_forward_size dff dim_ff "
        "n_inner d_inner d_ff intermediate_size_mlp dense_intermediate_size".split(),
        _FEED_FORWARD,
    ),
    **dict.fromkeys(
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "moe_shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size".split(),
        32,
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers".split(),
        _LAYERS,
    ),
    **dict.fromkeys(
        "num_experts n_routed_experts num_local_experts moe_num_experts num_moe_experts zero_expert_num".split(), 4
    ),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts".split(), 2),
    **dict.fromkeys("n_shared_experts num_shared_experts moe_num_shared_experts".split(), 1),
    **dict.fromkeys("n_group topk_group num_expert_group".split(), 1),
    **dict.fromkeys("first_k_dense_replace num_dense_layers moe_layer_start_index".split(), 1),
    **dict.fromkeys("q_lora_rank kv_lora_rank o_lora_rank".split(), 24),
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    **dict.fromkeys(
        "sliding_window sliding_window_size attention_window_size window_size local_attention keep_window_size "
        "attention_chunk_size".split(),
        8,
    ),
    **dict.fromkeys(
        "max_position_embeddings n_positions max_seq_len n_ctx context_length max_target_positions "
        "max_source_positions model_max_length".split(),
        256,
    ),
    "vocab_size": TABLE_ROWS,
    "decoder_vocab_size": TABLE_ROWS,
    "vocab_size_per_layer_input": TABLE_ROWS,
    "unpadded_vocab_size": TABLE_ROWS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    # Recurrent layers.
    **dict.fromkeys("state_size ssm_state_size mamba_d_state".split(), 8),
    **dict.fromkeys("mamba_chunk_size chunk_size".split(), 8),
    **dict.fromkeys("mamba_n_heads mamba_num_heads n_mamba_heads".split(), 8),
    **dict.fromkeys("mamba_d_head mamba_head_dim mamba_headdim".split(), 16),
    **dict.fromkeys("mamba_dt_rank time_step_rank".split(), 4),
    "n_groups": 1,
}
# Fields that rules on one name cannot settle: parts that must fit each other, or that a configuration leaves unset.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {
        "head_dim": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    **{
        f"{family}_assistant": {
            "text_config": {
                "model_type": f"{family}_text",
                "hidden_size": _WIDTH,
                "intermediate_size": _FEED_FORWARD,
                "num_hidden_layers": 2,
                "num_kv_shared_layers": 2,
                "num_attention_heads": _HEADS,
                "num_key_value_heads": 2,
                "head_dim": _HEAD_WIDTH,
                "vocab_size": TABLE_ROWS,
                "layer_types": ["sliding_attention", "full_attention"],
                **({"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0} if family == "gemma4" else {}),
            }
        }
        for family in ("gemma4", "gemma4_unified")
    },
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "nemotron3_diarization_audio": {"hidden_size": 512},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
    "dots3_note_audio_encoder": {"hidden_size": 64, "adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {"hidden_size": 64, "adapter_in_dim": 64, "adapter_out_dim": 64},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
}
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of a tiny model of `model_type`."""
    if model_type == "encoder-decoder":  # a pair of any two models
        encoder, decoder = _shrunk(CONFIG_MAPPING["bert"]), _shrunk(CONFIG_MAPPING["bert"])
        encoder.is_decoder = False
        return EncoderDecoderConfig.from_encoder_decoder_configs(
            encoder, decoder, decoder_start_token_id=1, pad_token_id=0
        )
    return _shrunk(CONFIG_MAPPING[model_type])


def _shrunk(config_class: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """A configuration of this class in which every size is small and every kind of layer is left."""
    overrides = {**_OVERRIDES.get(config_class.model_type, {}), **overrides}
    try:
        default = config_class()
    except StrictDataclassError:  # a type with no configuration of its own that would be valid
        default = config_class(**overrides)
    # Read past `getattr`, which refuses fields that differ from layer to layer.
    own = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    values: dict[str, Any] = {}
    markers = 0  # ids of images and sounds: the last of the vocabulary, which no text of ours uses
    for name, value in own.items():
        if isinstance(value, PreTrainedConfig):
            values[name] = _shrunk(type(value)).to_dict()
        elif name.endswith("token_id") and name in _SMALL:
            values[name] = _SMALL[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= TABLE_ROWS:
            markers += 1
            values[name] = TABLE_ROWS - markers
        elif isinstance(value, int) and not isinstance(value, bool) and value > _SMALL.get(name, value):
            values[name] = _SMALL[name]
    heads = own.get("num_attention_heads", own.get("n_head"))
    for name in ("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"):
        if isinstance(groups := own.get(name), int):
            values[name] = min(groups, _HEADS if groups == heads else 2)
    if "qk_rope_head_dim" in own:
        if own.get("head_dim") == own["qk_rope_head_dim"]:
            values["head_dim"] = _SMALL["qk_rope_head_dim"]
        if isinstance(own.get("qk_head_dim"), int):
            values["qk_head_dim"] = _HEAD_WIDTH + _SMALL["qk_rope_head_dim"]
    kinds = {
        name: list(dict.fromkeys(getattr(default, name)))
        for name in _KINDS
        if isinstance(getattr(default, name, None), (list, tuple))
    }
    given = {name: members for name, members in kinds.items() if name in own}
    if "has_decoder" not in own and hasattr(default, "is_decoder") and not default.is_encoder_decoder:
        values["is_decoder"] = True
    fewest = max([_LAYERS, *map(len, given.values()), *(len(overrides.get(name, ())) for name in _KINDS)])
    for name, members in given.items():
        values[name] = [members[index % len(members)] for index in range(fewest)]
    # Where the configuration places its kinds of layer itself, there are as many layers as it takes to have them all.
    for count in range(fewest, 16):
        if kinds:
            values["num_hidden_layers"] = count
        config = config_class(**{**values, **overrides})
        if all(set(getattr(config, name)) >= set(members) for name, members in kinds.items() if name not in given):
            break
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    return config


def randomise(model: torch.nn.Module, seed: int = 0, gain: float = 1.2, table: float = 0.5) -> None:
    """Draws all parameters: matrices at `gain` / sqrt(fan-in), embeddings at `table`, vectors near their start."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            elif id(parameter) in tables:
                parameter.copy_(table * noise)
            else:
                fan_in = parameter[0].numel() if id(parameter) in kernels else parameter.shape[-1]
                # Attention of T5's kind does not divide by its heads' width: there queries are drawn smaller.
                scale = gain / math.sqrt(fan_in * (_HEAD_WIDTH if name.endswith(".q.weight") else 1))
                parameter.copy_(scale * noise)


def tiny_language_model(model_type: str, kind: str = "causal", seed: int = 0) -> PreTrainedModel:
    """A tiny random model of `model_type`, on the CPU in float32 and in eval mode."""
    auto_class = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(tiny_config(model_type), attn_implementation="eager")
    randomise(model, seed)
    return model.eval()


def tiny_clip_configs() -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    """A tiny CLIP: vision tower (pictures of 32 x 32, 16 patches) and text encoder."""
    common = {"intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 24}
    vision = CLIPVisionConfig(hidden_size=32, image_size=32, patch_size=8, **common)
    text = CLIPTextConfig(
        hidden_size=40, vocab_size=60, max_position_embeddings=24, bos_token_id=58, eos_token_id=59, **common
    )
    return vision, text
