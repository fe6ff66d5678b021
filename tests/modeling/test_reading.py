"""How a causal model is read, whatever surrounds the call: threads, autocast, offloading, caches of other kinds."""

import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from comparison import Meter, assert_gradients, assert_same, inputs_of, rows_of
from reference import Reference
from transformers import StaticCache


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tiny_backbones import tiny_language_model

from transformers_lmeye import LMEyeForConditionalGeneration


def prompt_of(model, layout: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """One row of words and slots, and its pictures."""
    ids, _ = tiny.row(model.config, layout, seed)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    count = layout.split().count("img")
    return {**inputs, "pixel_values": tiny.pixels(count)} if count else inputs


@pytest.fixture
def build_any(folders, tmp_path):
    """`build_any(model_type, **config)` -> LMEye around a tiny model of any type, and the folder of that."""

    def make(model_type: str, **config):
        folder = tmp_path / model_type
        if not folder.exists():
            tiny_language_model(model_type).save_pretrained(folder)
            tiny.tokenizer().save_pretrained(folder)
        model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
            str(folders.vision()), str(folder), **{"interaction": "cross_attention", **tiny.SMALL_STACK, **config}
        )
        tiny.randomise_ipn(model)
        return model.eval(), folder

    return make


# --- threads --------------------------------------------------------------------------------------------------------


def test_a_forward_in_another_thread_is_whole(build):
    """A thread that scores words while another is in the middle of a prompt gets every column's logits."""
    model = build("llama")
    words, prompt = prompt_of(model, "9"), prompt_of(model, "3 img 4 req 2")
    with torch.no_grad():
        expected = model(**words).logits
    found = []

    def score():
        with torch.no_grad():
            found.append(model(**words).logits)

    def meanwhile(module, args, kwargs):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=score)
            other.start()
            other.join()

    model.language_model.model.register_forward_pre_hook(meanwhile, with_kwargs=True)
    perception = model.perceive(**prompt)
    assert len(found) == 1 and torch.equal(found[0], expected)
    assert perception.requests.shape == (1, model.language_model.config.hidden_size)


def test_threads_generate_what_one_does(build):
    model = build("llama", "cross_attention")
    prompts = [prompt_of(model, layout, seed) for seed, layout in enumerate(["3 img 4 req 2", "img 9 req", "7", "11"])]
    expected = [model.generate(**prompt, max_new_tokens=8) for prompt in prompts]
    wrong = []

    def work(index: int):
        for _ in range(4):
            try:
                if not torch.equal(model.generate(**prompts[index], max_new_tokens=8), expected[index]):
                    wrong.append(index)
            except Exception as error:  # an error would end the thread, and nothing else
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert not model.get_output_embeddings()._forward_pre_hooks


