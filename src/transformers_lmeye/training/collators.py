"""Samples to batches with labels: what is a target in either stage."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..processing.processing_lmeye import SLOT_TOKENS, LMEyeProcessor


IGNORED = -100
"""The label of a token that is no target."""


@dataclass
class PairCollator:
    """Batches of stage 1: `<img>` at column 0, the caption, and the end of text; the last two are targets.

    For an encoder-decoder, `<img>` is what the encoder reads, and the caption the decoder's labels.

    The caption is tokenized as words throughout: `<img>` or `</s>` written in it are no slot and no end. A caption
    that is cut at `max_length` has no end of text, so that nothing teaches to stop there.

    Args:
        processor: the model's.
        max_length: longest sample in tokens, the slots included.
    """

    processor: LMEyeProcessor
    max_length: int | None = None

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            samples: `{"id", "image", "caption"}`, as `PairDataset` gives them.

        Returns:
            input_ids, attention_mask, labels int64 `[batch, seq]`, padded on the right; pixel_values float32
            `[batch, 3, height, width]`.

        Raises:
            ValueError: a caption is empty, or `max_length` leaves no room for one; the message names the sample.
        """
        return pad_right([self._encode(sample) for sample in samples], self.processor.tokenizer.pad_token_id)

    def _encode(self, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        inputs = self.processor(images=sample["image"], text=self.processor.image_token, return_tensors="pt")
        slots = inputs["input_ids"][0].tolist()
        caption = sample["caption"].strip()
        if self.processor.is_encoder_decoder:
            return _encoder_decoder_row(self.processor, f"Sample {sample['id']}", inputs, caption, self.max_length)
        targets = tokenizer(caption, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not targets:
            raise ValueError(f"Sample {sample['id']} has no target token: its caption is empty. Leave the row out.")
        if tokenizer.eos_token_id is not None:
            targets = [*targets, tokenizer.eos_token_id]
        if self.max_length is not None:
            targets = targets[: max(self.max_length - len(slots), 0)]
            if not targets:
                raise ValueError(
                    f"Sample {sample['id']} has no target token: max_length={self.max_length} leaves no room behind "
                    f"the {len(slots)} tokens of the image. Raise max_length."
                )
        return {
            "input_ids": torch.tensor(slots + targets),
            "labels": torch.tensor([IGNORED] * len(slots) + targets),
            **_vision_inputs(inputs),
        }


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
    """

    processor: LMEyeProcessor
    max_length: int | None = None

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            samples: `{"id", "messages"}`, as `ConversationDataset` gives them.

        Returns:
            input_ids, attention_mask, labels int64 `[batch, seq]`, padded on the right; pixel_values float32
            `[images of all samples, 3, height, width]` where there are any.

        Raises:
            ValueError: no answer has a token; cutting at `max_length` would cut a slot or every target; the chat
                template hides an answer. The message names the sample.
        """
        rows = []
        for sample in samples:
            try:
                if self.processor.is_encoder_decoder:
                    rows += self._encode_answers(sample["messages"])
                else:
                    rows.append(self._encode(sample["messages"]))
            except ValueError as error:
                raise ValueError(f"Sample {sample['id']}: {error}") from error
        return pad_right(rows, self.processor.tokenizer.pad_token_id)

    def _encode(self, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        text, spans, open_end = self._render(messages)
        if images:
            text, spans = self._multiply_slots(text, spans)
        tokenizer = self.processor.tokenizer if images else self.processor.words_tokenizer
        bos = tokenizer.bos_token
        special = not images and not (bos is not None and text.startswith(bos))
        inputs = self.processor(images=images or None, text=text, add_special_tokens=special, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        inserted = len(ids) - len(encoding["input_ids"])  # a bos, with add_bos
        is_target = [False] * inserted + [
            any(_overlap(offsets, span) for span in spans) for offsets in encoding["offset_mapping"]
        ]
        if open_end and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            is_target.append(True)
        if self.max_length is not None and len(ids) > self.max_length:
            slots = set(self.processor.slot_token_ids)
            if images and not slots.isdisjoint(ids[self.max_length :]):
                raise ValueError(
                    f"it is {len(ids)} tokens long, and cutting it at max_length={self.max_length} would cut a slot. "
                    "Raise max_length, or give the conversation fewer turns."
                )
            ids, is_target = ids[: self.max_length], is_target[: self.max_length]
        if not any(is_target):
            reason = "none of its assistant turns says anything. Leave the row out."
            if spans:
                reason = f"max_length={self.max_length} cuts its answers off. Raise max_length."
            raise ValueError(f"it has no target token: {reason}")
        labels = [token if target else IGNORED for token, target in zip(ids, is_target, strict=True)]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), **_vision_inputs(inputs)}

    def _encode_answers(self, messages: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """A row for each answer of a conversation, for an encoder-decoder."""
        messages = [_with_plain_answer(message) for message in messages]
        rows = []
        for turn, message in enumerate(messages):
            answer = message["content"][0]["text"] if message["role"] == "assistant" else ""
            if not answer:
                continue
            before = messages[:turn]
            images = [part["image"] for earlier in before for part in earlier["content"] if part["type"] == "image"]
            prompt = self.processor.apply_chat_template(before, add_generation_prompt=True)
            inputs = self.processor(images=images or None, text=prompt, return_tensors="pt")
            rows.append(_encoder_decoder_row(self.processor, f"its turn {turn}", inputs, answer, self.max_length))
        if not rows:
            raise ValueError("it has no target token: none of its assistant turns says anything. Leave the row out.")
        return rows

    @cached_property
    def _end_of_turn(self) -> re.Pattern:
        """A special token behind an answer, blanks before it allowed."""
        special = {token.content for token in self.processor.tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(special - set(SLOT_TOKENS), key=len, reverse=True)
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, longest_first))})")

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]], bool]:
        """The conversation as text, each slot written once; the characters that are targets, one span per answer; and
        whether it ends with an answer that no end-of-turn token closes."""
        messages = [_with_plain_answer(message) for message in messages]

        def render(count: int, prompt: bool = False) -> str:
            return self.processor.apply_chat_template(messages[:count], add_generation_prompt=prompt) if count else ""

        text = render(len(messages))
        spans = []
        for turn, message in enumerate(messages):
            answer = message["content"][0]["text"] if message["role"] == "assistant" else ""
            if not answer:
                continue
            prompt = render(turn, prompt=True)
            follows_prompt = text.startswith(prompt)
            before = prompt if follows_prompt else render(turn)
            place = text.find(answer, len(before))
            if not text.startswith(before) or place < 0:
                raise ValueError(
                    f"the chat template does not show assistant turn {turn} as it is written, so its tokens cannot be "
                    "told from others. Choose another template (processor.chat_template)."
                )
            # What a template puts between its prompt and the answer (an empty thought, say) is for the model to say.
            start = len(prompt) if follows_prompt else place
            end = place + len(answer)
            marker = self._end_of_turn.match(text, end)
            spans.append((start, marker.end() if marker else end))
            if marker is None and not text[end:].strip():
                return text[:end], spans, True
        return text, spans, False

    def _multiply_slots(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """The text with each slot of its prompts written as often as the model has tokens for it, and its spans."""
        multiplied, moved, position = "", [], 0
        for start, end in [*spans, (len(text), len(text))]:
            multiplied += self.processor.multiply_slots(text[position:start])
            moved.append((len(multiplied), len(multiplied) + end - start))
            multiplied += text[start:end]
            position = end
        return multiplied, moved[:-1]


def _encoder_decoder_row(
    processor: LMEyeProcessor, name: str, inputs: Mapping[str, torch.Tensor], answer: str, max_length: int | None
) -> dict[str, torch.Tensor]:
    """One row of an encoder-decoder: what `inputs` says, and the answer's tokens as labels, cut at `max_length`."""
    ids = inputs["input_ids"][0]
    if max_length is not None and len(ids) > max_length:
        raise ValueError(
            f"{name} is {len(ids)} tokens long before its answer, longer than max_length={max_length}: raise "
            "max_length, or shorten it."
        )
    # As words throughout: a slot's name or an end of text written in an answer is neither.
    targets = processor.words_tokenizer(text_target=answer, split_special_tokens=True)["input_ids"]
    if not answer or not targets:
        raise ValueError(f"{name} has no target token: there is nothing to say. Leave the row out.")
    return {"input_ids": ids, "labels": torch.tensor(targets[:max_length]), **_vision_inputs(inputs)}


def _vision_inputs(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a processor's output is for the vision tower."""
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


def _with_plain_answer(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's text parts joined to one without outer blanks, as templates show it."""
    if message["role"] != "assistant":
        return message
    text = "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
    return {**message, "content": [{"type": "text", "text": text}]}


def _overlap(offsets: tuple[int, int], span: tuple[int, int]) -> bool:
    return offsets[0] < span[1] and offsets[1] > span[0]


def pad_right(rows: Sequence[dict[str, torch.Tensor]], pad_token_id: int | None) -> dict[str, torch.Tensor]:
    """
    Rows as one batch.

    Args:
        rows: `input_ids` and `labels` `[seq]` each (of two lengths where labels are a decoder's), with or without
            `pixel_values` `[images, 3, H, W]` and what else the vision tower takes.
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
        batch[name] = torch.cat([row[name] for row in rows if name in row])
    return batch


__all__ = ["ConversationCollator", "PairCollator", "pad_right"]
