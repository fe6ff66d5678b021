"""Rows in, samples out: the forms a data set may have, and what is said of rows that fit none."""

import json
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from transformers_lmeye.data import ConversationDataset, PairDataset, load_rows


PHOTOS = Path(__file__).parents[2] / "../shared/reference/photos"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def _color(value: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (value, value, value))


def _shade(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures of shade 10, 20, 30 in `images/`."""
    (tmp_path / "images").mkdir()
    for value in (10, 20, 30):
        _color(value).save(tmp_path / "images" / f"{value}.png")
    return tmp_path


def _jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PAIRS = [{"image": f"images/{v}.png", "caption": f"shade {v}"} for v in (10, 20, 30)]


def _check_pairs(data: PairDataset) -> None:
    samples = [data[i] for i in range(len(data))]
    assert [(_shade(s["image"]), s["caption"]) for s in samples] == [(v, f"shade {v}") for v in (10, 20, 30)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "pattern", "disk", "disk_dict"])
def test_local_files_and_folders_of_pairs(folder, kind):
    rows = datasets.Dataset.from_list(PAIRS)
    if kind == "jsonl":
        path = _jsonl(folder / "a.jsonl", PAIRS)
    elif kind == "json":
        path = folder / "a.json"
        path.write_text(json.dumps(PAIRS))
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
    elif kind == "disk":
        path = folder / "saved"
        rows.save_to_disk(path)
    else:
        path = folder / "saved"
        datasets.DatasetDict({"train": rows}).save_to_disk(path)
    _check_pairs(PairDataset(load_rows(path), image_folder=folder))
    assert len(load_rows(path, split="train[1:]")) == 2


def test_image_folder_with_metadata(folder):
    _jsonl(
        folder / "images" / "metadata.jsonl", [{"file_name": f"{v}.png", "text": f"shade {v}"} for v in (10, 20, 30)]
    )
    _check_pairs(PairDataset(load_rows(folder / "images"), caption_column="text"))


def test_pictures_inside_the_data_set(folder):
    """Image features are read as bytes and opened by us, whatever was stored."""
    rows = datasets.Dataset.from_dict(
        {"image": [_color(v) for v in (10, 20, 30)], "caption": [f"shade {v}" for v in (10, 20, 30)]},
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )
    rows.to_parquet(folder / "a.parquet")
    _check_pairs(PairDataset(load_rows(folder / "a.parquet")))


@pytest.mark.parametrize(("lists", "expected"), [("all", ["a", "b", "c", "d"]), ("first", ["a", "c", "d"])])
def test_a_list_of_captions(folder, lists, expected):
    captions = [["a", "b"], ["c"], ["d"]]
    rows = [{"file": p["image"], "captions": c} for p, c in zip(PAIRS, captions, strict=True)]
    path = _jsonl(folder / "a.jsonl", rows)
    data = PairDataset(load_rows(path), "file", "captions", folder, lists=lists)
    samples = [data[i] for i in range(len(data))]
    assert [s["caption"] for s in samples] == expected
    assert [_shade(s["image"]) for s in samples] == ([10, 10, 20, 30] if lists == "all" else [10, 20, 30])
    assert samples[-1]["id"] == "row 2"


def test_lists_beside_single_captions(folder):
    """A column that holds strings in some rows and lists in others."""
    captions = ["a", ["b", "c"], "d"]
    path = _jsonl(folder / "a.jsonl", [{"image": "images/10.png", "caption": c} for c in captions])
    data = PairDataset(load_rows(path), image_folder=folder)
    assert [data[i]["caption"] for i in range(len(data))] == ["a", "b", "c", "d"]


def test_empty_lists_stay_to_be_refused_by_name(folder):
    path = _jsonl(folder / "a.jsonl", [{"image": "images/10.png", "caption": c} for c in (["a"], [], ["b", "c"])])
    data = PairDataset(load_rows(path), image_folder=folder)
    assert [data[i]["caption"] for i in range(len(data))] == ["a", "", "b", "c"]
    assert data[1]["id"] == "row 1"


def _flat(sample: dict) -> list[tuple[str, list]]:
    return [
        (m["role"], [p["text"] if p["type"] == "text" else _shade(p["image"]) for p in m["content"]])
        for m in sample["messages"]
    ]


CONVERSATIONS = {
    "messages with places": (
        {
            "image": "images/10.png",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
                {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
            ],
        },
        [("user", ["see", 10]), ("assistant", ["yes"]), ("user", ["sure?"]), ("assistant", ["no"])],
    ),
    "messages of plain strings": (
        {
            "image": "images/20.png",
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "what?"},
                {"role": "assistant", "content": "that"},
            ],
        },
        [("system", ["be kind"]), ("user", [20, "what?"]), ("assistant", ["that"])],
    ),
    "pictures in the messages": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "images/10.png"},
                        {"type": "image", "path": "images/30.png"},
                        {"type": "text", "text": "same?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
            ]
        },
        [("user", [10, 30, "same?"]), ("assistant", ["no"])],
    ),
    "several pictures of the row": (
        {
            "image": ["images/10.png", "images/20.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "c"}]},
                {"role": "assistant", "content": "d"},
            ],
        },
        [("user", [10, "a"]), ("assistant", ["b"]), ("user", [20, "c"]), ("assistant", ["d"])],
    ),
    "no picture": (
        {"messages": [{"role": "user", "content": "<image> is a tag"}, {"role": "assistant", "content": "it is"}]},
        [("user", ["<image> is a tag"]), ("assistant", ["it is"])],
    ),
    "LLaVA": (
        {
            "id": "x",
            "image": "images/30.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat shade?"},
                {"from": "gpt", "value": "Thirty."},
                {"from": "human", "value": "And now?"},
                {"from": "gpt", "value": "The same."},
            ],
        },
        [
            ("user", [30, "What shade?"]),
            ("assistant", ["Thirty."]),
            ("user", ["And now?"]),
            ("assistant", ["The same."]),
        ],
    ),
    "LLaVA, image last": (
        {
            "image": "images/30.png",
            "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "It."}],
        },
        [("user", ["What?", 30]), ("assistant", ["It."])],
    ),
    "LLaVA, words only": (
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
        [("user", ["Hello"]), ("assistant", ["Hi"])],
    ),
    "question and answer": (
        {"image": "images/10.png", "question": "Which?", "answer": "This."},
        [("user", [10, "Which?"]), ("assistant", ["This."])],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_forms_of_conversations(folder, name, suffix):
    row, expected = CONVERSATIONS[name]
    path = folder / f"a.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps([row, row]))
    else:
        _jsonl(folder / "a.jsonl", [row, row])
        load_rows(folder / "a.jsonl").to_parquet(path)
    data = ConversationDataset(load_rows(path), image_folder=folder)
    assert len(data) == 2
    assert _flat(data[1]) == expected
    assert data[1]["id"] == ("row 1 (id x)" if name == "LLaVA" else "row 1")


def test_forms_mixed_in_one_file(folder):
    """Absent keys come out as None: contents of strings and parts, rows with and without picture, side by side."""
    rows = [CONVERSATIONS[name] for name in CONVERSATIONS if "messages" in CONVERSATIONS[name][0]]
    rows = [(r, e) for r, e in rows if not isinstance(r.get("image"), list)]
    path = _jsonl(folder / "a.jsonl", [row for row, _ in rows])
    data = ConversationDataset(load_rows(path), image_folder=folder)
    assert [_flat(data[i]) for i in range(len(data))] == [expected for _, expected in rows]


def test_pictures_of_trl_style_data_sets(folder):
    """A column of lists of Image features and messages with places for them."""
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        }
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = datasets.Dataset.from_dict(
        {"images": [[_color(10), _color(20)]], "messages": [messages]}, features=features
    )
    rows.save_to_disk(folder / "saved")
    data = ConversationDataset(load_rows(folder / "saved"), image_column="images")
    assert _flat(data[0]) == [("user", [10, 20, "q"]), ("assistant", ["a"])]


def test_one_question_about_every_picture(folder):
    path = _jsonl(folder / "a.jsonl", [{"image": "images/20.png", "captions": ["a", "b"]}])
    data = ConversationDataset(
        load_rows(path), answer_column="captions", instruction="Describe the picture.", image_folder=folder
    )
    assert [_flat(data[i]) for i in range(len(data))] == [
        [("user", [20, "Describe the picture."]), ("assistant", [text])] for text in ("a", "b")
    ]


def test_reading_twice_gives_the_same(folder):
    """Items are built anew: what a caller does with one leaves the data set alone."""
    path = _jsonl(folder / "a.jsonl", [CONVERSATIONS["messages with places"][0]])
    data = ConversationDataset(load_rows(path), image_folder=folder)
    data[0]["messages"].clear()
    assert _flat(data[0]) == CONVERSATIONS["messages with places"][1]


BAD_ROWS = {
    "places without picture": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ]
        },
        "Sample row 0 has 0 pictures in its column 'image' and 1 places",
    ),
    "picture twice": (
        {"image": "images/10.png", "conversations": [{"from": "human", "value": "<image><image>"}]},
        "Sample row 0 has 1 pictures in its column 'image' and 2 places",
    ),
    "unknown LLaVA role": (
        {"conversations": [{"from": "dog", "value": "woof"}]},
        "Sample row 0: a turn is from 'dog'",
    ),
    "unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "Sample row 0: a content part is of type 'video'",
    ),
    "picture without user": (
        {"image": "images/10.png", "messages": [{"role": "assistant", "content": "a"}]},
        "Sample row 0 has no user turn",
    ),
    "missing file": (
        {"image": "images/99.png", "question": "q", "answer": "a"},
        "Sample row 0: There is no file .*99.png",
    ),
    "no picture in the file": (
        {"image": "bad.png", "question": "q", "answer": "a"},
        "Sample row 0: .*bad.png cannot be read as a picture",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(folder, name):
    row, message = BAD_ROWS[name]
    (folder / "bad.png").write_bytes(b"words")
    data = ConversationDataset(load_rows(_jsonl(folder / "a.jsonl", [row])), image_folder=folder)
    with pytest.raises(ValueError, match=message):
        data[0]


def test_columns_that_do_not_fit(folder):
    rows = load_rows(_jsonl(folder / "a.jsonl", [{"picture": "images/10.png", "words": "a"}]))
    with pytest.raises(ValueError, match=r"no column 'image'; it has picture, words.*--image_column"):
        PairDataset(rows)
    with pytest.raises(ValueError, match=r"no column 'caption'.*--caption_column"):
        PairDataset(rows, image_column="picture")
    with pytest.raises(ValueError, match=r"columns are picture, words.*--instruction"):
        ConversationDataset(rows)
    with pytest.raises(ValueError, match=r"no column 'answer'.*--answer_column"):
        ConversationDataset(rows, image_column="picture", instruction="What?")
    with pytest.raises(ValueError, match=r'lists=.some.: choose "all" or "first"'):
        PairDataset(rows, "picture", "words", lists="some")


def test_missing_files_and_splits(folder):
    with pytest.raises(ValueError, match=r"There is no data file .*gone\.jsonl"):
        load_rows(folder / "gone.jsonl")
    datasets.DatasetDict({"val": datasets.Dataset.from_list(PAIRS)}).save_to_disk(folder / "saved")
    with pytest.raises(ValueError, match="has no split 'train': it holds val"):
        load_rows(folder / "saved")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the reference photographs are not beside the repository")
def test_the_photographs():
    """150 real photographs, five captions each: 750 pairs, and as many conversations, through the ordinary path."""
    rows = load_rows(PHOTOS / "photos.jsonl")
    lines = [json.loads(line) for line in (PHOTOS / "photos.jsonl").read_text().splitlines()]
    captions = [(line["file"], caption) for line in lines for caption in line["captions"]]
    pairs = PairDataset(rows, "file", "captions", PHOTOS)
    assert len(rows) == len(lines) == 150
    assert len(pairs) == len(captions) >= 750
    for index in range(0, len(pairs), 41):
        file, caption = captions[index]
        with Image.open(BytesIO((PHOTOS / file).read_bytes())) as image:
            np.testing.assert_array_equal(np.asarray(pairs[index]["image"]), np.asarray(image.convert("RGB")))
        assert pairs[index]["caption"] == caption
    conversations = ConversationDataset(
        rows, "file", answer_column="captions", instruction="Describe the picture.", image_folder=PHOTOS
    )
    assert len(conversations) == len(pairs)
    assert conversations[7]["messages"][1]["content"] == [{"type": "text", "text": captions[7][1]}]
