"""Which tokens of a conversation are an assistant's: what a model is to say, told from what it is to read."""

import re
from typing import Any


class UnusableSample(ValueError):
    """A sample that would teach nothing, or something wrong.

    Attributes:
        kind: `"no target"`, `"too long"` (cutting it would cut a slot, or its targets off), `"template"` (the chat
            template hides an answer) or `"slots"` (pictures and `<img>` slots differ in number).
    """

    def __init__(self, message: str, kind: str = "unusable"):
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return self.args[0]


def encode_conversation(
    processor, messages: list[dict[str, Any]], max_length: int | None = None, **template: Any
) -> tuple[list[int], list[bool]]:
    """
    A conversation's tokens, and which of them are answers.

    An answer is what the model would have to generate for it: all that stands between the template's prompt for an
    answer and the end of the turn, the end-of-turn token included. Where the template has none, the conversation ends
    with its last answer and the tokenizer's eos. Answers are taken without blanks around them.

    Args:
        processor ([`LMEyeProcessor`]): of a causal model.
        messages: contents are texts or lists of image and text parts.
        max_length (`int`, *optional*): a longer conversation is cut at its end.
        template: for `apply_chat_template`, such as `chat_template`.

    Returns:
        ids `[seq]`, and for each whether it is of an answer.

    Raises:
        UnusableSample: the chat template does not show an answer as it is written, the message names its turn; cutting
            at `max_length` would cut a slot; images and `<img>` slots differ in number.
    """
    num_images = sum(part["type"] == "image" for message in messages for part in _parts(message))
    text, spans, open_end = find_answers(processor, messages, **template)
    if num_images:
        text, spans = _multiply_slots(processor, text, spans)
    tokenizer = processor.tokenizer if num_images else processor.words_tokenizer
    bos = tokenizer.bos_token
    special = not num_images and not (bos is not None and text.startswith(bos))
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    is_answer = [any(_overlap(token, span) for span in spans) for token in encoding["offset_mapping"]]
    if num_images and processor.add_bos and ids[:1] != [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)
        is_answer.insert(0, False)
    if open_end and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        is_answer.append(True)
    if num_images and ids.count(processor.image_token_id) != num_images * processor.num_static_tokens:
        raise UnusableSample(
            f"Image features and image tokens do not match: it has {num_images} images and "
            f"{text.count(processor.image_token)} `<img>` slots. `<img>` written among its words is a slot: spell it "
            "otherwise.",
            "slots",
        )
    if max_length is not None and num_images and not set(processor.slot_token_ids).isdisjoint(ids[max_length:]):
        raise UnusableSample(
            f"it is {len(ids)} tokens long, and cutting it at max_length={max_length} would cut a slot. Raise "
            "max_length, or give the conversation fewer turns.",
            "too long",
        )
    return ids[:max_length], is_answer[:max_length]


def find_answers(
    processor, messages: list[dict[str, Any]], **template: Any
) -> tuple[str, list[tuple[int, int]], bool]:
    """
    Finds answers in a conversation's text.

    Args:
        processor, messages, template: as in [`encode_conversation`].

    Returns:
        the text, each slot written once; the characters of every answer and its end, `(start, end)`; and whether the
        text ends with an answer that no end-of-turn token closes.

    Raises:
        UnusableSample: as [`encode_conversation`].
    """
    messages = [with_plain_answer(message) for message in messages]

    def render(count: int, prompt: bool = False) -> str:
        if not count:
            return ""
        return processor.apply_chat_template(messages[:count], add_generation_prompt=prompt, **template)

    text = render(len(messages))
    end_of_turn = _end_of_turn(processor)
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
            raise UnusableSample(
                f"the chat template does not show assistant turn {turn} as it is written, so its tokens cannot be "
                "told from others. Choose another template (processor.chat_template).",
                "template",
            )
        # What a template puts between its prompt and the answer (an empty thought, say) is for the model to say.
        start = len(prompt) if follows_prompt else place
        end = place + len(answer)
        marker = end_of_turn.match(text, end)
        spans.append((start, marker.end() if marker else end))
        if marker is None and not text[end:].strip():
            return text[:end], spans, True
    return text, spans, False


def with_plain_answer(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's text parts joined to one without outer blanks, as templates show it; others' as they are."""
    if message["role"] != "assistant":
        return message
    text = "".join(part["text"] for part in _parts(message) if part["type"] == "text").strip()
    return {**message, "content": [{"type": "text", "text": text}]}


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _overlap(token: tuple[int, int], span: tuple[int, int]) -> bool:
    return token[0] < span[1] and token[1] > span[0]


def _end_of_turn(processor) -> re.Pattern:
    """A special token behind an answer, blanks before it allowed."""
    tokenizer = processor.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special -= set(tokenizer.convert_ids_to_tokens(list(processor.slot_token_ids)))
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, longest_first))})")


def _multiply_slots(processor, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
    """The text with each slot outside its answers written as often as the model has tokens for it, and its spans."""
    multiplied, moved, position = "", [], 0
    for start, end in [*spans, (len(text), len(text))]:
        multiplied += processor.multiply_slots(text[position:start])
        moved.append((len(multiplied), len(multiplied) + end - start))
        multiplied += text[start:end]
        position = end
    return multiplied, moved[:-1]


__all__ = ["UnusableSample", "encode_conversation", "find_answers", "with_plain_answer"]
