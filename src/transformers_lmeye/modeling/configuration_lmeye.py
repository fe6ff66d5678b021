"""Configuration of LMEye (arXiv 2305.03701)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


AUTO_MAP = {
    "AutoConfig": "configuration_lmeye.LMEyeConfig",
    "AutoModel": "modeling_lmeye.LMEyeForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_lmeye.LMEyeForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_lmeye.LMEyeForConditionalGeneration",
    "AutoProcessor": "processing_lmeye.LMEyeProcessor",
}


@strict
class LMEyeConfig(PreTrainedConfig):
    """
    Configuration of [`LMEyeForConditionalGeneration`].

    Args:
        vision_config (`PreTrainedConfig` or `dict`): the CLIP vision tower.
        text_config (`PreTrainedConfig` or `dict`): the causal language model, any of `AutoModelForCausalLM`.
        clip_text_config (`PreTrainedConfig` or `dict`, *optional*): the frozen CLIP text encoder; only with
            `interaction="clip_text"`.
        interaction (`str`): what turns a request and the image into dynamic information.
            `"clip_text"`: the frozen CLIP text transformer reads image and request (paper, first revisions).
            `"cross_attention"`: request vectors attend to image features in a trained stack (RVII, last revision).
            `"none"`: only the static mapping (the paper's IPN*).
        visual_mapping (`str`): the static perception. `"linear"`: the global image feature mapped by one matrix.
            `"resampler"`: learned queries attend to the patches, whatever is asked.
        num_static_tokens (`int`): `<img>` slots per image.
        num_dynamic_tokens (`int`): `<img-d>` slots per request, *k* in the paper (5 for LLaMA and BLOOMZ, 1 for
            OPT-IML).
        fine_grained_source (`str`): what the interaction sees of an image: `"global"`, the projected image feature, or
            `"patch"`, the vision tower's patch tokens. Default: `"global"` for `clip_text`, else `"patch"`.
        vision_feature_layer (`int`): index into the vision tower's `hidden_states` that patch tokens are taken from.
        num_fine_grained_tokens (`int`): soft tokens per image in the CLIP text transformer (`clip_text`).
        fine_grained_dropout (`float`): dropout on these soft tokens while training.
        use_request (`bool`): `False` puts zeros in the request's place, the ablation that shows what it carries.
        interaction_hidden_size (`int`): width of the cross-attention stack.
        interaction_intermediate_size (`int`, *optional*): width of its feed-forward, 4 x `interaction_hidden_size`.
        interaction_num_layers (`int`): its blocks.
        interaction_num_heads (`int`): its attention heads.
        num_request_vectors (`int`, *optional*): vectors a request is split into, at least `num_dynamic_tokens` (the
            default); the last `num_dynamic_tokens` of the stack's outputs become dynamic tokens.
        slot_init_std (`float`): standard deviation that new slot vectors are initialised to; the factory sets it to
            that of the language model's input embeddings.
        image_token_id, request_token_id, dynamic_token_id (`int`, *optional*): ids of `<img>`, `<img-q>`, `<img-d>`.
            All lie outside the language model's embedding table, so that no slot can be generated.
        backbones (`dict`, *optional*): where the frozen parts come from: for `"vision"` and `"language"` a name or
            path, a revision and a fingerprint of the source files.
        includes_backbones (`bool`): whether the checkpoint holds the frozen parts, or the IPN alone.
    """

    model_type = "lmeye"
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "clip_text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model", optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    clip_text_config: dict | PreTrainedConfig | None = None
    interaction: Literal["clip_text", "cross_attention", "none"] = "clip_text"
    visual_mapping: Literal["linear", "resampler"] = "linear"
    num_static_tokens: int = 1
    num_dynamic_tokens: int = 5
    fine_grained_source: Literal["global", "patch"] | None = None
    vision_feature_layer: int = -2
    num_fine_grained_tokens: int = 5
    fine_grained_dropout: float = 0.5
    use_request: bool = True
    interaction_hidden_size: int = 768
    interaction_intermediate_size: int | None = None
    interaction_num_layers: int = 5
    interaction_num_heads: int = 12
    num_request_vectors: int | None = None
    slot_init_std: float = 0.02
    image_token_id: int | None = None
    request_token_id: int | None = None
    dynamic_token_id: int | None = None
    backbones: dict[str, Any] | None = None
    includes_backbones: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.interaction == "clip_text" and self.clip_text_config is None:
            self.clip_text_config = {}
        super().__post_init__(**kwargs)
        if self.fine_grained_source is None:
            self.fine_grained_source = "global" if self.interaction == "clip_text" else "patch"
        if self.interaction_intermediate_size is None:
            self.interaction_intermediate_size = 4 * self.interaction_hidden_size
        if self.num_request_vectors is None:
            self.num_request_vectors = self.num_dynamic_tokens
        first_slot = self.text_config.get_text_config().vocab_size
        for offset, name in enumerate(("image_token_id", "request_token_id", "dynamic_token_id")):
            if getattr(self, name) is None:
                setattr(self, name, first_slot + offset)
        # The head is tied inside the language model; the outer flag decides whether the library ties at all.
        self.tie_word_embeddings = bool(self.text_config.get_text_config().tie_word_embeddings)
        self.auto_map = dict(AUTO_MAP)

    def validate_architecture(self):
        """Checks the fields against each other.

        Raises:
            ValueError: the interaction cannot be built with these sizes; the message names the field.
        """
        if min(self.num_static_tokens, self.num_dynamic_tokens, self.num_fine_grained_tokens) < 1:
            raise ValueError("num_static_tokens, num_dynamic_tokens and num_fine_grained_tokens must be at least 1.")
        if self.num_request_vectors < self.num_dynamic_tokens:
            raise ValueError(
                f"num_request_vectors={self.num_request_vectors} is smaller than num_dynamic_tokens="
                f"{self.num_dynamic_tokens}: each dynamic token is read from a request vector of its own."
            )
        if self.interaction_hidden_size % 4:
            raise ValueError("interaction_hidden_size must be a multiple of 4 (two-dimensional sinusoids).")
        if self.interaction_hidden_size % self.interaction_num_heads:
            raise ValueError(
                f"interaction_hidden_size={self.interaction_hidden_size} is not a multiple of "
                f"interaction_num_heads={self.interaction_num_heads}."
            )
        if self.interaction == "clip_text" and self.fine_grained_source != "global":
            raise ValueError('interaction="clip_text" reads the global image feature: fine_grained_source="global".')


__all__ = ["AUTO_MAP", "LMEyeConfig"]
