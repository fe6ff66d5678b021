"""Loading frozen backbones, and saving and publishing an LMEye with or without them."""

import inspect
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .configuration_lmeye import LMEyeConfig
from .fingerprints import check_fingerprint, fingerprint


logger = logging.get_logger(__name__)

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
BACKBONE_KWARGS = ("attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "max_memory", "offload_folder")


class CLIPVisionTower(CLIPVisionModelWithProjection):
    """CLIP's vision tower, read from a whole CLIP's checkpoint without a word about the rest."""

    _keys_to_ignore_on_load_unexpected = (r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"position_ids$")


class CLIPTextEncoder(CLIPTextModelWithProjection):
    """CLIP's text encoder, likewise."""

    _keys_to_ignore_on_load_unexpected = (
        r"^vision_model\.",
        r"^visual_projection\.",
        r"^logit_scale$",
        r"position_ids$",
    )


def language_model_widths(language_model: PreTrainedModel) -> tuple[int, int]:
    """Width of a language model's input embeddings and of its last hidden state; neither need be `hidden_size`."""
    embeddings, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    input_width = getattr(embeddings, "embedding_dim", None) or embeddings.weight.shape[-1]
    if head is None:
        return input_width, language_model.config.get_text_config().hidden_size
    return input_width, getattr(head, "in_features", None) or head.weight.shape[-1]


def first_slot_id(tokenizer_length: int, table_rows: int) -> int:
    """Slots start behind both the tokenizer's words and the embedding table, so that no slot can be generated."""
    return max(tokenizer_length, table_rows)


def load_clip_config(name_or_path: str, **hub_kwargs: Any):
    """
    Vision and text configuration of a CLIP checkpoint (the text one is `None` for a vision tower alone).

    Raises:
        ValueError: the checkpoint is no CLIP.
    """
    config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
    if config.model_type == "clip_vision_model":
        return config, None
    if config.model_type != "clip":
        raise ValueError(
            f'{name_or_path} is of type "{config.model_type}"; the vision model must be a CLIP ("clip", or '
            '"clip_vision_model").'
        )
    for part in (config.vision_config, config.text_config):
        part.projection_dim = config.projection_dim
    return config.vision_config, config.text_config


def load_backbones(
    config: LMEyeConfig, vision: str, language: str, vision_kwargs: dict[str, Any], language_kwargs: dict[str, Any]
) -> dict[str, PreTrainedModel]:
    """The loaded frozen parts as keyword arguments of [`LMEyeForConditionalGeneration`]; also updates `config`."""
    tower = CLIPVisionTower.from_pretrained(vision, config=config.vision_config, **vision_kwargs)
    language_model = AutoModelForCausalLM.from_pretrained(language, **language_kwargs)
    parts = {"vision_tower": tower, "language_model": language_model}
    if config.interaction == "clip_text":
        parts["clip_text_model"] = CLIPTextEncoder.from_pretrained(
            vision, config=config.clip_text_config, **{**vision_kwargs, "dtype": torch.float32}
        )
        config.clip_text_config = parts["clip_text_model"].config
    config.vision_config, config.text_config = tower.config, language_model.config
    for part in parts.values():
        part.config._name_or_path = ""  # the sources are in config.backbones; a published file needs no local path
    return parts


class LMEyeCheckpointMixin:
    """Factory, loading, saving and publishing of [`LMEyeForConditionalGeneration`]."""

    @classmethod
    def from_vision_language_pretrained(
        cls,
        vision_model_name_or_path: str,
        language_model_name_or_path: str,
        interaction: str = "clip_text",
        visual_mapping: str = "linear",
        num_dynamic_tokens: int = 5,
        **kwargs: Any,
    ):
        """
        Attaches a new IPN to a CLIP and a causal language model.

        Args:
            vision_model_name_or_path (`str`): hub id or folder of a CLIP.
            language_model_name_or_path (`str`): hub id or folder of any causal language model.
            interaction, visual_mapping, num_dynamic_tokens: see [`LMEyeConfig`].
            kwargs: any other field of [`LMEyeConfig`]; `dtype`, `device_map`, `attn_implementation` for both
                backbones, `quantization_config` and `trust_remote_code` for the language model; `revision` and others
                prefixed `vision_` or `language_` for one of them; `token`, `cache_dir`, `local_files_only`.

        Returns:
            [`LMEyeForConditionalGeneration`] in eval mode, its IPN in float32.

        Raises:
            ValueError: the vision model is no CLIP, or lacks the text encoder that `clip_text` needs; the language
                model takes no `inputs_embeds`.
        """
        vision_kwargs, language_kwargs = _split_loading_kwargs(kwargs)
        unknown = kwargs.keys() - inspect.signature(LMEyeConfig).parameters.keys()
        if unknown:
            raise TypeError(
                f"{', '.join(sorted(unknown))}: neither a field of LMEyeConfig nor an argument of from_pretrained. "
                "One meant for a single backbone is prefixed vision_ or language_."
            )
        vision_config, clip_text_config = load_clip_config(vision_model_name_or_path, **_hub_kwargs(vision_kwargs))
        if interaction == "clip_text" and clip_text_config is None:
            raise ValueError(
                f'interaction="clip_text" needs CLIP\'s text encoder, and {vision_model_name_or_path} is a vision '
                'tower alone: give a whole CLIP, or choose interaction="cross_attention".'
            )
        text_config = AutoConfig.from_pretrained(
            language_model_name_or_path,
            trust_remote_code=language_kwargs.get("trust_remote_code"),
            **_hub_kwargs(language_kwargs),
        )
        slot = first_slot_id(
            _tokenizer_length(language_model_name_or_path, language_kwargs), text_config.get_text_config().vocab_size
        )
        kwargs = {"image_token_id": slot, "request_token_id": slot + 1, "dynamic_token_id": slot + 2, **kwargs}
        config = LMEyeConfig(
            vision_config=vision_config,
            text_config=text_config,
            clip_text_config=clip_text_config if interaction == "clip_text" else None,
            interaction=interaction,
            visual_mapping=visual_mapping,
            num_dynamic_tokens=num_dynamic_tokens,
            **kwargs,
        )
        sources = {"vision": vision_model_name_or_path, "language": language_model_name_or_path}
        parts = load_backbones(config, *sources.values(), vision_kwargs, language_kwargs)
        if "slot_init_std" not in kwargs:
            config.slot_init_std = _embedding_std(parts["language_model"])
        config.backbones = {
            role: _describe(source, options)
            for (role, source), options in zip(sources.items(), (vision_kwargs, language_kwargs), strict=True)
        }
        return _placed(cls(config, **parts))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: LMEyeConfig | None = None,
        vision_model_name_or_path: str | None = None,
        language_model_name_or_path: str | None = None,
        backbone_trust_remote_code: bool = False,
        **kwargs: Any,
    ):
        """
        Loads a whole checkpoint, or an IPN together with the backbones it names.

        Args:
            pretrained_model_name_or_path (`str`): hub id or folder.
            vision_model_name_or_path, language_model_name_or_path (`str`, *optional*): other locations of the same
                backbones, for a checkpoint that holds the IPN alone.
            backbone_trust_remote_code (`bool`): whether a backbone may run code of its own repository.
            kwargs: as in `PreTrainedModel.from_pretrained`; `dtype`, `device_map`, `attn_implementation`,
                `quantization_config`, `token`, `cache_dir` and `local_files_only` reach the backbones.

        Raises:
            ValueError: a backbone's weights are not those the IPN was trained on; the IPN's own weights are
                incomplete.
        """
        own = config
        if own is None:
            hub = _hub_kwargs(kwargs) | {name: kwargs[name] for name in ("revision", "subfolder") if name in kwargs}
            own = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        if own.includes_backbones:
            if vision_model_name_or_path or language_model_name_or_path:
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds its backbones: other locations are for a checkpoint that "
                    "holds the IPN alone (save_pretrained(..., save_backbones=False))."
                )
            extra = {} if config is None else {"config": config}
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
            return (model, info) if with_info else model
        locations = {"vision": vision_model_name_or_path, "language": language_model_name_or_path}
        return cls._from_interactive_perception_network(
            pretrained_model_name_or_path, own, locations, backbone_trust_remote_code, kwargs
        )

    @classmethod
    def _from_interactive_perception_network(cls, path, config, locations, backbone_trust_remote_code, kwargs):
        own_hub_kwargs = _hub_kwargs(kwargs)
        own_hub_kwargs.update({name: kwargs.pop(name) for name in ("revision", "subfolder") if name in kwargs})
        weights = load_file(cached_file(path, SAFE_WEIGHTS_NAME, **own_hub_kwargs))
        vision_kwargs, language_kwargs = _split_loading_kwargs(kwargs)
        language_kwargs["trust_remote_code"] = backbone_trust_remote_code
        sources = {}
        for role, options in (("vision", vision_kwargs), ("language", language_kwargs)):
            recorded = config.backbones[role]
            sources[role] = locations[role] or recorded["name_or_path"]
            if locations[role] is None and recorded["revision"] is not None:
                options.setdefault("revision", recorded["revision"])
            hub = _hub_kwargs(options) | ({"revision": options["revision"]} if "revision" in options else {})
            try:
                check_fingerprint(role, sources[role], recorded["fingerprint"], **hub)
            except OSError as error:
                raise OSError(
                    f"The {role} model of this IPN is not at {sources[role]}: pass {role}_model_name_or_path= where "
                    "its weights are."
                ) from error
        model = cls(config, **load_backbones(config, *sources.values(), vision_kwargs, language_kwargs))
        expected = model.interactive_perception_state_dict()
        problems = [f"missing: {name}" for name in expected.keys() - weights.keys()]
        problems += [f"left over: {name}" for name in weights.keys() - expected.keys()]
        problems += [
            f"shape of {name}: {list(weights[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ]
        if problems:
            raise ValueError(
                f"The IPN's weights at {path} do not fit its configuration:\n" + "\n".join(sorted(problems))
            )
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(weights[name])
        model.name_or_path = str(path)
        if cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **own_hub_kwargs):
            model.generation_config = GenerationConfig.from_pretrained(path, **own_hub_kwargs)
        return _placed(model)

    def interactive_perception_state_dict(self) -> dict[str, torch.Tensor]:
        """The IPN's trained tensors under their names in the model; CLIP's frozen text encoder is not among them."""
        frozen = "ipn.interaction." if self.config.interaction == "clip_text" else None
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name.startswith("ipn.") and not (frozen and name.startswith(frozen))
        }

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_backbones: bool = True, **kwargs: Any
    ) -> None:
        """
        Saves weights, configuration, a model card and the code that loads them without this package.

        Args:
            save_directory (`str`): a folder.
            save_backbones (`bool`): `False` saves the IPN alone, with the backbones' names, revisions and
                fingerprints.
            args, kwargs: as in `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: `save_backbones=False`, and the backbones were not loaded from anywhere.
        """
        if kwargs.pop("push_to_hub", False):
            return self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), save_backbones=save_backbones)
        folder = Path(save_directory)
        if not save_backbones and not self.config.backbones:
            raise ValueError(
                "The backbones of this model were not loaded from a checkpoint, so an IPN saved alone could never "
                "find them again: build the model with from_vision_language_pretrained, or save it whole."
            )
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_pretrained needs a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        self.config.includes_backbones = save_backbones
        try:
            if save_backbones:
                super().save_pretrained(save_directory, *args, **kwargs)
            else:
                self._save_interactive_perception_network(folder)
        finally:
            self.config.includes_backbones = True
        custom_object_save(self, folder)
        card = folder / "README.md"
        if not card.exists():
            card.write_text(model_card(self.config, save_backbones))

    def _save_interactive_perception_network(self, folder: Path) -> None:
        self.config.architectures = [type(self).__name__]
        tensors = {
            name: tensor.detach().contiguous() for name, tensor in self.interactive_perception_state_dict().items()
        }
        # Written beside and moved into place: a reader finds the old file or the new one, never half of one.
        partial = folder / f".{SAFE_WEIGHTS_NAME}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        os.replace(partial, folder / SAFE_WEIGHTS_NAME)

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
            ValueError: the IPN alone is to be published, and a backbone's location is a local folder.
        """
        if not save_backbones:
            for role, source in (self.config.backbones or {}).items():
                if Path(source["name_or_path"]).exists():
                    raise ValueError(
                        f"The {role} model's location is the local folder {source['name_or_path']}, which nobody else "
                        "has: publish the backbone and build the model from its hub id, or publish with "
                        "save_backbones=True."
                    )
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, save_backbones=save_backbones, **kwargs)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )


def model_card(config: LMEyeConfig, save_backbones: bool) -> str:
    """A model card with base models, use, and the limitations the paper names (section 6)."""
    sources = {role: source["name_or_path"] for role, source in (config.backbones or {}).items()}
    published = [name for name in sources.values() if not Path(name).exists()]
    base_models = "".join(f"- {name}\n" for name in published)
    names = {role: Path(name).name if Path(name).exists() else f"`{name}`" for role, name in sources.items()}
    vision, language = names.get("vision", "a CLIP"), names.get("language", "a causal language model")
    contents = "its backbones" if save_backbones else "no backbones: they are loaded from where they were published"
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
{"base_model:" + chr(10) + base_models if published else ""}tags:
- lmeye
---

# LMEye: {vision} and {language}

An interactive perception network ([arXiv 2305.03701](https://arxiv.org/abs/2305.03701)) between a frozen vision
tower, {vision}, and a frozen language model, {language}. Interaction: `{config.interaction}`. This repository holds
the network and {contents}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("<this repository>", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("<this repository>", trust_remote_code=True)
inputs = processor(images=image, text="What is the man doing?", return_tensors="pt")
print(processor.post_process_image_text_to_text(model.generate(**inputs, max_new_tokens=30)))
```

## Licence
The network is under Apache-2.0. The vision tower and the language model keep the licences of their own repositories,
which bind whoever uses them here.

## Limitations
The language model is used as it is, so its biases and its toxicity come along. What it says of a picture may be made
up: do not rely on an answer where being wrong does harm. Pictures unlike those it was trained on are read worse.
"""


