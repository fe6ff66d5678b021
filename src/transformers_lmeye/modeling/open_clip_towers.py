"""open_clip models as vision tower, and as text encoder of the `clip_text` interaction.

A model is named as open_clip names it:

- `open_clip:ViT-B-32/laion2b_s34b_b79k`: an architecture and a pretrained tag;
- `open_clip:ViT-B-32//path/to/weights.pt`: an architecture and a weight file (split at the first slash);
- `hf-hub:org/name`: a hub repository in open_clip's format;
- a folder with `open_clip_config.json` and weights; where a checkpoint of transformers lies beside them, that one is
  meant, and `local-dir:path` names open_clip's.

Shapes: `N` images, `P` patches, `d_p` the projection's width, `d_v` width of the vision tower, `d_t` width of the text
encoder, `R` requests, `n` soft tokens.
"""

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPVisionModelOutput
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .soft_tokens import SoftTokenReadingMixin, causal_attention_weights


OPEN_CLIP_CONFIG = "open_clip_config.json"
# open_clip's own order of preference; other files are taken where they are the only one.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Words of CLIP's own tokenizer; bos and eos are its last two.
CLIP_VOCABULARY = 49408
TEXT_REMEDY = 'Name a CLIP as clip_text_model_name_or_path, or choose interaction="cross_attention".'


# --- configurations ------------------------------------------------------------------------------------------------


@strict
class OpenCLIPVisionConfig(PreTrainedConfig):
    """
    Configuration of [`OpenCLIPVisionTower`]: enough to rebuild the tower without its source.

    Args:
        vision_cfg (`dict`): open_clip's own description of the tower; ViT-B-32's by default.
        quick_gelu (`bool`): whether it was trained with the sigmoid approximation of GELU.
        projection_dim (`int`): d_p.
        image_size (`int` or `list`): height and width of its images; one number for squares.
        patch_size (`int` or `list`, *optional*): of a patch token; `None` for towers that return feature maps.
        hidden_size (`int`): d_v, the width of its last patch tokens.
        hidden_sizes (`list`, *optional*): the width of each entry of `hidden_states`, for towers in which they differ.
    """

    model_type = "open_clip_vision_model"

    vision_cfg: dict[str, Any] | None = None
    quick_gelu: bool = False
    projection_dim: int = 512
    image_size: int | list[int] | tuple[int, ...] | None = None
    patch_size: int | list[int] | tuple[int, ...] | None = None
    hidden_size: int | None = None
    hidden_sizes: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.vision_cfg is None:
            self.vision_cfg = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
        is_plain_vit = "timm_model_name" not in self.vision_cfg and isinstance(self.vision_cfg.get("layers", 12), int)
        if self.image_size is None:
            self.image_size = self.vision_cfg.get("image_size", 224)
        if self.hidden_size is None:
            self.hidden_size = self.vision_cfg.get("width", 768)
        if self.patch_size is None and is_plain_vit:
            self.patch_size = self.vision_cfg.get("patch_size", 16)


@strict
class OpenCLIPTextConfig(PreTrainedConfig):
    """
    Configuration of [`OpenCLIPTextEncoder`].

    Args:
        text_cfg (`dict`): open_clip's own description of the text tower; ViT-B-32's by default.
        quick_gelu (`bool`): whether it was trained with the sigmoid approximation of GELU.
        projection_dim (`int`): d_p.
        hidden_size (`int`): d_t.
        num_hidden_layers, num_attention_heads (`int`): its blocks and their heads.
        max_position_embeddings, vocab_size (`int`): its positions and words.
        bos_token_id, eos_token_id (`int`): the tokens a text starts and ends with.
    """

    model_type = "open_clip_text_model"

    text_cfg: dict[str, Any] | None = None
    quick_gelu: bool = False
    projection_dim: int = 512
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    max_position_embeddings: int | None = None
    vocab_size: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.text_cfg is None:
            self.text_cfg = {"context_length": 77, "width": 512, "heads": 8, "layers": 12}
        for name, key, default in (
            ("hidden_size", "width", 512),
            ("num_hidden_layers", "layers", 12),
            ("num_attention_heads", "heads", 8),
            ("max_position_embeddings", "context_length", 77),
            ("vocab_size", "vocab_size", CLIP_VOCABULARY),
        ):
            if getattr(self, name) is None:
                setattr(self, name, self.text_cfg.get(key, default))
        # A table may have more rows than the tokenizer has words; a smaller one belongs to a smaller vocabulary.
        words = min(self.vocab_size, CLIP_VOCABULARY)
        if self.bos_token_id is None:
            self.bos_token_id = words - 2
        if self.eos_token_id is None:
            self.eos_token_id = words - 1


