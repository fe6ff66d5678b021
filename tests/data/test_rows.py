"""Data sets opened: every source, map-style and streaming, gives the same samples."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from shades import PAIRS, SHADES, conversations, flat, pairs, picture, png, read_both_ways, shade_of, write_lines

from transformers_lmeye.data import (
    BadSample,
    ConversationReader,
    PairReader,
    Reader,
    SampleDataset,
    SampleStream,
    load_rows,
)


REFERENCE = Path(__file__).parents[2] / "../shared/reference"
PHOTOS = REFERENCE / "photos"

beside_the_repository = pytest.mark.skipif(
    not PHOTOS.is_dir(), reason="the reference data lies beside the repository only where it is developed"
)


def _check_pairs(samples: Iterable[dict]) -> None:
    assert [(shade_of(s["image"]), s["caption"]) for s in samples] == [(v, f"shade {v}") for v in SHADES]


@pytest.mark.parametrize(
    "kind",
    ["jsonl", "json", "lines in json", "gz", "csv", "tsv", "parquet", "arrow", "pattern", "braces", "disk", "dict"],
)
def test_local_files_and_folders_of_pairs(folder, kind):
    rows = datasets.Dataset.from_list(PAIRS)
    if kind in ("jsonl", "lines in json"):
        path = write_lines(folder / ("a.jsonl" if kind == "jsonl" else "a.json"), PAIRS)
    elif kind == "json":
        path = folder / "a.json"
        path.write_text(json.dumps(PAIRS, indent=2))
    elif kind == "gz":
        path = folder / "a.jsonl.gz"
        path.write_bytes(gzip.compress(write_lines(folder / "a.jsonl", PAIRS).read_bytes()))
    elif kind in ("csv", "tsv"):
        path = folder / f"a.{kind}"
        rows.to_csv(path, sep="," if kind == "csv" else "\t", index=False)
    elif kind == "parquet":
        path = folder / "a.parquet"
        rows.to_parquet(path)
    elif kind == "pattern":
        path = folder / "a-*.parquet"
        rows.select([0]).to_parquet(folder / "a-0.parquet")
        rows.select([1, 2]).to_parquet(folder / "a-1.parquet")
    elif kind == "braces":
        path = folder / "a-{08..10}.jsonl"
        for number, pair in zip((8, 9, 10), PAIRS, strict=True):
            write_lines(folder / f"a-{number:02}.jsonl", [pair])
    elif kind in ("disk", "arrow"):
        path = folder / "saved"
        rows.save_to_disk(path)
        path = next(path.glob("*.arrow")) if kind == "arrow" else path
    else:
        path = folder / "saved"
        datasets.DatasetDict({"train": rows}).save_to_disk(path)
    _check_pairs(read_both_ways(path, PairReader(image_folder=folder)))
    assert len(load_rows(path, split="train[1:]")) == 2
    assert load_rows(path, split="train[67%:]")["caption"] == ["shade 30"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_image_folder_with_metadata(folder, kind):
    rows = [{"file_name": f"{v}.png", "text": f"shade {v}"} for v in SHADES]
    if kind == "jsonl":
        write_lines(folder / "images" / "metadata.jsonl", rows)
    else:
        datasets.Dataset.from_list(rows).to_csv(folder / "images" / "metadata.csv", index=False)
    _check_pairs(read_both_ways(folder / "images", PairReader(caption_column="text")))
    # The same, where the pictures of a split have a folder of their own; one of them is gone.
    (folder / "images").rename(folder / "train")
    _check_pairs(read_both_ways(folder, PairReader(caption_column="text")))
    (folder / "train" / "20.png").unlink()
    samples = read_both_ways(folder, PairReader(caption_column="text"), skip_bad_samples=True)
    assert [sample.kind for sample in samples if isinstance(sample, BadSample)] == ["missing"]


def test_image_folder_with_texts(folder):
    for number, shade in enumerate(SHADES):
        below = folder / "images" / f"{number}"
        below.mkdir()
        (folder / "images" / f"{shade}.png").rename(below / f"{shade}.png")
        (below / f"{shade}.txt").write_text(f"shade {shade}\n")
    _check_pairs(read_both_ways(folder / "images", PairReader()))
    (below / "30.txt").unlink()
    (folder / "images" / "1" / "20.txt").write_bytes(b"caf\xe9")
    samples = read_both_ways(folder / "images", PairReader(), skip_bad_samples=True)
    assert [getattr(sample, "kind", None) for sample in samples] == [None, "broken record", "no text"]


def test_image_folder_of_classes(folder):
    """Without metadata and texts a folder is read by the datasets library."""
    for shade in SHADES:
        (folder / "images" / f"{shade}").mkdir()
        (folder / "images" / f"{shade}.png").rename(folder / "images" / f"{shade}" / "a.png")
    rows = load_rows(folder / "images")
    assert sorted(shade_of(s["image"]) for s in pairs(rows.add_column("caption", ["x"] * 3))) == list(SHADES)


def test_pictures_inside_the_data_set(folder):
    """Image features are read as bytes and opened by us, whatever was stored."""
    rows = datasets.Dataset.from_dict(
        {"image": [picture(v) for v in SHADES], "caption": [f"shade {v}" for v in SHADES]},
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )
    rows.to_parquet(folder / "a.parquet")
    _check_pairs(read_both_ways(folder / "a.parquet", PairReader()))


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("caption", ["txt", "json", "both", "list"])
def test_webdataset_shards(folder, caption):
    """Captions in text files or JSON, pictures of several formats, keys with folders and dots, other members."""
    for number, shade in enumerate(SHADES):
        text = f"shade {shade}"
        key = f"./part.0/{number:05}"
        fields = {"caption": "not this one" if caption == "both" else [text] if caption == "list" else text}
        members = [(f"{key}.cls", b"3")]
        members += [(f"{key}.json", json.dumps(fields).encode())] if caption != "txt" else []
        members += [(f"{key}.txt", f"{text}\n".encode())] if caption in ("txt", "both") else []
        image = png(shade)
        if number == 1:
            buffer = BytesIO()
            picture(shade).save(buffer, "WEBP", lossless=True)
            image = buffer.getvalue()
        members.append((f"{key}.{'webp' if number == 1 else 'png'}", image))
        _tar(folder / f"{number:03}.tar", members)
    for path in (folder / "{000..002}.tar", folder / "*.tar", folder):
        samples = read_both_ways(path, PairReader())
        _check_pairs(samples)
        assert samples[1]["id"] == "row 1 (id part.0/00001)"
    stream = SampleStream(load_rows(folder, streaming=True), PairReader(), num_passes=1)
    assert next(iter(stream))["id"] == "000.tar, part.0/00000 (id part.0/00000)"
    assert stream.rows.num_shards == 3


def test_webdataset_shards_of_conversations(folder):
    """LLaVA's records as the JSON of a shard; one with two pictures, one with words alone."""
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    two = [{"from": "human", "value": "<image> or <image>"}, {"from": "gpt", "value": "b"}]
    words = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "c"}]
    members = [
        ("0.jpg", png(10)),
        ("0.json", json.dumps({"id": "x", "conversations": turns, "image": "x.jpg"}).encode()),
    ]
    members += [("1.0.png", png(20)), ("1.1.png", png(30)), ("1.json", json.dumps({"conversations": two}).encode())]
    members += [("2.json", json.dumps({"conversations": words}).encode())]
    samples = read_both_ways(_tar(folder / "a.tar", members), ConversationReader())
    assert [flat(sample) for sample in samples] == [
        [("user", [10, "q"]), ("assistant", ["a"])],
        [("user", [20, "or", 30]), ("assistant", ["b"])],
        [("user", ["q"]), ("assistant", ["c"])],
    ]
    assert [sample["id"] for sample in samples] == ["row 0 (id x)", "row 1 (id 1)", "row 2 (id 2)"]


