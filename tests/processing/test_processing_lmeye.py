"""The processor: slots placed for the user and respected where the user places them."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoTokenizer, CLIPImageProcessor

from transformers_lmeye import LMEyeConfig, LMEyeProcessor
from transformers_lmeye.modeling.towers import ImageFeatures


K = 5
SLOTS = " ".join(["<img-d>"] * K)


@pytest.fixture
def make(folders):
    def make(family="llama", chat_template=None, keep_spaces=True, **kwargs):
        language = folders.language(family, chat_template=chat_template, keep_spaces=keep_spaces)
        return LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(language), **kwargs)

    return make


@pytest.fixture
def words(folders):
    """The language model's own tokenizer."""

    def words(keep_spaces=True, chat_template=None):
        return AutoTokenizer.from_pretrained(
            folders.language("llama", chat_template=chat_template, keep_spaces=keep_spaces)
        )

    return words


def spell(text: str, tokenizer, k: int = K, static: int = 1) -> list[int]:
    """Ids of a text with slots, from the pieces between them: slot ids start behind table and tokenizer."""
    slots = {"<img>": tiny.TABLE_ROWS, "<img-q>": tiny.TABLE_ROWS + 1, "<img-d>": tiny.TABLE_ROWS + 2}
    ids: list[int] = []
    for piece in re.split("(<img>|<img-q>|<img-d>)", text):
        if piece in slots:
            ids.append(slots[piece])
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


# --- slots ---------------------------------------------------------------------------------------------------------


def test_slot_ids_lie_behind_table_and_tokenizer(make):
    """Fillers take the ids between the tokenizer's length and the table's; the model's configuration agrees."""
    processor = make()
    rows = tiny.TABLE_ROWS
    assert tiny.TOKENIZER_LENGTH < rows
    assert processor.tokenizer.convert_tokens_to_ids(["<img>", "<img-q>", "<img-d>"]) == [rows, rows + 1, rows + 2]
    assert (processor.image_token_id, processor.request_token_id, processor.dynamic_token_id) == (
        rows,
        rows + 1,
        rows + 2,
    )
    assert len(processor.tokenizer) == rows + 3


def test_a_tokenizer_longer_than_the_table(folders, tmp_path):
    """LLaMA derivatives add tokens and leave the table; slots start behind both."""
    language = tiny.save_language(tmp_path / "language")
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_tokens([f"extra{i}" for i in range(20)])
    tokenizer.save_pretrained(language)
    assert len(tokenizer) > tiny.TABLE_ROWS
    from transformers_lmeye import LMEyeForConditionalGeneration

    processor = LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(language))
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(str(folders.vision()), str(language))
    assert processor.image_token_id == model.config.image_token_id == len(tokenizer)
    assert processor.dynamic_token_id == model.config.dynamic_token_id == len(tokenizer) + 2


@pytest.mark.parametrize("keep_spaces", [True, False])
def test_default_prompt(make, words, keep_spaces):
    """The released prompt, slots one space apart."""
    processor = make(keep_spaces=keep_spaces)
    inputs = processor(images=tiny.picture(), text="what is the man doing?", return_tensors="pt")
    text = f"Image as evidence: <img>\n Question: what is the man doing? {SLOTS}\nAnswer:"
    assert inputs["input_ids"].tolist() == [spell(text, words(keep_spaces))]
    assert inputs["attention_mask"].tolist() == [[1] * inputs["input_ids"].shape[1]]
    assert inputs["pixel_values"].shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert inputs["pixel_values"].dtype == torch.float32
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}


