"""Captions and their twins: what is swapped, what may take its place, and how it is written."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from transformers_lmeye.data import load_rows
from transformers_lmeye.data.matching import CaptionReader
from transformers_lmeye.data.preferences import (
    Vocabulary,
    annotated_objects,
    annotation_vocabulary,
    index_objects,
    plural,
    preference_rows,
    swap_objects,
)


PHOTOS = Path(__file__).parents[2] / "../shared/reference/photos"
VOCABULARY = Vocabulary([("person", "man", "woman"), "bear", "orange", "traffic light", "knife", "bench", "city"])
READER = CaptionReader(identity="path")


def _swap(caption: str, **swaps: str) -> str:
    numbers = {VOCABULARY.number(old.replace("_", " ")): VOCABULARY.number(new) for old, new in swaps.items()}
    return swap_objects(caption, VOCABULARY.mentions(caption), numbers, VOCABULARY)


@pytest.mark.parametrize(
    ("noun", "expected"),
    {
        "bear": "bears",
        "bench": "benches",
        "city": "cities",
        "toy": "toys",
        "bus": "buses",
        "box": "boxes",
        "knife": "knives",
        "person": "people",
        "sheep": "sheep",
        "wine glass": "wine glasses",
        "snow woman": "snow women",
    }.items(),
)
def test_plurals(noun, expected):
    assert plural(noun) == expected


def test_mentions():
    caption = "A Woman, two  traffic\nlights and bears near a bearing and an orange."
    found = [(VOCABULARY.names[m.object], caption[m.start : m.end], m.is_plural) for m in VOCABULARY.mentions(caption)]
    assert found == [
        ("person", "Woman", False),
        ("traffic light", "traffic\nlights", True),
        ("bear", "bears", True),
        ("orange", "orange", False),
    ]


@pytest.mark.parametrize(
    ("caption", "swaps", "expected"),
    [
        ("A bear on a bench.", {"bear": "orange"}, "An orange on a bench."),
        ("an orange and a bear", {"orange": "bear"}, "a bear and a bear"),
        ("An old man eats an orange.", {"person": "bear", "orange": "knife"}, "An old bear eats a knife."),
        ("Bears and a bear; women.", {"bear": "knife"}, "Knives and a knife; women."),
        ("Two cities", {"city": "traffic light"}, "Two traffic lights"),
        ("The banana bear", {"bear": "orange"}, "The banana orange"),
        ("a traffic light", {"traffic_light": "person"}, "a person"),
    ],
)
def test_a_twin_is_written_as_a_caption(caption, swaps, expected):
    assert _swap(caption, **swaps) == expected


def test_a_vocabulary_that_cannot_be_read():
    with pytest.raises(ValueError, match="'man' names two objects"):
        Vocabulary([("person", "man"), "man"])
    with pytest.raises(ValueError, match="has no name"):
        Vocabulary(["bear", " "])
    with pytest.raises(ValueError, match="is empty"):
        Vocabulary([])


def _rows() -> list[dict]:
    return [
        {"image": "0.png", "caption": ["A bear.", "A man and a bear."], "objects": ["bench"]},
        {"image": "1.png", "caption": "An orange on a bench", "objects": []},
        {"image": "0.png", "caption": "Something with a knife.", "objects": ["city"]},
        {"image": "2.png", "caption": "Nothing of note.", "objects": ["orange"]},
        {"image": "3.png", "caption": "A traffic light in a city.", "objects": [{"category": "city"}]},
    ]


def test_what_pictures_show():
    """All captions of a picture, in whichever row, and all annotations."""
    index = index_objects(_rows(), READER, VOCABULARY, "objects")
    names = [[VOCABULARY.names[place] for place in sorted(shown)] for shown in index.shown.values()]
    assert names == [["person", "bear", "knife", "bench", "city"], ["orange", "bench"], ["orange"], _names(3, 6)]
    assert dict(zip(VOCABULARY.names, index.named.tolist(), strict=True)) == {
        **{"person": 1, "bear": 2, "orange": 1, "traffic light": 1, "knife": 1, "bench": 1, "city": 1}
    }
    alone = index_objects(_rows(), READER, VOCABULARY)
    assert VOCABULARY.number("bench") not in next(iter(alone.shown.values()))


def _names(*numbers: int) -> list[str]:
    return [VOCABULARY.names[number] for number in numbers]


def test_nothing_shown_is_put_in():
    rows, counts = _rows(), Counter()
    index = index_objects(rows, READER, VOCABULARY, "objects")
    put_in: dict[str, Counter] = {row["image"]: Counter() for row in rows}
    for seed in range(200):
        for pair in preference_rows(rows, READER, VOCABULARY, index, "What?", seed=seed, counts=counts):
            (swap,) = pair["swaps"]
            old, new = swap.split(" -> ")
            put_in[pair["image"]][new] += 1
            prompt, chosen, rejected = (pair[name][0] for name in ("prompt", "chosen", "rejected"))
            assert prompt == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
            true, wrong = chosen["content"][0]["text"], rejected["content"][0]["text"]
            assert chosen["role"] == rejected["role"] == "assistant"
            assert true != wrong and VOCABULARY.number(new) in {m.object for m in VOCABULARY.mentions(wrong)}
            assert VOCABULARY.number(old) in {m.object for m in VOCABULARY.mentions(true)}
    assert counts == {"pairs": 1000, "captions that name no object": 200}
    assert set(put_in["0.png"]) == {"orange", "traffic light"}
    assert set(put_in["1.png"]) == {"person", "bear", "traffic light", "knife", "city"}
    # As often as captions name them: the bear twice, the others once.
    assert put_in["1.png"]["bear"] / put_in["1.png"].total() == pytest.approx(2 / 6, abs=0.1)


def test_equal_seeds_give_equal_pairs():
    rows = _rows()
    index = index_objects(rows, READER, VOCABULARY, "objects")

    def pairs(rows, seed=0, **kwargs):
        return list(preference_rows(rows, READER, VOCABULARY, index, seed=seed, **kwargs))

    assert pairs(rows) == pairs(rows) != pairs(rows, seed=1)
    twice = next(pair for pair in pairs(rows, num_swaps=5) if "A man and" in pair["chosen"][0]["content"][0]["text"])
    assert len(twice["swaps"]) == 2 and len({swap.split(" -> ")[1] for swap in twice["swaps"]}) == 2


def test_a_picture_that_shows_everything():
    rows = [{"image": "0.png", "caption": "A bear on a bench, a man, an orange, a knife, a city, a traffic light"}]
    index, counts = index_objects(rows, READER, VOCABULARY), Counter()
    assert list(preference_rows(rows, READER, VOCABULARY, index, counts=counts)) == []
    assert counts == {"captions of pictures that show too much": 1}


def test_what_cannot_be_read_is_named():
    rows = [*_rows(), {"image": "9.png", "caption": "", "objects": []}]
    with pytest.raises(ValueError, match=r"Row 5: a caption .* is empty"):
        index_objects(rows, READER, VOCABULARY)
    with pytest.raises(ValueError, match="Row 0: its column 'caption' holds no names of objects"):
        index_objects([{"image": "0.png", "caption": "a", "objects": []}], READER, VOCABULARY, "caption")
    with pytest.raises(ValueError, match="no names of objects"):
        annotated_objects({"objects": [{"bbox": [0, 0, 1, 1]}]}, "objects")
    assert annotated_objects({"objects": {"label": ["a", "b"], "bbox": []}}, "objects") == ["a", "b"]
    assert annotated_objects({"objects": [{"name": "a"}, "b"]}, "objects") == ["a", "b"]
    assert annotated_objects({"objects": None}, "objects") == []


def test_real_photographs():
    """Captions and boxes of people who looked: no twin names what a box or a caption shows."""
    if not PHOTOS.exists():
        pytest.skip("the photographs lie beside the repository only where it is developed")
    rows = load_rows(PHOTOS / "photos.jsonl")
    reader = CaptionReader("file", "captions", image_folder=PHOTOS, identity="path")
    vocabulary = annotation_vocabulary(rows, "instances")
    index = index_objects(rows, reader, vocabulary, "instances")
    pairs = list(preference_rows(rows, reader, vocabulary, index))
    assert len(pairs) > 500
    boxes = {}
    for line in (PHOTOS / "photos.jsonl").read_text().splitlines():
        photo = json.loads(line)
        boxes[photo["file"]] = {box["category"] for box in photo["instances"] or []}
    put_in = [(pair["image"], pair["swaps"][0].split(" -> ")[1]) for pair in pairs]
    assert not any(name in boxes[image] for image, name in put_in)
    assert len({name for _, name in put_in}) > 30
    assert np.mean(["  " in pair["rejected"][0]["content"][0]["text"] for pair in pairs]) == 0