# --- what is tried once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "way", "padding"),
    [("mamba2", "copy", False), ("qwen3_next", "copy", False), ("jamba", "again", False), ("mpt", "crop", True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_autocast_changes_no_way_of_reading(build_any, model_type, way, padding, dtype):
    model, _ = build_any(model_type, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.way_of_reading, model.reads_padding) == (way, padding)


@pytest.mark.parametrize("family", ["mpt", "bloom", "gemma2"])
def test_a_language_model_on_disk(build, tmp_path, family):
    """Weights that are loaded as they are used are read like any others, what has to be tried included."""
    model = build(family)
    inputs = inputs_of(rows_of(model.config, ["3 img 4 req 2", "img 2 req 1"])[0], "left")
    del inputs["labels"]
    inputs["pixel_values"] = tiny.pixels(2)
    expected = model.generate(**inputs, max_new_tokens=4)
    model.save_pretrained(tmp_path / "whole")
    offloaded = LMEyeForConditionalGeneration.from_pretrained(
        tmp_path / "whole",
        device_map={"vision_tower": "cpu", "ipn": "cpu", "language_model": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert offloaded.language_model.get_input_embeddings().weight.is_meta
    assert torch.equal(offloaded.generate(**inputs, max_new_tokens=4), expected)


# --- caches of other kinds ------------------------------------------------------------------------------------------

FIRST, SECOND = "15", "2 img 3 req 2"  # fifteen words are more than a window


def chat(model, first: list[str], second: list[str], cache=None):
    """A first turn of words that is generated, and the inputs of the second, which has pictures."""
    begin = inputs_of(rows_of(model.config, first)[0], "left")
    options = {} if cache is None else {"past_key_values": cache}
    got = model.generate(
        input_ids=begin["input_ids"],
        attention_mask=begin["attention_mask"],
        max_new_tokens=4,
        min_new_tokens=4,
        return_dict_in_generate=True,
        **options,
    )
    rows, pictures = rows_of(model.config, second, seed=5)
    behind = inputs_of(rows, "right")
    mask = torch.cat([begin["attention_mask"], torch.ones(len(first), 4, dtype=torch.long)], dim=1)
    whole = {
        "input_ids": torch.cat([got.sequences, behind["input_ids"]], dim=1),
        "attention_mask": torch.cat([mask, behind["attention_mask"]], dim=1),
        "pixel_values": pictures,
    }
    return got.past_key_values, whole


def assert_goes_on(model, cache, whole, **options):
    settings = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, **options}
    expected = model.generate(**whole, **settings)
    got = model.generate(**whole, past_key_values=cache, **settings)
    assert_same(got.logits[0], expected.logits[0], "logits of the first new word")
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("keep_request_token", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_picture_behind_words(build, family, keep_request_token, options):
    """Generation's own cache drops what is out of a window; no request token can be dropped from it again."""
    model = build(family, keep_request_token=keep_request_token)
    cache, whole = chat(model, [FIRST], [SECOND])
    assert_goes_on(model, cache, whole, **options)


@pytest.mark.parametrize("model_type", ["mistral", "cohere2", "qwen3_next"])
@pytest.mark.filterwarnings("ignore")
def test_a_picture_behind_words_of_other_types(build_any, model_type):
    model, _ = build_any(model_type)
    cache, whole = chat(model, [FIRST], [SECOND])
    assert_goes_on(model, cache, whole)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_a_picture_behind_a_static_cache(build, family, options):
    model = build(family)
    given = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    cache, whole = chat(model, [FIRST], [SECOND], given)
    assert_goes_on(model, cache, whole, **options)


def test_rows_behind_words(build):
    """Rows whose second turns are of one length need no moving, whatever lies before them."""
    model = build("gemma2")
    cache, whole = chat(model, [FIRST, "9"], [SECOND, SECOND])
    assert_goes_on(model, cache, whole)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_rows_that_would_have_to_be_moved_are_refused(build, family):
    model = build(family)
    given = None
    if family == "llama":
        given = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    cache, whole = chat(model, [FIRST, FIRST], [SECOND, "img 2 req 1"], given)
    with pytest.raises(ValueError, match="leave past_key_values out"):
        model.generate(**whole, past_key_values=cache, max_new_tokens=4)


# --- training behind recurrent states -------------------------------------------------------------------------------

ONE_TURN, TWO_TURNS = "2 img 3 req 4 =3", "2 img 3 req 2 =2 img 3 req 1 =2"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("layouts", "config"),
    [
        ([ONE_TURN], {"keep_request_token": True}),
        ([TWO_TURNS], {"keep_request_token": True}),
        ([ONE_TURN, TWO_TURNS], {"keep_request_token": True}),
        # A dynamic token alone between two requests: recurrent layers would read a single token behind their states.
        (["2 img 3 req req 2 =3"], {"num_dynamic_tokens": 1}),
        (["2 img 3 req req 2 =3", ONE_TURN], {"num_dynamic_tokens": 1}),
    ],
    ids=["one turn", "two turns", "both", "single token", "single token in a batch"],
)
@pytest.mark.parametrize("model_type", ["mamba2", "qwen3_next", "falcon_h1", "lfm2_moe"])
@pytest.mark.filterwarnings("ignore")
def test_training_behind_recurrent_states(build_any, folders, model_type, layouts, config, checkpointing):
    model, folder = build_any(model_type, interaction="clip_text", fine_grained_dropout=0.0, **config)
    plain = Reference(folders.vision(), folder, model)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    rows, pictures = rows_of(model.config, layouts)
    assert_gradients(model, plain, rows, "right", {"pixel_values": pictures})


@pytest.mark.parametrize(
    ("model_type", "expected"), [("llama", [6, 1, 13]), ("qwen3_next", [7, 13]), ("mamba2", [7, 13])]
)
@pytest.mark.filterwarnings("ignore")
def test_columns_read_in_training_with_a_request_token_that_stays(build_any, model_type, expected):
    """Every column once; the request token apart from what nothing trains through, where keys and values allow it."""
    model, _ = build_any(model_type, keep_request_token=True)
    model.freeze_for_stage("instruct")
    rows, pictures = rows_of(model.config, ["2 img 3 req 5 =3"])
    meter = Meter(model)
    model.way_of_reading  # noqa: B018, which tries the language model once
    meter.reads.clear()
    model(**inputs_of(rows, "right"), pixel_values=pictures).loss.backward()
    assert [columns for _, columns in meter.reads] == expected
