"""What TRL's trainers need around LMEye: samples as their rows, and a reference model that costs no memory.

Nothing here imports TRL: these are parts for its trainers, put together in `examples/run_sft_trl.py` and `run_dpo.py`.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import datasets
import torch

from ..data.images import open_image
from ..data.samples import BadSample
from ..modeling.modeling_lmeye import LMEyeForConditionalGeneration


def as_trl_dataset(samples: Sequence[dict[str, Any] | BadSample]) -> datasets.Dataset:
    """
    Conversations as TRL's trainers take them: rows of `messages` and `images`.

    Pictures are opened when a row is read, in the data loader's workers. Train with `remove_unused_columns=False`: the
    columns come into being as they are read.

    Args:
        samples: of stage 2, such as a `SampleDataset` of a `ConversationReader`.

    Raises:
        ValueError: when a row is read, that it is a `BadSample`: TRL's trainers have no place to report one.
    """
    rows = datasets.Dataset.from_dict({"index": range(len(samples))})
    return rows.with_transform(partial(_messages_and_images, samples))


def _messages_and_images(samples: Sequence[dict[str, Any] | BadSample], batch: dict[str, list]) -> dict[str, list]:
    rows: dict[str, list] = {"messages": [], "images": []}
    for index in batch["index"]:
        sample = samples[index]
        if isinstance(sample, BadSample):
            raise ValueError(sample.reason)
        images, messages = [], []
        for message in sample["messages"]:
            images += [part["image"] for part in message["content"] if part["type"] == "image"]
            content = [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]
            messages.append({**message, "content": content})
        rows["images"].append(images)
        rows["messages"].append(messages)
    return rows


def as_trl_preferences(
    rows: datasets.Dataset, image_column: str = "image", open_image: Callable[[Any], Any] = open_image
) -> datasets.Dataset:
    """
    Preference pairs as TRL's `DPOTrainer` takes them: rows of `images`, `prompt`, `chosen` and `rejected`.

    Pictures are opened when a row is read, in the data loader's workers. Train with `remove_unused_columns=False`.

    Args:
        rows: with a column of pictures, one or a list, and `prompt`, `chosen` and `rejected`: messages, or texts that
            become a question about the pictures and two answers.
        image_column: its name.
        open_image: opens a picture's value.

    Raises:
        ValueError: a column is missing; or, when a row is read, a picture cannot be opened.
    """
    for column in (image_column, "prompt", "chosen", "rejected"):
        if column not in rows.column_names:
            raise ValueError(
                f"The data set has no column {column!r}; it has {', '.join(rows.column_names)}. Preference pairs have "
                "prompt, chosen and rejected, and a column of pictures (--image_column)."
            )
    return rows.with_transform(partial(_preferences, image_column, open_image))


def _preferences(image_column: str, open_image: Callable[[Any], Any], batch: dict[str, list]) -> dict[str, list]:
    images = []
    for value in batch[image_column]:
        values = value if isinstance(value, list) else [] if value is None else [value]
        images.append([open_image(part) for part in values])
    return {
        "images": images,
        "prompt": [_messages(value, "user") for value in batch["prompt"]],
        "chosen": [_messages(value, "assistant") for value in batch["chosen"]],
        "rejected": [_messages(value, "assistant") for value in batch["rejected"]],
    }


def _messages(value: str | list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    """A text as one message; messages without the empty keys that Arrow gives parts of unlike types."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = []
    for message in value:
        content = message["content"]
        if not isinstance(content, str):
            content = [{key: held for key, held in part.items() if held is not None} for part in content]
        messages.append({**message, "content": content})
    return messages


def check_trl_head(model: LMEyeForConditionalGeneration) -> None:
    """
    Checks that the head which TRL's trainers put on `model` scores words as the language model's own does.

    TRL computes logits itself, from the head's weight and what the configuration says of scales and caps.

    Args:
        model: that a TRL trainer was made with.

    Raises:
        ValueError: it does not.
    """
    last = model.get_input_embeddings().weight.shape[0] - 1
    ids = torch.linspace(0, last, 8, device=model.device).long()[None]
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        expected = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    apart = float((found.float() - expected).abs().max())
    if not apart < 100 * torch.finfo(model.dtype).eps * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"TRL scores the words of {type(model.language_model).__name__} otherwise than its own head does "
            f"(log-probabilities differ by {apart:.3g}): train it with examples/run_instruct.py."
        )


def reference_model(model: LMEyeForConditionalGeneration) -> LMEyeForConditionalGeneration:
    """
    The model as it is now, to hold a policy against while `model` trains: for `DPOTrainer(ref_model=...)`.

    It shares every tensor that does not train with `model`, the backbones above all, and has copies of the others: the
    IPN's, and an adapter's where the language model has one that trains.

    Args:
        model: after `freeze_for_stage`.

    Returns:
        [`LMEyeForConditionalGeneration`] in eval mode, nothing of which trains.
    """
    shared = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    reference = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    if isinstance(vars(reference).get("forward"), MethodType):
        del reference.forward  # the head of a TRL trainer that had the model before, which would read with the model
    return reference.requires_grad_(False).eval()


__all__ = ["as_trl_dataset", "as_trl_preferences", "check_trl_head", "reference_model"]
