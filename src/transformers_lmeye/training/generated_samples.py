"""What the model says to a few samples of the evaluation data, beside what it should."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..modeling.modeling_lmeye import LMEyeForConditionalGeneration
from .collators import IGNORED


MAX_NEW_TOKENS = 64
_MAX_TRIES = 16  # samples looked at for one with a picture and a target
_SLOT_RUN = re.compile(r"(<img(?:-[dq])?>)(?:\s*\1)+")


def generate_samples(
    model: LMEyeForConditionalGeneration,
    tokenizer: Any,
    collator: Callable[[Sequence[Any]], dict[str, Any]],
    dataset: Sequence[Any],
    num_samples: int,
) -> Iterator[dict[str, str]]:
    """
    Answers some samples greedily, in at most 64 tokens.

    A sample is collated as it is in training; what stands before its first target is the prompt: in stage 1 the image
    slots, in stage 2 the conversation up to its first answer. Samples without picture or target are passed over,
    at most 15 in a row: of words alone nothing is answered.

    Args:
        model: in evaluation mode.
        tokenizer: the language model's, with the slots.
        collator: makes batches with `labels` of the samples.
        dataset: map-style; samples are taken at even distances.
        num_samples: how many.

    Yields:
        `dict`: `id` (the sample's, else its index), `prompt`, `reference` and `generated`.
    """
    taken: set[int] = set()
    for place in range(min(num_samples, len(dataset))):
        start = place * len(dataset) // num_samples
        for index in range(start, min(start + _MAX_TRIES, len(dataset))):
            if index in taken:
                continue
            taken.add(index)
            sample = dataset[index]
            inputs, reference = _prompt_and_reference(model, collator([sample]))
            if inputs is None:
                continue
            output = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=MAX_NEW_TOKENS)[0]
            prompt = inputs["input_ids"][0]
            new = output if model.config.is_encoder_decoder else output[len(prompt) :]
            name = sample["id"] if isinstance(sample, Mapping) and "id" in sample else str(index)
            yield {
                "id": name,
                "prompt": _SLOT_RUN.sub(r"\1", tokenizer.decode(prompt)),
                "reference": tokenizer.decode(reference, skip_special_tokens=True).strip(),
                "generated": tokenizer.decode(new, skip_special_tokens=True).strip(),
            }
            break


def _prompt_and_reference(
    model: LMEyeForConditionalGeneration, batch: dict[str, Any]
) -> tuple[dict[str, Any] | None, torch.Tensor | None]:
    """The first row's prompt, as inputs of `generate`, and the tokens of its first answer; or `None`."""
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    targets = labels != IGNORED
    if not targets.any():
        return None, None
    if model.config.is_encoder_decoder:
        prompt, reference = ids[batch["attention_mask"][0].bool()], labels[targets]
    else:
        start = int(targets.int().argmax())
        after = (~targets[start:]).nonzero()
        prompt = ids[:start]
        reference = labels[start : start + int(after[0])] if len(after) else labels[start:]
    num_images = int((prompt == model.config.image_token_id).sum()) // model.config.num_static_tokens
    if not num_images:
        return None, None
    not_vision = ("input_ids", "attention_mask", "labels", "bad_samples")
    inputs = {name: value[:num_images] for name, value in batch.items() if name not in not_vision}
    inputs |= {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt)[None]}
    return {name: value.to(model.device) for name, value in inputs.items()}, reference


__all__ = ["MAX_NEW_TOKENS", "generate_samples"]
