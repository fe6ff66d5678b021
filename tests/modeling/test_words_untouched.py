"""Promise 1: without images, LMEye is the plain language model, for every family and every decoding strategy."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "static_cache": {"cache_implementation": "static"},
    "static_cache_beams": {"cache_implementation": "static", "num_beams": 2},
    "no_cache": {"use_cache": False},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {},
}
SINGLE_ROW = ("assistant", "prompt_lookup")


def text_batch(rows: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(5)
    lengths = [13, 9, 11][:rows]
    texts = [torch.randint(tiny.FIRST_WORD, tiny.TABLE_ROWS, (n,), generator=draws).tolist() for n in lengths]
    inputs = tiny.batch([(text, text) for text in texts], "left")
    return inputs


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention"])
def test_logits_and_loss(build, folders, family, interaction):
    model = build(family, interaction)
    plain = AutoModelForCausalLM.from_pretrained(folders.language(family)).eval()
    inputs = text_batch(3)
    with torch.no_grad():
        ours, theirs = model(**inputs), plain(**inputs)
    assert ours.logits.shape == theirs.logits.shape == (*inputs["input_ids"].shape, tiny.TABLE_ROWS)
    words = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[words], theirs.logits[words], atol=1e-5, rtol=1e-5)
    targets = inputs["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(theirs.logits[:, :-1].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours.loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generated_ids(build, folders, family, strategy):
    model = build(family)
    plain = AutoModelForCausalLM.from_pretrained(folders.language(family)).eval()
    inputs = text_batch(1 if strategy in SINGLE_ROW else 3)
    del inputs["labels"]
    options = dict(STRATEGIES[strategy], max_new_tokens=10)
    if strategy == "assistant":
        options["assistant_model"] = tiny.language_model(family, seed=5)
    torch.manual_seed(3)
    expected = plain.generate(**inputs, **options)
    torch.manual_seed(3)
    got = model.generate(**inputs, **options)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_returned_dict(build, folders, options):
    """Scores and logits of every step are the plain model's, not only the ids."""
    model, plain = build(), AutoModelForCausalLM.from_pretrained(folders.language()).eval()
    inputs = text_batch(2)
    del inputs["labels"]
    options = dict(options, max_new_tokens=6, return_dict_in_generate=True, output_scores=True, output_logits=True)
    torch.manual_seed(3)
    expected = plain.generate(**inputs, **options)
    torch.manual_seed(3)
    got = model.generate(**inputs, **options)
    assert type(got) is type(expected)
    assert got.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name])
        for ours, theirs in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer(build, folders):
    model, plain = build(), AutoModelForCausalLM.from_pretrained(folders.language()).eval()
    inputs = text_batch(1)
    del inputs["labels"]
    ours, theirs = Recorder(), Recorder()
    plain.generate(**inputs, max_new_tokens=6, streamer=theirs)
    model.generate(**inputs, max_new_tokens=6, streamer=ours)
    assert ours.tokens == theirs.tokens and ours.ended


@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention", "none"])
def test_published_text_with_the_eyes_attached(folders, stories, interaction):
    """A real model tells its published story word for word, and the words decide the ids: a picture changes them."""
    from transformers_lmeye import LMEyeForConditionalGeneration

    published = json.loads((stories / "reference.json").read_text())
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folders.vision()), str(stories / "hf"), interaction=interaction, **tiny.SMALL_STACK
    ).eval()
    expected = published["greedy_ids_first_200"]
    begin = torch.tensor([[expected[0]]])
    ids = model.generate(input_ids=begin, attention_mask=torch.ones_like(begin), max_new_tokens=len(expected) - 1)
    assert ids[0].tolist() == expected
    text = AutoTokenizer.from_pretrained(stories / "hf").decode(ids[0], skip_special_tokens=True).strip()
    assert len(text) > 400
    assert published["greedy_from_bos_200_steps_expected"].startswith(text)
