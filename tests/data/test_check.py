"""The preflight: what it counts, against counts made by hand; that training would meet the same; its exit status."""

import json
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiny

from transformers_lmeye import LMEyeProcessor
from transformers_lmeye.data import BadSample, ConversationReader, PairReader, SampleDataset, load_rows
from transformers_lmeye.data.check import (
    HashSet,
    SampleFacts,
    Summary,
    check,
    choose,
    expected_longest,
    load_processor,
    quantile,
)
from transformers_lmeye.training import ConversationCollator, ModelArguments, PairCollator, load_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def backbones(folders) -> list[str]:
    vision, language = str(folders.vision()), str(folders.language("llama"))
    return ["--vision_model_name_or_path", vision, "--language_model_name_or_path", language]


@pytest.fixture
def look(backbones, tmp_path) -> Callable[..., SimpleNamespace]:
    """`look(stage, data, "--flag", value, ..)` -> exit status and report."""

    def run(stage: str, data: Path | str, *arguments: object) -> SimpleNamespace:
        path = tmp_path / "report.json"
        command = ["--stage", stage, *backbones, "--dataset_name_or_path", data, "--json", path, *arguments]
        status = check([str(argument) for argument in command])
        return SimpleNamespace(status=status, **json.loads(path.read_text()) if status != 2 else {})

    return run