# --- vision tower --------------------------------------------------------------------------------------------------


class _OpenCLIPModel(PreTrainedModel):
    # open_clip computes attention by torch's own fused kernels, whatever implementation is asked for.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ("VisionTransformer", "TimmModel", "ModifiedResNet", "TextTransformer")

    def _init_weights(self, module: nn.Module) -> None:
        # open_clip initialises in its constructors; what a checkpoint does not hold is recomputed here.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()


class OpenCLIPVisionTower(_OpenCLIPModel):
    """
    The vision tower of an open_clip model.

    Raises:
        ImportError: open_clip is not installed.
    """

    config: OpenCLIPVisionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: OpenCLIPVisionConfig):
        super().__init__(config)
        vision_cfg = dict(config.vision_cfg)
        if "timm_model_name" in vision_cfg:
            vision_cfg["timm_model_pretrained"] = False
        self.visual = _open_clip().model._build_vision_tower(config.projection_dim, vision_cfg, config.quick_gelu)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> CLIPVisionModelOutput:
        """
        Args:
            pixel_values (`[N, 3, height, width]`): as the model's own preprocessing gives them.
            output_hidden_states (`bool`): whether to return all layers.

        Returns:
            `image_embeds` `[N, d_p]`, projected and not normalised; `last_hidden_state` `[N, 1 + P, d_v]`, before the
            final norm, class token (where there is one) included, or the last feature map `[N, d_v, rows, columns]`;
            `hidden_states`, counted as in transformers' CLIP: the embeddings, then each block's output. Towers of
            convolutions and windows have the feature map of each stage instead.

        Raises:
            ValueError: layers are asked of a tower that returns none.
        """
        visual, pixel_values = self.visual, pixel_values.to(self.dtype)
        if hasattr(visual, "trunk"):
            image_embeds, states = self._read_with_timm(pixel_values, output_hidden_states)
        elif hasattr(visual, "transformer"):
            states = [visual._embeds(pixel_values)]
            for block in visual.transformer.resblocks:
                states.append(block(states[-1]))
            image_embeds = visual._pool(states[-1])[0] @ visual.proj
        else:
            outputs = visual.forward_intermediates(pixel_values)
            image_embeds, states = outputs["image_features"], outputs["image_intermediates"]
        return CLIPVisionModelOutput(
            image_embeds=image_embeds.flatten(1),
            last_hidden_state=states[-1] if states else None,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _read_with_timm(
        self, pixel_values: torch.Tensor, output_hidden_states: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        visual, trunk = self.visual, self.visual.trunk
        if not hasattr(trunk, "forward_intermediates"):
            if output_hidden_states:
                raise ValueError(
                    f"{self.config.vision_cfg['timm_model_name']} returns its pooled feature alone, no patch tokens: "
                    'use visual_mapping="linear" with fine_grained_source="global", or another vision tower.'
                )
            return visual(pixel_values), []
        indices = None if output_hidden_states else 1
        if not hasattr(trunk, "num_prefix_tokens"):  # convolutions and windows: feature maps [N, d_v, rows, columns]
            last, states = trunk.forward_intermediates(pixel_values, indices=indices, output_fmt="NCHW")
            return visual.head(trunk.forward_head(last)), states
        # Not every trunk can return its class tokens where it has none.
        with_prefix = {"return_prefix_tokens": True} if trunk.num_prefix_tokens else {}
        embeddings: list[torch.Tensor] = []
        hook = trunk.blocks[0].register_forward_pre_hook(lambda block, inputs: embeddings.append(inputs[0]))
        try:
            last, blocks = trunk.forward_intermediates(pixel_values, indices=indices, output_fmt="NLC", **with_prefix)
        finally:
            hook.remove()
        if with_prefix:
            blocks = [torch.cat([prefix, patches], dim=1) for patches, prefix in blocks]
        return visual.head(trunk.forward_head(last)), [*embeddings, *blocks] if output_hidden_states else blocks


# --- text encoder --------------------------------------------------------------------------------------------------


class OpenCLIPTextEncoder(SoftTokenReadingMixin, _OpenCLIPModel):
    """
    The causal text transformer of an open_clip model.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: the text tower is of another kind.
    """

    config: OpenCLIPTextConfig
    base_model_prefix = ""
    main_input_name = "soft_tokens"

    def __init__(self, config: OpenCLIPTextConfig):
        super().__init__(config)
        if problem := _text_tower_problem(config.text_cfg):
            raise ValueError(f"This open_clip model cannot serve as text encoder: {problem}. {TEXT_REMEDY}")
        self.text = _open_clip().model._build_text_tower(config.projection_dim, config.text_cfg, config.quick_gelu)
        self.text.attn_mask = None  # made for the length that is read; no checkpoint holds it
        self.post_init()

    def _embed_ends(self, positions: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor([self.config.bos_token_id, self.config.eos_token_id], device=positions.device)
        return self.text.token_embedding(ids) + self.text.positional_embedding[positions]

    def _read_states(
        self, states: torch.Tensor, output_attentions: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        text, length = self.text, states.shape[1]
        mask = states.new_full((length, length), float("-inf")).triu(1)
        attentions = []
        for block in text.transformer.resblocks:
            if output_attentions:
                attentions.append(_attention_weights(block, states))
            states = block(states, attn_mask=mask)
        states = text.ln_final(states)
        if isinstance(text.text_projection, nn.Linear):
            states = text.text_projection(states)
        elif text.text_projection is not None:
            states = states @ text.text_projection
        return states, tuple(attentions) if output_attentions else None


def _attention_weights(block: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The attention `[R, heads, S, S]` that a block's fused kernel computes without returning it."""
    attention = block.attn
    queries, keys, _ = nn.functional.linear(
        block.ln_1(states), attention.in_proj_weight, attention.in_proj_bias
    ).chunk(3, dim=-1)
    queries, keys = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (queries, keys))
    if hasattr(attention, "ln_q"):
        queries, keys = attention.ln_q(queries), attention.ln_k(keys)
    return causal_attention_weights(queries, keys)


def _text_tower_problem(text_cfg: dict[str, Any]) -> str | None:
    """Why a text tower cannot read soft tokens as CLIP's does; `None` where it can."""
    if "hf_model_name" in text_cfg:
        return f"its text tower is {text_cfg['hf_model_name']}, not CLIP's causal transformer"
    if text_cfg.get("no_causal_mask"):
        return "its text tower has no causal mask"
    if text_cfg.get("embed_cls"):
        return "its text tower is read at a class token behind the text, not at eos"
    if text_cfg.get("hf_tokenizer_name") or text_cfg.get("pool_type", "argmax") != "argmax":
        return "its text tower has another tokenizer than CLIP's"
    return None


# --- names ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where a model comes from: an architecture of open_clip's own, a hub repository or a folder."""

    kind: Literal["architecture", "hub", "folder"]
    location: str
    weights: str = ""  # of an architecture: its pretrained tag or weight file


def is_open_clip(name_or_path: str) -> bool:
    """Whether a name is one of open_clip's; see the top of this file. Neither imports nor fetches anything."""
    name = str(name_or_path)
    if name.startswith(("open_clip:", "hf-hub:", "local-dir:")):
        return True
    folder = Path(name)
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        return False
    config = folder / "config.json"
    return not (config.is_file() and "model_type" in json.loads(config.read_text()))


def _source(name_or_path: str) -> _Source:
    name = str(name_or_path).removeprefix("open_clip:")
    if name.startswith("hf-hub:"):
        return _Source("hub", name.removeprefix("hf-hub:"))
    if name.startswith("local-dir:"):
        return _Source("folder", name.removeprefix("local-dir:"))
    if not str(name_or_path).startswith("open_clip:"):
        return _Source("folder", name)
    return _Source("architecture", *name.split("/", 1))


def open_clip_local_path(name_or_path: str) -> Path | None:
    """The folder or weight file a name of open_clip's points to on this machine, if it does."""
    source = _source(name_or_path)
    path = Path(source.location if source.kind == "folder" else source.weights)
    return path if source.kind != "hub" and path.parts and path.exists() else None


def _open_clip():
    """open_clip, or an `ImportError` that says how to get it."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("This model is one of open_clip's: pip install open_clip_torch.") from error
    return open_clip


def _hub_kwargs(source: _Source, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the hub's arguments out of `kwargs`."""
    hub = {name: kwargs.pop(name) for name in HUB_KWARGS if name in kwargs}
    is_local = source.kind == "folder" or (source.kind == "architecture" and Path(source.weights).is_file())
    if is_local and hub.pop("revision", None):
        raise ValueError(f"{source.weights or source.location} is on this machine and has no revision: leave it out.")
    return hub


def _pretrained_cfg(source: _Source) -> dict[str, Any]:
    """open_clip's entry for an architecture's pretrained tag; empty for a weight file.

    Raises:
        ValueError: there is no such architecture, or no such tag or file; the message names what there is.
    """
    open_clip = _open_clip()
    architectures = open_clip.list_models()
    if source.location not in architectures:
        close = difflib.get_close_matches(source.location, architectures, n=5, cutoff=0.4)
        raise ValueError(
            f'open_clip knows no architecture "{source.location}"; similar ones: {", ".join(close) or "none"} '
            "(open_clip.list_models() names all)."
        )
    if Path(source.weights).is_file():
        return {}
    tags = open_clip.list_pretrained_tags_by_model(source.location)
    if found := open_clip.get_pretrained_cfg(source.location, source.weights) if source.weights else None:
        return found
    wanted = (
        f"open_clip:{source.location} names no weights"
        if not source.weights
        else f'"{source.weights}" is neither a pretrained tag of {source.location} nor a weight file'
    )
    raise ValueError(
        f"{wanted}: write open_clip:{source.location}/ and a tag or a path. Tags: {', '.join(tags) or 'none'}."
    )


def _model_cfg(source: _Source, hub: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """open_clip's description of a model, and the commit of the hub repository it was read from."""
    if source.kind == "architecture":
        tag = _pretrained_cfg(source)
        cfg = _open_clip().get_model_config(source.location)
        # Some tags were trained with another activation than their architecture's own.
        return {**cfg, "quick_gelu": bool(cfg.get("quick_gelu") or tag.get("quick_gelu"))}, None
    try:
        file = cached_file(source.location, OPEN_CLIP_CONFIG, **hub)
    except OSError as error:
        raise OSError(
            f"No {OPEN_CLIP_CONFIG} of {source.location} could be read. A checkpoint of transformers is named without "
            f"hf-hub: or local-dir:. {error}"
        ) from error
    content = json.loads(Path(file).read_text())
    return content.get("model_cfg", content), extract_commit_hash(file, None)


def open_clip_weight_file(name_or_path: str, **hub_kwargs: Any) -> Path:
    """
    The weight file of an open_clip model, fetched if it is not in the cache.

    Args:
        name_or_path (`str`): see the top of this file.
        hub_kwargs: `cache_dir`, `token`, `revision`, `local_files_only`, `force_download`, `proxies`, `subfolder`.

    Raises:
        OSError: there is none.
        ValueError: no such architecture or pretrained tag.
    """
    source = _source(name_or_path)
    hub = _hub_kwargs(source, hub_kwargs)
    location, names = source.location, WEIGHT_FILES
    if source.kind == "architecture":
        tag = _pretrained_cfg(source)
        if not tag:
            return Path(source.weights)
        location, _, name = tag["hf_hub"].rpartition("/")
        if name and name not in WEIGHT_FILES:
            names = (str(Path(name).with_suffix(".safetensors")), name)
    for name in names:
        if found := cached_file(location, name, _raise_exceptions_for_missing_entries=False, **hub):
            return Path(found)
    if source.kind == "folder":
        others = sorted(file for file in Path(location).iterdir() if file.suffix in WEIGHT_SUFFIXES)
        if len(others) == 1:
            return others[0]
        names = (*names, *(f"{file.name} (one of {len(others)})" for file in others))
    raise OSError(f"{name_or_path} holds no weights that open_clip would read; looked for {', '.join(names)}.")


# --- loading -------------------------------------------------------------------------------------------------------


def load_open_clip_config(
    name_or_path: str, **hub_kwargs: Any
) -> tuple[OpenCLIPVisionConfig, OpenCLIPTextConfig | None]:
    """
    Configurations of an open_clip model's towers. The text one is `None` where the text tower cannot serve the
    `clip_text` interaction; [`open_clip_text_problem`] says why.

    Args:
        name_or_path (`str`): see the top of this file.
        hub_kwargs: as in [`open_clip_weight_file`].

    Raises:
        ImportError: open_clip is not installed.
        OSError, ValueError: there is no such model.
    """
    _open_clip()
    source = _source(name_or_path)
    cfg, commit = _model_cfg(source, _hub_kwargs(source, hub_kwargs))
    common = {"quick_gelu": bool(cfg.get("quick_gelu", False)), "projection_dim": cfg["embed_dim"]}
    # A frozen tower drops no patches.
    vision = OpenCLIPVisionConfig(vision_cfg={**cfg["vision_cfg"], "patch_dropout": 0.0}, **common)
    _measure(vision)
    text_cfg = cfg["text_cfg"]
    text = None if _text_tower_problem(text_cfg) else OpenCLIPTextConfig(text_cfg=text_cfg, **common)
    if text is not None and text_cfg.get("proj_type") == "none":
        text.projection_dim = text.hidden_size
    for config in (vision, text):
        if config is not None:
            config._commit_hash = commit
    return vision, text


def _measure(config: OpenCLIPVisionConfig) -> None:
    """Fills in the sizes of a tower's patch tokens, seen on the meta device."""
    sizes = config.image_size
    height, width = (sizes, sizes) if isinstance(sizes, int) else sizes
    with torch.device("meta"):
        tower = OpenCLIPVisionTower(config).eval()
        trunk = getattr(tower.visual, "trunk", None)
        has_layers = trunk is None or hasattr(trunk, "forward_intermediates")
        with torch.no_grad():
            outputs = tower(torch.zeros(1, 3, height, width), output_hidden_states=has_layers)
    if outputs.image_embeds.shape[-1] != config.projection_dim:
        raise ValueError(
            f"This vision tower has no pooled output of width {config.projection_dim} (its pooling gives "
            f"{list(outputs.image_embeds.shape[1:])} per image), which the static mapping needs: choose another model."
        )
    if not has_layers:
        config.hidden_size, config.patch_size = trunk.num_features, None
        return
    if outputs.last_hidden_state.dim() == 4:
        config.hidden_sizes = [states.shape[1] for states in outputs.hidden_states]
        config.hidden_size, config.patch_size = config.hidden_sizes[-1], None
        return
    config.hidden_size = outputs.last_hidden_state.shape[-1]
    num_patches = outputs.last_hidden_state.shape[1] - getattr(trunk, "num_prefix_tokens", 1)
    rows = round(math.sqrt(num_patches * height / width))
    patch = (height // rows, width // (num_patches // rows))
    config.patch_size = patch[0] if patch[0] == patch[1] else list(patch)


def open_clip_text_problem(name_or_path: str, **hub_kwargs: Any) -> str | None:
    """
    Why an open_clip model's text tower cannot serve the `clip_text` interaction, as half a sentence; `None` where it
    can.
    """
    source = _source(name_or_path)
    cfg, _ = _model_cfg(source, _hub_kwargs(source, hub_kwargs))
    return _text_tower_problem(cfg["text_cfg"])


def load_open_clip_tower(
    name_or_path: str, config: OpenCLIPVisionConfig | None = None, **kwargs: Any
) -> OpenCLIPVisionTower:
    """
    The vision tower of an open_clip model, in eval mode.

    Args:
        name_or_path (`str`): see the top of this file.
        config ([`OpenCLIPVisionConfig`], *optional*): read from the source by default.
        kwargs: the hub's, as in [`open_clip_weight_file`]; `dtype`, `device_map` and others as in `from_pretrained`.
            `attn_implementation` has no effect.

    Raises:
        ImportError: open_clip is not installed.
        OSError, ValueError: there is no such model, or its weights do not fit its architecture.
    """
    return _load(OpenCLIPVisionTower, name_or_path, config, kwargs)


def load_open_clip_text_encoder(
    name_or_path: str, config: OpenCLIPTextConfig | None = None, **kwargs: Any
) -> OpenCLIPTextEncoder:
    """
    The text encoder of an open_clip model, in eval mode; arguments and errors are those of [`load_open_clip_tower`].

    Raises:
        ValueError: the model's text tower is no causal CLIP text transformer.
    """
    return _load(OpenCLIPTextEncoder, name_or_path, config, kwargs)


def _load(model_class: type[_OpenCLIPModel], name_or_path: str, config: PreTrainedConfig | None, kwargs: dict):
    open_clip = _open_clip()
    hub = _hub_kwargs(_source(name_or_path), kwargs)
    kwargs.pop("attn_implementation", None)
    if config is None:
        vision_config, text_config = load_open_clip_config(name_or_path, **hub)
        config = vision_config if model_class is OpenCLIPVisionTower else text_config
        if config is None:
            problem = open_clip_text_problem(name_or_path, **hub)
            raise ValueError(f"{name_or_path} cannot serve as text encoder: {problem}. {TEXT_REMEDY}")
    state = _state_dict(model_class, config, open_clip_weight_file(name_or_path, **hub), open_clip)
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **kwargs
    )
    problems = [f"missing: {name}" for name in info["missing_keys"]]
    problems += [f"left over: {name}" for name in info["unexpected_keys"]]
    if problems:
        raise ValueError(
            f"The weights at {name_or_path} do not fit their architecture:\n" + "\n".join(sorted(problems))
        )
    return model


def _state_dict(
    model_class: type[_OpenCLIPModel], config: PreTrainedConfig, file: Path, open_clip: Any
) -> dict[str, torch.Tensor]:
    """One tower's tensors out of a weight file, under their names in the tower's class."""
    try:
        state = open_clip.factory.load_state_dict(str(file))
    except (RuntimeError, SafetensorError, UnpicklingError) as error:
        raise OSError(
            f"{file} is no weight file that open_clip reads ({error}); give a safetensors file, or a state dict "
            "saved by torch.save."
        ) from error
    with torch.device("meta"):
        tower = model_class(config)
    part = "visual." if model_class is OpenCLIPVisionTower else "text."
    # The model's own loader in open_clip does the same to a whole model.
    state = open_clip.model.convert_to_custom_text_state_dict(open_clip.factory.convert_state_dict(tower, state))
    state = {name: tensor for name, tensor in state.items() if name.startswith(part)}
    if part == "visual.":
        open_clip.model.resize_pos_embed(state, tower)
    else:
        open_clip.model.resize_text_pos_embed(state, tower)
    return state


# Nested configurations are found by their model type, in published code too.
for _config_class, _model_class in (
    (OpenCLIPVisionConfig, OpenCLIPVisionTower),
    (OpenCLIPTextConfig, OpenCLIPTextEncoder),
):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModel.register(_config_class, _model_class, exist_ok=True)


__all__ = [
    "OpenCLIPTextConfig",
    "OpenCLIPTextEncoder",
    "OpenCLIPVisionConfig",
    "OpenCLIPVisionTower",
    "is_open_clip",
    "load_open_clip_config",
    "load_open_clip_text_encoder",
    "load_open_clip_tower",
    "open_clip_local_path",
    "open_clip_text_problem",
    "open_clip_weight_file",
]