def test_semart_as_published(folder):
    """Its CSV is separated by tabs and written in Windows' Latin; both stages read its descriptions."""
    columns = ["IMAGE_FILE", "DESCRIPTION", "AUTHOR", "TITLE", "TECHNIQUE", "DATE", "TYPE", "SCHOOL", "TIMEFRAME"]
    rows = [
        ["10.png", 'The "Calling", seen by Dürer, in 1508', "DÜRER, Albrecht", "A", "Oil", "1508", "r", "German", "x"],
        ["20.png", '"A café\u2019s, ""quoted"" table"', "MANET, Édouard", "NA", "Oil", "", "g", "French", "y"],
    ]
    lines = "\r\n".join("\t".join(row) for row in [columns, *rows])
    (folder / "semart_train.csv").write_bytes(lines.encode("cp1252"))
    texts = [rows[0][1], 'A café\u2019s, "quoted" table']
    reader = PairReader("IMAGE_FILE", "DESCRIPTION", image_folder=folder / "images")
    samples = read_both_ways(folder / "semart_train.csv", reader)
    assert [(shade_of(s["image"]), s["caption"]) for s in samples] == list(zip((10, 20), texts, strict=True))
    talks = ConversationReader(
        image_column="IMAGE_FILE",
        answer_column="DESCRIPTION",
        instruction="Describe the painting.",
        image_folder=folder / "images",
    )
    assert [flat(s)[1] for s in read_both_ways(folder / "semart_train.csv", talks)] == [
        ("assistant", [text]) for text in texts
    ]
    assert load_rows(folder / "semart_train.csv")[1]["TITLE"] == "NA"  # words, not a missing value


