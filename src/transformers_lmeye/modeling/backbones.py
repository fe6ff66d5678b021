"""Loading frozen backbones, and saving and publishing an LMEye with or without them."""

import copy
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Blip2Config,
    CLIPConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)

from .configuration_lmeye import LMEyeConfig
from .fingerprints import check_fingerprint, fingerprint, weight_files
from .open_clip_towers import (
    is_open_clip,
    load_open_clip_config,
    load_open_clip_text_encoder,
    load_open_clip_tower,
    open_clip_local_path,
    open_clip_text_problem,
)
from .towers import CLIPTextEncoder, QFormer, check_vision_tower, vision_tower_class


logger = logging.get_logger(__name__)

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
BACKBONE_KWARGS = ("attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "max_memory", "offload_folder")
PUSH_KWARGS = ("repo_id", "private", "token", "revision", "create_pr", "commit_message")
# Arguments of `from_pretrained` that an Auto class or a loading script passes and that say nothing to an IPN alone.
IDLE_KWARGS = ("adapter_kwargs", "code_revision", "use_safetensors", "weights_only")
# The parts a model is loaded from, and the prefix of arguments meant for one of them.
ROLES = ("vision", "language", "clip_text")
# Folder beside an IPN's weights that holds a PEFT adapter of its language model.
ADAPTER_FOLDER = "language_adapter"
SHARD_PATTERN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def language_model_widths(language_model: PreTrainedModel) -> tuple[int, int]:
    """Width of a language model's input embeddings and of the states a request is read from.

    These are its last hidden states or, in an encoder-decoder, its encoder's. Neither need be `hidden_size`.
    """
    embeddings, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    input_width = getattr(embeddings, "embedding_dim", None) or embeddings.weight.shape[-1]
    if language_model.config.is_encoder_decoder:
        encoder_config = getattr(language_model.get_encoder(), "config", language_model.config)
        return input_width, encoder_config.get_text_config().hidden_size
    if head is None:
        return input_width, language_model.config.get_text_config().hidden_size
    return input_width, getattr(head, "in_features", None) or head.weight.shape[-1]


def first_slot_id(tokenizer_length: int, table_rows: int) -> int:
    """Slots start behind both the tokenizer's words and the embedding table, so that no slot can be generated."""
    return max(tokenizer_length, table_rows)


@dataclass
class VisionConfigs:
    """Configurations of the frozen encoders in one checkpoint.

    Args:
        vision: the vision tower's.
        clip_text: that of a text encoder that `interaction="clip_text"` can use, where there is one.
        qformer: that of BLIP-2's Q-Former, where there is one.
        num_query_tokens: the Q-Former's outputs per image.
    """

    vision: PreTrainedConfig
    clip_text: PreTrainedConfig | None = None
    qformer: PreTrainedConfig | None = None
    num_query_tokens: int = 32


def load_vision_config(name_or_path: str, **hub_kwargs: Any) -> VisionConfigs:
    """
    Configurations of the vision tower in a checkpoint and of what stands beside it.

    Args:
        name_or_path (`str`): hub id or folder of a CLIP, of a BLIP-2, of any model with a vision tower (SigLIP), or of
            a vision tower alone (DINOv2, ViT); or an open_clip name.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ValueError: the checkpoint holds no vision tower.
    """
    if is_open_clip(name_or_path):
        return VisionConfigs(*load_open_clip_config(name_or_path, **hub_kwargs))
    config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
    found = VisionConfigs(getattr(config, "vision_config", config))
    try:
        vision_tower_class(found.vision)
    except ValueError as error:
        raise ValueError(f"{name_or_path} holds no vision tower. {error}") from error
    if isinstance(config, CLIPConfig):
        for part in (config.vision_config, config.text_config):
            part.projection_dim = config.projection_dim
        found.clip_text = config.text_config
    elif isinstance(config, Blip2Config):
        found.qformer, found.num_query_tokens = config.qformer_config, config.num_query_tokens
    return found


def load_language_config(name_or_path: str, **kwargs: Any) -> PreTrainedConfig:
    """Configuration of a language model, or of the one inside a BLIP-2 checkpoint."""
    config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    return config.text_config if isinstance(config, Blip2Config) else config


def load_part(
    part_class: type[PreTrainedModel], name_or_path: str, config: PreTrainedConfig, prefix: str = "", **kwargs: Any
) -> PreTrainedModel:
    """
    Loads one part out of a checkpoint that may hold more, without a word about the rest.

    Args:
        part_class (`type`): the part's class.
        name_or_path (`str`): hub id or folder of the whole.
        config (`PreTrainedConfig`): the part's configuration.
        prefix (`str`): what the whole puts before the part's own tensor names.
        kwargs: as in `PreTrainedModel.from_pretrained`.

    Raises:
        ValueError: the checkpoint lacks weights of the part.
    """
    # The library reads this attribute of the class while it loads; name and module stay, since conversions of older
    # checkpoints are found by them.
    silent = {"__module__": part_class.__module__, "_keys_to_ignore_on_load_unexpected": (r".",)}
    reader = type(part_class.__name__, (part_class,), silent)
    if prefix:
        kwargs["key_mapping"] = {rf"^{prefix}\.": ""}
    part, info = reader.from_pretrained(name_or_path, config=config, output_loading_info=True, **kwargs)
    part.__class__ = part_class
    if info["missing_keys"]:
        raise ValueError(
            f"{name_or_path} lacks weights of {part_class.__name__}, which would be random: "
            f"{', '.join(sorted(info['missing_keys']))}. Choose a checkpoint that holds them."
        )
    return part


def load_vision_tower(name_or_path: str, vision_config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Loads a vision tower, alone or out of a larger checkpoint; `kwargs` as in `from_pretrained`."""
    if is_open_clip(name_or_path):
        return load_open_clip_tower(name_or_path, vision_config, **kwargs)
    part_class = vision_tower_class(vision_config)
    prefix = "" if part_class.base_model_prefix == "vision_model" else "vision_model"
    return load_part(part_class, name_or_path, vision_config, prefix, **kwargs)


def load_text_encoder(name_or_path: str, clip_text_config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Loads CLIP's text encoder, in float32; `kwargs` as in `from_pretrained`."""
    kwargs["dtype"] = torch.float32
    if is_open_clip(name_or_path):
        return load_open_clip_text_encoder(name_or_path, clip_text_config, **kwargs)
    return load_part(CLIPTextEncoder, name_or_path, clip_text_config, **kwargs)


def load_language_model(name_or_path: str, text_config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Loads a language model, or the one inside a BLIP-2 checkpoint; `kwargs` as in `from_pretrained`."""
    encoder_decoder = text_config.is_encoder_decoder
    config = AutoConfig.from_pretrained(
        name_or_path, trust_remote_code=kwargs.get("trust_remote_code"), **_source_kwargs(kwargs)
    )
    if isinstance(config, Blip2Config):
        mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
        kwargs.pop("trust_remote_code", None)
        model = load_part(mapping[type(text_config)], name_or_path, text_config, "language_model", **kwargs)
        # The whole's generation settings need not name the language model's special tokens.
        for name, value in GenerationConfig.from_model_config(text_config).to_diff_dict().items():
            if getattr(model.generation_config, name, None) is None:
                setattr(model.generation_config, name, value)
        return model
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(name_or_path, **kwargs)


def load_backbones(
    config: LMEyeConfig, sources: dict[str, str], options: dict[str, dict[str, Any]]
) -> dict[str, PreTrainedModel]:
    """
    The loaded frozen parts as keyword arguments of [`LMEyeForConditionalGeneration`]; also updates `config`.

    Args:
        config ([`LMEyeConfig`]): which parts there are, and their configurations.
        sources (`dict`): for each role the checkpoint it is loaded from; without `"clip_text"` the text encoder is the
            vision model's own.
        options (`dict`): for each role, and for the `"ipn"` itself, the arguments of `from_pretrained`.
    """
    if attn_implementation := options["ipn"].get("attn_implementation"):
        config._attn_implementation = attn_implementation  # each part below is given its own again
    tower = load_vision_tower(sources["vision"], config.vision_config, **_for_part(options["vision"], "vision_tower"))
    language_model = load_language_model(
        sources["language"], config.text_config, **_for_part(options["language"], "language_model")
    )
    config.vision_config, config.text_config = tower.config, language_model.config
    parts = {"vision_tower": tower, "language_model": language_model}
    if config.qformer_config is not None:
        parts["qformer"] = load_part(
            QFormer,
            sources["vision"],
            config.qformer_config,
            num_query_tokens=config.num_query_tokens,
            **{**_for_part(options["vision"], "qformer"), "dtype": torch.float32},
        )
        config.qformer_config = parts["qformer"].config
    if config.interaction == "clip_text":
        role = "clip_text" if "clip_text" in sources else "vision"
        parts["clip_text_model"] = load_text_encoder(
            sources[role], config.clip_text_config, **_for_part(options[role], "ipn.interaction")
        )
        config.clip_text_config = parts["clip_text_model"].config
    for part in parts.values():
        part.config._name_or_path = ""  # the sources are in config.backbones; a published file needs no local path
    return parts


def _as_own_class(save: Callable[..., None]) -> Callable[..., None]:
    """Has a model that FSDP2 has given a class of its making saved as the class it was before."""

    @wraps(save)
    def run(self, *args: Any, **kwargs: Any) -> None:
        found = type(self)
        self.__class__ = next(kind for kind in found.__mro__ if not kind.__module__.startswith("torch."))
        try:
            save(self, *args, **kwargs)
        finally:
            self.__class__ = found

    return run


class LMEyeCheckpointMixin:
    """Factories, loading, saving and publishing of [`LMEyeForConditionalGeneration`]."""

    @classmethod
    def from_vision_language_pretrained(
        cls,
        vision_model_name_or_path: str,
        language_model_name_or_path: str,
        interaction: str = "clip_text",
        visual_mapping: str = "linear",
        num_dynamic_tokens: int = 5,
        clip_text_model_name_or_path: str | None = None,
        **kwargs: Any,
    ):
        """
        Attaches a new IPN to a vision tower and a language model.

        Args:
            vision_model_name_or_path (`str`): hub id or folder of a CLIP, a SigLIP, a BLIP-2 or any vision model with
                patch tokens and a pooled output; `"open_clip:NAME/PRETRAINED"` or `"hf-hub:..."` for open_clip's.
            language_model_name_or_path (`str`): hub id or folder of any causal or encoder-decoder language model, or
                of a BLIP-2, whose language model is taken.
            interaction, visual_mapping, num_dynamic_tokens: see [`LMEyeConfig`].
            clip_text_model_name_or_path (`str`, *optional*): the CLIP whose text encoder `interaction="clip_text"`
                uses, where it is not to be the vision model's own.
            kwargs: any other field of [`LMEyeConfig`]; `dtype`, `device_map`, `attn_implementation` for all
                backbones, `quantization_config` and `trust_remote_code` for the language model; `revision` and others
                prefixed `vision_`, `language_` or `clip_text_` for one of them; `token`, `cache_dir`,
                `local_files_only`.

        Returns:
            [`LMEyeForConditionalGeneration`] in eval mode, its IPN in float32.

        Raises:
            ValueError: there is no vision tower; `clip_text` lacks a text encoder, or `"qformer"` a Q-Former; the
                language model takes no `inputs_embeds`.
        """
        options = _split_loading_kwargs(kwargs)
        unknown = kwargs.keys() - inspect.signature(LMEyeConfig).parameters.keys()
        if unknown:
            raise TypeError(
                f"{', '.join(sorted(unknown))}: neither a field of LMEyeConfig nor an argument of from_pretrained. "
                "One meant for a single backbone is prefixed vision_, language_ or clip_text_."
            )
        sources = {"vision": str(vision_model_name_or_path), "language": str(language_model_name_or_path)}
        vision = load_vision_config(sources["vision"], **_source_kwargs(options["vision"]))
        if clip_text_model_name_or_path is not None:
            if interaction != "clip_text":
                raise ValueError(
                    f'clip_text_model_name_or_path is for interaction="clip_text": leave it out with "{interaction}".'
                )
            sources["clip_text"] = str(clip_text_model_name_or_path)
        if interaction == "clip_text":
            vision.clip_text = _clip_text_config(sources, vision, options)
        text_config = load_language_config(
            sources["language"],
            trust_remote_code=options["language"].get("trust_remote_code"),
            **_source_kwargs(options["language"]),
        )
        slot = first_slot_id(
            _tokenizer_length(sources["language"], options["language"]), text_config.get_text_config().vocab_size
        )
        kwargs = {"image_token_id": slot, "request_token_id": slot + 1, "dynamic_token_id": slot + 2, **kwargs}
        if vision.qformer is None and "qformer" in (visual_mapping, kwargs.get("fine_grained_source")):
            field = "visual_mapping" if visual_mapping == "qformer" else "fine_grained_source"
            raise ValueError(
                f'{field}="qformer" needs a Q-Former, and {sources["vision"]} has none: give a BLIP-2 checkpoint as '
                f"the vision model, or choose another {field}."
            )
        config = LMEyeConfig(
            vision_config=vision.vision,
            text_config=text_config,
            clip_text_config=vision.clip_text if interaction == "clip_text" else None,
            qformer_config=vision.qformer,
            interaction=interaction,
            visual_mapping=visual_mapping,
            num_dynamic_tokens=num_dynamic_tokens,
            **{"num_query_tokens": vision.num_query_tokens, **kwargs},
        )
        if visual_mapping != "qformer" and (interaction == "none" or config.fine_grained_source != "qformer"):
            config.qformer_config = None
        check_vision_tower(config)
        parts = load_backbones(config, sources, options)
        if "slot_init_std" not in kwargs:
            config.slot_init_std = _embedding_std(parts["language_model"])
        config.backbones = _describe(sources, options)
        return _placed(cls(config, **parts))

    @classmethod
    def from_blip2_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        clip_text_model_name_or_path: str | None = None,
        interaction: str = "clip_text",
        **kwargs: Any,
    ):
        """
        Attaches an IPN to a BLIP-2: its vision tower, its Q-Former and its language model (FlanT5 or OPT).

        The static mapping starts as BLIP-2's own language projection, so that the model sees what BLIP-2 saw before
        any training. With `interaction="clip_text"` the layout is that of LMEye v0.1: `<img-q>` stays in the sequence,
        the Q-Former's outputs are the fine-grained features, and dynamic tokens are read at the text transformer's
        last outputs.

        Args:
            pretrained_model_name_or_path (`str`): hub id or folder of a BLIP-2 with a language model.
            clip_text_model_name_or_path (`str`, *optional*): the CLIP whose text encoder `interaction="clip_text"`
                uses.
            interaction (`str`): see [`LMEyeConfig`].
            kwargs: as in [`~LMEyeForConditionalGeneration.from_vision_language_pretrained`].

        Returns:
            [`LMEyeForConditionalGeneration`] in eval mode, its IPN in float32.

        Raises:
            ValueError: the checkpoint is no BLIP-2 with a language model; `clip_text` lacks a text encoder.
        """
        name = str(pretrained_model_name_or_path)
        hub = {key: value for key, value in kwargs.items() if key in HUB_KWARGS}
        if "revision" in kwargs:
            revision = kwargs.pop("revision")
            kwargs = {"vision_revision": revision, "language_revision": revision, **kwargs}
        if "vision_revision" in kwargs:
            hub["revision"] = kwargs["vision_revision"]
        if not isinstance(blip2 := AutoConfig.from_pretrained(name, **hub), Blip2Config):
            raise ValueError(
                f'{name} is of type "{blip2.model_type}", no BLIP-2 ("blip-2"): attach an IPN to it with '
                "from_vision_language_pretrained."
            )
        if interaction == "clip_text":
            first_edition = {
                "fine_grained_source": "qformer",
                "fine_grained_dropout": 0.0,
                "keep_request_token": True,
                "dynamic_readout": "last",
            }
            kwargs = {**first_edition, **kwargs}
        visual_mapping = kwargs.pop("visual_mapping", "qformer")
        projection = None
        if visual_mapping == "qformer":
            projection = _read_tensors(name, ("language_projection.weight", "language_projection.bias"), **hub)
        model = cls.from_vision_language_pretrained(
            name,
            name,
            interaction=interaction,
            visual_mapping=visual_mapping,
            clip_text_model_name_or_path=clip_text_model_name_or_path,
            **kwargs,
        )
        ipn, table = model.ipn, model.get_input_embeddings()
        with torch.no_grad():
            ids = torch.zeros(1, dtype=torch.long, device=table.weight.device)
            word = table(ids)[0].to(ipn.image_token)
            if projection is not None:
                ipn.visual_mapping.weight.copy_(projection["language_projection.weight"])
                ipn.visual_mapping.bias.copy_(projection["language_projection.bias"])
                ipn.image_token.copy_(word.expand_as(ipn.image_token))
            for slot in ("request_token", "dynamic_token"):
                if hasattr(ipn, slot):  # drawn at slot_init_std
                    getattr(ipn, slot).add_(word)
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: LMEyeConfig | None = None,
        vision_model_name_or_path: str | None = None,
        language_model_name_or_path: str | None = None,
        clip_text_model_name_or_path: str | None = None,
        backbone_trust_remote_code: bool = False,
        is_trainable: bool = False,
        **kwargs: Any,
    ):
        """
        Loads a whole checkpoint, or an IPN together with the backbones it names.

        Args:
            pretrained_model_name_or_path (`str`): hub id or folder.
            vision_model_name_or_path, language_model_name_or_path, clip_text_model_name_or_path (`str`, *optional*):
                other locations of the same backbones, for a checkpoint that holds the IPN alone. One location serves
                all parts that came from the same checkpoint.
            backbone_trust_remote_code (`bool`): whether a backbone may run code of its own repository.
            is_trainable (`bool`): whether the language model's adapter that was saved with an IPN trains on, as in
                PEFT; without it the adapter is frozen like the rest of the language model.
            kwargs: as in `PreTrainedModel.from_pretrained`, fields of [`LMEyeConfig`] among them; `dtype`,
                `device_map`, `attn_implementation`, `quantization_config`, `token`, `cache_dir` and
                `local_files_only` reach the backbones; for a checkpoint that holds the IPN alone, loading arguments
                prefixed `vision_`, `language_` or `clip_text_` reach one of them.

        Raises:
            ImportError: the IPN was saved with an adapter of the language model, and PEFT is not installed.
            TypeError: an argument is unknown, or meant for a backbone of a whole checkpoint.
            ValueError: a backbone's weights are not those the IPN was trained on; the IPN's or the adapter's own
                weights are incomplete; there is no adapter that could be trainable.
        """
        own = config
        if own is None:
            hub = _hub_kwargs(kwargs) | {name: kwargs[name] for name in ("revision", "subfolder") if name in kwargs}
            own = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        if own.includes_backbones:
            if vision_model_name_or_path or language_model_name_or_path or clip_text_model_name_or_path:
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds its backbones: other locations are for a checkpoint that "
                    "holds the IPN alone (save_pretrained(..., save_backbones=False))."
                )
            if prefixed := [n for n in kwargs if n.startswith(tuple(f"{r}_" for r in ROLES)) and not hasattr(own, n)]:
                raise TypeError(
                    f"{', '.join(prefixed)}: {pretrained_model_name_or_path} holds its backbones, which are loaded as "
                    "one. Arguments for a single backbone are for the factories and for a checkpoint that holds the "
                    "IPN alone."
                )
            if is_trainable:
                raise ValueError(_no_adapter(pretrained_model_name_or_path))
            extra = {} if config is None else {"config": config}
            if kwargs.get("quantization_config") is not None:
                kwargs["quantization_config"] = _of_language_model(kwargs["quantization_config"])
            with_info = kwargs.pop("output_loading_info", False)
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **extra, **kwargs
            )
            if info["missing_keys"]:
                raise ValueError(
                    f"{pretrained_model_name_or_path} lacks weights, which would be random: "
                    + ", ".join(sorted(info["missing_keys"]))
                )
            model.freeze_backbones()
            # The Trainer asks before it trains: what is quantised is frozen, and what trains is not quantised.
            model.is_quantized = False
            return (model, info) if with_info else model
        locations = {
            "vision": vision_model_name_or_path,
            "language": language_model_name_or_path,
            "clip_text": clip_text_model_name_or_path,
        }
        return cls._from_interactive_perception_network(
            pretrained_model_name_or_path, config, locations, backbone_trust_remote_code, is_trainable, kwargs
        )

    @classmethod
    def _from_interactive_perception_network(
        cls, path, config, locations, backbone_trust_remote_code, is_trainable, kwargs
    ):
        own_hub_kwargs = _hub_kwargs(kwargs)
        own_hub_kwargs.update({name: kwargs.pop(name) for name in ("revision", "subfolder") if name in kwargs})
        with_info = kwargs.pop("output_loading_info", False)
        options = _split_loading_kwargs(kwargs)
        options["language"]["trust_remote_code"] = backbone_trust_remote_code
        kwargs = {
            name: value for name, value in kwargs.items() if name not in IDLE_KWARGS and not name.startswith("_")
        }
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(
                path, return_unused_kwargs=True, **own_hub_kwargs, **kwargs
            )
        if kwargs:
            raise TypeError(
                f"{', '.join(sorted(kwargs))}: neither a field of LMEyeConfig nor an argument that loads an IPN and "
                "its backbones."
            )
        adapter = cached_file(
            path,
            f"{ADAPTER_FOLDER}/adapter_config.json",
            _raise_exceptions_for_missing_entries=False,
            **own_hub_kwargs,
        )
        if adapter is not None:
            cached_file(path, f"{ADAPTER_FOLDER}/adapter_model.safetensors", **own_hub_kwargs)  # beside the other
        elif is_trainable:
            raise ValueError(_no_adapter(path))
        weights = load_file(cached_file(path, SAFE_WEIGHTS_NAME, **own_hub_kwargs))
        sources = _locate_backbones(path, config.backbones, locations, options)
        model = cls(config, **load_backbones(config, sources, options))
        expected = model.interactive_perception_state_dict()
        _check_tensors(f"The IPN's weights at {path} do", expected, weights)
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(weights[name])
        if adapter is not None:
            model.language_model = _with_adapter(model.language_model, Path(adapter).parent, is_trainable)
        model.name_or_path = str(path)
        if cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **own_hub_kwargs):
            model.generation_config = GenerationConfig.from_pretrained(path, **own_hub_kwargs)
        model = _placed(model)
        if not with_info:
            return model
        # Whatever did not fit has been an error.
        info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return model, info

    def interactive_perception_state_dict(
        self, state_dict: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """
        The IPN's trained tensors under their names in the model; CLIP's frozen text encoder is not among them.

        Args:
            state_dict (`dict`, *optional*): what to take them from, by default `self.state_dict()`.
        """
        frozen = "ipn.interaction." if self.config.interaction == "clip_text" else None
        return {
            name: tensor
            for name, tensor in (self.state_dict() if state_dict is None else state_dict).items()
            if name.startswith("ipn.") and not (frozen and name.startswith(frozen))
        }

    @_as_own_class
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        *,
        save_backbones: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Saves weights, configuration, a model card and the code that loads them without this package.

        Weight files of an earlier save that the new ones replace are removed from the folder.

        Args:
            save_directory (`str`): a folder.
            is_main_process (`bool`): `False` writes nothing.
            state_dict (`dict`, *optional*): the tensors to save under their names in the model, where the model's own
                are split over processes; an IPN saved alone takes its own out of them.
            push_to_hub (`bool`): whether to upload what was saved as well; `repo_id` (by default the folder's name),
                `private`, `token`, `revision`, `create_pr` and `commit_message` go to `push_to_hub`.
            max_shard_size (`int` or `str`): of a whole checkpoint's files; an IPN is one file.
            save_backbones (`bool`): `False` saves the IPN alone, with the backbones' names, revisions and
                fingerprints. A PEFT adapter of the language model is saved beside it, in `language_adapter`.
            kwargs: as in `PreTrainedModel.save_pretrained`.

        Raises:
            TypeError: an argument has no meaning for an IPN saved alone.
            ValueError: `save_backbones=False`, and the backbones were not loaded from anywhere; or `True`, and the
                language model has an adapter that is not merged into it.
        """
        push = {name: kwargs.pop(name) for name in PUSH_KWARGS if name in kwargs} if push_to_hub else {}
        self._check_can_be_saved(save_backbones, kwargs)
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_pretrained needs a folder.")
        if push_to_hub and is_main_process:
            self._check_can_be_published(save_backbones)
            api, repo_id = _hub_repository(
                push.pop("repo_id", folder.name), push.pop("private", None), push.pop("token", None)
            )
            before = _times(folder)
        if is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
        self.config.includes_backbones = save_backbones
        try:
            if save_backbones:
                super().save_pretrained(
                    save_directory,
                    is_main_process=is_main_process,
                    state_dict=state_dict,
                    max_shard_size=max_shard_size,
                    **kwargs,
                )
            elif is_main_process:
                self._save_interactive_perception_network(folder, state_dict)
        finally:
            self.config.includes_backbones = True
        if not is_main_process:
            return
        _remove_replaced_weights(folder, save_backbones)
        custom_object_save(self, folder)
        card = folder / "README.md"
        cards = [model_card(self.config, kind) for kind in (save_backbones, not save_backbones)]
        if not card.exists() or card.read_text(encoding="utf-8") in cards:
            card.write_text(cards[0], encoding="utf-8")
        if push_to_hub:
            written = [name for name, time in _times(folder).items() if before.get(name) != time]
            _upload(api, repo_id, folder, allow_patterns=written, **push)

    def _check_can_be_saved(self, save_backbones: bool, kwargs: dict[str, Any]) -> None:
        adapters = list(getattr(self.language_model, "peft_config", None) or {})
        if save_backbones:
            if adapters:
                raise ValueError(
                    "The language model has a PEFT adapter, which a whole checkpoint cannot hold apart from it. Merge "
                    "it (model.language_model = model.language_model.merge_and_unload()), or save the IPN and the "
                    "adapter without the backbones (save_backbones=False)."
                )
            return
        if not self.config.backbones:
            raise ValueError(
                "The backbones of this model were not loaded from a checkpoint, so an IPN saved alone could never "
                "find them again: build the model with from_vision_language_pretrained, or save it whole."
            )
        if len(adapters) > 1:
            raise ValueError(
                f"The language model has the adapters {', '.join(adapters)}, and one is saved with an IPN: delete the "
                "others (model.language_model.delete_adapter)."
            )
        if unknown := kwargs.keys() - {"token", "safe_serialization", "save_original_format", "save_peft_format"}:
            raise TypeError(f"{', '.join(sorted(unknown))}: no argument that says anything to an IPN saved alone.")

    def _save_interactive_perception_network(
        self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        self.config.architectures = [type(self).__name__]
        own = self.interactive_perception_state_dict(state_dict)
        tensors = {name: tensor.detach().contiguous() for name, tensor in own.items()}
        # Written beside and moved into place: a reader finds the old file or the new one, never half of one.
        partial = folder / f".{SAFE_WEIGHTS_NAME}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        if getattr(self.language_model, "peft_config", None):
            self._save_adapter(folder, state_dict)
        elif (folder / ADAPTER_FOLDER / "adapter_config.json").is_file():
            shutil.rmtree(folder / ADAPTER_FOLDER)
        os.replace(partial, folder / SAFE_WEIGHTS_NAME)

    def _save_adapter(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        (name,) = self.language_model.peft_config
        if state_dict is not None:
            prefix = "language_model."
            state_dict = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{ADAPTER_FOLDER}.") as partial:
            written = Path(partial, ADAPTER_FOLDER)
            self.language_model.save_pretrained(str(written), state_dict=state_dict)
            if (written / name).is_dir():  # where PEFT puts an adapter of another name than "default"
                written = written / name
            shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
            os.replace(written, folder / ADAPTER_FOLDER)

    def _check_can_be_published(self, save_backbones: bool) -> None:
        if save_backbones:
            return
        for role, source in (self.config.backbones or {}).items():
            if _is_local(source["name_or_path"]):
                raise ValueError(
                    f"The {role} model's location is the local folder {source['name_or_path']}, which nobody else "
                    "has: publish the backbone and build the model from its hub id, or publish with "
                    "save_backbones=True."
                )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        save_backbones: bool = True,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload LMEye",
        **kwargs: Any,
    ):
        """
        Publishes the model with its code: a process without this package loads it with `trust_remote_code=True`.

        Args:
            repo_id (`str`): the hub repository, made if it does not exist.
            save_backbones (`bool`): `False` publishes the IPN alone.
            private, token, revision, create_pr, commit_message: as in `huggingface_hub`.
            kwargs: as in `save_pretrained`, such as `max_shard_size`.

        Raises:
            ValueError: the IPN alone is to be published, and a backbone's location is a local folder; or see
                `save_pretrained`.
        """
        self._check_can_be_published(save_backbones)
        self._check_can_be_saved(save_backbones, kwargs)
        api, repo_id = _hub_repository(repo_id, private, token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, save_backbones=save_backbones, **kwargs)
            return _upload(api, repo_id, folder, revision=revision, create_pr=create_pr, commit_message=commit_message)


def restore_adapter(language_model: nn.Module, folder: str | os.PathLike) -> None:
    """
    Copies the tensors of a saved PEFT adapter into the one that is attached to a language model.

    Args:
        language_model (`nn.Module`): with one adapter; what trains of it goes on training.
        folder (`str`): where PEFT saved one.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the two differ in names or shapes of their tensors.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise ImportError(_needs_peft(folder)) from error
    (adapter,) = language_model.peft_config
    expected = get_peft_model_state_dict(language_model, adapter_name=adapter, save_embedding_layers=False)
    weights = load_peft_weights(str(folder), device="cpu")
    if not isinstance(language_model, PeftModel):  # attached by the library's own `add_adapter`
        weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    # Beside the adapter's own, PEFT saves embeddings of the language model where they may have changed.
    known = language_model.state_dict()
    expected |= {name: known[name] for name in weights.keys() & known.keys()}
    _check_tensors(f"The language model's adapter at {folder} does", expected, weights)
    if any(hasattr(tensor, "device_mesh") for tensor in expected.values()):
        copy_tensors(weights, expected)
    else:
        set_peft_model_state_dict(language_model, weights, adapter_name=adapter)


@torch.no_grad()
def copy_tensors(sources: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> None:
    """Copies whole tensors into those of the same names, of which this process may hold a part alone (FSDP2)."""
    for name, source in sources.items():
        target = targets[name]
        source = source.to(target.device, target.dtype)
        if hasattr(target, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            source = distribute_tensor(source, target.device_mesh, target.placements)
        target.copy_(source)


def _with_adapter(language_model: nn.Module, folder: Path, is_trainable: bool) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(_needs_peft(folder)) from error
    adapted = PeftModel.from_pretrained(language_model, str(folder), is_trainable=is_trainable)
    restore_adapter(adapted, folder)  # PEFT itself lets tensors be missing or left over
    return adapted


def _needs_peft(folder: str | os.PathLike) -> str:
    return f"{folder} holds a PEFT adapter of the language model: pip install peft."


def _no_adapter(path: str | os.PathLike) -> str:
    return (
        f"{path} holds no adapter of the language model that could be trainable: leave is_trainable out, or attach "
        "one with peft.get_peft_model after loading."
    )


def _check_tensors(problem: str, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    problems = [f"missing: {name}" for name in expected.keys() - found.keys()]
    problems += [f"left over: {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"shape of {name}: {list(found[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"{problem} not fit:\n" + "\n".join(sorted(problems)))


def _remove_replaced_weights(folder: Path, save_backbones: bool) -> None:
    """Takes the weight files of an earlier save of another kind out of a folder that holds the new ones."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if save_backbones:
        if (folder / ADAPTER_FOLDER / "adapter_config.json").is_file():
            shutil.rmtree(folder / ADAPTER_FOLDER)
        if not (index.is_file() and single.is_file()):
            return
        # The library removes earlier shards before it writes, so an index that finds its own is the new one.
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        (single if all((folder / shard).is_file() for shard in shards) else index).unlink()
        return
    for file in [index, *folder.iterdir()]:
        if file.is_file() and (file == index or SHARD_PATTERN.fullmatch(file.name)):
            file.unlink()


def _times(folder: Path) -> dict[str, int]:
    return {
        file.relative_to(folder).as_posix(): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()
    }


def _hub_repository(repo_id: str, private: bool | None, token: str | bool | None) -> tuple[HfApi, str]:
    api = HfApi(token=token)
    return api, api.create_repo(repo_id, private=private, exist_ok=True).repo_id


def _upload(api: HfApi, repo_id: str, folder: str | os.PathLike, commit_message: str = "Upload LMEye", **kwargs: Any):
    # Weights of another kind that the repository holds would be found before the new ones.
    replaced = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*-of-*.safetensors", f"{ADAPTER_FOLDER}/*"]
    return api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=commit_message, delete_patterns=replaced, **kwargs
    )


def model_card(config: LMEyeConfig, save_backbones: bool) -> str:
    """A model card with base models, use, and the limitations the paper names (section 6)."""
    sources = {role: source["name_or_path"] for role, source in (config.backbones or {}).items()}
    published = [name for name in dict.fromkeys(sources.values()) if not _is_local(name)]
    base_models = "".join(
        f"- {name.removeprefix('hf-hub:')}\n" for name in published if ":" not in name.removeprefix("hf-hub:")
    )
    names = {role: Path(name).name if _is_local(name) else f"`{name}`" for role, name in sources.items()}
    vision, language = names.get("vision", "a vision tower"), names.get("language", "a language model")
    text_encoder = (
        f" The text encoder that reads image and request is that of {names['clip_text']}."
        if "clip_text" in names
        else ""
    )
    contents = "its backbones" if save_backbones else "no backbones: they are loaded from where they were published"
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
{"base_model:" + chr(10) + base_models if base_models else ""}tags:
- lmeye
---

# LMEye: {vision} and {language}

An interactive perception network ([arXiv 2305.03701](https://arxiv.org/abs/2305.03701)) between a frozen vision
tower, {vision}, and a frozen language model, {language}. Interaction: `{config.interaction}`.{text_encoder} This
repository holds the network and {contents}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("<this repository>", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("<this repository>", trust_remote_code=True)
inputs = processor(images=image, text="What is the man doing?", return_tensors="pt")
print(processor.post_process_image_text_to_text(model.generate(**inputs, max_new_tokens=30)))
```

## Licence
The network is under Apache-2.0. The frozen models keep the licences of their own repositories, which bind whoever uses
them here.

## Limitations
The language model is used as it is, so its biases and its toxicity come along. What it says of a picture may be made
up: do not rely on an answer where being wrong does harm. Pictures unlike those it was trained on are read worse.
"""


def _split_loading_kwargs(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Takes the loading arguments out of `kwargs`: for each role its own, for `"ipn"` those meant for all."""
    shared = {name: kwargs.pop(name) for name in (*HUB_KWARGS, *BACKBONE_KWARGS) if name in kwargs}
    if "torch_dtype" in kwargs:
        shared["dtype"] = kwargs.pop("torch_dtype")
    options = {role: dict(shared) for role in (*ROLES, "ipn")}
    for name in ("quantization_config", "trust_remote_code"):
        if name in kwargs:
            options["language"][name] = kwargs.pop(name)
    fields = set(inspect.signature(LMEyeConfig).parameters)
    for name in list(kwargs):
        for role in ROLES:
            if name.startswith(f"{role}_") and name not in fields:
                options[role][name.removeprefix(f"{role}_")] = kwargs.pop(name)
    return options


def _of_language_model(quantization_config: Any) -> Any:
    """A quantization configuration by which a whole model's language model alone is quantised, its head apart."""
    config = copy.deepcopy(quantization_config)
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    name = "llm_int8_skip_modules" if hasattr(config, "llm_int8_skip_modules") else "modules_to_not_convert"
    if not hasattr(config, name):
        raise ValueError(
            f"{type(config).__name__} cannot leave modules out, and would quantise what trains: save the IPN alone "
            "(save_backbones=False) and load it with the quantised language model."
        )
    kept = getattr(config, name) or ["lm_head"]
    setattr(config, name, [*kept, "ipn", "qformer", "vision_tower"])
    return config


def _for_part(kwargs: dict[str, Any], part: str) -> dict[str, Any]:
    """Loading arguments with the entries of a device map that concern one part, under the part's own names."""
    device_map = kwargs.get("device_map")
    parts = {name.split(".")[0] for name in device_map} if isinstance(device_map, dict) else set()
    if not parts & {"vision_tower", "qformer", "language_model", "ipn"}:
        return kwargs  # one device, or a map of this part alone
    inner = {
        name.removeprefix(part).removeprefix("."): device
        for name, device in device_map.items()
        if name == part or name.startswith(f"{part}.")
    }
    return {**kwargs, "device_map": inner or {"": device_map.get("", next(iter(device_map.values())))}}


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}


def _source_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What says where a checkpoint is and which revision of it."""
    return _hub_kwargs(kwargs) | ({"revision": kwargs["revision"]} if kwargs.get("revision") else {})


def _is_local(name_or_path: str) -> bool:
    return Path(name_or_path).exists() or open_clip_local_path(name_or_path) is not None


def _clip_text_config(
    sources: dict[str, str], vision: VisionConfigs, options: dict[str, dict[str, Any]]
) -> PreTrainedConfig:
    """Configuration of the text encoder that `interaction="clip_text"` uses."""
    if "clip_text" not in sources:
        if vision.clip_text is not None:
            return vision.clip_text
        source, problem = sources["vision"], "has none that is CLIP's"
        if is_open_clip(source):
            problem = f"does not bring it: {open_clip_text_problem(source, **_source_kwargs(options['vision']))}"
        raise ValueError(
            f'interaction="clip_text" needs CLIP\'s text encoder, and {source} {problem}. Name a CLIP as '
            'clip_text_model_name_or_path, or choose interaction="cross_attention".'
        )
    source = sources["clip_text"]
    found = load_vision_config(source, **_source_kwargs(options["clip_text"])).clip_text
    if found is None:
        raise ValueError(
            f"{source} has no text encoder of CLIP's: name a whole CLIP as clip_text_model_name_or_path, such as "
            "openai/clip-vit-large-patch14."
        )
    return found


def _read_tensors(name_or_path: str, names: tuple[str, ...], **hub_kwargs: Any) -> dict[str, torch.Tensor]:
    """Single tensors of a checkpoint.

    Raises:
        ValueError: one is not there.
    """
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(name_or_path, **hub_kwargs):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                found |= {name: stored.get_tensor(name) for name in names if name in stored.keys()}
        else:
            stored = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            found |= {name: stored[name] for name in names if name in stored}
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{name_or_path} holds no {', '.join(missing)}: give a whole BLIP-2 with a language model.")
    return found


def _tokenizer_length(name_or_path: str, kwargs: dict[str, Any]) -> int:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=kwargs.get("trust_remote_code"), **_source_kwargs(kwargs)
        )
    except (OSError, ValueError) as error:
        logger.warning(f"No tokenizer at {name_or_path} ({error}); slot ids start behind the embedding table.")
        return 0
    return len(tokenizer)


def _embedding_std(language_model: PreTrainedModel) -> float:
    """Standard deviation of the input embeddings, over the first 4,096 words; 0.02 where they hold no values."""
    weight = language_model.get_input_embeddings().weight[:4096].detach()
    if weight.device.type == "meta" or not weight.is_floating_point():
        return 0.02
    return float(weight.float().std())


def _describe(sources: dict[str, str], options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name, revision and fingerprint of each role's source; a source of two roles is read once."""
    described: list[tuple[tuple, dict[str, Any]]] = []
    backbones = {}
    for role, name in sources.items():
        hub = _source_kwargs(options[role])
        entry = next((entry for key, entry in described if key == (name, hub)), None)
        if entry is None:
            if is_open_clip(name):
                config = load_open_clip_config(name, **hub)[0]
            else:
                config = AutoConfig.from_pretrained(
                    name, trust_remote_code=options[role].get("trust_remote_code"), **hub
                )
            entry = {
                "name_or_path": name,
                "revision": getattr(config, "_commit_hash", None) or hub.get("revision"),
                "fingerprint": fingerprint(name, **hub),
            }
            described.append(((name, hub), entry))
        backbones[role] = dict(entry)
    return backbones


def _locate_backbones(
    path: str | os.PathLike,
    recorded: dict[str, dict[str, Any]],
    locations: dict[str, str | None],
    options: dict[str, dict[str, Any]],
) -> dict[str, str]:
    """
    Where the backbones of an IPN are now, each checked against the recorded fingerprint.

    Args:
        path: the IPN's checkpoint, for messages.
        recorded (`dict`): `config.backbones`.
        locations (`dict`): for each role another location, or `None`.
        options (`dict`): for each role its loading arguments; those of a recorded location get its revision.

    Raises:
        OSError: a backbone is not where it was.
        ValueError: it has other weights, or a location is given for a role that the IPN does not have.
    """
    for role, location in locations.items():
        if location is not None and role not in recorded:
            raise ValueError(
                f"The IPN at {path} takes no {role} model of its own: leave {role}_model_name_or_path out."
            )
    sources: dict[str, str] = {}
    checked: list[tuple] = []
    for role in (role for role in ROLES if role in recorded):
        entry = recorded[role]
        same = [other for other in recorded if recorded[other] == entry]
        location = next((locations[other] for other in (role, *same) if locations[other] is not None), None)
        sources[role] = str(location or entry["name_or_path"])
        if location is None and entry["revision"] is not None:
            options[role].setdefault("revision", entry["revision"])
        hub = _source_kwargs(options[role])
        key = (sources[role], hub, entry["fingerprint"])
        if key in checked:
            continue
        try:
            check_fingerprint(role, sources[role], entry["fingerprint"], **hub)
        except OSError as error:
            raise OSError(
                f"The {role} model of this IPN is not at {sources[role]}: pass {role}_model_name_or_path= where its "
                "weights are."
            ) from error
        checked.append(key)
    return sources


def _placed(model: nn.Module) -> nn.Module:
    """Puts the IPN where the language model reads its embeddings."""
    device = model.language_model.get_input_embeddings().weight.device
    if device.type != "meta":
        model.ipn.to(device)
    return model.eval()


__all__ = [
    "ADAPTER_FOLDER",
    "LMEyeCheckpointMixin",
    "copy_tensors",
    "first_slot_id",
    "language_model_widths",
    "restore_adapter",
]
