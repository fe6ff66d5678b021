"""Samples to batches with labels: what is a target in either stage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.samples import BadSample
from ..modeling.towers import ImageFeatures
from ..processing.answers import UnusableSample, encode_conversation, with_plain_answer
from ..processing.processing_lmeye import LMEyeProcessor


IGNORED = -100
"""The label of a token that is no target."""

Row = dict[str, Any]
"""One row of a batch: `input_ids` and `labels` `[seq]`, and what the vision tower or the network is given."""

_SILENT = "it has no target token: none of its assistant turns says anything. Leave the row out."


@dataclass
class PairCollator:
    """Batches of stage 1: `<img>` at column 0, the caption, and the end of text; the last two are targets.

    For an encoder-decoder, `<img>` is what the encoder reads, and the caption the decoder's labels.

    The caption is tokenized as words throughout: `<img>` or `</s>` written in it are no slot and no end. A caption
    that is cut at `max_length` has no end of text, so that nothing teaches to stop there.

    A sample without a picture is its caption alone, begun as the tokenizer begins texts.

    Args:
        processor: the model's.
        max_length: longest sample in tokens, the slots included.
        skip_bad_samples: whether a sample that cannot be used is left out of its batch and named there, in place of
            an error.
    """

    processor: LMEyeProcessor
    max_length: int | None = None
    skip_bad_samples: bool = False

    def __call__(self, samples: Sequence[dict[str, Any] | BadSample]) -> dict[str, Any]:
        """
        Args:
            samples: `{"id", "image", "caption"}`, as `PairReader` reads them; an image is a picture, the
                `ImageFeatures` of one, or `None`.

        Returns:
            input_ids, attention_mask, labels int64 `[batch, seq]`, padded on the right; pixel_values float32
            `[images, 3, height, width]`, or image_features, where there are any; bad_samples, a list, where there are
            any. With nothing left, one row of padding without targets.

        Raises:
            ValueError: a caption is empty, or `max_length` leaves no room for one; the message names the sample.
        """
        return _collate(samples, self.encode, self.processor, self.skip_bad_samples)

    def encode(self, sample: dict[str, Any]) -> list[Row]:
        """The row of one sample. Raises `UnusableSample`."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        caption = sample["caption"].strip()
        if sample["image"] is None:
            if processor.is_encoder_decoder:
                raise UnusableSample(
                    "it has no picture, and an encoder-decoder then has nothing to read before the caption: give it a "
                    "picture, or leave the row out.",
                    "no target",
                )
            inputs, before = {}, processor.words_tokenizer("")["input_ids"][:1]
            before = before if before == [tokenizer.bos_token_id] else []
        else:
            inputs = _encode_prompt(processor, processor.image_token, [sample["image"]])
            if processor.is_encoder_decoder:
                return [_encoder_decoder_row(processor, inputs, caption, self.max_length)]
            before = inputs["input_ids"][0].tolist()
        targets = tokenizer(caption, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not targets:
            raise UnusableSample("it has no target token: its caption is empty. Leave the row out.", "no target")
        if tokenizer.eos_token_id is not None:
            targets = [*targets, tokenizer.eos_token_id]
        if self.max_length is not None:
            targets = targets[: max(self.max_length - len(before), 0)]
            if not targets:
                raise UnusableSample(
                    f"it has no target token: max_length={self.max_length} leaves no room behind the {len(before)} "
                    "tokens of the image. Raise max_length.",
                    "too long",
                )
        return [
            {
                "input_ids": torch.tensor(before + targets),
                "labels": torch.tensor([IGNORED] * len(before) + targets),
                **_vision_inputs(inputs),
            }
        ]


@dataclass
class ConversationCollator:
    """Batches of stage 2: a conversation in the model's chat template; every answer and its end are targets.

    An answer's targets are what the model would have to generate for it: all that stands between the template's prompt
    for an answer and the end of the turn, the end-of-turn token included. Where the template has no such token, the
    conversation ends with the tokenizer's eos. The tokens are those `processor.apply_chat_template` gives.

    For an encoder-decoder each answer is a row of its own: the encoder reads what stands before it, its labels are the
    answer's tokens.

    Args:
        processor: the model's.
        max_length: longest sample in tokens; a longer one is cut at its end.
        skip_bad_samples: whether a sample that cannot be used is left out of its batch and named there, in place of
            an error.
    """

    processor: LMEyeProcessor
    max_length: int | None = None
    skip_bad_samples: bool = False

    def __call__(self, samples: Sequence[dict[str, Any] | BadSample]) -> dict[str, Any]:
        """
        Args:
            samples: `{"id", "messages"}`, as `ConversationReader` reads them; an image part's image is a picture or
                the `ImageFeatures` of one.

        Returns:
            input_ids, attention_mask, labels int64 `[batch, seq]`, padded on the right; pixel_values float32
            `[images of all samples, 3, height, width]`, or image_features, where there are any; bad_samples, a list,
            where there are any. With nothing left, one row of padding without targets.

        Raises:
            ValueError: no answer has a token; cutting at `max_length` would cut a slot or every target; the chat
                template hides an answer. The message names the sample.
        """
        return _collate(samples, self.encode, self.processor, self.skip_bad_samples)

    def encode(self, sample: dict[str, Any]) -> list[Row]:
        """The row of one sample; for an encoder-decoder a row per answer. Raises `UnusableSample`."""
        if self.processor.is_encoder_decoder:
            return self._encode_answers(sample["messages"])
        return [self._encode(sample["messages"])]

    def _encode(self, messages: list[dict[str, Any]]) -> Row:
        ids, is_target = encode_conversation(self.processor, messages, self.max_length)
        if not any(is_target):
            if any(with_plain_answer(m)["content"][0]["text"] for m in messages if m["role"] == "assistant"):
                raise UnusableSample(
                    f"it has no target token: max_length={self.max_length} cuts its answers off. Raise max_length.",
                    "too long",
                )
            raise UnusableSample(_SILENT, "no target")
        labels = [token if target else IGNORED for token, target in zip(ids, is_target, strict=True)]
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            **_encode_images(self.processor, images),
        }

    def _encode_answers(self, messages: list[dict[str, Any]]) -> list[Row]:
        """A row for each answer of a conversation, for an encoder-decoder."""
        messages = [with_plain_answer(message) for message in messages]
        rows = []
        for turn, message in enumerate(messages):
            answer = message["content"][0]["text"] if message["role"] == "assistant" else ""
            if not answer:
                continue
            before = messages[:turn]
            images = [part["image"] for earlier in before for part in earlier["content"] if part["type"] == "image"]
            prompt = self.processor.apply_chat_template(before, add_generation_prompt=True)
            inputs = _encode_prompt(self.processor, prompt, images)
            rows.append(_encoder_decoder_row(self.processor, inputs, answer, self.max_length, f"turn {turn} of it"))
        if not rows:
            raise UnusableSample(_SILENT, "no target")
        return rows


