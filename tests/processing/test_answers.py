"""Which tokens of a conversation are an assistant's, in templates that mark them and in those that do not."""

from typing import Any

import pytest
import tiny
import torch

from transformers_lmeye import LMEyeProcessor


OPTIONS = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
ENDLESS_TEMPLATE = (  # no end-of-turn token
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
HIDING_TEMPLATE = "{% for m in messages %}{{ m['role'] }}{% endfor %}"


@pytest.fixture
def make(folders, tmp_path):
    def build(chat_template: str | None = None, **kwargs: Any) -> LMEyeProcessor:
        language = tmp_path / "language"
        tiny.language_config("llama").save_pretrained(language)
        tiny.tokenizer(chat_template).save_pretrained(language)
        kwargs = {"num_dynamic_tokens": 2, "padding_side": "left", **kwargs}
        return LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(language), **kwargs)

    return build


def _image(seed: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": tiny.picture(seed)}


def _chat(*turns: Any) -> list[dict[str, Any]]:
    """Messages of turns, user first; a turn is a text or a list of parts."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _runs(processor, ids: list[int], mask: list[int]) -> list[str]:
    """Runs of tokens joined: others', the assistant's, others', ..."""
    runs = [""]
    for token, marked in zip(processor.tokenizer.convert_ids_to_tokens(ids), mask, strict=True):
        if marked != (len(runs) - 1) % 2:
            runs.append("")
        runs[-1] += token
    return runs


TWO_TURNS = _chat([_image(), _words("what?")], "a cat", "where?", [_words("in a "), _words("house\n")])
RELEASED = [
    "Image as evidence: <img>\n Question: what? <img-d> <img-d>\nAnswer:",
    " a cat</s>",
    "\nQuestion: where? <img-d> <img-d>\nAnswer:",
    " in a house</s>",
]
CASES = {
    "released format": (None, {}, TWO_TURNS, RELEASED),
    "released format with bos": (None, {"add_bos": True}, TWO_TURNS, ["<s>" + RELEASED[0], *RELEASED[1:]]),
    "a template that marks nothing": (
        tiny.CHAT_TEMPLATE,
        {},
        TWO_TURNS,
        [
            "[user] <img>\nwhat? <img-d> <img-d></s>\n[assistant] ",
            "a cat</s>",
            "\n[user] where? <img-d> <img-d></s>\n[assistant] ",
            "in a house</s>",
            "\n",
        ],
    ),
    "a template without end of turn": (
        ENDLESS_TEMPLATE,
        {},
        TWO_TURNS,
        [
            "user:<img>\nwhat? <img-d> <img-d>\nassistant:",
            "a cat",
            "\nuser:where? <img-d> <img-d>\nassistant:",
            "in a house</s>",
        ],
    ),
    "words alone, slots among them": (
        None,
        {"add_bos": True},
        _chat("what is <img> ?", "a <img-d>"),
        ["Question: what is <img> ?\nAnswer:", " a <img-d></s>"],
    ),
    "no answer": (None, {}, _chat([_image(), _words("what?")]), [RELEASED[0]]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_and_its_end_are_the_assistants(make, name):
    template, kwargs, messages, expected = CASES[name]
    processor = make(template, **kwargs)
    (expected_ids,) = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    batch = processor.apply_chat_template(messages, **OPTIONS)
    ids, mask = batch["input_ids"][0], batch["assistant_masks"][0]
    assert _runs(processor, ids, mask) == expected
    slots = processor.slot_token_ids
    assert [i for i in ids if i in slots] == [i for i in expected_ids if i in slots]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch(make, side):
    processor = make(tiny.CHAT_TEMPLATE)
    chats = [TWO_TURNS, _chat("what?", "yes"), _chat([_image(1), _words("a")], "no")]
    limits = {"padding": True, "padding_side": side, "pad_to_multiple_of": 8}
    batch = processor.apply_chat_template(chats, processor_kwargs=limits, return_tensors="pt", **OPTIONS)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["assistant_masks"].shape
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["attention_mask"][1].tolist() == sorted(batch["attention_mask"][1].tolist(), reverse=side == "right")
    for index, chat in enumerate(chats):
        alone = processor.apply_chat_template(chat, return_tensors="pt", **OPTIONS)
        valid = batch["attention_mask"][index].bool()
        for name in ("input_ids", "assistant_masks"):
            assert torch.equal(batch[name][index, valid], alone[name][0])
        assert not batch["assistant_masks"][index, ~valid].any()
    pictures = processor.image_processor([tiny.picture(0), tiny.picture(1)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], pictures)


def test_cutting(make):
    processor = make()
    chat = _chat([_image(), _words("what?")], "a cat in a house")
    (whole,) = processor.apply_chat_template(chat, **OPTIONS)["input_ids"]

    def cut(max_length: int, messages: list[dict[str, Any]] = chat):
        limits = {"truncation": True, "max_length": max_length}
        return processor.apply_chat_template(messages, processor_kwargs=limits, **OPTIONS)

    assert cut(len(whole))["input_ids"] == [whole]
    assert cut(len(whole) - 3)["input_ids"] == [whole[:-3]]
    assert sum(cut(len(whole) - 3)["assistant_masks"][0]) == sum(cut(len(whole))["assistant_masks"][0]) - 3
    with pytest.raises(ValueError, match=r"Conversation 0: it is \d+ tokens long, and cutting it .* Raise max_length"):
        cut(5)
    assert len(cut(3, _chat("what is a cat ?", "a dog"))["input_ids"][0]) == 3


def test_what_it_cannot_do_is_refused(make, folders):
    with pytest.raises(ValueError, match="Conversation 1: the chat template does not show assistant turn 1"):
        make(HIDING_TEMPLATE).apply_chat_template([_chat("what?"), _chat("what?", "yes")], **OPTIONS)
    with pytest.raises(ValueError, match="for finished conversations"):
        make().apply_chat_template(TWO_TURNS, add_generation_prompt=True, **OPTIONS)
    with pytest.raises(ValueError, match=r"its decoder's labels.*ConversationCollator"):
        reads_with_an_encoder = (str(folders.vision()), str(folders.language("t5")))
        LMEyeProcessor.from_vision_language_pretrained(*reads_with_an_encoder).apply_chat_template(
            TWO_TURNS, **OPTIONS
        )


@pytest.mark.parametrize("template", [None, tiny.CHAT_TEMPLATE], ids=["released", "chat"])
def test_trl_takes_the_template(make, template):
    """As it is: no template of TRL's own in its place, and the end of a turn is known to be trained."""
    trl = pytest.importorskip("trl.chat_template_utils")
    processor = make(template)
    assert trl.has_generation_markers(processor.chat_template)
    assert trl.is_chat_template_stop_token_trained(processor)
