"""Rows in, samples out: the forms a row may have, and what is said of rows that fit none."""

import json

import datasets
import pytest
from shades import PAIRS, conversations, flat, pairs, picture, shade_of, write_lines

from transformers_lmeye.data import UnreadableSample, load_rows


@pytest.mark.parametrize(("lists", "expected"), [("all", ["a", "b", "c", "d"]), ("first", ["a", "c", "d"])])
def test_a_list_of_captions(folder, lists, expected):
    captions = [["a", "b"], ["c"], ["d"]]
    rows = [{"file": p["image"], "captions": c} for p, c in zip(PAIRS, captions, strict=True)]
    path = write_lines(folder / "a.jsonl", rows)
    data = pairs(load_rows(path), "file", "captions", lists, folder)
    samples = [data[i] for i in range(len(data))]
    assert [s["caption"] for s in samples] == expected
    assert [shade_of(s["image"]) for s in samples] == ([10, 10, 20, 30] if lists == "all" else [10, 20, 30])
    assert samples[-1]["id"] == "row 2"


def test_lists_beside_single_captions(folder):
    """A column that holds strings in some rows and lists in others."""
    captions = ["a", ["b", "c"], "d"]
    path = write_lines(folder / "a.jsonl", [{"image": "images/10.png", "caption": c} for c in captions])
    data = pairs(load_rows(path), image_folder=folder)
    assert [data[i]["caption"] for i in range(len(data))] == ["a", "b", "c", "d"]


def test_empty_lists_stay_to_be_refused_by_name(folder):
    path = write_lines(folder / "a.jsonl", [{"image": "images/10.png", "caption": c} for c in (["a"], [], ["b", "c"])])
    data = pairs(load_rows(path), image_folder=folder)
    assert [data[i]["caption"] for i in (0, 2, 3)] == ["a", "b", "c"]
    with pytest.raises(UnreadableSample, match=r"Sample row 1 has no target token: its caption is empty"):
        data[1]


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
        write_lines(folder / "a.jsonl", [row, row])
        load_rows(folder / "a.jsonl").to_parquet(path)
    data = conversations(load_rows(path), image_folder=folder)
    assert len(data) == 2
    assert flat(data[1]) == expected
    assert data[1]["id"] == ("row 1 (id x)" if name == "LLaVA" else "row 1")


def test_forms_mixed_in_one_file(folder):
    """Absent keys come out as None: contents of strings and parts, rows with and without picture, side by side."""
    rows = [CONVERSATIONS[name] for name in CONVERSATIONS if "messages" in CONVERSATIONS[name][0]]
    rows = [(r, e) for r, e in rows if not isinstance(r.get("image"), list)]
    path = write_lines(folder / "a.jsonl", [row for row, _ in rows])
    data = conversations(load_rows(path), image_folder=folder)
    assert [flat(data[i]) for i in range(len(data))] == [expected for _, expected in rows]


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
        {"images": [[picture(10), picture(20)]], "messages": [messages]}, features=features
    )
    rows.save_to_disk(folder / "saved")
    data = conversations(load_rows(folder / "saved"), image_column="images")
    assert flat(data[0]) == [("user", [10, 20, "q"]), ("assistant", ["a"])]


def test_one_question_about_every_picture(folder):
    path = write_lines(folder / "a.jsonl", [{"image": "images/20.png", "captions": ["a", "b"]}])
    data = conversations(
        load_rows(path), answer_column="captions", instruction="Describe the picture.", image_folder=folder
    )
    assert [flat(data[i]) for i in range(len(data))] == [
        [("user", [20, "Describe the picture."]), ("assistant", [text])] for text in ("a", "b")
    ]


def test_reading_twice_gives_the_same(folder):
    """Items are built anew: what a caller does with one leaves the data set alone."""
    path = write_lines(folder / "a.jsonl", [CONVERSATIONS["messages with places"][0]])
    data = conversations(load_rows(path), image_folder=folder)
    data[0]["messages"].clear()
    assert flat(data[0]) == CONVERSATIONS["messages with places"][1]


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
    "unknown role": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "gpt", "content": "a"}]},
        "Sample row 0: a message is of the role 'gpt'",
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
    data = conversations(load_rows(write_lines(folder / "a.jsonl", [row])), image_folder=folder)
    with pytest.raises(ValueError, match=message):
        data[0]


def test_columns_that_do_not_fit(folder):
    rows = load_rows(write_lines(folder / "a.jsonl", [{"picture": "images/10.png", "words": "a"}]))
    with pytest.raises(ValueError, match=r"no column 'image'; it has picture, words.*--image_column"):
        pairs(rows)
    with pytest.raises(ValueError, match=r"no column 'caption'.*--caption_column"):
        pairs(rows, image_column="picture")
    with pytest.raises(ValueError, match=r"columns are picture, words.*--instruction"):
        conversations(rows)
    with pytest.raises(ValueError, match=r"no column 'answer'.*--answer_column"):
        conversations(rows, image_column="picture", instruction="What?")
    with pytest.raises(ValueError, match=r'lists=.some.: choose "all" or "first"'):
        pairs(rows, "picture", "words", lists="some")
