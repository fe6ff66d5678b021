"""The frozen encoders around the Interactive Perception Network: vision tower, BLIP-2's Q-Former, CLIP's text encoder.

Shapes: `N` images, `P` patches, `Q` queries, `d_p` width of the pooled output, `d_v` width of the patch tokens, `d_q`
width of the Q-Former, `d_t` width of the text encoder, `R` requests, `n` soft tokens.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_MAPPING,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested

from .configuration_lmeye import LMEyeConfig
from .open_clip_towers import OpenCLIPTextConfig, OpenCLIPTextEncoder, OpenCLIPVisionConfig
from .soft_tokens import SoftTokenReadingMixin, causal_attention_weights


logger = logging.get_logger(__name__)


@dataclass
class ImageFeatures:
    """What the frozen encoders say of `N` images, computed once and used by both kinds of perception.

    Args:
        pooled (`torch.Tensor` of shape `[N, d_p]`): global image features, CLIP's projected but not normalised.
        patches (`torch.Tensor` of shape `[N, P, d_v]`, *optional*): patch tokens, where the configuration uses them.
        queries (`torch.Tensor` of shape `[N, Q, d_q]`, *optional*): the Q-Former's outputs, where there is one.
        patch_mask (bool `[N, P]`, *optional*): `False` at patches that are padding; `None` where none are.
        spatial_shapes (int `[N, 2]`, *optional*): rows and columns of each image's patches; `None` where they form a
            square.
    """

    pooled: torch.Tensor
    patches: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    patch_mask: torch.Tensor | None = None
    spatial_shapes: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, index) -> "ImageFeatures":
        return self._map(lambda tensor: tensor[index])

    def to(self, *args, **kwargs) -> "ImageFeatures":
        """Moves or casts the features as `torch.Tensor.to` does; masks and shapes are moved, not cast."""
        device = self.pooled[:0].to(*args, **kwargs).device
        return self._map(
            lambda tensor: tensor.to(*args, **kwargs) if tensor.is_floating_point() else tensor.to(device)
        )

    def pin_memory(self) -> "ImageFeatures":
        """The features in page-locked memory, for data loaders."""
        return self._map(lambda tensor: tensor.pin_memory())

    @staticmethod
    def join(parts: Sequence["ImageFeatures"]) -> "ImageFeatures":
        """The images of all parts, in their order, as one; where numbers of patches differ the shorter are padded."""
        joined: dict[str, torch.Tensor] = {}
        counts = [0 if part.patches is None else part.patches.shape[1] for part in parts]
        padded = any(part.patch_mask is not None for part in parts) or len(set(counts)) > 1
        for name in (field.name for field in fields(ImageFeatures)):
            tensors = [getattr(part, name) for part in parts]
            if name == "patch_mask" and padded:
                tensors = [
                    part.patches.new_ones(part.patches.shape[:2], dtype=torch.bool) if mask is None else mask
                    for part, mask in zip(parts, tensors, strict=True)
                ]
            if any(tensor is None for tensor in tensors):
                continue
            if name in ("patches", "patch_mask"):
                missing = [max(counts) - count for count in counts]
                sides = (0, 0) if name == "patches" else ()
                tensors = [
                    torch.nn.functional.pad(tensor, (*sides, 0, more))
                    for tensor, more in zip(tensors, missing, strict=True)
                ]
            joined[name] = torch.cat(tensors)
        return ImageFeatures(**joined)

    def _map(self, function) -> "ImageFeatures":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return ImageFeatures(**{name: None if t is None else function(t) for name, t in tensors.items()})


def patch_grid(num_patches: int) -> tuple[int, int]:
    """Rows and columns of a patch sequence: the square where there is one, else a single row."""
    side = math.isqrt(num_patches)
    return (side, side) if side * side == num_patches else (1, num_patches)


# --- vision towers -------------------------------------------------------------------------------------------------


def vision_tower_class(vision_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """
    The class of the vision tower that `vision_config` describes.

    Raises:
        ValueError: there is none: the configuration is of no vision model of transformers.
    """
    if isinstance(vision_config, CLIPVisionConfig):
        return CLIPVisionModelWithProjection
    found = MODEL_MAPPING.get(type(vision_config), None)
    if found is None:  # vision parts of larger models are in no mapping, BLIP-2's among them
        found = getattr(transformers, type(vision_config).__name__.removesuffix("Config") + "Model", None)
    if isinstance(found, (list, tuple)):
        found = found[0]
    if found is None or found.main_input_name != "pixel_values":
        raise ValueError(
            f'A model of type "{vision_config.model_type}" is no vision tower: choose one that reads `pixel_values` '
            "and returns patch tokens and a pooled output, such as CLIP, SigLIP, DINOv2, ViT or BLIP-2."
        )
    return found


def build_vision_tower(config: LMEyeConfig) -> PreTrainedModel:
    """The vision tower of an LMEye configuration, with random weights."""
    return vision_tower_class(config.vision_config)._from_config(config.vision_config)


def vision_widths(vision_config: PreTrainedConfig, layer: int = -1) -> tuple[int, int]:
    """
    Width of a vision tower's pooled output and of its patch tokens.

    Args:
        vision_config (`PreTrainedConfig`): the tower's.
        layer (`int`): index into its `hidden_states`; matters to towers whose stages have widths of their own.
    """
    # By type name: published code may bring the configuration's class a second time.
    from_open_clip = vision_config.model_type == OpenCLIPVisionConfig.model_type
    stages = getattr(vision_config, "hidden_sizes", None) or [getattr(vision_config, "hidden_size", None)]
    # In transformers, the hidden states of the stages stand behind those of the embeddings.
    index = layer if layer < 0 or from_open_clip else max(layer - 1, 0)
    patch_width = stages[index] if -len(stages) <= index < len(stages) else stages[-1]
    if from_open_clip or isinstance(vision_config, CLIPVisionConfig):
        return vision_config.projection_dim, patch_width
    return getattr(vision_config, "pooler_output_size", None) or stages[-1], patch_width


def uses_patches(config: LMEyeConfig) -> bool:
    """Whether a model of this configuration reads patch tokens."""
    in_interaction = config.interaction != "none" and config.fine_grained_source == "patch"
    return in_interaction or config.visual_mapping in ("patch", "resampler")


def check_vision_tower(config: LMEyeConfig) -> None:
    """
    Reads one picture of the tower's own size on the meta device, before any weights are loaded.

    A tower that takes more than pixel values, or cannot run there, is left to its first picture.

    Raises:
        ValueError: the tower lacks a pooled output or the patch tokens that the configuration uses.
    """
    vision_config, size = config.vision_config, getattr(config.vision_config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    with torch.device("meta"), torch.no_grad():
        tower = vision_tower_class(vision_config)._from_config(vision_config).eval()
        pixel_values = torch.zeros(1, getattr(vision_config, "num_channels", 3), height, width)
        if _required_inputs(tower):
            return
        try:
            read_images(tower, None, pixel_values, config.vision_feature_layer, uses_patches(config))
        except (NotImplementedError, RuntimeError) as error:
            logger.debug(f"{type(tower).__name__} was not checked before loading: {error}")


def read_images(
    tower: PreTrainedModel,
    qformer: "QFormer | None",
    pixel_values: torch.Tensor,
    layer: int,
    needs_patches: bool,
    **vision_inputs: torch.Tensor | None,
) -> ImageFeatures:
    """
    Runs a vision tower and, where there is one, the Q-Former behind it.

    Args:
        tower (`PreTrainedModel`): takes `pixel_values`, returns `image_embeds` or `pooler_output` besides
            `last_hidden_state` and `hidden_states`.
        qformer ([`QFormer`], *optional*).
        pixel_values (`[N, channels, height, width]`, or `[N, P, channels * patch height * patch width]` from image
            processors that cut patches themselves).
        layer (`int`): index into the tower's `hidden_states` that patch tokens are taken from.
        needs_patches (`bool`): whether to return patch tokens.
        vision_inputs: whatever else the tower's image processor returned (SigLIP2's `pixel_attention_mask` `[N, P]`
            and `spatial_shapes` `[N, 2]`).

    Raises:
        ValueError: the tower lacks an input, a pooled output or patch tokens, or has them in other sizes than its
            configuration says.
    """
    name = type(tower).__name__
    given = {key: value.to(tower.device) for key, value in vision_inputs.items() if value is not None}
    _check_vision_inputs(tower, given)
    outputs = tower(pixel_values.to(tower.device, tower.dtype), output_hidden_states=needs_patches, **given)
    pooled = getattr(outputs, "image_embeds", None)
    if pooled is None:
        pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        raise ValueError(
            f"{name} returns no pooled output (neither image_embeds nor pooler_output), which the static mapping "
            "needs: choose a checkpoint with its pooling layer, or another vision tower."
        )
    features = ImageFeatures(pooled.flatten(1))
    pooled_width, patch_width = vision_widths(tower.config, layer)
    if features.pooled.shape[-1] != pooled_width:
        raise ValueError(
            f"{name} returns a pooled output of width {features.pooled.shape[-1]}, its configuration says "
            f"{pooled_width}: this kind of vision tower cannot be used."
        )
    if qformer is not None:
        features.queries = qformer(outputs.last_hidden_state)
    if needs_patches:
        states = _states_of_layer(outputs, layer, name)
        patch_size = getattr(tower.config, "patch_size", None)
        features.patches, grid = _patch_tokens(states, pixel_values, patch_size, name)
        if features.patches.shape[-1] != patch_width:
            raise ValueError(
                f"{name} returns patch tokens of width {features.patches.shape[-1]} at vision_feature_layer={layer}, "
                f"its configuration says {patch_width}: choose another layer, or another vision tower."
            )
        features.patch_mask, features.spatial_shapes = _mask_and_shapes(given, grid, features.patches)
    return features


def _required_inputs(tower: PreTrainedModel) -> set[str]:
    """What a tower cannot do without, besides pixel values."""
    parameters = inspect.signature(tower.forward).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return required - {"pixel_values"}


def _check_vision_inputs(tower: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
    missing = _required_inputs(tower) - given.keys()
    unknown = given.keys() - inspect.signature(tower.forward).parameters.keys()
    if missing:
        raise ValueError(
            f"{type(tower).__name__} also needs {', '.join(sorted(missing))}: pass everything that the processor "
            "returned, not `pixel_values` alone."
        )
    if unknown:
        raise ValueError(
            f"{type(tower).__name__} takes no {', '.join(sorted(unknown))}: the image processor belongs to another "
            "vision tower. Build the processor from the same vision model."
        )


def _states_of_layer(outputs: Any, layer: int, name: str) -> torch.Tensor:
    states = getattr(outputs, "hidden_states", None)
    if states is None and layer == -1:
        states = (outputs.last_hidden_state,)
    if states is None:
        raise ValueError(
            f"{name} returns patch tokens of its last layer alone, not of layer {layer}: set vision_feature_layer=-1."
        )
    if not -len(states) <= layer < len(states):
        raise ValueError(
            f"vision_feature_layer={layer} is out of range: {name} returns {len(states)} hidden states, "
            f"{-len(states)} to {len(states) - 1}."
        )
    return states[layer]


def _patch_tokens(
    states: torch.Tensor, pixel_values: torch.Tensor, patch_size: int | list[int] | tuple[int, ...] | None, name: str
) -> tuple[torch.Tensor, tuple[int, int] | None]:
    """
    The patch tokens among a layer's states, and rows and columns they form (`None` where images differ in these).

    Tokens before the patches (class, registers, distillation) are as many as the sequence is longer than the patches
    are many. Towers that merge 2 x 2 patches from stage to stage have fewer.
    """
    if states.dim() == 4:  # a feature map [N, d_v, rows, columns]
        return states.flatten(2).transpose(1, 2), (states.shape[2], states.shape[3])
    if pixel_values.dim() == 3:  # the image processor has cut the patches
        return states[:, states.shape[1] - pixel_values.shape[1] :], None
    if patch_size is None or pixel_values.dim() != 4:
        raise ValueError(
            f"{name} does not say how its hidden states {list(states.shape)} lie on pixel values "
            f"{list(pixel_values.shape)} (no patch_size in its configuration), so it has no patch tokens: use "
            'visual_mapping="linear" with fine_grained_source="global", or another vision tower.'
        )
    sizes = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size[-2:]
    rows, columns = (length // size for length, size in zip(pixel_values.shape[-2:], sizes, strict=True))
    while rows * columns > states.shape[1] and rows % 2 == columns % 2 == 0:
        rows, columns = rows // 2, columns // 2
    if rows * columns > states.shape[1]:
        raise ValueError(
            f"{name} returns {states.shape[1]} tokens for {rows} x {columns} patches, so it has no patch tokens: use "
            'visual_mapping="linear" with fine_grained_source="global", or another vision tower.'
        )
    return states[:, states.shape[1] - rows * columns :], (rows, columns)


def _mask_and_shapes(
    given: dict[str, torch.Tensor], grid: tuple[int, int] | None, patches: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if grid is None:
        mask, shapes = given.get("pixel_attention_mask"), given.get("spatial_shapes")
        return None if mask is None else mask.bool(), None if shapes is None else shapes.long()
    if grid == patch_grid(patches.shape[1]):
        return None, None
    return None, torch.tensor(grid, device=patches.device).expand(patches.shape[0], 2)


def _without_flash(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a part that stays in float32, which flash attention does not take: sdpa stands in."""
    if is_flash_attention_requested(config):
        config._attn_implementation = "sdpa"
    return config


