"""Semantic matching: wrong captions are wrong, answers are balanced, and nothing but the picture tells them."""

import json
import random
import re
import shutil
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from transformers_lmeye import LMEyeProcessor
from transformers_lmeye.data.matching import (
    FOUR_CHOICE_PROMPT,
    MATCHING_KINDS,
    TRUE_OR_FALSE_PROMPT,
    CaptionReader,
    clip_text_features,
    index_captions,
    matching_rows,
    normalize_caption,
    tfidf_features,
)
from transformers_lmeye.data.samples import ConversationReader
from transformers_lmeye.training import ConversationCollator


PHOTOS = Path(__file__).parents[2] / "../shared/reference/photos"
BY_PATH = CaptionReader(identity="path")


def _words(caption: str) -> str:
    """The tests' own idea of equal captions."""
    return " ".join(re.sub("[^a-z0-9 ]", "", " ".join(caption.lower().split())).split())


def _shown(row: dict) -> tuple[list[str], str]:
    """The captions a row shows, cut out of its prompt, and its answer."""
    (image, text), (answer,) = (message["content"] for message in row["messages"])
    assert image == {"type": "image"} and [message["role"] for message in row["messages"]] == ["user", "assistant"]
    if row["kind"] == "true_or_false":
        captions = [re.fullmatch(r'Does this caption fit the image: "(.*)"\? Answer True or False\.', text["text"])[1]]
    else:
        pattern = r"Which of these captions fits the image\?\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\n"
        pattern += r"Answer with the letter\."
        captions = list(re.fullmatch(pattern, text["text"]).groups())
    return captions, answer["text"]


def _wrong_ones(row: dict) -> tuple[list[str], list[str]]:
    """The captions that a row says are right, and those that it says are wrong."""
    captions, answer = _shown(row)
    if row["kind"] == "true_or_false":
        return (captions, []) if answer == "True" else ([], captions)
    right = "ABCD".index(answer)
    return [captions[right]], captions[:right] + captions[right + 1 :]


def _check(rows: list[dict], built: list[dict], picture_of: dict[str, str]) -> None:
    """Every built row against the captions of its picture, collected over all rows. `picture_of`: image to picture."""
    belonging = defaultdict(set)
    shown_by = {}
    for number, row in enumerate(rows):
        captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        belonging[picture_of[row["image"]]].update(map(_words, captions))
        shown_by |= {
            f"{number}-{place}": (" ".join(caption.split()), row["image"]) for place, caption in enumerate(captions)
        }
    for row in built:
        right, wrong = _wrong_ones(row)
        own = belonging[picture_of[row["image"]]]
        assert set(map(_words, right)) <= own
        assert own.isdisjoint(map(_words, wrong)), row
        captions, _ = _shown(row)
        assert len({_words(caption) for caption in captions}) == len(captions)
        # The row's own account of where its captions come from.
        assert captions == [shown_by[name][0] for name in row["captions"]]
        assert len({picture_of[shown_by[name][1]] for name in row["captions"]}) == len(captions)
    assert [row["id"] for row in built] == [f"{name}-{kind}" for name in shown_by for kind in MATCHING_KINDS]


@pytest.fixture
def entangled(tmp_path) -> tuple[list[dict], dict[str, str]]:
    """Rows in which a wrong caption may be right in every way there is: pictures that come again in far rows and under
    other names, captions of several pictures, captions that differ in case and punctuation."""
    generator = random.Random(0)
    things, places = ("cat", "dog", "bus", "cup", "tree"), ("mat", "road", "hill")
    rows, picture_of = [], {}
    for number in range(120):
        picture = number % 40
        name = f"{picture}.png" if number < 80 else f"copy-{picture}.png"
        picture_of[name] = f"picture {picture}"
        (tmp_path / name).write_bytes(f"picture {picture}".encode())
        captions = [f"a {generator.choice(things)} on a {generator.choice(places)}" for _ in range(3)]
        captions[0] = captions[0].upper() + " !"
        rows.append({"image": name, "caption": captions})
    return rows, picture_of


@pytest.mark.parametrize("features", [None, tfidf_features], ids=["random", "near"])
@pytest.mark.parametrize("window_size", [45, 10_000])
def test_no_wrong_caption_belongs_to_the_picture(entangled, tmp_path, features, window_size):
    rows, picture_of = entangled
    reader = CaptionReader(image_folder=tmp_path)
    index = index_captions(rows, reader)
    assert (len(index.pictures), index.num_captions, index.num_different_captions, index.num_pictures) == (
        120, 360, 15, 40,
    )  # fmt: skip
    counts = Counter()
    options = {"window_size": window_size, "max_similarity": 1.0, "counts": counts}
    built = list(matching_rows(rows, reader, index, features=features, **options))
    _check(rows, built, picture_of)
    assert counts["words of another caption of the picture"] > 100  # the guard had much to do