def _collate(
    samples: Sequence[dict[str, Any] | BadSample],
    encode: Callable[[dict[str, Any]], list[Row]],
    processor: LMEyeProcessor,
    skip_bad_samples: bool,
) -> dict[str, Any]:
    """The rows of all samples as one batch, and what cannot be used under `bad_samples`."""
    rows: list[Row] = []
    bad_samples: list[BadSample] = []
    for sample in samples:
        if isinstance(sample, BadSample):
            bad_samples.append(sample)
            continue
        try:
            rows += encode(sample)
        except ValueError as error:
            if not skip_bad_samples:
                raise ValueError(f"Sample {sample['id']}: {error}") from error
            bad_samples.append(BadSample.from_error(sample["id"], error))
    pad_token_id = processor.tokenizer.pad_token_id
    if not rows:
        rows = [{"input_ids": torch.tensor([pad_token_id or 0]), "labels": torch.tensor([IGNORED])}]
    batch: dict[str, Any] = pad_right(rows, pad_token_id)
    if bad_samples:
        batch["bad_samples"] = bad_samples
    return batch


def _encode_images(processor: LMEyeProcessor, images: Sequence[Any]) -> dict[str, Any]:
    """What the model is given of pictures, or of the features of pictures."""
    if not images:
        return {}
    if isinstance(images[0], ImageFeatures):
        return {"image_features": ImageFeatures.join(images)}
    return dict(processor.image_processor(list(images), return_tensors="pt"))


def _encode_prompt(processor: LMEyeProcessor, text: str, images: Sequence[Any]) -> Mapping[str, Any]:
    """What `processor` makes of a text and its pictures, or the features of these."""
    if images and isinstance(images[0], ImageFeatures):
        return processor(text=text, image_features=ImageFeatures.join(images), return_tensors="pt")
    return processor(text=text, images=list(images) or None, return_tensors="pt")


def _encoder_decoder_row(
    processor: LMEyeProcessor,
    inputs: Mapping[str, torch.Tensor],
    answer: str,
    max_length: int | None,
    name: str = "it",
) -> Row:
    """One row of an encoder-decoder: what `inputs` says, and the answer's tokens as labels, cut at `max_length`."""
    ids = inputs["input_ids"][0]
    if max_length is not None and len(ids) > max_length:
        raise UnusableSample(
            f"{name} is {len(ids)} tokens long before its answer, longer than max_length={max_length}: raise "
            "max_length, or shorten it.",
            "too long",
        )
    # As words throughout: a slot's name or an end of text written in an answer is neither.
    targets = processor.words_tokenizer(text_target=answer, split_special_tokens=True)["input_ids"]
    if not answer or not targets:
        raise UnusableSample(f"{name} has no target token: there is nothing to say. Leave the row out.", "no target")
    return {"input_ids": ids, "labels": torch.tensor(targets[:max_length]), **_vision_inputs(inputs)}


def _vision_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a processor's output is for the vision tower, or comes from it."""
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


def pad_right(rows: Sequence[Row], pad_token_id: int | None) -> dict[str, Any]:
    """
    Rows as one batch.

    Args:
        rows: `input_ids` and `labels` `[seq]` each (of two lengths where labels are a decoder's), with or without
            `pixel_values` `[images, 3, H, W]` and what else the vision tower takes, or `image_features`.
        pad_token_id: fills `input_ids`.

    Returns:
        input_ids, attention_mask, labels `[batch, longest seq]`; pixel_values `[images of all rows, 3, H, W]` and the
        like where any row has them.
    """
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])

    def padded(name: str, value: int) -> torch.Tensor:
        longest = max(len(row[name]) for row in rows)
        fill = [torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows]
        return torch.stack(fill)

    batch = {
        "input_ids": padded("input_ids", pad_token_id or 0),  # any id will do where nothing attends
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": padded("labels", IGNORED),
    }
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("input_ids", "labels")):
        parts = [row[name] for row in rows if name in row]
        batch[name] = ImageFeatures.join(parts) if name == "image_features" else torch.cat(parts)
    return batch


__all__ = ["ConversationCollator", "PairCollator", "pad_right"]
