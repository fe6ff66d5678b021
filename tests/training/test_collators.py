"""Which tokens are targets: cases worked out by hand, in either stage and in several chat templates."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from transformers_lmeye import LMEyeProcessor
from transformers_lmeye.data import BadSample
from transformers_lmeye.modeling.towers import ImageFeatures
from transformers_lmeye.training import ConversationCollator, PairCollator


IGNORED = -100
THINKING_TEMPLATE = (  # Qwen3's way: an empty thought before the answer of the last turn, none in turns before
    "{% for m in messages %}"
    "{{ '[' + m['role'] + ']\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '[q]' }}{% endif %}"
    "{{ m['content'] + '</s>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
ENDLESS_TEMPLATE = (  # no end-of-turn token
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
FORCING_TEMPLATE = (  # DeepSeek-R1's way: the prompt holds the beginning of a thought that the finished turn has not
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]think' }}{% endif %}"
)
HIDING_TEMPLATE = "{% for m in messages %}{{ m['role'] }}{% endfor %}"


@pytest.fixture
def processor(folders, tmp_path):
    def make(chat_template: str | None = None, keep_spaces: bool = True, **kwargs: Any) -> LMEyeProcessor:
        language = tmp_path / "language"
        tiny.language_config("llama").save_pretrained(language)
        tiny.tokenizer(chat_template, keep_spaces).save_pretrained(language)
        kwargs = {"num_dynamic_tokens": 2, **kwargs}
        return LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(language), **kwargs)

    return make


def _image(seed: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": tiny.picture(seed)}


def _words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _conversation(*turns: Any) -> list[dict[str, Any]]:
    """Messages of turns, user first; a turn is a text or a list of parts."""
    roles = ("user", "assistant")
    return [
        {"role": roles[i % 2], "content": [_words(turn)] if isinstance(turn, str) else turn}
        for i, turn in enumerate(turns)
    ]


def _split(processor, row: torch.Tensor, labels: torch.Tensor) -> list[tuple[str, bool]]:
    """The row's tokens, and whether each is a target; labels that are neither the token nor ignored fail."""
    assert all(label in (IGNORED, token) for token, label in zip(row.tolist(), labels.tolist(), strict=True))
    tokens = processor.tokenizer.convert_ids_to_tokens(row.tolist())
    return list(zip(tokens, (labels != IGNORED).tolist(), strict=True))


def _prompts_and_targets(processor, batch: dict[str, torch.Tensor], row: int = 0) -> list[str]:
    """Runs of tokens joined: prompt, targets, prompt, targets, ..."""
    length = int(batch["attention_mask"][row].sum())
    runs: list[str] = []
    for token, target in _split(processor, batch["input_ids"][row, :length], batch["labels"][row, :length]):
        if target == bool(len(runs) % 2) and runs:
            runs.append("")
        runs = runs or [""]
        runs[-1] += token
    return runs


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def test_a_caption_follows_its_image(processor):
    p = processor()
    batch = PairCollator(p)(
        [
            {"id": "a", "image": tiny.picture(0), "caption": "a cat on a house."},
            {"id": "b", "image": tiny.picture(1), "caption": " red dog\n"},
        ]
    )
    assert _prompts_and_targets(p, batch, 0) == ["<img>", "a cat on a house.</s>"]
    assert _prompts_and_targets(p, batch, 1) == ["<img>", "red dog</s>"]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 12)
    assert batch["input_ids"][:, 0].tolist() == [p.image_token_id] * 2
    assert batch["attention_mask"].tolist() == [[1] * 12, [1] * 5 + [0] * 7]
    assert batch["labels"][1, 5:].tolist() == [IGNORED] * 7
    alone = p.image_processor([tiny.picture(0), tiny.picture(1)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], alone, atol=0, rtol=0)


def test_several_static_tokens_and_bos(processor):
    p = processor(num_static_tokens=3, add_bos=True)
    batch = PairCollator(p)([{"id": "a", "image": tiny.picture(), "caption": "cat"}])
    assert _prompts_and_targets(p, batch) == ["<s><img> <img> <img>", "cat</s>"]


def test_a_caption_is_words_throughout(processor):
    """Slots and special tokens written in a caption stay words."""
    p = processor()
    batch = PairCollator(p)([{"id": "a", "image": tiny.picture(), "caption": "<img> cat <img-d>"}])
    assert _prompts_and_targets(p, batch) == ["<img>", "<img> cat <img-d></s>"]
    assert (batch["input_ids"] >= tiny.TABLE_ROWS).sum() == 1
    batch = PairCollator(p)([{"id": "a", "image": tiny.picture(), "caption": "a</s>b"}])
    assert (batch["input_ids"] == p.tokenizer.eos_token_id).sum() == 1