def _lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Sixteen pairs: ten good, of which many are odd, and six bad ones."""
    sizes = {"a": (40, 40), "b": (64, 48), "small": (20, 50), "wide": (140, 40), "other": (32, 32)}
    for number, (name, size) in enumerate(sizes.items()):
        tiny.picture(number, size).save(tmp_path / f"{name}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    tiny.picture(0, sizes["a"]).save(tmp_path / "same.bmp")  # other bytes, the same pixels
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("no picture")
    rows = [
        {"image": "a.png", "caption": "a cat"},
        {"image": "a.png", "caption": "a cat"},  # again
        {"image": "a.png", "caption": "a dog"},
        {"image": "copy.png", "caption": "a cat"},  # again, under another name
        {"image": "same.bmp", "caption": "the man"},  # under a third
        {"image": "b.png", "caption": "a cat"},
        {"image": "small.png", "caption": "a dog in a house"},
        {"image": "wide.png", "caption": "a house"},
        {"image": "other.png", "caption": "zebra"},  # no word of the tokenizer
        {"image": "copy.png", "caption": "a house"},  # a name that is known by now
        {"image": "gone.png", "caption": "a cat"},
        {"image": "gone too.png", "caption": "a cat"},
        {"image": "cut.png", "caption": "a cat"},
        {"image": "empty.png", "caption": "a cat"},
        {"image": "words.png", "caption": "a cat"},
        {"image": "a.png", "caption": "  "},
    ]
    return _lines(tmp_path / "pairs.jsonl", rows)


def test_pairs_counted_by_hand(look, pairs, tmp_path, capsys):
    found = look("pretrain", pairs, "--num_samples", "all", "--bad_samples_file", tmp_path / "bad.jsonl")
    part = found.parts["train"]
    assert found.status == 1 and found.verdict == "do not train"
    assert found.reasons == ["train: 6 of 16 samples are bad (37.50%), more than --max_bad_fraction 0.01 allows"]
    assert (part["samples"], part["in_all"], part["bad"], part["text_only"]) == (16, 16, 6, 0)
    bad = {kind: (finding["count"], finding["ids"]) for kind, finding in part["bad_by_kind"].items()}
    assert bad == {
        "missing": (2, ["row 10", "row 11"]),
        "truncated": (1, ["row 12"]),
        "empty": (1, ["row 13"]),
        "no picture": (1, ["row 14"]),
        "no text": (1, ["row 15"]),
    }
    assert "gone.png" in part["bad_by_kind"]["missing"]["first_reason"]
    findings = {name: finding["ids"] for name, finding in part["findings"].items() if finding["count"]}
    assert findings == {
        "same pictures and text as an earlier sample": ["row 1", "row 3"],
        "same picture as an earlier one under another name": ["row 3", "row 4"],
    }
    assert part["images_per_sample"] == {"1": 10} and part["requests_per_sample"] == {"0": 10}
    assert (part["different_texts"], part["different_pictures"]) == (6, 5)
    # <img>, the words and the blanks between them, and the end.
    lengths = [5, 5, 5, 5, 5, 5, 11, 5, 3, 5]
    assert part["length"] == {
        "min": 3, "median": 5, "95%": 11, "99%": 11, "max": 11, "mean": sum(lengths) / 10,
    }  # fmt: skip
    assert part["targets_per_sample"] == sum(lengths) / 10 - 1
    assert part["unknown_targets"] == pytest.approx(1 / (sum(lengths) - 10))
    assert part["pictures"] == {
        "count": 10, "measured": 10, "shortest_side_median": 40, "smaller_than_input": 1, "extreme_aspect_ratio": 1,
    }  # fmt: skip
    reported = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in reported] == [f"row {number}" for number in range(10, 16)]
    assert reported[0]["part"] == "train" and reported[0]["kind"] == "missing" and "gone.png" in reported[0]["reason"]
    printed = capsys.readouterr().out
    assert "row 10, row 11: " in printed and "Verdict: do not train; train: 6 of 16" in printed


@pytest.mark.parametrize(("allowed", "status"), [(0.37, 1), (0.375, 0), (0.4, 0)])
def test_the_verdict_follows_the_share_of_bad_samples(look, pairs, allowed, status):
    found = look("pretrain", pairs, "--num_samples", "all", "--max_bad_fraction", allowed)
    assert found.status == status and bool(found.reasons) == bool(status)


def test_nothing_to_train_on(look, pairs):
    found = look("pretrain", pairs, "--train_split", "train[10:]", "--max_bad_fraction", 1)
    assert found.status == 1 and found.reasons == ["train: no sample is good"]
    assert Summary(batch_size=4, asks=False).reasons_not_to_train(1.0) == ["there is no sample"]


def test_streams_and_workers_count_the_same(look, pairs):
    mapped = look("pretrain", pairs, "--num_samples", "all").parts["train"]
    for options in (["--streaming"], ["--dataloader_num_workers", 2], ["--streaming", "--dataloader_num_workers", 2]):
        part = look("pretrain", pairs, "--num_samples", "all", *options).parts["train"]
        for key in ("samples", "bad", "length", "pictures", "different_texts", "different_pictures", "padding"):
            assert part[key] == mapped[key], (options, key)
        assert part["in_all"] == (None if "--streaming" in options else 16)
        counts = {kind: finding["count"] for kind, finding in part["bad_by_kind"].items()}
        assert counts == {kind: finding["count"] for kind, finding in mapped["bad_by_kind"].items()}
    part = look("pretrain", pairs, "--num_samples", 3, "--streaming").parts["train"]
    assert part["samples"] == 3 and part["findings"]["same pictures and text as an earlier sample"]["count"] == 1


def test_a_draw_of_the_samples(look, pairs):
    part = look("pretrain", pairs, "--num_samples", 7, "--max_bad_fraction", 1).parts["train"]
    assert (part["samples"], part["in_all"]) == (7, 16)
    drawn = choose(1000, 100, seed=0)
    assert len(set(drawn)) == 100 and list(drawn) == sorted(drawn) and drawn == choose(1000, 100, seed=0)
    assert drawn != choose(1000, 100, seed=1) and max(drawn) < 1000
    assert list(choose(5, None, 0)) == list(choose(5, 7, 0)) == [0, 1, 2, 3, 4]
    assert len(choose(10**12, 3, 0)) == 3  # nothing is listed to draw from


def test_evaluation_data_that_was_trained_on(look, pairs, tmp_path):
    rows = [
        {"image": "copy.png", "caption": "a cat"},  # trained on
        {"image": "b.png", "caption": "a house"},  # its picture was
        {"image": "other.png", "caption": "a cat"},
        {"image": "gone.png", "caption": "a cat"},
    ]
    tiny.picture(99, (50, 50)).save(tmp_path / "new.png")
    rows[2]["image"] = "new.png"
    _lines(tmp_path / "eval.jsonl", rows)
    found = look(
        "pretrain", pairs, "--train_split", "train[:10]", "--eval_dataset_name_or_path", tmp_path / "eval.jsonl"
    )
    findings = {name: f["ids"] for name, f in found.parts["eval"]["findings"].items() if f["count"]}
    assert findings == {
        "picture also among those to train on": ["row 0", "row 1"],
        "same pictures and text as one to train on": ["row 0"],
    }
    assert found.status == 1 and [reason.split(":")[0] for reason in found.reasons] == ["eval"]


def _turns(*texts: str, images: int = 1) -> list[dict]:
    messages = []
    for place, text in enumerate(texts):
        content = [{"type": "text", "text": text}]
        if not place:
            content = [{"type": "image"}] * images + content
        messages.append({"role": ("user", "assistant")[place % 2], "content": content})
    return messages


@pytest.fixture
def conversations(tmp_path) -> Path:
    for number in range(3):
        tiny.picture(number, (40, 40)).save(tmp_path / f"{number}.png")
    rows = [
        {"id": "one", "image": ["0.png"], "messages": _turns("a cat", "a dog")},
        {"id": "two", "image": ["0.png", "1.png"], "messages": _turns("a cat", "a dog", images=2)},
        {"id": "three", "image": ["1.png"], "messages": _turns("a cat", "a dog", "the man", "a house", "a", "dog")},
        {"id": "words", "image": [], "messages": _turns("a cat", "a dog", images=0)},
        {"id": "places", "image": ["0.png"], "messages": _turns("a cat", "a dog", images=2)},
        {"id": "silent", "image": ["0.png"], "messages": _turns("a cat", " ")},
        {"id": "lost", "image": ["lost.png"], "messages": _turns("a cat", "a dog")},
        {"id": "long", "image": ["2.png"], "messages": _turns("a cat", "a dog in a house " * 6)},
        {"id": "longer", "image": ["2.png"], "messages": _turns("a cat " * 40, "a dog")},
    ]
    return _lines(tmp_path / "conversations.jsonl", rows)


def test_conversations_counted_by_hand(look, conversations):
    part = look("instruct", conversations, "--num_samples", "all", "--num_dynamic_tokens", 2).parts["train"]
    bad = {kind: finding["ids"] for kind, finding in part["bad_by_kind"].items()}
    assert bad == {
        "bad places": ["row 4 (id places)"],
        "no text": ["row 5 (id silent)"],
        "missing": ["row 6 (id lost)"],
    }
    assert part["images_per_sample"] == {"0": 1, "1": 4, "2": 1} and part["text_only"] == 1
    assert part["requests_per_sample"] == {"0": 1, "1": 4, "3": 1}
    assert part["findings"]["cut at max_length"]["count"] == part["findings"]["without a request"]["count"] == 0
    cut = look("instruct", conversations, "--num_samples", "all", "--num_dynamic_tokens", 2, "--max_length", 75)
    assert cut.parts["train"]["findings"]["cut at max_length"]["ids"] == ["row 7 (id long)"]
    assert cut.parts["train"]["bad_by_kind"]["too long"]["ids"] == ["row 8 (id longer)"]
    assert cut.parts["train"]["length"]["max"] == 75
    # Two requests for each question, and none at all.
    rounds = look("instruct", conversations, "--num_samples", "all", "--num_request_rounds", 2).parts["train"]
    assert rounds["requests_per_sample"] == part["requests_per_sample"]
    assert rounds["length"]["max"] > part["length"]["max"]
    none = look("instruct", conversations, "--num_samples", "all", "--interaction", "none").parts["train"]
    assert none["requests_per_sample"] == {"0": 6} and none["findings"]["without a request"]["count"] == 0


def test_pictures_that_are_never_asked(look, conversations, folders, tmp_path):
    """A chat template without the request slot trains nothing in stage 2."""
    processor = LMEyeProcessor.from_vision_language_pretrained(
        str(folders.vision()), str(folders.language("llama")), num_dynamic_tokens=2
    )
    processor.chat_template = processor.chat_template.replace("<img-d>", "")
    processor.save_pretrained(tmp_path / "processor")
    found = look(
        "instruct",
        conversations,
        "--num_samples",
        3,
        "--streaming",
        "--processor_name_or_path",
        tmp_path / "processor",
    )
    finding = found.parts["train"]["findings"]["without a request"]
    assert finding["count"] == 3 and found.parts["train"]["requests_per_sample"] == {"0": 3}


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_the_report_is_what_training_meets(look, pairs, conversations, folders, stage):
    """Against one batch of everything, as training collates it."""
    data = pairs if stage == "pretrain" else conversations
    reader = (PairReader if stage == "pretrain" else ConversationReader)(image_folder=data.parent)
    samples = SampleDataset(load_rows(data), reader, skip_bad_samples=True)
    processor = LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(folders.language("llama")))
    collator = (PairCollator if stage == "pretrain" else ConversationCollator)(processor, 60, skip_bad_samples=True)
    batch = collator([samples[index] for index in range(len(samples))])
    part = look(stage, data, "--num_samples", "all", "--max_length", 60).parts["train"]
    kinds = Counter(bad.kind for bad in batch["bad_samples"])
    assert {kind: finding["count"] for kind, finding in part["bad_by_kind"].items()} == kinds
    lengths = batch["attention_mask"].sum(1).tolist()
    assert part["rows"] == len(lengths) and part["length"]["max"] == max(lengths)
    assert part["length"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
    targets = int((batch["labels"] != -100).sum())
    assert part["targets_per_sample"] * (part["samples"] - part["bad"]) == pytest.approx(targets)
    assert part["pictures"]["count"] == len(batch["pixel_values"])


def test_an_encoder_decoder_has_a_row_for_each_answer(look, conversations, folders):
    language = ("--language_model_name_or_path", folders.language("t5"))
    part = look("instruct", conversations, "--num_samples", "all", *language).parts["train"]
    assert part["samples"] - part["bad"] == 6 and part["rows"] == 8
    assert part["images_per_sample"] == {"0": 1, "1": 4, "2": 1}
    assert part["requests_per_sample"] == {"0": 1, "1": 4, "3": 1}


def test_texts_mixed_in_are_counted(look, pairs, tmp_path):
    texts = _lines(tmp_path / "texts.jsonl", [{"caption": "a dog"}, {"caption": ""}])
    options = ("--text_dataset_name_or_path", texts, "--text_rate", 0.5, "--train_split", "train[:10]")
    part = look("pretrain", pairs, "--num_samples", "all", *options).parts["train"]
    assert part["samples"] == 19 and part["text_only"] == 5 and part["bad_by_kind"]["no text"]["count"] == 4
    assert part["images_per_sample"] == {"0": 5, "1": 10}


def test_features_stand_in_for_pictures(look, pairs, folders, tmp_path, monkeypatch):
    """The cache that training would read: what is not in it is bad, and one of another tower is refused."""
    cache = tmp_path / "features"
    script = Path(__file__).parents[2] / "examples" / "extract_features.py"
    command = ["extract_features.py", "--vision_model_name_or_path", folders.vision(), "--output_dir", cache]
    command += ["--dataset_name_or_path", pairs, "--num_workers", 0, "--max_bad_fraction", 1]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    runpy.run_path(str(script), run_name="__main__")
    options = ("--num_samples", "all", "--feature_cache", cache)
    part = look("pretrain", pairs, *options).parts["train"]
    without = look("pretrain", pairs, "--num_samples", "all").parts["train"]
    kinds = {kind: finding["count"] for kind, finding in part["bad_by_kind"].items()}
    assert kinds == {"not cached": 5, "no text": 1}
    assert part["length"] == without["length"] and part["pictures"]["measured"] == 0
    assert part["findings"] == without["findings"]  # what is the same is known by its features
    other = look("pretrain", pairs, *options, "--vision_model_name_or_path", folders.vision(seed=5))
    assert other.status == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name_or_path", "gone.jsonl"], "There is no data file gone.jsonl"),
        (["--caption_column", "text"], "no column 'text'"),
        (["--model_name_or_path", "/no/such/model"], "Nothing could be checked"),
        (["--config_overrides", "[1]"], "must be a JSON object"),
        (["--train_split", "test"], "no split 'test'"),
        (["--feature_cache", "nowhere"], "no feature cache"),
        (["--num_samples", "some"], "a number or"),
        (["--num_samples", "0"], "a number or"),
        (["--max_lenght", "9"], "unrecognized arguments: --max_lenght"),
        (["--stage", "both"], "invalid choice"),
    ],
)
def test_wrong_usage(look, pairs, capsys, arguments, message):
    try:
        status = look("pretrain", pairs, *arguments).status
    except SystemExit as left:
        status = left.code
    assert status == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_as_a_command(pairs, conversations, backbones, monkeypatch, capsys, stage):
    """With the whole command line of a training script."""
    command = ["--stage", stage, *backbones]
    if stage == "pretrain":
        command += ["--dataset_name_or_path", str(pairs), "--train_split", "train[:10]"]
    else:
        command += ["--dataset_name_or_path", str(conversations), "--train_split", "train[:3]"]
        command += ["--standardize_requests", "4"]
    command += ["--bf16", "--learning_rate", "1e-3", "--output_dir", "out", "--per_device_train_batch_size", "2"]
    monkeypatch.setattr(sys, "argv", ["check", *command])
    monkeypatch.delitem(sys.modules, "transformers_lmeye.data.check")
    with pytest.raises(SystemExit) as left:
        runpy.run_module("transformers_lmeye.data.check", run_name="__main__")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "padding of random batches of 2:" in printed and printed.endswith("Verdict: train.\n")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interaction": "none", "num_static_tokens": 3},
        {"interaction": "cross_attention", "num_dynamic_tokens": 2, "num_request_rounds": 2},
        {"visual_mapping": "patch", "interaction": "none"},
        {"config_overrides": '{"keep_request_token": true}', "add_bos": True},
        {"language": "t5"},
    ],
)  # fmt: skip
def test_the_processor_is_that_of_the_model(folders, options):
    language = folders.language(options.get("language", "llama"))
    options = {name: value for name, value in options.items() if name != "language"}
    arguments = ModelArguments(
        vision_model_name_or_path=str(folders.vision()), language_model_name_or_path=str(language), **options
    )
    if options.get("interaction") == "cross_attention":
        arguments.config_overrides = json.dumps(tiny.SMALL_STACK)
    _, expected = load_model(arguments)
    found = load_processor(arguments)
    assert found.to_dict() == expected.to_dict() and found.chat_template == expected.chat_template


def test_lengths_of_random_batches():
    """Against every batch there is."""
    values = [3, 3, 5, 9]
    counts = Counter(values)
    for batch_size in (1, 2, 3):
        batches = list(product(values, repeat=batch_size))
        assert expected_longest(counts, batch_size) == pytest.approx(sum(map(max, batches)) / len(batches))
    for share in (0.0, 0.2, 0.25, 0.5, 0.6, 0.95, 1.0):
        assert quantile(counts, share) == np.quantile(values, share, method="inverted_cdf")


def test_hash_sets():
    generator = Random(0)
    plain: set[int] = set()
    hashes = HashSet(num_newest=50)
    for _ in range(2000):
        value = generator.choice([generator.getrandbits(64), generator.randrange(300)])
        assert (value in hashes) == (value in plain)
        assert hashes.add(value) == (value not in plain)
        plain.add(value)
        assert len(hashes) == len(plain)
    assert hashes._sorted.nbytes >= 8 * (len(plain) - 50) and len(hashes._recent) < 50


def test_the_ids_listed_are_few():
    summary = Summary(batch_size=4, asks=True)
    for number in range(30):
        summary.add(SampleFacts(f"row {number}", bad=BadSample(f"row {number}", "missing", f"reason {number}")))
    (finding,) = summary.as_dict()["bad_by_kind"].values()
    assert finding["count"] == 30 and len(finding["ids"]) == 20 and finding["first_reason"] == "reason 0"