def test_pictures_are_told_apart_as_the_reader_says(entangled, tmp_path):
    rows, picture_of = entangled
    assert index_captions(rows, CaptionReader(image_folder=tmp_path)).num_pictures == 40
    assert index_captions(rows, BY_PATH).num_pictures == 80  # copies have names of their own
    numbered = [{**row, "number": picture_of[row["image"]]} for row in rows]
    reader = CaptionReader(image_id_column="number")
    index = index_captions(numbered, reader)
    assert index.num_pictures == 40
    _check(rows, list(matching_rows(numbered, reader, index)), picture_of)
    as_bytes = [{**row, "image": {"bytes": picture_of[row["image"]].encode(), "path": row["image"]}} for row in rows]
    assert index_captions(as_bytes, CaptionReader()).num_pictures == 40


def _simple(count: int) -> list[dict]:
    return [{"image": f"{number}.png", "caption": f"thing {number}"} for number in range(count)]


def test_answers_are_balanced():
    rows = _simple(402)
    built = list(matching_rows(rows, BY_PATH, index_captions(rows, BY_PATH)))
    answers = {kind: [_shown(row)[1] for row in built if row["kind"] == kind] for kind in MATCHING_KINDS}
    assert Counter(answers["true_or_false"]) == {"True": 201, "False": 201}
    assert sorted(Counter(answers["four_choice"]).values()) == [100, 100, 101, 101]
    # Not by turns: what came before says nothing but that a block fills up.
    pairs = Counter(zip(answers["four_choice"][::4], answers["four_choice"][4::4], strict=False))
    assert len(pairs) == 16 and max(pairs.values()) < 20


def test_wrong_captions_are_drawn_evenly():
    rows = _simple(20)
    index = index_captions(rows, BY_PATH)
    drawn = Counter(
        caption
        for seed in range(60)
        for row in matching_rows(rows, BY_PATH, index, ["four_choice"], seed=seed)
        for caption in _wrong_ones(row)[1]
    )
    assert len(drawn) == 20 and 0.7 * 180 < min(drawn.values()) <= max(drawn.values()) < 1.3 * 180


def test_equal_seeds_give_equal_rows():
    rows = _simple(30)
    index = index_captions(rows, BY_PATH)

    def build(*args, **kwargs) -> list[dict]:
        return list(matching_rows(rows, BY_PATH, index, *args, window_size=12, **kwargs))

    first = build()
    assert build() == first and build(seed=1) != first
    for kind in MATCHING_KINDS:  # one kind is built alone as beside the other
        assert build([kind]) == [row for row in first if row["kind"] == kind]


class Rows:
    """Rows that say how far each pass over them has come."""

    def __init__(self, count: int):
        self.rows = _simple(count)
        self.passes: list[int] = []

    def __iter__(self):
        number = len(self.passes)
        self.passes.append(0)
        for row in self.rows:
            self.passes[number] += 1
            yield row