def test_the_end_of_text_counts_where_it_is_the_padding_too(processor):
    p = processor()
    p.tokenizer.pad_token = p.tokenizer.eos_token
    samples = [{"id": c, "image": tiny.picture(), "caption": c} for c in ("cat", "cat on a dog")]
    batch = PairCollator(p)(samples)
    words = batch["input_ids"][0].tolist()
    assert words[2:] == [p.tokenizer.eos_token_id] * (len(words) - 2)
    assert batch["labels"][0].tolist() == [IGNORED, *words[1:3], *[IGNORED] * (len(words) - 3)]


def test_a_cut_caption_has_no_end(processor):
    p = processor()
    sample = {"id": "row 4", "image": tiny.picture(), "caption": "a cat on a house"}
    assert _prompts_and_targets(p, PairCollator(p, max_length=4)([sample])) == ["<img>", "a cat"]
    assert _prompts_and_targets(p, PairCollator(p, max_length=11)([sample])) == ["<img>", "a cat on a house</s>"]
    with pytest.raises(ValueError, match=r"Sample row 4: it has no target token: max_length=1 leaves no room.*Raise"):
        PairCollator(p, max_length=1)([sample])


@pytest.mark.parametrize("caption", ["", " \n"])
def test_an_empty_caption_is_named(processor, caption):
    with pytest.raises(
        ValueError, match=r"Sample row 7: it has no target token: its caption is empty. Leave the row out"
    ):
        PairCollator(processor())([{"id": "row 7", "image": tiny.picture(), "caption": caption}])


# --- stage 2 ---------------------------------------------------------------------------------------------------------

ONE = _conversation([_image(), _words("what is the man doing?")], "in a house")
THREE = _conversation([_image(), _words("what?")], "a cat", "where?", "house", "how many?", "yes")
TWO_IMAGES = _conversation([_image(0), _words("a")], "cat", [_image(1), _words("how")], "dog")
WORDS = _conversation("what is <img> in a house?", "a dog", "is <img-d> a cat?", "no")