def test_values_come_out_as_they_went_in(folder):
    """Nothing is guessed from what texts look like; columns that differ from row to row keep every value."""
    rows = [
        {"image": "a", "caption": "4.0", "n": 1, "x": {"k": [1, "true"]}, "mixed": "null", "flag": True},
        {"image": "b", "caption": "true", "n": 2, "x": None, "mixed": 5, "extra": [0.5]},
        {"image": "c", "caption": "0012", "n": 3, "mixed": ["1"], "flag": False},
    ]
    data = load_rows(write_lines(folder / "a.jsonl", rows))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    assert list(data) == [{column: row.get(column) for column in columns} for row in rows]
    assert data.features["caption"] == datasets.Value("string")
    (folder / "a.csv").write_text("image,caption\n0012,null\n1e5,NA\n")
    assert list(load_rows(folder / "a.csv")) == [
        {"image": "0012", "caption": "null"},
        {"image": "1e5", "caption": "NA"},
    ]


def test_a_file_that_changed_is_read_anew(folder):
    path = write_lines(folder / "a.jsonl", PAIRS)
    assert len(load_rows(path)) == 3
    write_lines(path, PAIRS[:2])
    assert len(load_rows(path)) == 2


def test_a_file_that_is_prepared_is_not_read_again(folder, monkeypatch):
    """Archives of terabytes would be, at every start and by every process."""
    path = write_lines(folder / "a.jsonl", [*PAIRS, {"caption": None, "n": 1}, {"caption": ["a", "b"], "n": "x"}])
    first = load_rows(path)
    monkeypatch.setattr("transformers_lmeye.data.rows._kinds", None)
    again = load_rows(path)
    assert again.features == first.features
    assert list(again) == list(first)


def test_a_caption_that_was_edited_is_read_anew(folder):
    path = folder / "with_texts"
    path.mkdir()
    picture(7).save(path / "7.png")
    (path / "7.txt").write_text("a broken capt")
    assert load_rows(path)["caption"][0] == "a broken capt"
    (path / "7.txt").write_text("a whole caption")
    assert load_rows(path)["caption"][0] == "a whole caption"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_a_slice_without_a_row_is_refused(folder, kind):
    rows = datasets.Dataset.from_list(PAIRS[:1])
    path = folder / f"one.{kind}"
    {"jsonl": rows.to_json, "parquet": rows.to_parquet, "saved": rows.save_to_disk}[kind](path)
    assert len(load_rows(path, split="train[:1]")) == 1
    for part in ("[1:]", "[:0]", "[50%:20%]"):
        with pytest.raises(ValueError, match=r"\[.*corresponds to no data"):
            load_rows(path, split=f"train{part}")


def test_missing_files_and_splits(folder):
    with pytest.raises(ValueError, match=r"There is no data file .*gone\.jsonl"):
        load_rows(folder / "gone.jsonl")
    with pytest.raises(ValueError, match=r"There is no data file .*b-1\.tar"):
        _tar(folder / "b-0.tar", [])
        load_rows(folder / "b-{0..1}.tar")
    with pytest.raises(ValueError, match="copy the files here first"):
        load_rows("https://example.org/a.jsonl")
    datasets.DatasetDict({"val": datasets.Dataset.from_list(PAIRS)}).save_to_disk(folder / "saved")
    with pytest.raises(ValueError, match="has no split 'train': it holds val"):
        load_rows(folder / "saved")
    path = write_lines(folder / "a.jsonl", PAIRS)
    with pytest.raises(ValueError, match="no split 'val': files are one split named 'train'"):
        load_rows(path, split="val")
    with pytest.raises(ValueError, match="slices are read map-style"):
        load_rows(path, split="train[:1]", streaming=True)
    for streaming in (False, True):
        (folder / "empty.jsonl").write_text("\n")
        with pytest.raises(ValueError, match="The data set holds no record"):
            _columns(folder / "empty.jsonl", streaming)
        (folder / "object.json").write_text('{\n "a": 1\n}')
        with pytest.raises(ValueError, match=r"No record can be read: .*object.json, line 1: it is no JSON"):
            _columns(folder / "object.json", streaming)