def test_windows_bound_what_is_held():
    rows = Rows(100)
    index = index_captions(rows, BY_PATH)
    built = matching_rows(rows, BY_PATH, index, ["four_choice"], window_size=20)
    first = list(islice(built, 5))
    assert sorted(rows.passes) == [5, 20, 100]  # pictures, captions ahead, index
    first += built
    numbers = [[int(name.split("-")[0]) for name in row["captions"]] for row in first]
    assert all(number // 20 == row // 20 for row, shown in enumerate(numbers) for number in shown)


def test_a_short_last_window_borrows_from_the_one_before():
    rows = _simple(43)
    index = index_captions(rows, BY_PATH)
    built = list(matching_rows(rows, BY_PATH, index, ["four_choice"], window_size=20))
    assert len(built) == 43
    last = {int(name.split("-")[0]) for row in built[40:] for name in row["captions"]}
    assert min(last) >= 23 and min(last) < 40


def _told_by_likeness(built: list[dict], vectors: dict[str, np.ndarray]) -> tuple[float, float]:
    """How often the right one of four captions is the one most like the others, and the one least like them: what can
    be told without the picture. Chance: 1/4."""
    most, least = [], []
    for row in built:
        shown = np.stack([vectors[name] for name in row["captions"]])
        likeness, right = (shown @ shown.T).sum(1), "ABCD".index(_shown(row)[1])
        most.append(int(likeness.argmax()) == right)
        least.append(int(likeness.argmin()) == right)
    return float(np.mean(most)), float(np.mean(least))


def test_near_captions():
    """Near wrong captions are nearer than random ones, never nearer than allowed, and the four do not tell."""
    generator = random.Random(1)
    words = [
        ["red", "blue", "old", "tall"],
        ["cat", "dog", "bus", "cup", "man"],
        ["by", "on"],
        ["road", "sea", "hill"],
    ]
    rows = []
    for number in range(300):
        captions = [" ".join(generator.choice(choices) for choices in words) + f" {number % 7}" for _ in range(2)]
        rows.append({"image": f"{number}.png", "caption": captions})
    index = index_captions(rows, BY_PATH)
    captions = {f"{i}-{p}": caption for i, row in enumerate(rows) for p, caption in enumerate(row["caption"])}
    vectors = dict(zip(captions, tfidf_features(list(captions.values())).toarray(), strict=True))
    assert np.allclose([v @ v for v in vectors.values()], 1, atol=1e-5)
    cosine = {}
    for features in (None, tfidf_features):
        built = list(matching_rows(rows, BY_PATH, index, ["four_choice"], features, max_similarity=0.7))
        nearest = []
        for number, row in enumerate(built):
            shown = np.stack([vectors[name] for name in row["captions"]])
            own = np.stack([vectors[f"{number // 2}-{place}"] for place in (0, 1)])
            nearest.append(float((np.delete(shown, "ABCD".index(_shown(row)[1]), 0) @ own.T).max()))
        cosine[features] = np.mean(nearest)
        if features is not None:
            assert max(nearest) <= 0.7
            assert all(0.15 < share < 0.35 for share in _told_by_likeness(built, vectors))
    assert cosine[tfidf_features] > cosine[None] + 0.1


def test_too_few_near_captions_are_filled_up_at_random():
    rows = [{"image": f"{n}.png", "caption": f"the same {'x' * n}"} for n in range(1, 9)]
    counts = Counter()
    built = list(
        matching_rows(
            rows,
            BY_PATH,
            index_captions(rows, BY_PATH),
            ["four_choice"],
            tfidf_features,
            num_neighbors=1,  # and the middle's own nearest: two at most
            counts=counts,
        )
    )
    assert len(built) == 8 and counts["filled at random"] >= 8


def test_clip_text_features(folders, tmp_path):
    """Against transformers' whole CLIP, one text at a time: padding and batches change nothing."""
    from transformers import AutoTokenizer, CLIPModel

    texts = ["a cat", "two dogs on a road", "a house", "a cat", "tree"]
    folder = tmp_path / "clip"
    shutil.copytree(folders.vision(), folder)
    tiny.tokenizer().save_pretrained(folder)
    features = clip_text_features(str(folder), batch_size=2)(texts)
    model = CLIPModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(texts, features, strict=True):
        with torch.no_grad():
            expected = model.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0]
        assert np.allclose(vector, expected / expected.norm(), atol=1e-5)
    assert features.shape == (5, tiny.PROJECTION_WIDTH)


def test_normalized_captions():
    same = ["A cat, on a mat.", "a  CAT on a mat", " a cat on a mat!", "\uff21 cat on a mat"]
    assert len({normalize_caption(caption) for caption in same}) == 1
    assert normalize_caption("Ein Straßenbahn-Depot") == "ein strassenbahn depot"
    assert normalize_caption("猫が二匹") == "猫が二匹" and normalize_caption(" ?! ") == ""


def test_prompts_are_frozen():
    """Data sets built with other prompts are other data sets: change these deliberately."""
    assert TRUE_OR_FALSE_PROMPT == 'Does this caption fit the image: "{caption}"? Answer True or False.'
    assert FOUR_CHOICE_PROMPT == (
        "Which of these captions fits the image?\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer with the letter."
    )


def test_captions_with_braces_stay_as_they_are():
    rows = [{"image": f"{n}.png", "caption": f"{{caption}} {{{n}}}"} for n in range(4)]
    for row in matching_rows(rows, BY_PATH, index_captions(rows, BY_PATH)):
        assert all("{caption} {" in caption for caption in _shown(row)[0])


