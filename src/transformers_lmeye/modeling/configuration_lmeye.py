"""Configuration of LMEye (arXiv 2305.03701)."""

import copy
import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .open_clip_towers import OpenCLIPTextConfig, OpenCLIPVisionConfig  # noqa: F401 (registers their model types)
from .presets import preset_fields


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
        vision_config (`PreTrainedConfig` or `dict`): the vision tower: CLIP's, SigLIP's, BLIP-2's, open_clip's, or any
            vision model with patch tokens and a pooled output.
        text_config (`PreTrainedConfig` or `dict`): the language model, any of `AutoModelForCausalLM` or
            `AutoModelForSeq2SeqLM`.
        clip_text_config (`PreTrainedConfig` or `dict`, *optional*): the frozen CLIP text encoder; only with
            `interaction="clip_text"`.
        qformer_config (`PreTrainedConfig` or `dict`, *optional*): BLIP-2's frozen Q-Former, where `visual_mapping` or
            `fine_grained_source` is `"qformer"`.
        num_query_tokens (`int`): the Q-Former's outputs per image.
        interaction (`str`): what turns a request and the image into dynamic information.
            `"clip_text"`: the frozen CLIP text transformer reads image and request (paper, first revisions).
            `"cross_attention"`: request vectors attend to image features in a trained stack (RVII, last revision).
            `"none"`: only the static mapping (the paper's IPN*).
        visual_mapping (`str`): the static perception. `"linear"`: the global image feature mapped by one matrix.
            `"qformer"`: each output of BLIP-2's Q-Former mapped by one matrix. `"patch"`: each of the vision tower's
            patch tokens mapped by one matrix, as in LLaVA. `"resampler"`: learned queries attend to the patches,
            whatever is asked.
        num_static_tokens (`int`, *optional*): `<img>` slots per image; by default `num_query_tokens` with `"qformer"`,
            the number of patches with `"patch"`, else 1. With `"patch"`, fewer average the patches over that many
            equal areas (rows and columns as near to a square as they divide).
        num_dynamic_tokens (`int`): `<img-d>` slots per request, *k* in the paper (5 for LLaMA and BLOOMZ, 1 for
            OPT-IML).
        num_request_rounds (`int`): requests a question asks one after another, each seeing what the earlier ones
            brought; one round has `num_dynamic_tokens` slots.
        keep_request_token (`bool`, *optional*): whether the request has a slot of its own, `<img-q>`, that stays in
            the sequence, and dynamic tokens a learned vector of their own. Default: for encoder-decoders alone, which
            need it; a causal model drops the request token once its hidden state is known.
        fine_grained_source (`str`, *optional*): what the interaction sees of an image: `"global"`, the projected image
            feature, `"patch"`, the vision tower's patch tokens, or `"qformer"`, the Q-Former's outputs. Default:
            `"patch"` for `cross_attention`; for `clip_text` `"qformer"` in encoder-decoders that have one, else
            `"global"`.
        vision_feature_layer (`int`): index into the vision tower's `hidden_states` that patch tokens are taken from.
        num_fine_grained_tokens (`int`, *optional*): soft tokens per image in the CLIP text transformer (`clip_text`).
            Of the global feature one matrix makes that many (5 by default); patches and Q-Former outputs are
            average-pooled to that many, and taken as they are without it.
        fine_grained_dropout (`float`): dropout on these soft tokens while training.
        use_request (`bool`): `False` puts zeros in the request's place, the ablation that shows what it carries.
        num_request_vectors (`int`, *optional*): vectors a request is split into. Default: `num_dynamic_tokens`, or 1
            where `dynamic_readout` is `"eos"`.
        dynamic_readout (`str`, *optional*): where dynamic tokens are read from the CLIP text transformer. `"eos"`: all
            from its output at eos (default for causal models). `"last"`: one from each of its last
            `num_dynamic_tokens` outputs (default for encoder-decoders). The cross-attention stack is always read at
            its last vectors.
        interaction_hidden_size (`int`): width of the cross-attention stack.
        interaction_intermediate_size (`int`, *optional*): width of its feed-forward, 4 x `interaction_hidden_size`.
        interaction_num_layers (`int`): its blocks.
        interaction_num_heads (`int`): its attention heads.
        slot_init_std (`float`): standard deviation that new slot vectors are initialised to; the factory sets it to
            that of the language model's input embeddings.
        image_token_id, request_token_id, dynamic_token_id (`int`, *optional*): ids of `<img>`, `<img-q>`, `<img-d>`.
            All lie outside the language model's embedding table, so that no slot can be generated.
        backbones (`dict`, *optional*): where the frozen parts come from: for `"vision"`, `"language"` and, where it is
            not the vision model's own, `"clip_text"` a name or path, a revision and a fingerprint of the source files.
        includes_backbones (`bool`): whether the checkpoint holds the frozen parts, or the IPN alone.
    """

    model_type = "lmeye"
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "clip_text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model", optional=True),
        "qformer_config": SubConfigSpec(config_class=AutoConfig, model_type="blip_2_qformer", optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    clip_text_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    interaction: Literal["clip_text", "cross_attention", "none"] = "clip_text"
    visual_mapping: Literal["linear", "qformer", "patch", "resampler"] = "linear"
    num_static_tokens: int | None = None
    num_dynamic_tokens: int = 5
    num_request_rounds: int = 1
    keep_request_token: bool | None = None
    fine_grained_source: Literal["global", "patch", "qformer"] | None = None
    vision_feature_layer: int = -2
    num_fine_grained_tokens: int | None = None
    fine_grained_dropout: float | int = 0.5
    use_request: bool = True
    num_request_vectors: int | None = None
    dynamic_readout: Literal["eos", "last"] | None = None
    interaction_hidden_size: int = 768
    interaction_intermediate_size: int | None = None
    interaction_num_layers: int = 5
    interaction_num_heads: int = 12
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
        if self.qformer_config is None and "qformer" in (self.visual_mapping, self.fine_grained_source):
            self.qformer_config = {}
        # The library sets the attention implementation of every part anew, which a loaded model must not notice.
        for name in self.sub_configs_defaults:
            if isinstance(part := getattr(self, name), PreTrainedConfig):
                setattr(self, name, copy.deepcopy(part))
        super().__post_init__(**kwargs)
        language = self.text_config.get_text_config()
        self.is_encoder_decoder = bool(self.text_config.is_encoder_decoder)
        if self.keep_request_token is None:
            self.keep_request_token = self.is_encoder_decoder
        if self.num_static_tokens is None:
            by_default = {"qformer": self.num_query_tokens, "patch": self._num_patches()}
            self.num_static_tokens = by_default.get(self.visual_mapping, 1)
        if self.fine_grained_source is None:
            if self.interaction == "cross_attention":
                self.fine_grained_source = "patch"
            else:
                self.fine_grained_source = "qformer" if self.is_encoder_decoder and self.qformer_config else "global"
        soft_tokens_of_one = self.interaction == "clip_text" and self.fine_grained_source == "global"
        if self.num_fine_grained_tokens is None and soft_tokens_of_one:
            self.num_fine_grained_tokens = 5
        if self.dynamic_readout is None:
            at_eos = self.interaction == "clip_text" and not self.is_encoder_decoder
            self.dynamic_readout = "eos" if at_eos else "last"
        if self.num_request_vectors is None:
            self.num_request_vectors = 1 if self.dynamic_readout == "eos" else self.num_dynamic_tokens
        if self.interaction_intermediate_size is None:
            self.interaction_intermediate_size = 4 * self.interaction_hidden_size
        for offset, name in enumerate(("image_token_id", "request_token_id", "dynamic_token_id")):
            if getattr(self, name) is None:
                setattr(self, name, language.vocab_size + offset)
        # The head is tied inside the language model; the outer flag decides whether the library ties at all.
        self.tie_word_embeddings = bool(getattr(language, "tie_word_embeddings", False))
        self.pad_token_id = getattr(language, "pad_token_id", None)  # trainers pad generated ids with it
        self.auto_map = dict(AUTO_MAP)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "LMEyeConfig":
        """
        The configuration of a model of the paper or of the authors' releases, at true width.

        Args:
            name (`str`): `"opt-iml-1.3b"`, `"bloomz-7b1"`, `"blip2-flan-t5-xl"`, `"llama-7b"`, `"llama-13b"`,
                `"vicuna-7b"`, `"mpt-7b"` or `"chatglm2-6b"`; see `presets.py`.
            overrides: fields of [`LMEyeConfig`] to set otherwise, such as `interaction="none"` for the same model
                without interaction (the paper's IPN*).

        Raises:
            ValueError: there is no such preset; the message lists them.
        """
        return cls(**preset_fields(name, **overrides))

    def validate_architecture(self):
        """Checks the fields against each other.

        Raises:
            ValueError: the interaction cannot be built with these sizes; the message names the field.
        """
        if self.visual_mapping == "patch":
            self._check_static_patches()
        for name in ("num_static_tokens", "num_dynamic_tokens", "num_request_rounds", "num_request_vectors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.num_fine_grained_tokens is not None and self.num_fine_grained_tokens < 1:
            raise ValueError(f"num_fine_grained_tokens must be at least 1, not {self.num_fine_grained_tokens}.")
        if self.interaction == "cross_attention" and self.num_fine_grained_tokens is not None:
            raise ValueError(
                f'num_fine_grained_tokens={self.num_fine_grained_tokens} is for interaction="clip_text", whose text '
                "encoder has few positions: a cross-attention sees every feature. Leave it out."
            )
        if self.visual_mapping == "qformer" and self.num_static_tokens != self.num_query_tokens:
            raise ValueError(
                f'visual_mapping="qformer" maps each of the {self.num_query_tokens} outputs of the Q-Former to a '
                f"static token: leave num_static_tokens={self.num_static_tokens} out."
            )
        if self.is_encoder_decoder and not self.keep_request_token and self.interaction != "none":
            raise ValueError(
                "An encoder-decoder reads its request at `<img-q>`, which stays in the sequence: leave "
                "keep_request_token=False out."
            )
        if self.interaction == "clip_text":
            self._check_text_positions()
            # The last outputs are those of the request vectors and of eos.
            if self.dynamic_readout == "last" and self.num_request_vectors + 1 < self.num_dynamic_tokens:
                raise ValueError(
                    f"num_request_vectors={self.num_request_vectors} is too small for num_dynamic_tokens="
                    f"{self.num_dynamic_tokens}: dynamic tokens are read at the request vectors and at eos."
                )
        elif self.interaction == "cross_attention" and self.dynamic_readout == "eos":
            raise ValueError('dynamic_readout="eos" is for interaction="clip_text": a stack of blocks has no eos.')
        elif self.interaction == "cross_attention" and self.num_request_vectors < self.num_dynamic_tokens:
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

    def _num_patches(self) -> int | None:
        """Patch tokens of a picture of the vision tower's own size, `None` where its configuration does not say."""
        image_size, patch_size = (getattr(self.vision_config, name, None) for name in ("image_size", "patch_size"))
        if not (isinstance(image_size, int) and isinstance(patch_size, int)):
            return None
        return (image_size // patch_size) ** 2

    def _check_static_patches(self):
        """Refuses a static mapping of more patches than there are, or of an unknown number."""
        if self.num_static_tokens is None:
            raise ValueError(
                f'visual_mapping="patch" maps each patch to a static token, and a vision tower of type '
                f'"{self.vision_config.model_type}" does not say how many it has: give num_static_tokens.'
            )
        num_patches = self._num_patches()
        if num_patches is not None and self.num_static_tokens > num_patches:
            raise ValueError(
                f"num_static_tokens={self.num_static_tokens} is more than the {num_patches} patches that "
                'visual_mapping="patch" maps: leave it out for all of them, or give fewer, which average them.'
            )

    def _check_text_positions(self):
        """Refuses more soft tokens per image than the CLIP text encoder has positions for."""
        num_tokens = self.num_fine_grained_tokens
        if num_tokens is None and self.fine_grained_source == "qformer":
            num_tokens = self.num_query_tokens
        elif num_tokens is None:
            num_tokens = self._num_patches()
            if num_tokens is None:
                return
        needed, available = num_tokens + self.num_request_vectors + 2, self.clip_text_config.max_position_embeddings
        if needed > available:
            side = math.isqrt(max(available - self.num_request_vectors - 2, 1))
            raise ValueError(
                f'fine_grained_source="{self.fine_grained_source}" gives {num_tokens} soft tokens per image; with '
                f"bos, eos and {self.num_request_vectors} request vectors they need {needed} positions of the CLIP "
                f"text encoder, which has {available}: pool them, for instance with "
                f'num_fine_grained_tokens={side * side}, or choose interaction="cross_attention".'
            )


__all__ = ["AUTO_MAP", "LMEyeConfig"]
