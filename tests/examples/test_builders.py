"""The scripts that build stage-2 data, as a user runs them, and training on what they built."""

import json
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import tiny

from transformers_lmeye.data import ConversationReader, SampleDataset, load_rows
from transformers_lmeye.data.check import check
from transformers_lmeye.data.writing import write_rows


EXAMPLES = Path(__file__).parents[2] / "examples"
PHOTOS = Path(__file__).parents[2] / "../shared/reference/photos"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def run(monkeypatch) -> Callable[..., None]:
    def script(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return script


@pytest.fixture
def captions(tmp_path) -> Path:
    """Twelve pictures with two captions each."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(12):
        tiny.picture(number).save(folder / "images" / f"{number}.png")
        rows.append({"image": f"images/{number}.png", "caption": [f"a cat {number}", f"dog number {number}"]})
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _answers(rows: list[dict]) -> Counter:
    return Counter(row["messages"][1]["content"][0]["text"] for row in rows)


def test_matching_from_json_lines(run, captions, tmp_path, capsys):
    output = tmp_path / "out" / "matching.jsonl"
    run("build_matching.py", "--dataset_name_or_path", captions, "--output_file", output, "--seed", 3)
    rows = _read(output)
    assert _answers(rows) == {"True": 12, "False": 12, "A": 6, "B": 6, "C": 6, "D": 6}
    printed = capsys.readouterr().out
    assert "24 captions of 12 pictures gave 48 rows" in printed
    assert f"train with --image_folder {captions.parent}" in printed
    # As training reads them.
    samples = SampleDataset(load_rows(output), ConversationReader(image_folder=captions.parent))
    for index, row in enumerate(rows):
        (image, text), answer = samples[index]["messages"][0]["content"], samples[index]["messages"][1]
        assert image["image"].tobytes() == tiny.picture(int(row["image"][7:-4])).tobytes()
        assert text["text"] == row["messages"][0]["content"][1]["text"] and answer["role"] == "assistant"
    again = tmp_path / "again.jsonl"
    pattern = captions.with_name("capt*.jsonl")  # pictures start at the folder of the files, as in training
    run("build_matching.py", "--dataset_name_or_path", pattern, "--output_file", again, "--seed", 3, "--streaming")
    assert again.read_bytes() == output.read_bytes()  # read as a stream or not
    run("build_matching.py", "--dataset_name_or_path", captions, "--output_file", again, "--seed", 4)
    assert again.read_bytes() != output.read_bytes()


def test_matching_from_pictures_in_parquet(run, captions, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = [
        {"image": {"bytes": (captions.parent / row["image"]).read_bytes(), "path": None}, "caption": row["caption"][0]}
        for row in _read(captions)
    ]
    write_rows(rows[:5], tmp_path / "shard-0.parquet", features)
    write_rows(rows[5:], tmp_path / "shard-1.parquet", features)
    output = tmp_path / "matching.parquet"
    shards = tmp_path / "shard-*.parquet"
    with pytest.raises(ValueError, match=r"does not fit JSON lines .*\.parquet"):
        run("build_matching.py", "--dataset_name_or_path", shards, "--output_file", tmp_path / "a.jsonl")
    options = ("--kinds", "four_choice", "--hard_negatives", "tfidf", "--max_similarity", 1)
    run("build_matching.py", "--dataset_name_or_path", shards, "--output_file", output, *options)
    samples = SampleDataset(load_rows(output), ConversationReader())
    assert len(samples) == 12
    for index in (0, 11):
        image = samples[index]["messages"][0]["content"][0]["image"]
        assert image.tobytes() in {tiny.picture(number).tobytes() for number in range(12)}


def test_rows_that_cannot_be_read(run, captions, tmp_path, capsys):
    rows = [
        *_read(captions),
        {"image": "images/gone.png", "caption": "lost"},
        {"image": "images/0.png", "caption": ""},
    ]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    output = tmp_path / "matching.jsonl"
    build = ("build_matching.py", "--dataset_name_or_path", captions, "--output_file", output)
    with pytest.raises(ValueError, match="Row 12: its picture cannot be read"):
        run(*build)
    assert not output.exists()
    run(*build, "--skip_bad_rows")
    assert len(_read(output)) == 48
    bad = _read(tmp_path / "matching.bad_rows.jsonl")
    assert [entry["row"] for entry in bad] == [12, 13, 14]
    assert "gone.png" in bad[0]["reason"] and "is empty" in bad[1]["reason"] and "broken" in bad[2]["reason"].lower()
    assert "3 rows could not be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "train[:3]"], "6 different captions of 3 pictures"),
        (["--caption_column", "text"], "no column 'text'.*--caption_column"),
        (["--kinds", "both"], "choose from"),
        (["--window_size", 2], "window_size=2"),
        (["--output_file", "matching.csv"], r"\.jsonl or a \.parquet"),
        (["--dataset_name_or_path", "gone.jsonl"], "There is no data file"),
    ],
)
def test_what_building_refuses(run, captions, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    build = ["--dataset_name_or_path", captions, "--output_file", tmp_path / "out.jsonl"]
    with pytest.raises(ValueError, match=message):
        run("build_matching.py", *build, *arguments)
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "matching.csv").exists()


def test_long_answers(run, folders, tmp_path, capsys):
    entries = [
        {"image_id": str(n), "caption": "A cat.", "questions": ["1. Question: a cat?", "Answer: a cat.", " "]}
        for n in range(3)
    ]
    entries[1]["questions"] += ["a dog.", "2) Question: a dog?", "Answer 2: a dog."]
    (tmp_path / "benchmark.json").write_text(json.dumps(entries))
    for number in range(3):
        tiny.picture(number).save(tmp_path / f"{number}.png")
    output = tmp_path / "long.jsonl"
    build = ("build_long_answers.py", "--benchmark_file", tmp_path / "benchmark.json", "--output_file", output)
    run(*build, "--image_pattern", "{image_id}.png")
    printed = capsys.readouterr().out
    assert "3 records, 4 questions with their answers, 4 rows written" in printed
    assert "image_id 1, string 3: no label: 'a dog.'" in printed and "blank: 3" in printed
    assert [row["id"] for row in _read(output)] == ["0-0", "1-0", "1-1", "2-0"]
    run(*build, "--image_pattern", "{image_id}.png", "--dialogues")
    assert [len(row["messages"]) for row in _read(output)] == [2, 4, 2]
    # Fit for training.
    backbones = ("--vision_model_name_or_path", folders.vision(), "--language_model_name_or_path", folders.language())
    assert check([*map(str, ("--stage", "instruct", *backbones, "--dataset_name_or_path", output))]) == 0


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the reference photographs are not beside the repository")
def test_matching_of_the_photographs_is_fit_for_training(run, folders, tmp_path):
    output = tmp_path / "matching.jsonl"
    photos = ("--dataset_name_or_path", PHOTOS / "photos.jsonl", "--image_column", "file", "--lists", "first")
    run("build_matching.py", *photos, "--caption_column", "captions", "--output_file", output)
    assert _answers(_read(output))["True"] == 75
    backbones = ("--vision_model_name_or_path", folders.vision(), "--language_model_name_or_path", folders.language())
    data = ("--dataset_name_or_path", output, "--image_folder", PHOTOS, "--num_samples", 60)
    assert check([*map(str, ("--stage", "instruct", *backbones, *data))]) == 0