def test_rows_are_those_that_training_reads(folders):
    rows = _simple(6)
    processor = LMEyeProcessor.from_vision_language_pretrained(
        str(folders.vision()), str(folders.language("llama")), num_dynamic_tokens=2
    )
    reader = ConversationReader(open_image=lambda value: tiny.picture(int(value.removesuffix(".png"))))
    built = list(matching_rows(rows, BY_PATH, index_captions(rows, BY_PATH)))
    samples = [reader.read(row, 0, row["id"]) for row in built]
    batch = ConversationCollator(processor)(samples)
    assert batch["pixel_values"].shape[0] == len(built) == 12
    assert ((batch["labels"] != -100).sum(1) == 3).all()  # a blank, the answer's one word, and the end


def _case(rows: list[dict], reader: CaptionReader = BY_PATH, **options):
    return list(matching_rows(rows, reader, index_captions(rows, reader), **options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _case(_simple(3)), "3 different captions of 3 pictures; .* at least 4 of each. Give a larger split"),
        (lambda: _case(_simple(1), kinds=["true_or_false"]), "at least 2 of each"),
        (lambda: _case([{"image": "a", "caption": f"{n}"} for n in range(9)]), "9 different captions of 1 pictures"),
        (lambda: _case([{"image": f"{n}", "caption": "a"} for n in range(9)]), "1 different captions of 9 pictures"),
        (lambda: _case(_simple(9), kinds=["true"]), "choose from true_or_false, four_choice"),
        (lambda: _case(_simple(9), kinds=[]), "choose from"),
        (lambda: _case(_simple(9), window_size=3), "window_size=3"),
        (lambda: index_captions(iter(_simple(9)), BY_PATH), "gone through only once"),
        (lambda: _case([*_simple(5), {"image": "a", "caption": " ."}]), r"Row 5: a caption .*'caption' is empty"),
        (lambda: _case([*_simple(5), {"image": "a", "caption": []}]), "Row 5: a caption"),
        (lambda: _case([*_simple(5), {"image": "a", "caption": ["x", None]}]), "Row 5: a caption"),
        (lambda: _case([*_simple(5), {"image": None, "caption": "x"}]), "Row 5: it has no picture"),
        (lambda: _case([*_simple(5), {"image": ["a", "b"], "caption": "x"}]), "Row 5: it has 2 pictures"),
        (lambda: _case([*_simple(5), {"image": 3, "caption": "x"}]), "Row 5: its picture is int"),
        (lambda: _case(_simple(5), CaptionReader()), r"Row 0: its picture cannot be read .*identity"),
        (lambda: CaptionReader(lists="some"), 'choose "all" or "first"'),
        (lambda: CaptionReader(identity="name"), 'choose "content" or "path"'),
        (lambda: CaptionReader().check_columns(["image", "text"]), "no column 'caption'.*--caption_column"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_window_of_one_picture_is_refused_by_caption():
    rows = [{"image": f"{n // 10}", "caption": f"caption {n}"} for n in range(50)]
    with pytest.raises(ValueError, match=r"Caption \d+-0 .* 10 captions around it only 0 .*Shuffle the rows"):
        _case(rows, window_size=10)
    _check(rows, _case(rows, window_size=50), {f"{n}": f"{n}" for n in range(5)})


def test_bad_rows_are_left_out_and_reported():
    rows = [*_simple(5), {"image": None, "caption": "x"}, *({"image": f"b{n}", "caption": f"b {n}"} for n in range(3))]
    bad = {}
    index = index_captions(rows, BY_PATH, bad.__setitem__)
    assert list(bad) == [5] and "no picture" in bad[5] and index.num_captions == 8 and index.num_pictures == 8
    built = list(matching_rows(rows, BY_PATH, index, ["true_or_false"]))
    assert [row["id"].split("-")[0] for row in built] == ["0", "1", "2", "3", "4", "6", "7", "8"]


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the reference photographs are not beside the repository")
@pytest.mark.parametrize("features", [None, tfidf_features], ids=["random", "near"])
def test_the_photographs(features):
    """150 photographs with five human captions each."""
    rows = [json.loads(line) for line in (PHOTOS / "photos.jsonl").read_text().splitlines()]
    reader = CaptionReader("file", "captions", image_folder=PHOTOS)
    built = list(matching_rows(rows, reader, index_captions(rows, reader), features=features))
    plain = [{"image": row["file"], "caption": row["captions"]} for row in rows]
    _check(plain, built, {row["file"]: row["file"] for row in rows})
    assert len(built) == 2 * 750
    captions = {f"{i}-{p}": caption for i, row in enumerate(rows) for p, caption in enumerate(row["captions"])}
    vectors = dict(zip(captions, tfidf_features(list(captions.values())).toarray(), strict=True))
    choices = [row for row in built if row["kind"] == "four_choice"]
    assert all(0.18 < share < 0.32 for share in _told_by_likeness(choices, vectors))