def _columns(path: Path, streaming: bool) -> None:
    SampleStream(load_rows(path, streaming=streaming), PairReader())


@beside_the_repository
@pytest.mark.parametrize("streaming", [False, True])
def test_llava_files_as_published(streaming):
    """Captions with boxes are pairs, questions with answers are conversations; their pictures are not here."""

    def read(file: str, reader: Reader) -> tuple[list[dict], list[dict]]:
        path = REFERENCE / "llava" / file
        rows = load_rows(path, streaming=streaming)
        data = SampleStream(rows, reader, num_passes=1) if streaming else SampleDataset(rows, reader)
        return list(data), [json.loads(line) for line in path.read_text().splitlines()]

    samples, lines = read(
        "caps_boxes_coco2014_val_80.jsonl", PairReader(caption_column="captions", open_image=lambda value: value)
    )
    assert [(sample["image"], sample["caption"]) for sample in samples] == [
        (line["image"], text) for line in lines for text in line["captions"]
    ]
    reader = ConversationReader(question_column="instruction", answer_column="output", open_image=lambda value: value)
    samples, lines = read("coco2014_val_gpt4_qa_30x3.jsonl", reader)
    assert [[m["content"][-1]["text"] for m in sample["messages"]] for sample in samples] == [
        [line["instruction"], line["output"]] for line in lines
    ]
    assert [s["messages"][0]["content"][0]["image"] for s in samples] == [line["image"] for line in lines]


@beside_the_repository
def test_the_photographs():
    """150 real photographs, five captions each: 750 pairs, and as many conversations, through the ordinary path."""
    rows = load_rows(PHOTOS / "photos.jsonl")
    lines = [json.loads(line) for line in (PHOTOS / "photos.jsonl").read_text().splitlines()]
    captions = [(line["file"], caption) for line in lines for caption in line["captions"]]
    data = pairs(rows, "file", "captions", image_folder=PHOTOS)
    assert len(rows) == len(lines) == 150
    assert len(data) == len(captions) >= 750
    for index in range(0, len(data), 41):
        file, caption = captions[index]
        with Image.open(BytesIO((PHOTOS / file).read_bytes())) as image:
            np.testing.assert_array_equal(np.asarray(data[index]["image"]), np.asarray(image.convert("RGB")))
        assert data[index]["caption"] == caption
    talks = conversations(
        rows,
        image_column="file",
        answer_column="captions",
        instruction="Describe the picture.",
        image_folder=PHOTOS,
    )
    assert len(talks) == len(data)
    assert talks[7]["messages"][1]["content"] == [{"type": "text", "text": captions[7][1]}]


@beside_the_repository
def test_the_photographs_as_shards(tmp_path):
    """Three shards give the pairs that the list of files gives, in both modes, byte for byte."""
    lines = [json.loads(line) for line in (PHOTOS / "photos.jsonl").read_text().splitlines()]
    for shard in range(3):
        members = []
        for number in range(shard * 50, shard * 50 + 50):
            fields = {"captions": lines[number]["captions"]}
            members.append((f"{number:05}.jpg", (PHOTOS / lines[number]["file"]).read_bytes()))
            members.append((f"{number:05}.json", json.dumps(fields).encode()))
        _tar(tmp_path / f"{shard}.tar", members)
    expected = [(line["file"], caption) for line in lines for caption in line["captions"]]

    def same(value: dict) -> bytes:
        return value["bytes"]

    shards = str(tmp_path / "{0..2}.tar")
    data = pairs(load_rows(shards), caption_column="captions", open_image=same)
    stream = SampleStream(
        load_rows(shards, streaming=True), PairReader(caption_column="captions", open_image=same), num_passes=1
    )
    for samples in (data, stream):
        read = [(sample["image"], sample["caption"]) for sample in samples]
        assert read == [((PHOTOS / file).read_bytes(), caption) for file, caption in expected]