# --- Q-Former ------------------------------------------------------------------------------------------------------


class QFormer(PreTrainedModel):
    """
    BLIP-2's Querying Transformer with its learned queries. It stays in float32, as in BLIP-2.

    Args:
        config (`Blip2QFormerConfig`): its sizes.
        num_query_tokens (`int`): its outputs per image.
    """

    config: Blip2QFormerConfig
    base_model_prefix = ""
    main_input_name = "last_hidden_state"
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ("query_tokens", "qformer")

    def __init__(self, config: Blip2QFormerConfig, num_query_tokens: int = 32):
        super().__init__(_without_flash(config))
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QFormer):
            init.normal_(module.query_tokens, std=self.config.initializer_range)

    def forward(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """Reads a vision tower's last hidden states `[N, 1 + P, d_v]`: `[N, Q, d_q]`, float32."""
        outputs = self.qformer(
            query_embeds=self.query_tokens.expand(last_hidden_state.shape[0], -1, -1),
            encoder_hidden_states=last_hidden_state,
            encoder_attention_mask=last_hidden_state.new_ones(last_hidden_state.shape[:-1], dtype=torch.long),
        )
        return outputs.last_hidden_state


# --- CLIP's text encoder -------------------------------------------------------------------------------------------


def clip_text_ends(config: CLIPTextConfig) -> tuple[int, int]:
    """Ids of CLIP's bos and eos.

    Configurations that say `eos_token_id=2` (all of OpenAI's) do not mean it: there, as `CLIPTextModel` knows too, eos
    is the highest id of the vocabulary and bos the one before.
    """
    if config.eos_token_id == 2 or config.eos_token_id >= config.vocab_size:
        return config.vocab_size - 2, config.vocab_size - 1
    return config.bos_token_id, config.eos_token_id


class CLIPTextEncoder(SoftTokenReadingMixin, CLIPTextModelWithProjection):
    """CLIP's text encoder, which can also read vectors in place of words. It stays in float32, as the IPN does."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__(_without_flash(config))

    def _embed_ends(self, positions: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor(clip_text_ends(self.config), device=positions.device)
        return self.text_model.embeddings(input_ids=ids[None], position_ids=positions[None])[0]

    def _read_states(
        self, states: torch.Tensor, output_attentions: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        text_model = self.text_model
        mask = create_causal_mask(
            config=text_model.config, inputs_embeds=states, attention_mask=None, past_key_values=None
        )
        attentions = []
        for layer in text_model.encoder.layers:
            if output_attentions:
                normed, attention = layer.layer_norm1(states), layer.self_attn
                queries, keys = (
                    project(normed).unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)
                    for project in (attention.q_proj, attention.k_proj)
                )
                attentions.append(causal_attention_weights(queries, keys))
            states = layer(states, mask, is_causal=True)
        projected = self.text_projection(text_model.final_layer_norm(states))
        return projected, tuple(attentions) if output_attentions else None


def build_text_encoder(config: LMEyeConfig) -> PreTrainedModel:
    """The text encoder of an LMEye configuration with `interaction="clip_text"`, with random weights."""
    from_open_clip = config.clip_text_config.model_type == OpenCLIPTextConfig.model_type
    encoder_class = OpenCLIPTextEncoder if from_open_clip else CLIPTextEncoder
    return encoder_class._from_config(config.clip_text_config)


__all__ = [
    "CLIPTextEncoder",
    "ImageFeatures",
    "QFormer",
    "build_text_encoder",
    "build_vision_tower",
    "check_vision_tower",
    "clip_text_ends",
    "patch_grid",
    "read_images",
    "uses_patches",
    "vision_tower_class",
    "vision_widths",
]