def _split_loading_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the loading arguments out of `kwargs`: those of the vision tower and those of the language model."""
    shared = {name: kwargs.pop(name) for name in (*HUB_KWARGS, *BACKBONE_KWARGS) if name in kwargs}
    if "torch_dtype" in kwargs:
        shared["dtype"] = kwargs.pop("torch_dtype")
    vision, language = dict(shared), dict(shared)
    if isinstance(device_map := shared.get("device_map"), dict):
        vision["device_map"], language["device_map"] = (
            _part_of_device_map(device_map, prefix) for prefix in ("vision_tower", "language_model")
        )
    for name in ("quantization_config", "trust_remote_code"):
        if name in kwargs:
            language[name] = kwargs.pop(name)
    fields = set(inspect.signature(LMEyeConfig).parameters)
    for name in list(kwargs):
        for prefix, options in (("vision_", vision), ("language_", language)):
            if name.startswith(prefix) and name not in fields:
                options[name.removeprefix(prefix)] = kwargs.pop(name)
    return vision, language


def _part_of_device_map(device_map: dict[str, Any], part: str) -> dict[str, Any]:
    """The entries of a device map that concern one part, under the part's own names."""
    inner = {
        name.removeprefix(part).removeprefix("."): device
        for name, device in device_map.items()
        if name == part or name.startswith(f"{part}.")
    }
    return inner or {"": device_map.get("", next(iter(device_map.values())))}


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}


def _tokenizer_length(name_or_path: str, kwargs: dict[str, Any]) -> int:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=kwargs.get("trust_remote_code"), **_hub_kwargs(kwargs)
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


def _describe(name_or_path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    hub = _hub_kwargs(kwargs) | ({"revision": kwargs["revision"]} if kwargs.get("revision") else {})
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=kwargs.get("trust_remote_code"), **hub)
    return {
        "name_or_path": str(name_or_path),
        "revision": getattr(config, "_commit_hash", None) or kwargs.get("revision"),
        "fingerprint": fingerprint(str(name_or_path), **hub),
    }


def _placed(model: nn.Module) -> nn.Module:
    """Puts the IPN where the language model reads its embeddings."""
    device = model.language_model.get_input_embeddings().weight.device
    if device.type != "meta":
        model.ipn.to(device)
    return model.eval()


__all__ = ["LMEyeCheckpointMixin", "first_slot_id", "language_model_widths"]