def test_prompt_without_requests(make, words):
    inputs = make(interaction="none")(images=tiny.picture(), text="what is it?", return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(tiny.TABLE_ROWS) == 1 and tiny.TABLE_ROWS + 2 not in ids
    assert words().decode([i for i in ids if i < tiny.TABLE_ROWS]).split() == (
        "Image as evidence: \n Question: what is it? \nAnswer:".split()
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("static", [1, 2])
def test_slots_as_written(make, words, k, static):
    """A user's own slots stay where they are, one per image and one per request, multiplied."""
    processor = make(num_dynamic_tokens=k, num_static_tokens=static)
    text = "<img> where is it <img-d> and <img> who? <img-d>\nAnswer: yes."
    inputs = processor(images=[tiny.picture(1), tiny.picture(2)], text=text, return_tensors="pt")
    expanded = text.replace("<img>", " ".join(["<img>"] * static)).replace("<img-d>", " ".join(["<img-d>"] * k))
    assert inputs["input_ids"].tolist() == [spell(expanded, words())]


def test_expanded_slots_as_written(make, words):
    """A text that has all k slots already keeps them."""
    text = f"Image: <img>\n what is it? {SLOTS}\nAnswer:"
    inputs = make()(images=tiny.picture(), text=text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [spell(text, words())]


def test_rows_without_an_image_are_words(make, words):
    """`<img>` typed in a text without images is HTML: the ids are those of the language model's own tokenizer."""
    processor, texts = make(), ["the man in <img>/<img-d> and <img-q>?", "Question: what is it?", ""]
    for text in texts[:2]:
        inputs = processor(text=text, return_tensors="pt")
        assert inputs["input_ids"].tolist() == [words()(text)["input_ids"]]
        assert set(inputs) == {"input_ids", "attention_mask"}
    inputs = processor(text=texts[:2], images=[[], []], return_tensors="pt", padding_side="right")
    for row, mask, text in zip(inputs["input_ids"], inputs["attention_mask"], texts, strict=False):
        assert row[mask.bool()].tolist() == words()(text)["input_ids"]


@pytest.mark.parametrize("interaction", ["clip_text", "none"])
def test_a_real_tokenizer(folders, stories, interaction):
    """A byte-fallback BPE with prefix space and bos: words alone are its own, slots stand where they were written."""
    processor = LMEyeProcessor.from_vision_language_pretrained(
        str(folders.vision()), str(stories / "hf"), interaction=interaction
    )
    own = AutoTokenizer.from_pretrained(stories / "hf")
    for text in ("Once upon a time", "the <img> of a cat, <img-d>!\n", " x", "<img>"):
        assert processor(text=text, return_tensors="pt")["input_ids"][0].tolist() == own(text)["input_ids"]
    inputs = processor(images=tiny.picture(), text="What is it?", return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    table = 512
    assert ids.count(table) == 1 and ids.count(table + 2) == (K if interaction == "clip_text" else 0)
    text = processor.decode(ids)
    request = SLOTS if interaction == "clip_text" else ""
    assert text.split() == f"Image as evidence: <img>\n Question: What is it? {request}\nAnswer:".split()
    assert own.bos_token_id not in ids


def test_html_beside_pictures(make, words):
    """In a mixed batch, too, the row without a picture is words."""
    inputs = make()(
        images=[[tiny.picture()], []], text=["what is it?", "a <img> of a cat <img-d>"], return_tensors="pt"
    )
    row = inputs["input_ids"][1][inputs["attention_mask"][1].bool()]
    assert row.tolist() == words()("a <img> of a cat <img-d>")["input_ids"]
    assert int(row.max()) < tiny.TABLE_ROWS
    assert inputs["pixel_values"].shape[0] == 1


# --- requests in rounds, requests with a slot of their own ----------------------------------------------------------

KEPT = " ".join(["<img-q>"] + ["<img-d>"] * K)


def test_rounds(make, words):
    """A question asks as many requests as there are rounds, one behind the other."""
    processor = make(num_request_rounds=3, num_dynamic_tokens=2)
    inputs = processor(images=tiny.picture(), text="what is it?", return_tensors="pt")
    request = " ".join(["<img-d>"] * 6)
    text = f"Image as evidence: <img>\n Question: what is it? {request}\nAnswer:"
    assert inputs["input_ids"].tolist() == [spell(text, words())]


def test_the_first_editions_prompt(make, words):
    """Variant 2's prompt, whatever the language model: `Human: <img>\\n{prompt}\\n <img-q> <img-d>x5\\nAssistant:`."""
    inputs = make(keep_request_token=True)(images=tiny.picture(), text="what is it?", return_tensors="pt")
    text = "Human: <img>\nwhat is it?\n <img-q> <img-d> <img-d> <img-d> <img-d> <img-d>\nAssistant:"
    assert inputs["input_ids"].tolist() == [spell(text, words())]
    processor = make(keep_request_token=True, num_request_rounds=2, num_dynamic_tokens=2)
    inputs = processor(images=[tiny.picture(1), tiny.picture(2)], text="what is it?", return_tensors="pt")
    text = "Human: <img> <img>\nwhat is it?\n <img-q> <img-d> <img-d> <img-q> <img-d> <img-d>\nAssistant:"
    assert inputs["input_ids"].tolist() == [spell(text, words())]


@pytest.mark.parametrize("written", ["<img-d>", "<img-q>", "<img-q> <img-d>", "<img-q><img-d>", KEPT])
def test_ways_to_write_a_request(make, words, written):
    """Once, in whatever way, or in full."""
    text = f"Image: <img>\n what is it? {written}\nAnswer: yes. <img-q> <img-d>"
    full = f"Image: <img>\n what is it? {KEPT}\nAnswer: yes. {KEPT}"
    inputs = make(keep_request_token=True)(images=tiny.picture(), text=text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [spell(full, words())]


def test_rounds_written_in_full_stay(make, words):
    processor = make(keep_request_token=True, num_request_rounds=2, num_dynamic_tokens=2)
    full = "<img> who? <img-q> <img-d> <img-d> <img-q> <img-d> <img-d>."
    for text in (full, "<img> who? <img-q> <img-d>.", "<img> who? <img-d>."):
        inputs = processor(images=tiny.picture(), text=text, return_tensors="pt")
        assert inputs["input_ids"].tolist() == [spell(full, words())]


@pytest.mark.parametrize(
    ("kept", "text", "message"),
    [
        (
            False,
            "<img> who? <img-q>",
            "Sample 1 has an `<img-q>` slot, which is for models with keep_request_token=True",
        ),
        (False, "<img> who? <img-q> <img-d>", "keep_request_token=True: write `<img-d>` once per request"),
        (False, "<img> who? <img-d> <img-d>", "Sample 1 has a run of 2 `<img-d>` slots that is no multiple"),
        (
            True,
            "<img> who? <img-q> <img-d> <img-d>",
            "Sample 1 has a run of 2 `<img-d>` slots.*`<img-q> <img-d>` once",
        ),
        (True, f"<img> who? {KEPT} <img-d>", "Sample 1 has a run of 6"),
        (True, "<img> who? <img-d> <img-q>", "Sample 1 has a run of 1"),
    ],
)
def test_requests_that_are_neither_once_nor_full(make, kept, text, message):
    processor = make(keep_request_token=kept)
    with pytest.raises(ValueError, match=message):
        processor(images=[tiny.picture(1), tiny.picture(2)], text=["<img> what? <img-d>", text])


def test_html_where_requests_are_kept(make, words):
    """Without an image `<img-q>`, too, is words."""
    inputs = make(keep_request_token=True)(text="an <img-q> of a <img>", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [words()("an <img-q> of a <img>")["input_ids"]]


# --- encoder-decoders ----------------------------------------------------------------------------------------------


@pytest.fixture
def own(folders):
    """An encoder-decoder's own tokenizer."""
    return lambda family: AutoTokenizer.from_pretrained(folders.language(family))


# What each tokenizer puts around a text.
AROUND = {"t5": ([], [2]), "bart": ([1], [2])}


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_prompt_of_an_encoder_decoder(make, own, family):
    """Variant 2's prompt between the special tokens that the tokenizer puts around any text; padded on the right."""
    processor = make(family)
    assert processor.is_encoder_decoder and processor.keep_request_token
    before, behind = AROUND[family]
    assert own(family)("a cat")["input_ids"] == [*before, *own(family)("a cat", add_special_tokens=False).input_ids, 2]
    rows = []
    for question in ("what is the man doing?", "who"):
        text = f"Human: <img>\n{question}\n <img-q> <img-d> <img-d> <img-d> <img-d> <img-d>\nAssistant:"
        rows.append([*before, *spell(text, own(family)), *behind])
    inputs = processor(images=[tiny.picture(1), tiny.picture(2)], text=["what is the man doing?", "who"])
    missing = len(rows[0]) - len(rows[1])
    assert inputs["input_ids"] == [rows[0], rows[1] + [0] * missing]
    assert inputs["attention_mask"] == [[1] * len(rows[0]), [1] * len(rows[1]) + [0] * missing]
    # Both can be chosen.
    alone = processor(images=tiny.picture(1), text="who", add_special_tokens=False)["input_ids"]
    assert alone == rows[1][len(before) : -1]
    inputs = processor(images=[tiny.picture(1)] * 2, text=["what is the man doing?", "who"], padding_side="left")
    assert inputs["input_ids"][1] == [0] * missing + rows[1]


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_words_of_an_encoder_decoder(make, own, family):
    """Rows without an image are the tokenizer's own, special tokens included."""
    processor = make(family, interaction="none")
    text = "an <img> of a cat <img-q>"
    assert processor(text=text)["input_ids"] == own(family)(text)["input_ids"]
    inputs = processor(images=[[tiny.picture()], []], text=["what?", text])
    assert inputs["input_ids"][1][: sum(inputs["attention_mask"][1])] == own(family)(text)["input_ids"]
    before, behind = AROUND[family]
    assert inputs["input_ids"][0][: sum(inputs["attention_mask"][0])] == [
        *before,
        *spell("Human: <img>\nwhat?\nAssistant:", own(family)),
        *behind,
    ]


def test_chat_with_an_encoder_decoder(make, own):
    """Turns before the question stand in the encoder's text, their requests too; the text ends where it ends alone."""
    inputs = make("bart", num_dynamic_tokens=2).apply_chat_template(conversation(), **OPTIONS)
    text = (
        "Human: <img>\nwhat is it?\n <img-q> <img-d> <img-d>\nAssistant: a cat.\n"
        "Human: where is it?\n <img-q> <img-d> <img-d>\nAssistant:"
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids == [1, *spell(text, own("bart")), 2]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_round_trip_of_an_encoder_decoder(make, tmp_path, family):
    processor = make(family, num_request_rounds=2, num_dynamic_tokens=2)
    processor.save_pretrained(tmp_path)
    again = LMEyeProcessor.from_pretrained(tmp_path)
    assert again.is_encoder_decoder and again.keep_request_token and again.num_request_rounds == 2
    assert again.tokenizer.padding_side == "right"
    inputs = processor(images=tiny.picture(), text="what is it?", return_tensors="pt")
    for name, value in again(images=tiny.picture(), text="what is it?", return_tensors="pt").items():
        assert torch.equal(value, inputs[name])


# --- BLIP-2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "opt"])
def test_processor_from_blip2(folders, family):
    """As many static tokens as the Q-Former has queries, the first edition's prompt, BLIP-2's own pixels."""
    from transformers import BlipImageProcessor

    folder = folders.blip2(family)
    processor = LMEyeProcessor.from_blip2_pretrained(str(folder), num_dynamic_tokens=2)
    assert processor.num_static_tokens == tiny.NUM_QUERIES and processor.keep_request_token
    assert processor.is_encoder_decoder == (family == "t5")
    assert processor.tokenizer.padding_side == ("right" if family == "t5" else "left")
    inputs = processor(images=tiny.picture(), text="what is it?", return_tensors="pt")
    images = " ".join(["<img>"] * tiny.NUM_QUERIES)
    text = f"Human: {images}\nwhat is it?\n <img-q> <img-d> <img-d>\nAssistant:"
    own = AutoTokenizer.from_pretrained(folder)
    special = own("cat")["input_ids"] != own("cat", add_special_tokens=False)["input_ids"]
    assert not special, "this tokenizer has no special tokens, so none are expected"
    assert inputs["input_ids"].tolist() == [spell(text, own)]
    pixels = BlipImageProcessor.from_pretrained(folder)(tiny.picture(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"], pixels)


def test_a_q_former_beside_another_language_model(folders, words):
    processor = LMEyeProcessor.from_vision_language_pretrained(
        str(folders.blip2("opt")), str(folders.language()), visual_mapping="qformer", num_dynamic_tokens=1
    )
    inputs = processor(images=tiny.picture(), text="what is it?", return_tensors="pt")
    images = " ".join(["<img>"] * tiny.NUM_QUERIES)
    text = f"Image as evidence: {images}\n Question: what is it? <img-d>\nAnswer:"
    assert inputs["input_ids"].tolist() == [spell(text, words())]


def test_a_slot_for_each_patch(folders):
    from transformers_lmeye import LMEyeForConditionalGeneration

    backbones = str(folders.vision()), str(folders.language())
    mapping = {"visual_mapping": "patch", "interaction": "none"}
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(*backbones, **mapping)
    processor = LMEyeProcessor.from_vision_language_pretrained(*backbones, **mapping)
    assert processor.num_static_tokens == model.config.num_static_tokens == 16
    ids = processor(images=tiny.picture(), text="what is it?")["input_ids"]
    assert ids.count(processor.image_token_id) == 16
    fewer = LMEyeProcessor.from_vision_language_pretrained(*backbones, **mapping, num_static_tokens=4)
    assert fewer.num_static_tokens == 4
    with pytest.raises(ValueError, match=r"does not say in its configuration how many.*give num_static"):
        LMEyeProcessor.from_vision_language_pretrained(str(folders.tower("siglip2")), backbones[1], **mapping)


# --- images --------------------------------------------------------------------------------------------------------


def test_ways_to_give_images(make, tmp_path):
    processor = make()
    first, second = tiny.picture(1), tiny.picture(2)
    first.save(tmp_path / "first.png")
    expected = processor(images=[[first], [second]], text=["what is it?", "who?"], return_tensors="pt")
    array = np.array(first)
    for images in (
        [first, second],
        [array, second],
        [torch.from_numpy(array).permute(2, 0, 1), second],
        [str(tmp_path / "first.png"), second],
        [[str(tmp_path / "first.png")], [second]],
    ):
        got = processor(images=images, text=["what is it?", "who?"], return_tensors="pt")
        assert got["input_ids"].tolist() == expected["input_ids"].tolist()
        torch.testing.assert_close(got["pixel_values"], expected["pixel_values"])


def test_pixels_are_the_vision_towers_own(make, folders):
    """Preprocessing is CLIP's, whatever the picture's size and mode."""
    processor = make()
    own = CLIPImageProcessor.from_pretrained(folders.vision())
    for picture in (tiny.picture(1), tiny.picture(2, (70, 41)), tiny.picture(3).convert("L").convert("RGB")):
        got = processor(images=picture, text="what is it?", return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(got, own(picture, return_tensors="pt")["pixel_values"])


def test_pictures_in_the_order_of_their_slots(make):
    processor = make()
    pictures = [tiny.picture(i) for i in range(4)]
    alone = [processor(images=p, text="what?", return_tensors="pt")["pixel_values"][0] for p in pictures]
    batch = processor(
        images=[[pictures[2], pictures[0]], [], [pictures[3]]],
        text=["<img> <img> what? <img-d>", "who", "who?"],
        return_tensors="pt",
    )
    torch.testing.assert_close(batch["pixel_values"], torch.stack([alone[2], alone[0], alone[3]]))


def test_several_images_for_one_question(make, words):
    inputs = make()(images=[tiny.picture(1), tiny.picture(2)], text="what is it?", return_tensors="pt")
    text = f"Image as evidence: <img> <img>\n Question: what is it? {SLOTS}\nAnswer:"
    assert inputs["input_ids"].tolist() == [spell(text, words())]


# --- padding, truncation, specials ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", None])
def test_padding(make, side):
    """On the left unless told otherwise, as generation needs."""
    processor = make()
    texts = ["what is the man doing on the house?", "who?"]
    inputs = processor(images=[tiny.picture()] * 2, text=texts, return_tensors="pt", padding_side=side)
    rows = [processor(images=tiny.picture(), text=t, return_tensors="pt")["input_ids"][0].tolist() for t in texts]
    missing = len(rows[0]) - len(rows[1])
    assert missing > 0
    pad = processor.tokenizer.pad_token_id
    short = rows[1] + [pad] * missing if side == "right" else [pad] * missing + rows[1]
    assert inputs["input_ids"].tolist() == [rows[0], short]
    mask = [1] * len(rows[1]) + [0] * missing if side == "right" else [0] * missing + [1] * len(rows[1])
    assert inputs["attention_mask"].tolist() == [[1] * len(rows[0]), mask]


def test_padding_to_a_length(make):
    processor = make()
    inputs = processor(images=tiny.picture(), text="who?", return_tensors="pt", padding="max_length", max_length=60)
    assert inputs["input_ids"].shape == (1, 60)
    inputs = processor(images=tiny.picture(), text="who?", return_tensors="pt", pad_to_multiple_of=16)
    assert inputs["input_ids"].shape[1] % 16 == 0


def test_truncation_cuts_words_and_no_slot(make):
    processor = make()
    text = "<img> who? <img-d>\nAnswer: " + "a cat and a dog " * 20
    full = processor(images=tiny.picture(), text=text, return_tensors="pt")["input_ids"][0].tolist()
    last_slot = max(i for i, token in enumerate(full) if token >= tiny.TABLE_ROWS)
    for length in (last_slot + 1, last_slot + 7, len(full)):
        cut = processor(images=tiny.picture(), text=text, return_tensors="pt", truncation=True, max_length=length)
        assert cut["input_ids"][0].tolist() == full[:length]
    with pytest.raises(ValueError, match=r"Sample 0 .*max_length=\d+ would cut a slot: raise max_length"):
        processor(images=tiny.picture(), text=text, return_tensors="pt", truncation=True, max_length=last_slot)
    again = processor(images=tiny.picture(), text=text, return_tensors="pt")
    assert again["input_ids"][0].tolist() == full, "truncation stayed set"


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_truncation_leaves_an_encoders_text_its_ends(make, family):
    processor = make(family)
    text = "<img> who? <img-q> <img-d> " + "a cat and a dog " * 20
    before, behind = AROUND[family]
    full = processor(images=tiny.picture(), text=text)["input_ids"]
    assert processor(images=tiny.picture(), text=text, truncation=True, max_length=40)["input_ids"] == [
        *full[: 40 - len(behind)],
        *behind,
    ]
    processor.tokenizer.truncation_side = "left"
    text = "a cat and a dog " * 20 + "<img> who? <img-q> <img-d>"
    full = processor(images=tiny.picture(), text=text)["input_ids"]
    found = processor(images=tiny.picture(), text=text, truncation=True, max_length=40)["input_ids"]
    assert found == [*before, *full[len(full) - 40 + len(before) :]]


def test_truncation_on_the_left(make):
    """Cut from the left, a text loses its beginning, and still no slot."""
    processor = make()
    processor.tokenizer.truncation_side = "left"
    text = "a cat and a dog. " * 10 + "<img> who? <img-d>\nAnswer:"
    full = processor(images=tiny.picture(), text=text, return_tensors="pt")["input_ids"][0].tolist()
    first_slot = full.index(tiny.TABLE_ROWS)
    length = len(full) - first_slot
    cut = processor(images=tiny.picture(), text=text, return_tensors="pt", truncation=True, max_length=length)
    assert cut["input_ids"][0].tolist() == full[first_slot:]
    with pytest.raises(ValueError, match="would cut a slot"):
        processor(images=tiny.picture(), text=text, return_tensors="pt", truncation=True, max_length=length - 1)


def test_truncation_of_plain_words(make, words):
    processor, text = make(), "a cat and a dog " * 5
    cut = processor(text=text, return_tensors="pt", truncation=True, max_length=7)
    assert cut["input_ids"].tolist() == [words()(text)["input_ids"][:7]]
    assert processor(text=text, return_tensors="pt")["input_ids"].tolist() == [words()(text)["input_ids"]]


def test_bos(make, words):
    """Released models run without bos; `add_bos` puts one before rows with images."""
    plain = make()(images=tiny.picture(), text="who?", return_tensors="pt")["input_ids"][0].tolist()
    with_bos = make(add_bos=True)(images=tiny.picture(), text="who?", return_tensors="pt")["input_ids"][0].tolist()
    assert plain[0] != words().bos_token_id and with_bos == [words().bos_token_id, *plain]


# --- chats ---------------------------------------------------------------------------------------------------------


def conversation():
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": tiny.picture(1)}, {"type": "text", "text": "what is it?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "where is it?"}]},
    ]


OPTIONS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def test_chat_in_the_released_format(make, words):
    """Every turn that can see an image has its own request."""
    inputs = make().apply_chat_template(conversation(), **OPTIONS)
    text = (
        f"Image as evidence: <img>\n Question: what is it? {SLOTS}\nAnswer: a cat.</s>\n"
        f"Question: where is it? {SLOTS}\nAnswer:"
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids == spell(text, words())
    assert inputs["pixel_values"].shape[0] == 1
    assert ids.count(tiny.TABLE_ROWS) == 1 and ids.count(tiny.TABLE_ROWS + 2) == 2 * K


def test_chat_where_requests_are_kept(make, words):
    inputs = make(keep_request_token=True).apply_chat_template(conversation(), **OPTIONS)
    text = f"Human: <img>\nwhat is it?\n {KEPT}\nAssistant: a cat.</s>\nHuman: where is it?\n {KEPT}\nAssistant:"
    assert inputs["input_ids"].tolist() == [spell(text, words())]
    # In the language model's own template a request stands behind the question.
    text = make(keep_request_token=True, chat_template=tiny.CHAT_TEMPLATE).apply_chat_template(
        conversation(), add_generation_prompt=True
    )
    assert text == (
        "[user] <img>\nwhat is it? <img-q> <img-d></s>\n[assistant] a cat.</s>\n"
        "[user] where is it? <img-q> <img-d></s>\n[assistant] "
    )


def test_chat_in_the_language_models_own_template(make, words):
    """The words and their markup come from the language model's template; only slots are added."""
    processor = make(chat_template=tiny.CHAT_TEMPLATE)
    text = processor.apply_chat_template(conversation(), add_generation_prompt=True, tokenize=False)
    plain = [
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "a cat."},
        {"role": "user", "content": "where is it?"},
    ]
    own = words(chat_template=tiny.CHAT_TEMPLATE).apply_chat_template(
        plain, add_generation_prompt=True, tokenize=False
    )
    assert text.replace("<img>\n", "").replace(" <img-d>", "") == own
    assert text.count("<img>") == 1 and text.count("<img-d>") == 2
    inputs = processor.apply_chat_template(conversation(), **OPTIONS)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(tiny.TABLE_ROWS) == 1 and ids.count(tiny.TABLE_ROWS + 2) == 2 * K


@pytest.mark.parametrize("chat_template", [None, tiny.CHAT_TEMPLATE], ids=["released", "own"])
def test_chat_of_words_alone(make, words, chat_template):
    """Without an image there is no slot; with the model's own template the ids are its own."""
    processor = make(chat_template=chat_template)
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}]
    inputs = processor.apply_chat_template(messages, **OPTIONS)
    assert int(inputs["input_ids"].max()) < tiny.TABLE_ROWS and "pixel_values" not in inputs
    if chat_template is not None:
        own = words(chat_template=chat_template).apply_chat_template(
            [{"role": "user", "content": "what is it?"}], add_generation_prompt=True, return_dict=True
        )
        assert inputs["input_ids"][0].tolist() == list(own["input_ids"])


def test_chat_with_a_picture_on_disk(make, tmp_path):
    tiny.picture(1).save(tmp_path / "picture.png")
    messages = conversation()
    expected = make().apply_chat_template(messages, **OPTIONS)
    messages[0]["content"][0] = {"type": "image", "path": str(tmp_path / "picture.png")}
    got = make().apply_chat_template(messages, **OPTIONS)
    assert got["input_ids"].tolist() == expected["input_ids"].tolist()
    torch.testing.assert_close(got["pixel_values"], expected["pixel_values"])


def test_batch_of_chats(make):
    processor = make()
    chats = [conversation(), conversation()[:1]]
    inputs = processor.apply_chat_template(chats, padding=True, **OPTIONS)
    assert inputs["pixel_values"].shape[0] == 2
    for chat, row, mask in zip(chats, inputs["input_ids"], inputs["attention_mask"], strict=True):
        alone = processor.apply_chat_template(chat, **OPTIONS)["input_ids"][0].tolist()
        assert row[mask.bool()].tolist() == alone


# --- decoding, saving ----------------------------------------------------------------------------------------------


def test_decoding(make):
    processor = make()
    inputs = processor(images=tiny.picture(), text="what is it?", return_tensors="pt")
    answer = processor.tokenizer(" a cat", add_special_tokens=False)["input_ids"]
    sequences = torch.tensor([inputs["input_ids"][0].tolist() + answer + [2]])
    (text,) = processor.post_process_image_text_to_text(sequences)
    assert text.endswith("a cat") and "<img" not in text and "</s>" not in text
    (raw,) = processor.post_process_image_text_to_text(sequences, skip_special_tokens=False)
    assert "<img>" in raw and "<img-d>" in raw
    assert processor.batch_decode([answer]) == [" a cat"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_bos": True, "num_dynamic_tokens": 2, "num_static_tokens": 3, "padding_side": "right"},
        {"interaction": "none"},
        {"chat_template": tiny.CHAT_TEMPLATE},
        {"keep_request_token": True, "num_request_rounds": 2, "num_dynamic_tokens": 2},
    ],
    ids=["default", "every_option", "none", "chat", "kept_rounds"],
)
def test_round_trip(make, tmp_path, options):
    """Nothing reverts on reload."""
    processor = make(**options)
    processor(images=tiny.picture(), text="who?", truncation=True, max_length=500)  # must leave no trace in the files
    processor.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    assert state["truncation"] is None and state["padding"] is None
    again = LMEyeProcessor.from_pretrained(tmp_path)
    for name in (
        "num_static_tokens",
        "num_dynamic_tokens",
        "num_request_rounds",
        "keep_request_token",
        "is_encoder_decoder",
        "add_bos",
        "chat_template",
        "image_token_id",
        "dynamic_token_id",
    ):
        assert getattr(again, name) == getattr(processor, name), name
    assert again.tokenizer.padding_side == processor.tokenizer.padding_side
    texts = ["what is the man doing?", "a <img> of words"]
    for text in texts:
        for images in (tiny.picture(), None):
            if images is not None and "<img>" in text and options.get("interaction") == "none":
                continue
            first = processor(images=images, text=text, return_tensors="pt")
            second = again(images=images, text=text, return_tensors="pt")
            assert first.keys() == second.keys()
            for name, value in first.items():
                assert torch.equal(value, second[name])
    assert again.apply_chat_template(conversation(), tokenize=False) == processor.apply_chat_template(
        conversation(), tokenize=False
    )


@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention", "none"])
def test_processor_and_model_agree(make, build, interaction):
    """What the processor writes is what a model of the same options reads."""
    processor = make(interaction=interaction, num_static_tokens=2, num_dynamic_tokens=3)
    model = build("llama", interaction, num_static_tokens=2, num_dynamic_tokens=3)
    config = model.config
    assert isinstance(config, LMEyeConfig)
    assert (processor.image_token_id, processor.dynamic_token_id) == (config.image_token_id, config.dynamic_token_id)
    inputs = processor(images=[[tiny.picture(1)], []], text=["what is it?", "who is it?"], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3)
    assert out.shape[0] == 2 and int(out[:, inputs["input_ids"].shape[1] :].max()) < tiny.TABLE_ROWS


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"keep_request_token": True, "num_request_rounds": 2}),
        ("gpt2", {"num_request_rounds": 3}),
        ("t5", {}),
        ("bart", {"num_request_rounds": 2}),
        ("t5", {"interaction": "none"}),
    ],
)
def test_processor_and_model_agree_on_requests(make, build, family, fields):
    options = {"num_dynamic_tokens": 2, **fields}
    processor, model = make(family, **options), build(family, options.pop("interaction", "clip_text"), **options)
    config = model.config
    assert processor.slot_token_ids == (config.image_token_id, config.request_token_id, config.dynamic_token_id)
    assert processor.is_encoder_decoder == config.is_encoder_decoder
    assert processor.keep_request_token == config.keep_request_token
    inputs = processor(images=[[tiny.picture(1)], []], text=["what is it?", "who is it?"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 2
    if config.interaction != "none":
        requests = model.perceive(**inputs).requests
        assert requests.shape[0] == config.num_request_rounds


def test_without_torchvision(make, folders, tmp_path):
    """Pixels do not depend on whether torchvision is there, or the processor refuses to work without it."""
    import os
    import subprocess
    import sys

    picture = tiny.picture(5, (70, 41))
    picture.save(tmp_path / "picture.png")
    script = """
import sys
sys.modules["torchvision"] = None
import torch
from PIL import Image
from transformers_lmeye import LMEyeProcessor
processor = LMEyeProcessor.from_vision_language_pretrained(sys.argv[1], sys.argv[2])
torch.save(processor(images=Image.open(sys.argv[3]), text="who?", return_tensors="pt")["pixel_values"], sys.argv[4])
"""
    arguments = [
        str(folders.vision()),
        str(folders.language()),
        str(tmp_path / "picture.png"),
        str(tmp_path / "pixels.pt"),
    ]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if run.returncode:
        assert "torchvision" in run.stderr.lower(), run.stderr[-3000:]
        return
    expected = make()(images=picture, text="who?", return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.load(tmp_path / "pixels.pt"), expected, atol=1e-6, rtol=0)


# --- features in place of pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", ["What?", ["What?", "Who is it?"], ["<img> and <img>", "no picture", "<img> here"]])
def test_features_stand_for_pictures(make, texts):
    """The words are those that come with pictures, and the features are handed on as they are."""
    processor = make()
    num_images = {1: 1, 2: 2, 3: 3}[1 if isinstance(texts, str) else len(texts)]
    pictures = [tiny.picture(seed) for seed in range(num_images)]
    features = ImageFeatures(torch.randn(num_images, 24))
    expected = processor(images=pictures, text=texts, return_tensors="pt")
    got = processor(image_features=features, text=texts, return_tensors="pt")
    assert got["image_features"] is features
    assert "pixel_values" not in got
    assert torch.equal(got["input_ids"], expected["input_ids"])
    assert torch.equal(got["attention_mask"], expected["attention_mask"])


def test_features_and_their_slots_must_agree(make):
    features = ImageFeatures(torch.randn(2, 24))
    with pytest.raises(ValueError, match="sample 0 has 2 images and 1 `<img>` slots"):
        make()(image_features=features, text="<img> alone")
    with pytest.raises(ValueError, match="2 images for 3 texts"):
        make()(image_features=features, text=["a", "b", "c"])
    with pytest.raises(ValueError, match="not both"):
        make()(images=[tiny.picture()], image_features=features, text="What?")