CASES = {
    "one turn, released format": (
        None,
        ONE,
        ["Image as evidence: <img>\n Question: what is the man doing? <img-d> <img-d>\nAnswer:", " in a house</s>"],
    ),
    "three turns, released format": (
        None,
        THREE,
        [
            "Image as evidence: <img>\n Question: what? <img-d> <img-d>\nAnswer:",
            " a cat</s>",
            "\nQuestion: where? <img-d> <img-d>\nAnswer:",
            " house</s>",
            "\nQuestion: how many? <img-d> <img-d>\nAnswer:",
            " yes</s>",
        ],
    ),
    "two images, released format": (
        None,
        TWO_IMAGES,
        [
            "Image as evidence: <img>\n Question: a <img-d> <img-d>\nAnswer:",
            " cat</s>",
            "\nImage as evidence: <img>\n Question: how <img-d> <img-d>\nAnswer:",
            " dog</s>",
        ],
    ),
    "answers that stand in the prompts": (
        None,
        _conversation([_image(), _words("Answer : ?")], "Answer", "assistant ?", "Question"),
        [
            "Image as evidence: <img>\n Question: Answer : ? <img-d> <img-d>\nAnswer:",
            " Answer</s>",
            "\nQuestion: assistant ? <img-d> <img-d>\nAnswer:",
            " Question</s>",
        ],
    ),
    "chat template": (
        tiny.CHAT_TEMPLATE,
        THREE,
        [
            "[user] <img>\nwhat? <img-d> <img-d></s>\n[assistant] ",
            "a cat</s>",
            "\n[user] where? <img-d> <img-d></s>\n[assistant] ",
            "house</s>",
            "\n[user] how many? <img-d> <img-d></s>\n[assistant] ",
            "yes</s>",
            "\n",
        ],
    ),
    "an answer that is the role's name": (
        tiny.CHAT_TEMPLATE,
        _conversation([_image(), _words("user")], "assistant"),
        ["[user] <img>\nuser <img-d> <img-d></s>\n[assistant] ", "assistant</s>", "\n"],
    ),
    "system prompt": (
        tiny.CHAT_TEMPLATE,
        [{"role": "system", "content": [_words("see")]}, *ONE],
        [
            "[system] see</s>\n[user] <img>\nwhat is the man doing? <img-d> <img-d></s>\n[assistant] ",
            "in a house</s>",
            "\n",
        ],
    ),
    "a question at the end": (
        tiny.CHAT_TEMPLATE,
        [*ONE, {"role": "user", "content": [_words("where?")]}],
        [
            "[user] <img>\nwhat is the man doing? <img-d> <img-d></s>\n[assistant] ",
            "in a house</s>",
            "\n[user] where? <img-d> <img-d></s>\n",
        ],
    ),
    "an empty thought before the last answer": (
        THINKING_TEMPLATE,
        _conversation([_image(), _words("what?")], "cat", "where?", "house"),
        [
            "[user]\n<img>\nwhat? <img-d> <img-d></s>\n[assistant]\n",
            "cat</s>",
            "\n[user]\nwhere? <img-d> <img-d></s>\n[assistant]\n",
            "[q]house</s>",
            "\n",
        ],
    ),
    "a template without end of turn": (
        ENDLESS_TEMPLATE,
        _conversation([_image(), _words("what?")], "cat", "where?", "house"),
        [
            "user:<img>\nwhat? <img-d> <img-d>\nassistant:",
            "cat",
            "\nuser:where? <img-d> <img-d>\nassistant:",
            "house</s>",
        ],
    ),
    "a prompt that begins the thought": (
        FORCING_TEMPLATE,
        _conversation([_image(), _words("what?")], "cat"),
        ["[user]<img>\nwhat? <img-d> <img-d></s>[assistant]", "cat</s>"],
    ),
    "words alone, released format": (
        None,
        WORDS,
        [
            "Question: what is <img> in a house?\nAnswer:",
            " a dog</s>",
            "\nQuestion: is <img-d> a cat?\nAnswer:",
            " no</s>",
        ],
    ),
    "words alone, chat template": (
        tiny.CHAT_TEMPLATE,
        _conversation("what?", "a dog"),
        ["[user] what?</s>\n[assistant] ", "a dog</s>", "\n"],
    ),
    "answers of several parts with blanks around": (
        None,
        _conversation([_image(), _words("what?")], [_words(" a "), _words("cat\n")]),
        ["Image as evidence: <img>\n Question: what? <img-d> <img-d>\nAnswer:", " a cat</s>"],
    ),
    "an empty answer among others": (
        None,
        _conversation([_image(), _words("what?")], "", "where?", "house"),
        [
            "Image as evidence: <img>\n Question: what? <img-d> <img-d>\nAnswer: </s>"
            "\nQuestion: where? <img-d> <img-d>\nAnswer:",
            " house</s>",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_answer_and_its_end_are_targets(processor, name):
    template, messages, expected = CASES[name]
    p = processor(template)
    batch = ConversationCollator(p)([{"id": "a", "messages": messages}])
    assert _prompts_and_targets(p, batch) == expected


@pytest.mark.parametrize("name", CASES)
def test_tokens_without_spaces(processor, name):
    """A tokenizer that drops blanks gives the same words the same labels."""
    template, messages, expected = CASES[name]
    p = processor(template, keep_spaces=False)
    batch = ConversationCollator(p)([{"id": "a", "messages": messages}])
    runs = ["".join(run.split()) for run in expected]
    assert _prompts_and_targets(p, batch) == [run for run in runs if run]


@pytest.mark.parametrize("name", [name for name in CASES if "end of turn" not in name])
@pytest.mark.parametrize("add_bos", [False, True])
def test_the_tokens_are_the_processors(processor, name, add_bos):
    """What is trained on is what the processor makes of the conversation, and of the prompt for its first answer."""
    template, messages, _ = CASES[name]
    p = processor(template, add_bos=add_bos)
    batch = ConversationCollator(p)([{"id": "a", "messages": messages}])
    stripped = [
        {**m, "content": [_words("".join(part["text"] for part in m["content"]).strip())]}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    whole = p.apply_chat_template(stripped, **kwargs)
    assert torch.equal(batch["input_ids"], whole["input_ids"])
    if "pixel_values" in whole:
        assert torch.equal(batch["pixel_values"], whole["pixel_values"])
    assert ("pixel_values" in whole) == ("pixel_values" in batch)
    if "empty answer" in name or "begins the thought" in name:
        return
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    prompt = p.apply_chat_template(messages[:first], add_generation_prompt=True, **kwargs)["input_ids"][0]
    start = int((batch["labels"][0] != IGNORED).nonzero()[0, 0])
    assert torch.equal(batch["input_ids"][0, :start], prompt)


def _byte_level_tokenizer(path: Path) -> Path:
    """A byte-level BPE as GPT-2's and OPT's, whose words carry their blank and whose sequences start with a bos."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(
        ["Image as evidence: Question: what is the man doing? Answer: in a house"] * 3, trainer
    )
    bos = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    tiny.language_config("opt", vocab_size=300).save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="</s>", pad_token="<pad>"
    ).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("messages", [ONE, THREE, _conversation("what?", "a dog", "where?", "in a house")])
def test_subword_tokenizers(folders, tmp_path, request, kind, messages):
    """Targets decode to the answers, and what stands before the first is the prompt a user would give."""
    if kind == "byte-level":
        path = _byte_level_tokenizer(tmp_path)
    else:
        path = request.getfixturevalue("stories") / "hf"
    p = LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(path), num_dynamic_tokens=2)
    batch = ConversationCollator(p)([{"id": "a", "messages": messages}])
    ids, is_target = batch["input_ids"][0], batch["labels"][0] != IGNORED
    answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
    assert (
        p.tokenizer.decode(ids[is_target]).replace("</s>", " </s> ").split() == " </s> ".join([*answers, ""]).split()
    )
    prompt = p.apply_chat_template(
        messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"][0]
    start = int(is_target.nonzero()[0, 0])
    assert torch.equal(ids[:start], prompt)


def test_a_batch_of_all_kinds(processor):
    """Rows keep their labels in company; pictures stand in the order of their slots."""
    p = processor()
    names = ["two images, released format", "words alone, released format", "one turn, released format"]
    collator = ConversationCollator(p)
    batch = collator([{"id": n, "messages": CASES[n][1]} for n in names])
    for row, name in enumerate(names):
        assert _prompts_and_targets(p, batch, row) == CASES[name][2]
    pictures = [tiny.picture(0), tiny.picture(1), tiny.picture(0)]
    expected = p.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    longest = int(batch["attention_mask"].sum(dim=1).max())
    assert batch["input_ids"].shape == (3, longest)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    words = collator([{"id": "w", "messages": WORDS}])
    assert "pixel_values" not in words


def test_a_model_without_requests(processor):
    p = processor(interaction="none", num_static_tokens=2)
    batch = ConversationCollator(p)([{"id": "a", "messages": ONE}])
    assert _prompts_and_targets(p, batch) == [
        "Image as evidence: <img> <img>\n Question: what is the man doing?\nAnswer:",
        " in a house</s>",
    ]


def test_cutting(processor):
    p = processor()
    runs = CASES["three turns, released format"][2]
    lengths = [len(p.tokenizer(run, add_special_tokens=False)["input_ids"]) for run in runs]

    def collate(max_length: int) -> list[str]:
        batch = ConversationCollator(p, max_length)([{"id": "row 3", "messages": THREE}])
        return _prompts_and_targets(p, batch)

    assert collate(sum(lengths)) == runs
    assert collate(sum(lengths) - 1) == [*runs[:-1], " yes"]
    with pytest.raises(ValueError, match=r"Sample row 3: it has no target token: max_length=\d+ cuts its answers off"):
        ConversationCollator(p, lengths[0])([{"id": "row 3", "messages": THREE[:2]}])
    for max_length in (5, lengths[0] - 4, sum(lengths[:4])):
        with pytest.raises(
            ValueError, match=r"Sample row 3: it is \d+ tokens long.* would cut a slot. Raise max_length"
        ):
            collate(max_length)


BAD = {
    "no answer": (None, ONE[:1], "Sample x: it has no target token: none of its assistant turns says anything"),
    "empty answer": (None, _conversation([_image()], "  "), "Sample x: it has no target token: none of its"),
    "hidden answer": (
        HIDING_TEMPLATE,
        _conversation("a", "cat"),
        "Sample x: the chat template does not show assistant",
    ),
    "slot among the words": (
        None,
        _conversation([_image(), _words("is <img> a tag?")], "yes"),
        "Sample x: Image features and image tokens do not match",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_conversations_are_named(processor, name):
    template, messages, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        ConversationCollator(processor(template))([{"id": "x", "messages": messages}])


def test_pictures_of_different_proportions(folders):
    """Whatever a vision tower takes besides pixels stands in the order of the slots, too (SigLIP2)."""
    from transformers_lmeye import LMEyeForConditionalGeneration

    vision, language = str(folders.tower("siglip2")), str(folders.language())
    options = {"interaction": "cross_attention", "num_dynamic_tokens": 2}
    p = LMEyeProcessor.from_vision_language_pretrained(vision, language, **options)
    wide, high = tiny.picture(1, (48, 16)), tiny.picture(2, (16, 40))
    samples = [
        _conversation([{"type": "image", "image": wide}, _words("what?")], "cat"),
        _conversation("who?", "man"),
        _conversation([{"type": "image", "image": high}, _words("where is it?")], "in a house"),
    ]
    samples = [{"id": str(index), "messages": messages} for index, messages in enumerate(samples)]
    batch = ConversationCollator(p)(samples)
    expected = p.image_processor([wide, high], return_tensors="pt")
    assert expected["spatial_shapes"][0].tolist() != expected["spatial_shapes"][1].tolist()
    assert set(expected) == {"pixel_values", "pixel_attention_mask", "spatial_shapes"}
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    pairs = PairCollator(p)([{"id": "a", "image": wide, "caption": "a"}, {"id": "b", "image": high, "caption": "b"}])
    assert all(torch.equal(pairs[name], value) for name, value in expected.items())
    # Each row's loss is what it is alone.
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        vision, language, **options, **tiny.SMALL_STACK
    )
    tiny.randomise_ipn(model)
    counts, losses = [], []
    with torch.no_grad():
        for sample in samples:
            alone = ConversationCollator(p)([sample])
            counts.append(int((alone["labels"] != IGNORED).sum()))
            losses.append(float(model(**alone).loss))
        mean = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)
        assert float(model(**batch).loss) == pytest.approx(mean, abs=1e-5)


# --- requests with a slot of their own, in rounds ------------------------------------------------------------------


def test_dialogues_where_requests_are_kept(processor):
    """Every `<img-q>` and `<img-d>` of every round is prompt; the answers are targets."""
    p = processor(keep_request_token=True, num_request_rounds=2)
    request = "<img-q> <img-d> <img-d> <img-q> <img-d> <img-d>"
    batch = ConversationCollator(p)([{"id": "a", "messages": THREE}])
    assert _prompts_and_targets(p, batch) == [
        f"Human: <img>\nwhat?\n {request}\nAssistant:",
        " a cat</s>",
        f"\nHuman: where?\n {request}\nAssistant:",
        " house</s>",
        f"\nHuman: how many?\n {request}\nAssistant:",
        " yes</s>",
    ]
    p = processor(tiny.CHAT_TEMPLATE, keep_request_token=True)
    batch = ConversationCollator(p)([{"id": "a", "messages": ONE}])
    assert _prompts_and_targets(p, batch) == [
        "[user] <img>\nwhat is the man doing? <img-q> <img-d> <img-d></s>\n[assistant] ",
        "in a house</s>",
        "\n",
    ]


def test_rounds_are_prompt(processor):
    p = processor(num_request_rounds=2)
    batch = ConversationCollator(p)([{"id": "a", "messages": ONE}])
    request = "<img-d> <img-d> <img-d> <img-d>"
    assert _prompts_and_targets(p, batch) == [
        f"Image as evidence: <img>\n Question: what is the man doing? {request}\nAnswer:",
        " in a house</s>",
    ]
    batch = PairCollator(p)([{"id": "a", "image": tiny.picture(), "caption": "cat"}])
    assert _prompts_and_targets(p, batch) == ["<img>", "cat</s>"]


# --- encoder-decoders: the encoder reads the prompt, the answer is the decoder's ------------------------------------


@pytest.fixture
def encoder_decoder(folders):
    def make(family: str, **kwargs: Any) -> LMEyeProcessor:
        kwargs = {"num_dynamic_tokens": 2, **kwargs}
        vision, language = str(folders.vision()), str(folders.language(family))
        return LMEyeProcessor.from_vision_language_pretrained(vision, language, **kwargs)

    return make


def _encoder_and_decoder(processor, batch: dict[str, torch.Tensor], row: int) -> tuple[str, str]:
    """What the encoder reads and what the decoder is to say, tokens joined; padding is on the right, in both."""
    mask, labels = batch["attention_mask"][row], batch["labels"][row]
    read, said = int(mask.sum()), int((labels != IGNORED).sum())
    assert mask.tolist() == [1] * read + [0] * (len(mask) - read)
    assert (labels[said:] == IGNORED).all()
    tokens = processor.tokenizer.convert_ids_to_tokens
    return "".join(tokens(batch["input_ids"][row, :read])), "".join(tokens(labels[:said]))


# Around a text T5 has `</s>` alone; its tokenizer drops blanks.
def test_captions_for_an_encoder_decoder(encoder_decoder):
    """`<img>` is all the encoder reads, the caption all the decoder says, in the special tokens of either side."""
    samples = [
        {"id": "a", "image": tiny.picture(0), "caption": "a cat on a house."},
        {"id": "b", "image": tiny.picture(1), "caption": " red dog\n"},
    ]
    p = encoder_decoder("t5", num_static_tokens=2)
    batch = PairCollator(p)(samples)
    assert _encoder_and_decoder(p, batch, 0) == ("<img><img></s>", "acatonahouse.</s>")
    assert _encoder_and_decoder(p, batch, 1) == ("<img><img></s>", "reddog</s>")
    assert batch["input_ids"].shape == (2, 3) and batch["labels"].shape == (2, 7)
    p = encoder_decoder("bart")
    batch = PairCollator(p)(samples)
    assert _encoder_and_decoder(p, batch, 0) == ("<s><img></s>", "<s>a cat on a house.</s>")
    assert _encoder_and_decoder(p, batch, 1) == ("<s><img></s>", "<s>red dog</s>")
    alone = p.image_processor([tiny.picture(0), tiny.picture(1)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], alone)
    assert {value.dtype for name, value in batch.items() if name != "pixel_values"} == {torch.int64}


def test_an_encoder_decoders_words_are_words(encoder_decoder):
    """Slots and special tokens written in a caption or an answer stay words; "s" is none that the tokenizer has."""
    p = encoder_decoder("bart")
    batch = PairCollator(p)([{"id": "a", "image": tiny.picture(), "caption": "<img> cat </s><img-d>"}])
    assert _encoder_and_decoder(p, batch, 0) == ("<s><img></s>", "<s><img> cat </<unk>><img-d></s>")
    assert int(batch["labels"].max()) < tiny.TABLE_ROWS
    assert batch["labels"][0].tolist().count(p.tokenizer.eos_token_id) == 1
    messages = _conversation([_image(), _words("what?")], "a <img-q> cat</s>")
    batch = ConversationCollator(p)([{"id": "a", "messages": messages}])
    assert _encoder_and_decoder(p, batch, 0)[1] == "<s>a <img-q> cat</<unk>></s>"
    assert int(batch["labels"].max()) < tiny.TABLE_ROWS
    assert batch["labels"][0].tolist().count(p.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("rounds", [1, 2])
def test_each_answer_is_a_row(encoder_decoder, rounds):
    """The encoder reads what stands before the answer, earlier answers included, and sees the picture in every row."""
    request = " ".join(["<img-q> <img-d> <img-d>"] * rounds)
    first = f"Human: <img>\nwhat?\n {request}\nAssistant:"
    second = f"{first} a cat\nHuman: where?\n {request}\nAssistant:"
    third = f"{second} house\nHuman: how many?\n {request}\nAssistant:"
    p = encoder_decoder("bart", num_request_rounds=rounds)
    batch = ConversationCollator(p)([{"id": "a", "messages": THREE}])
    assert [_encoder_and_decoder(p, batch, row) for row in range(3)] == [
        (f"<s>{first}</s>", "<s>a cat</s>"),
        (f"<s>{second}</s>", "<s>house</s>"),
        (f"<s>{third}</s>", "<s>yes</s>"),
    ]
    assert len(batch["input_ids"]) == 3
    pixels = p.image_processor([tiny.picture(0)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], pixels.expand(3, -1, -1, -1))
    p = encoder_decoder("t5", num_request_rounds=rounds)
    batch = ConversationCollator(p)([{"id": "a", "messages": THREE}])
    for row, (read, said) in enumerate(((first, "acat"), (second, "house"), (third, "yes"))):
        assert _encoder_and_decoder(p, batch, row) == ("".join(read.split()) + "</s>", f"{said}</s>")


def test_rows_of_several_conversations(encoder_decoder):
    """Two pictures, words alone, and a turn that says nothing: rows and pictures stay in order."""
    p = encoder_decoder("bart")
    silent = _conversation([_image(2), _words("what?")], " ", "where?", "house")
    samples = [TWO_IMAGES, WORDS, silent]
    batch = ConversationCollator(p)([{"id": str(index), "messages": part} for index, part in enumerate(samples)])
    request = "<img-q> <img-d> <img-d>"
    first = f"Human: <img>\na\n {request}\nAssistant:"
    words = "Human: what is <img> in a house?\nAssistant:"
    assert [_encoder_and_decoder(p, batch, row) for row in range(len(batch["labels"]))] == [
        (f"<s>{first}</s>", "<s>cat</s>"),
        (f"<s>{first} cat\nHuman: <img>\nhow\n {request}\nAssistant:</s>", "<s>dog</s>"),
        (f"<s>{words}</s>", "<s>a dog</s>"),
        (f"<s>{words} a dog\nHuman: is <img-d> a cat?\nAssistant:</s>", "<s>no</s>"),
        (
            f"<s>Human: <img>\nwhat?\n {request}\nAssistant: \nHuman: where?\n {request}\nAssistant:</s>",
            "<s>house</s>",
        ),
    ]
    # Pictures of the first row, of the second, which sees both, and of the last.
    pictures = [tiny.picture(0), tiny.picture(0), tiny.picture(1), tiny.picture(2)]
    assert torch.equal(batch["pixel_values"], p.image_processor(pictures, return_tensors="pt")["pixel_values"])
    assert int((batch["input_ids"] == p.image_token_id).sum()) == 4


def test_a_batch_for_an_encoder_decoder_trains(encoder_decoder, build):
    """The model takes what the collator makes: the loss is the decoder's own over these labels."""
    p, model = encoder_decoder("t5"), build("t5", "clip_text", num_dynamic_tokens=2)
    batch = ConversationCollator(p)([{"id": "a", "messages": THREE}, {"id": "b", "messages": WORDS}])
    out = model(**batch)
    shown = batch["labels"] != IGNORED
    log_p = out.logits.log_softmax(-1)[shown]
    expected = -log_p[torch.arange(len(log_p)), batch["labels"][shown]].mean()
    torch.testing.assert_close(out.loss, expected)
    model.freeze_for_stage("instruct")
    model(**batch).loss.backward()
    assert float(model.ipn.request_token.grad.abs().max()) > 0


def test_cutting_for_an_encoder_decoder(encoder_decoder):
    """Labels are cut at `max_length`, and lose their end; what the encoder reads is never cut."""
    p = encoder_decoder("t5")
    batch = PairCollator(p, max_length=3)([{"id": "a", "image": tiny.picture(), "caption": "a cat on a house"}])
    assert _encoder_and_decoder(p, batch, 0) == ("<img></s>", "acaton")
    # Two words and a slot, two and three slots, two, the answer's two; four and three slots, two; the end.
    with pytest.raises(
        ValueError, match="turn 3 of it is 22 tokens long before its answer, longer than max_length=21"
    ):
        ConversationCollator(p, max_length=21)([{"id": "row 3", "messages": THREE[:4]}])
    assert len(ConversationCollator(p, max_length=22)([{"id": "row 3", "messages": THREE[:4]}])["labels"]) == 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (ONE[:1], "Sample x: it has no target token: none of its assistant turns says anything. Leave the row out"),
        (_conversation([_image()], " "), "Sample x: it has no target token"),
        (
            _conversation([_image(), _words("is <img> a tag?")], "yes"),
            "Sample x: Image features and image tokens do not",
        ),
    ],
    ids=["no answer", "empty answer", "slot among the words"],
)
def test_bad_conversations_for_an_encoder_decoder(encoder_decoder, messages, message):
    with pytest.raises(ValueError, match=message):
        ConversationCollator(encoder_decoder("t5"))([{"id": "x", "messages": messages}])
    with pytest.raises(ValueError, match="Sample x: it has no target token: there is nothing to say"):
        PairCollator(encoder_decoder("t5"))([{"id": "x", "image": tiny.picture(), "caption": " "}])


# --- samples that cannot be used, samples without pictures, features in place of pictures ----------------------------


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_bad_samples_leave_the_batch_and_are_named(processor, encoder_decoder, kind):
    """What is left is the batch of the good samples alone."""
    p = processor() if kind == "llama" else encoder_decoder(kind)
    unread = BadSample("row 1", "truncated", "it ends too early")
    silent = {"id": "row 2", "messages": ONE[:1]}
    good = {"id": "row 3", "messages": ONE}
    with pytest.raises(ValueError, match="Sample row 2: it has no target token"):
        ConversationCollator(p)([unread, silent, good])
    batch = ConversationCollator(p, skip_bad_samples=True)([unread, silent, good])
    bad = batch.pop("bad_samples")
    assert [(sample.id, sample.kind) for sample in bad] == [("row 1", "truncated"), ("row 2", "no target")]
    assert bad[0] is unread
    assert "Leave the row out" in bad[1].reason
    alone = ConversationCollator(p)([good])
    assert batch.keys() == alone.keys()
    assert all(torch.equal(batch[name], alone[name]) for name in alone)


def test_kinds_of_what_cannot_be_encoded(processor):
    collator = PairCollator(processor(), max_length=1, skip_bad_samples=True)
    samples = [
        {"id": "a", "image": tiny.picture(), "caption": "cat"},
        {"id": "b", "image": tiny.picture(), "caption": " "},
    ]
    assert [sample.kind for sample in collator(samples)["bad_samples"]] == ["too long", "no target"]
    hiding = ConversationCollator(processor(HIDING_TEMPLATE), skip_bad_samples=True)
    assert [s.kind for s in hiding([{"id": "a", "messages": ONE}])["bad_samples"]] == ["template"]


def test_a_batch_of_nothing_has_no_target(processor):
    p = processor()
    for collator in (PairCollator(p), ConversationCollator(p)):
        batch = collator([BadSample("a", "missing", "no file")] * 3)
        assert len(batch.pop("bad_samples")) == 3
        assert batch["input_ids"].tolist() == [[p.tokenizer.pad_token_id]]
        assert batch["labels"].tolist() == [[IGNORED]]
        assert batch["attention_mask"].tolist() == [[1]]
        assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_a_pair_without_a_picture_is_its_caption(processor):
    """Begun as the tokenizer begins a text; `<img>` in it is words."""
    p = processor()
    samples = [
        {"id": "a", "image": None, "caption": "a cat <img>"},
        {"id": "b", "image": tiny.picture(), "caption": "dog"},
    ]
    batch = PairCollator(p)(samples)
    before = [p.tokenizer.bos_token_id] if p.words_tokenizer("cat")["input_ids"][0] == p.tokenizer.bos_token_id else []
    words = p.words_tokenizer("a cat <img>", add_special_tokens=False)["input_ids"]
    expected = [*before, *words, p.tokenizer.eos_token_id]
    length = int(batch["attention_mask"][0].sum())
    assert batch["input_ids"][0, :length].tolist() == expected
    assert batch["labels"][0, :length].tolist() == [IGNORED] * len(before) + expected[len(before) :]
    assert p.image_token_id not in expected
    assert len(batch["pixel_values"]) == 1


def test_an_encoder_decoder_reads_no_pair_without_a_picture(encoder_decoder):
    with pytest.raises(ValueError, match="Sample a: it has no picture"):
        PairCollator(encoder_decoder("t5"))([{"id": "a", "image": None, "caption": "cat"}])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_features_in_place_of_pictures(processor, encoder_decoder, stage, kind):
    """The batch of pictures, with the features in the pictures' order in place of pixels."""
    p = processor() if kind == "llama" else encoder_decoder(kind)
    features = ImageFeatures(torch.randn(3, 24), torch.randn(3, 16, 32))

    def samples(images: list[Any]) -> list[dict[str, Any]]:
        if stage == 1:
            return [{"id": str(i), "image": image, "caption": "a cat" + " dog" * i} for i, image in enumerate(images)]
        both = [{"type": "image", "image": image} for image in images[:2]]
        first = _conversation([*both, _words("what?")], "cat")
        return [
            {"id": "a", "messages": first},
            {"id": "b", "messages": _conversation([{"type": "image", "image": images[2]}, _words("why?")], "dog")},
        ]

    collator = (PairCollator if stage == 1 else ConversationCollator)(p)
    expected = collator(samples([tiny.picture(seed) for seed in range(3)]))
    got = collator(samples([features[i : i + 1] for i in range(3)]))
    joined = got.pop("image_features")
    assert torch.equal(joined.pooled, features.pooled)
    assert torch.equal(joined.patches, features.patches)
    assert got.keys() == expected.keys() - {"pixel_values"}
    assert all(torch.equal(got[name], expected[name]) for name in got)
