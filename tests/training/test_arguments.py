"""Which samples the arguments of the scripts name."""

import json
from itertools import islice
from pathlib import Path

import pytest
import tiny
from PIL import Image
from transformers import HfArgumentParser

from transformers_lmeye.data import BadSample, SampleDataset, SampleStream
from transformers_lmeye.training import ConversationDataArguments, PairDataArguments


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six pictures with captions and questions, and nine texts."""
    (tmp_path / "images").mkdir()
    pairs = []
    for number in range(6):
        tiny.picture(number).save(tmp_path / "images" / f"{number}.png")
        pairs.append({"image": f"images/{number}.png", "caption": f"cat {number}", "question": "what?"})
    texts = [{"caption": f"words {number}", "question": "why?", "answer": f"so {number}"} for number in range(9)]
    for name, rows in (("pairs", pairs), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def parse(kind: type, *words: object):
    (arguments,) = HfArgumentParser(kind).parse_args_into_dataclasses([str(word) for word in words])
    return arguments


def pairs(data: Path, *words: object) -> PairDataArguments:
    return parse(PairDataArguments, "--dataset_name_or_path", data / "pairs.jsonl", *words)


def test_pairs(data):
    samples = pairs(data).train_dataset(seed=0)
    assert isinstance(samples, SampleDataset)
    assert [sample["caption"] for sample in samples] == [f"cat {number}" for number in range(6)]
    assert all(sample["image"].tobytes() == tiny.picture(n).tobytes() for n, sample in enumerate(samples))
    assert pairs(data).eval_dataset() is None


def test_a_stream_has_the_same_samples(data):
    samples = pairs(data, "--streaming", "--shuffle_buffer", 0).train_dataset(seed=0)
    assert isinstance(samples, SampleStream)
    captions = [sample["caption"] for sample in islice(samples, 12)]
    assert captions == [f"cat {number}" for number in range(6)] * 2
    shuffled = [
        [sample["caption"] for sample in islice(pairs(data, "--streaming").train_dataset(seed=seed), 6)]
        for seed in (0, 0, 1)
    ]
    assert sorted(shuffled[0]) == captions[:6]
    assert shuffled[0] == shuffled[1] != shuffled[2]


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_are_mixed_in(data, streaming):
    """At the rate that is given; rows of the texts need no column of pictures."""
    words = ["--text_dataset_name_or_path", data / "texts.jsonl", "--text_rate", 0.25]
    words += ["--streaming", "--shuffle_buffer", 0] if streaming else []
    captions = [sample["caption"] for sample in islice(pairs(data, *words).train_dataset(seed=0), 7)]
    expected = ["cat 0", "cat 1", "cat 2", "words 0", "cat 3", "cat 4", "cat 5"]
    assert captions == expected
    asked = ["--answer_column", "caption", "--instruction", "describe", *words]
    mixed = parse(ConversationDataArguments, "--dataset_name_or_path", data / "pairs.jsonl", *asked)
    turns = [
        [part.get("text") for message in sample["messages"] for part in message["content"]]
        for sample in islice(mixed.train_dataset(seed=0), 4)
    ]
    assert turns[0] == [None, "describe", "cat 0"]  # the picture, the instruction, the caption
    assert turns[3] == ["why?", "words 0"]


def test_what_is_evaluated(data):
    """Samples with pictures, those without beside them, or none; other data starts at its own folder."""
    both = pairs(
        data,
        *("--eval_split", "train[4:]", "--text_dataset_name_or_path", data / "texts.jsonl"),
        *("--text_eval_split", "train[:2]"),
    ).eval_dataset()
    assert [sample["caption"] for sample in both[""]] == ["cat 4", "cat 5"]
    assert [(sample["caption"], sample["image"]) for sample in both["text"]] == [("words 0", None), ("words 1", None)]
    other = data / "other"
    (other / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(other / "images" / "0.png")
    (other / "a.jsonl").write_text(json.dumps({"image": "images/0.png", "caption": "red"}))
    (sample,) = pairs(data, "--eval_dataset_name_or_path", other / "a.jsonl").eval_dataset()
    assert sample["image"].size == (4, 4)
    with pytest.raises(ValueError, match="--text_eval_split is a split of --text_dataset_name_or_path"):
        pairs(data, "--text_eval_split", "train").eval_dataset()


def test_bad_samples_keep_their_place(data):
    (data / "images" / "2.png").write_bytes(b"")
    samples = pairs(data, "--max_pixels", 32 * 32 - 1).train_dataset(seed=0)
    found = [samples[number] for number in range(6)]
    assert all(isinstance(sample, BadSample) for sample in found)
    assert [sample.kind for sample in found] == ["too large"] * 2 + ["empty"] + ["too large"] * 3
    assert "images/2.png" in found[2].reason


def test_ids_say_which_data_set_a_row_is_of(data):
    (data / "texts.jsonl").write_text('{"caption": "words"}\n{"caption": ""}\n')
    (data / "images" / "1.png").write_bytes(b"")
    samples = pairs(
        data,
        *("--text_dataset_name_or_path", data / "texts.jsonl", "--text_rate", 0.5, "--text_eval_split", "train"),
        *("--eval_split", "train"),
    )
    mixed = samples.train_dataset(seed=0)
    bad = [found.id for found in (mixed[number] for number in range(4)) if isinstance(found, BadSample)]
    assert bad == ["row 1", "text row 1"]
    evaluation = samples.eval_dataset()
    assert [evaluation[""][1].id, evaluation["text"][1].id] == bad


def test_where_pictures_start(data):
    """At the folder that is named, of the file, or of the files that a pattern names."""
    pattern = parse(PairDataArguments, "--dataset_name_or_path", data / "p*.jsonl")
    assert pattern.image_folder_of() == pairs(data).image_folder_of() == pairs(data).image_root() == data
    assert len([sample for sample in pattern.train_dataset(seed=0) if isinstance(sample, dict)]) == 6
    assert pairs(data, "--image_folder", data / "images").image_folder_of() == data / "images"
    folder = parse(PairDataArguments, "--dataset_name_or_path", data / "images")
    assert folder.image_folder_of() is None
    assert folder.image_root() == data / "images"
