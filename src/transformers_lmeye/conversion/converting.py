"""From a released file to a folder that `from_pretrained` loads."""

import os
import shutil
from os import PathLike
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from ..modeling.modeling_lmeye import LMEyeForConditionalGeneration
from ..processing.processing_lmeye import LMEyeProcessor
from .released import (
    LAYOUTS,
    QUERY_TOKENS,
    STAGE_1,
    STAGE_2_STATIC,
    Widths,
    expected_shapes,
    layout_of,
    problems,
    read_released,
    token_counts,
)


logger = logging.get_logger(__name__)


def convert(
    checkpoint: str | PathLike,
    output: str | PathLike,
    vision_model_name_or_path: str,
    language_model_name_or_path: str | None = None,
    clip_text_model_name_or_path: str | None = None,
    stage1: str | PathLike | None = None,
    whole: bool = False,
    add_bos: bool = False,
) -> Path:
    r"""
    Writes a released checkpoint in this package's format, with its processor and a model card.

    The number of dynamic tokens and of soft tokens per image follow from the shapes. What the slots of the released
    model held in the language model's own embedding table is added to the slots' vectors: version 1 put its slots
    behind the tokenizer's words, where OPT and BLOOM have rows of their own and LLaMA has none; version 0.1 built all
    slots on the embedding of id 0.

    Args:
        checkpoint (`str`): the `.pth` file.
        output (`str`): the folder to be written; it must not exist, or be empty. On an error nothing is left there.
        vision_model_name_or_path (`str`): the CLIP of a version 1 file, the BLIP-2 of a version 0.1 file.
        language_model_name_or_path (`str`): the language model of a version 1 file; a BLIP-2 brings its own.
        clip_text_model_name_or_path (`str`): the CLIP whose text encoder interacts, for a version 0.1 file.
        stage1 (`str`, *optional*): the stage-1 file of a stage-2 file that lacks the static mapping.
        whole (`bool`): whether to write the frozen parts as well. Without them the folder names them.
        add_bos (`bool`): whether the processor starts prompts with bos, as some LLaMA releases were trained.

    Returns:
        `Path`: the output folder.

    Raises:
        ValueError: tensors are missing, left over or of the wrong shape (the message lists all of them); the file is
            no released checkpoint; an argument does not go with its layout; the file's `query_tokens` are not those of
            the BLIP-2.
        FileExistsError: there is something at `output`.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists: choose another output folder, or remove it first.")
    tensors = read_released(checkpoint)
    layout = layout_of(tensors, checkpoint)
    if stage1 is not None:
        tensors |= _static_mapping(stage1, layout, tensors)
    names = _Backbones(layout, vision_model_name_or_path, language_model_name_or_path, clip_text_model_name_or_path)
    # On the meta device every shape is known, and no weight is read.
    probe = names.build(num_dynamic_tokens=1, num_fine_grained_tokens=1, device_map="meta")
    if probe.config.is_encoder_decoder != (layout == "v0.1"):
        kind = "an encoder-decoder" if layout == "v0.1" else "a causal language model"
        raise ValueError(f"A checkpoint of {layout} was trained on {kind}, and {names.language} holds none.")
    widths = _widths(probe)
    num_dynamic_tokens, num_fine_grained_tokens = token_counts(layout, tensors, widths)
    found = problems(tensors, expected_shapes(layout, widths, num_dynamic_tokens, num_fine_grained_tokens))
    if found:
        message = f"{checkpoint} does not hold the tensors of its layout ({layout}):\n  " + "\n  ".join(found)
        if layout == "v1, stage 2" and not any(name.split(".")[0] in STAGE_2_STATIC for name in tensors):
            message += "\nThe static mapping is in the file of stage 1: pass it as stage1 (--stage1)."
        raise ValueError(message)

    # Version 1 added `<img>` and `<img-d>` to the tokenizer, which gives them its length and the next id.
    slot = None if layout == "v0.1" else len(AutoTokenizer.from_pretrained(names.language))
    reads_weights = whole or slot is None or slot < widths.table_rows
    model = names.build(
        num_dynamic_tokens=num_dynamic_tokens,
        num_fine_grained_tokens=num_fine_grained_tokens,
        **({} if reads_weights else {"device_map": "meta"}),
    )
    if layout == "v0.1":
        _settle_query_tokens(model, tensors.pop(QUERY_TOKENS), checkpoint, whole)
    _load(model, layout, tensors, slot)
    processor = names.processor(model, add_bos)

    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial, save_backbones=whole)
        processor.save_pretrained(partial)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info(f"{checkpoint} ({layout}, {num_dynamic_tokens} dynamic tokens) is now {output}")
    return output


class _Backbones:
    """Names of the frozen parts, and what is built on them."""

    def __init__(self, layout: str, vision: str, language: str | None, clip_text: str | None):
        if layout == "v0.1":
            if language is not None:
                raise ValueError(
                    "A v0.1 checkpoint takes its language model from the BLIP-2: leave the language model out."
                )
            if clip_text is None:
                raise ValueError(
                    "A v0.1 checkpoint interacts through CLIP's text encoder: name the CLIP (--clip-text)."
                )
        else:
            if language is None:
                raise ValueError(f"A checkpoint of {layout} needs the name of its language model (--language).")
            if clip_text is not None:
                raise ValueError(f"A checkpoint of {layout} has one CLIP for vision and text: leave --clip-text out.")
        self.layout, self.vision = layout, str(vision)
        self.language = str(language or vision)
        self.clip_text = None if clip_text is None else str(clip_text)

    def build(self, num_dynamic_tokens: int, num_fine_grained_tokens: int, **kwargs) -> LMEyeForConditionalGeneration:
        if self.layout == "v0.1":
            variant = {
                "visual_mapping": "qformer",
                "fine_grained_source": "qformer",
                "fine_grained_dropout": 0.0,
                "keep_request_token": True,
                "dynamic_readout": "last",
                "clip_text_model_name_or_path": self.clip_text,
            }
        else:
            interaction = "none" if self.layout == "v1, stage 1" else "clip_text"
            variant = {"interaction": interaction, "num_fine_grained_tokens": num_fine_grained_tokens}
        return LMEyeForConditionalGeneration.from_vision_language_pretrained(
            self.vision, self.language, num_dynamic_tokens=num_dynamic_tokens, **variant, **kwargs
        )

    def processor(self, model: LMEyeForConditionalGeneration, add_bos: bool) -> LMEyeProcessor:
        config = model.config
        processor = LMEyeProcessor.from_vision_language_pretrained(
            self.vision,
            self.language,
            interaction=config.interaction,
            num_static_tokens=config.num_static_tokens,
            num_dynamic_tokens=config.num_dynamic_tokens,
            add_bos=add_bos,
            keep_request_token=config.keep_request_token,
        )
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"The processor gives `<img>` the id {processor.image_token_id}, the model expects "
                f"{config.image_token_id}: tokenizer and language model do not belong together."
            )
        return processor


def _static_mapping(stage1: str | PathLike, layout: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a stage-1 file under their names in stage 2."""
    if layout != "v1, stage 2":
        raise ValueError(
            f"A stage-1 file goes with a stage-2 file; this one is {layout}: leave stage1 (--stage1) out."
        )
    mapping = read_released(stage1)
    if layout_of(mapping, stage1) != "v1, stage 1":
        raise ValueError(f"{stage1} is no stage-1 file: it holds {', '.join(sorted(mapping))}.")
    own = sorted(name for name in tensors if name.split(".")[0] in STAGE_2_STATIC)
    if own:
        raise ValueError(
            f"The stage-2 file holds the static mapping itself ({', '.join(own)}): leave stage1 (--stage1) out."
        )
    renamed = dict(zip(STAGE_1, STAGE_2_STATIC, strict=True))
    result = {}
    for name, value in mapping.items():
        part, *rest = name.split(".")
        result[".".join([renamed.get(part, part), *rest])] = value
    return result


def _widths(model: LMEyeForConditionalGeneration) -> Widths:
    """The widths of the frozen parts, read off a network with one token of each kind."""
    ipn = model.ipn
    widths = {
        "input": ipn.visual_mapping.out_features,
        "image": ipn.visual_mapping.in_features,
        "num_queries": model.config.num_static_tokens,
        "table_rows": model.get_input_embeddings().weight.shape[0],
    }
    if model.config.interaction == "clip_text":
        widths |= {
            "request": ipn.request_projection.in_features,
            "text": ipn.request_projection.out_features,
            "projection": ipn.dynamic_projection.in_features,
        }
    return Widths(**widths)


def _settle_query_tokens(
    model: LMEyeForConditionalGeneration, released: torch.Tensor, checkpoint: str | PathLike, whole: bool
) -> None:
    """The Q-Former's queries are no part of the network: they are the BLIP-2's own, or need a whole checkpoint."""
    own = model.qformer.query_tokens
    if torch.equal(own.to(released.dtype), released) or torch.equal(own, released.to(own.dtype)):
        return
    if not whole:
        difference = float((own.float() - released.float()).abs().max())
        raise ValueError(
            f"query_tokens of {checkpoint} are not those of the BLIP-2 (largest difference {difference:.3g}), and a "
            "checkpoint of the network alone has no place for them: name the BLIP-2 that was trained on, or write a "
            "whole checkpoint (--whole), which keeps the file's."
        )
    with torch.no_grad():
        own.copy_(released)
    # The Q-Former is no longer the one that any backbone's files hold.
    model.config.backbones = None


def _load(
    model: LMEyeForConditionalGeneration, layout: str, tensors: dict[str, torch.Tensor], slot: int | None
) -> None:
    """Fills the network; `slot` is the id of the released `<img>` slot (`None`: all were built on id 0)."""
    targets = {name: target for name, target in LAYOUTS[layout].items() if target is not None}
    values = {}
    for name, value in tensors.items():
        part, *rest = name.split(".")
        values[".".join([targets[part], *rest])] = value.float()
    table = model.get_input_embeddings().weight
    if slot is None:
        base = table[0].detach().float()
        values["image_token"] = torch.zeros_like(base)
        bases = dict.fromkeys(("image_token", "request_token", "dynamic_token"), base)
    else:
        ids = {"image_token": slot, "request_token": slot + 1}
        bases = {
            name: table[row].detach().float() for name, row in ids.items() if name in values and row < table.shape[0]
        }
    for name, base in bases.items():
        values[name] = values[name] + base
    parameters = {
        name.removeprefix("ipn."): tensor for name, tensor in model.interactive_perception_state_dict().items()
    }
    if parameters.keys() != values.keys():
        raise RuntimeError(f"{layout} fills {sorted(values)}, the network has {sorted(parameters)}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = values[name].reshape(-1, parameter.shape[-1]) if parameter.dim() > 1 else values[name].flatten()
            parameter.copy_(value.expand_as(parameter))


__all__ = ["convert"]
