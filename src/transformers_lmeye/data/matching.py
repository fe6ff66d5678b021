"""Semantic matching: stage-2 data built from captions alone (paper, section on multimodal instruction-following data).

Two tasks for each caption: True-or-False, does this caption fit the image; and four-choice, which of four captions
fits. Wrong captions come from other pictures of the same data set, and a caption that also belongs to the picture is
never among them, wherever in the data set it stands: `index_captions` goes through all rows first.
"""

import hashlib
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from .records import BROKEN_RECORD


TRUE_OR_FALSE_PROMPT = 'Does this caption fit the image: "{caption}"? Answer True or False.'
TRUE_OR_FALSE_ANSWERS = ("True", "False")
FOUR_CHOICE_PROMPT = "Which of these captions fits the image?\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer with the letter."
FOUR_CHOICE_ANSWERS = ("A", "B", "C", "D")
MATCHING_KINDS = ("true_or_false", "four_choice")

SimilarityFeatures = Callable[[list[str]], Any]
"""N texts to a numpy array or a scipy sparse matrix `[N, features]` with rows of unit length: their products are
cosine similarities."""


def normalize_caption(caption: str) -> str:
    """A caption without what does not change its meaning: case, punctuation, outer and double blanks, letter forms."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold()))


@dataclass(frozen=True)
class CaptionReader:
    """How rows say which picture they are about and which captions it has.

    Args:
        image_column, caption_column: their names. A caption is a string or a list of strings.
        lists: what a list of captions stands for: `"all"`, each of them; `"first"`, its first.
        image_folder: where relative image paths start.
        image_id_column: a column that names the picture, so that rows with equal values show the same one.
        identity: without such a column, what makes two pictures the same: `"content"`, equal bytes (files are read,
            not decoded), or `"path"`, equal paths (nothing is read; the same picture under two names counts as two).
    """

    image_column: str = "image"
    caption_column: str = "caption"
    lists: Literal["all", "first"] = "all"
    image_folder: str | Path | None = None
    image_id_column: str | None = None
    identity: Literal["content", "path"] = "content"

    def __post_init__(self) -> None:
        if self.lists not in ("all", "first"):
            raise ValueError(f'lists={self.lists!r}: choose "all" or "first".')
        if self.identity not in ("content", "path"):
            raise ValueError(f'identity={self.identity!r}: choose "content" or "path".')

    def check_columns(self, column_names: Iterable[str]) -> None:
        """Raises `ValueError` where a column is not among `column_names`."""
        names = list(column_names)
        for argument in ("image_column", "caption_column", "image_id_column"):
            column = getattr(self, argument)
            if column is not None and column not in names:
                raise ValueError(
                    f"The data set has no column {column!r}; it has {', '.join(names)}. "
                    f"Name the right one with --{argument}."
                )

    def captions(self, row: dict[str, Any]) -> list[str]:
        """The captions of a row, each on one line. Raises `ValueError` where it has none, or one without a word."""
        if row.get(BROKEN_RECORD) is not None:
            raise ValueError(f"it is broken: {row[BROKEN_RECORD]}")
        value = row[self.caption_column]
        values = value if isinstance(value, list | tuple) else [value]
        captions = [" ".join(text.split()) if isinstance(text, str) else "" for text in values]
        if self.lists == "first":
            captions = captions[:1]
        if not captions or not all(map(normalize_caption, captions)):
            raise ValueError(f"a caption in its column {self.caption_column!r} is empty.")
        return captions

    def image(self, row: dict[str, Any]) -> Any:
        """The row's picture as it is stored: a path, or a dict of bytes and path. Raises `ValueError` where it has
        none, or several."""
        value = row[self.image_column]
        if isinstance(value, list | tuple):
            if len(value) != 1:
                raise ValueError(f"it has {len(value)} pictures; semantic matching is about one.")
            value = value[0]
        if isinstance(value, dict) and not value.get("bytes"):
            value = value.get("path")
        if not value:
            raise ValueError(f"it has no picture in its column {self.image_column!r}.")
        return {"bytes": value, "path": None} if isinstance(value, bytes) else value

    def picture(self, row: dict[str, Any]) -> int:
        """Which picture a row is about, a hash of 64 bits. Raises `ValueError` where that cannot be said."""
        if self.image_id_column is not None:
            if row[self.image_id_column] in (None, ""):
                raise ValueError(f"its column {self.image_id_column!r} is empty.")
            return _hash(str(row[self.image_id_column]).encode())
        value = self.image(row)
        if isinstance(value, dict):
            return _hash(value["bytes"])
        if not isinstance(value, str | Path):
            raise ValueError(f"its picture is {type(value).__name__}, neither a path nor bytes.")
        path = Path(self.image_folder or "") / value
        if self.identity == "path":
            return _hash(str(path).encode())
        try:
            return _hash(path.read_bytes())
        except OSError as error:
            raise ValueError(
                f"its picture cannot be read ({error}). Relative paths start at the image folder; to tell pictures "
                'apart by their paths alone choose identity "path" or an image_id_column.'
            ) from error


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class CaptionIndex:
    """Which caption belongs to which picture, for a whole data set: 8 bytes a row and 8 bytes a caption.

    Attributes:
        pictures: uint64 `[num_rows]`, which picture each row is about.
        skipped: numbers of the rows that could not be read.
        num_captions, num_different_captions, num_pictures: counts.
        pairs: uint64, sorted: a hash of every picture with every one of its captions, normalised.
    """

    pictures: np.ndarray
    skipped: frozenset[int]
    num_captions: int
    num_different_captions: int
    num_pictures: int
    pairs: np.ndarray = field(repr=False)

    def belongs(self, picture: int, normalized: str) -> bool:
        """Whether some row says that a normalised caption belongs to a picture. A collision of hashes says so of one
        in 10^19 others, which merely spares them from being drawn."""
        key = _pair_key(picture, normalized)
        place = int(np.searchsorted(self.pairs, np.uint64(key)))
        return place < len(self.pairs) and int(self.pairs[place]) == key


def _pair_key(picture: int, normalized: str) -> int:
    return _hash(picture.to_bytes(8, "little") + normalized.encode())


def index_captions(
    rows: Iterable[dict[str, Any]],
    reader: CaptionReader,
    on_bad_row: Callable[[int, str], None] | None = None,
) -> CaptionIndex:
    """
    Goes through all rows once and notes which caption belongs to which picture.

    Args:
        rows: what can be gone through again, in the same order.
        reader: how they are read.
        on_bad_row: called with number and reason of a row that cannot be read, which is then left out; without it
            such a row is an error.

    Raises:
        ValueError: a row cannot be read, and the message names it; or `rows` can be gone through only once.
    """
    if iter(rows) is rows:
        raise ValueError("The rows are an iterator, which can be gone through only once: give a data set or a list.")
    pictures, pairs, texts, skipped = array("Q"), array("Q"), array("Q"), set()
    for number, row in enumerate(rows):
        try:
            captions, picture = reader.captions(row), reader.picture(row)
        except ValueError as error:
            if on_bad_row is None:
                raise ValueError(f"Row {number}: {error} Correct the row, or leave it out.") from error
            on_bad_row(number, str(error))
            skipped.add(number)
            pictures.append(0)
            continue
        pictures.append(picture)
        for normalized in map(normalize_caption, captions):
            pairs.append(_pair_key(picture, normalized))
            texts.append(_hash(normalized.encode()))
    of_rows = np.array(pictures, dtype=np.uint64)
    is_read = np.ones(len(of_rows), dtype=bool)
    is_read[sorted(skipped)] = False
    return CaptionIndex(
        pictures=of_rows,
        skipped=frozenset(skipped),
        num_captions=len(texts),
        num_different_captions=len(np.unique(np.array(texts, dtype=np.uint64))),
        num_pictures=len(np.unique(of_rows[is_read])),
        pairs=np.unique(np.array(pairs, dtype=np.uint64)),
    )


def tfidf_features(captions: list[str]) -> Any:
    """
    What captions have in common by their words and pairs of words, rare ones counting more.

    Args:
        captions: N texts; how rare a word is, is counted among them.

    Returns:
        scipy's `csr_matrix`, float32 `[N, words and pairs of words]`, rows of unit length.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # an extra

    vectorizer = TfidfVectorizer(
        token_pattern=r"\w+", ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32, preprocessor=normalize_caption
    )
    return vectorizer.fit_transform(captions)


def clip_text_features(
    model_name_or_path: str, device: str = "cpu", batch_size: int = 256, **hub_kwargs: Any
) -> SimilarityFeatures:
    """
    What captions have in common as CLIP's text encoder sees it.

    Args:
        model_name_or_path: a CLIP, hub id or folder.
        device: where it runs.
        batch_size: captions at a time.
        hub_kwargs: for `from_pretrained`.

    Returns:
        A function from N texts to float32 `[N, d_p]`, rows of unit length. Texts are cut at the model's length.
    """
    import torch
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **hub_kwargs)
    model = CLIPTextModelWithProjection.from_pretrained(model_name_or_path, **hub_kwargs).eval().to(device)
    length = model.config.max_position_embeddings

    @torch.inference_mode()
    def features(captions: list[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(captions), batch_size):
            texts = captions[start : start + batch_size]
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            embeds = model(**inputs.to(device)).text_embeds.float()
            parts.append(torch.nn.functional.normalize(embeds, dim=-1).cpu().numpy())
        return np.concatenate(parts)

    return features


@dataclass(frozen=True)
class _Caption:
    """A caption of the window: number of its row, its place among the row's captions, its picture."""

    row: int
    place: int
    picture: int
    text: str
    normalized: str

    @property
    def name(self) -> str:
        return f"{self.row}-{self.place}"


class _Window:
    """Captions that wrong ones are drawn from, and who is near whom among them."""

    def __init__(
        self,
        captions: list[_Caption],
        index: CaptionIndex,
        features: SimilarityFeatures | None,
        num_neighbors: int,
        max_similarity: float,
        counts: Counter,
    ):
        self.captions = captions
        self.index = index
        self.max_similarity = max_similarity
        self.counts = counts
        self.features, self.neighbors = None, None
        if features is not None:
            from sklearn import config_context  # an extra
            from sklearn.neighbors import NearestNeighbors

            self.features = features([caption.text for caption in captions])
            search = NearestNeighbors(
                n_neighbors=min(num_neighbors, len(captions) - 1), metric="cosine", algorithm="brute"
            )
            with config_context(working_memory=128):  # MiB
                self.neighbors = search.fit(self.features).kneighbors(return_distance=False)  # [N, num_neighbors]
        self.of_picture: dict[int, list[int]] = defaultdict(list)
        for place, caption in enumerate(captions):
            self.of_picture[caption.picture].append(place)

    def draw(self, place: int, count: int, rng: np.random.Generator) -> list[_Caption]:
        """`count` captions that are wrong for the picture of the caption at `place`, of as many other pictures and
        of different words."""
        chosen: list[_Caption] = []
        if self.neighbors is not None:
            self._draw_neighbors(place, count, chosen, rng)
            self.counts["filled at random"] += count - len(chosen)
        size = len(self.captions)
        for candidate in rng.integers(size, size=16 * count):
            if len(chosen) == count:
                return chosen
            self._take(place, candidate, chosen)
        for candidate in rng.permutation(size):
            if len(chosen) == count:
                return chosen
            self._take(place, candidate, chosen)
        if len(chosen) < count:
            raise ValueError(
                f"Caption {self.captions[place].name} (row-place): of the {size} captions around it only "
                f"{len(chosen)} are of other pictures and wrong for its own, and {count} are needed. Shuffle the "
                "rows, or raise window_size (or max_similarity)."
            )
        return chosen

    def _draw_neighbors(self, place: int, count: int, chosen: list[_Caption], rng: np.random.Generator) -> None:
        # Were the wrong captions always neighbours of the right one, it would stand in their middle, and could be told
        # without the picture. So the one they are near to is each of the four equally often.
        middle, near = place, self.neighbors[place]
        if rng.integers(count + 1):
            mutual = (self.neighbors[near] == place).any(axis=1)
            candidates = (*rng.permutation(near[mutual]), *rng.permutation(near[~mutual]))
            middle = next((candidate for candidate in candidates if self._take(place, candidate, chosen)), place)
        for candidate in (*rng.permutation(self.neighbors[middle]), *rng.permutation(near)):
            if len(chosen) == count:
                return
            self._take(place, candidate, chosen)

    def _take(self, place: int, candidate: int, chosen: list[_Caption]) -> bool:
        """Adds a candidate to those chosen if it is wrong for the picture of the caption at `place`."""
        picture, caption = self.captions[place].picture, self.captions[candidate]
        if caption.picture == picture:
            return False
        if any(caption.picture == other.picture or caption.normalized == other.normalized for other in chosen):
            return False
        if self.index.belongs(picture, caption.normalized):
            self.counts["words of another caption of the picture"] += 1
            return False
        if self.features is not None and self._similarity(picture, candidate) > self.max_similarity:
            self.counts["too near to be surely wrong"] += 1
            return False
        chosen.append(caption)
        return True

    def _similarity(self, picture: int, candidate: int) -> float:
        """The greatest cosine of a candidate with the captions of a picture."""
        products = self.features[self.of_picture[picture]] @ self.features[[candidate]].T
        return float(products.max())


def matching_rows(
    rows: Iterable[dict[str, Any]],
    reader: CaptionReader,
    index: CaptionIndex,
    kinds: Iterable[str] = MATCHING_KINDS,
    features: SimilarityFeatures | None = None,
    num_neighbors: int = 32,
    max_similarity: float = 0.5,
    window_size: int = 20_000,
    seed: int = 0,
    counts: Counter | None = None,
) -> Iterator[dict[str, Any]]:
    """
    Semantic matching as rows of stage 2 (docs/own-data.md), one of each kind for every caption.

    Wrong captions are drawn from the `window_size` captions around the right one: the data set is gone through window
    after window, and a window's texts, never its pictures, are held in memory. No caption
    that any row of the data set gives the picture is ever wrong for it, nor is one of the same words
    (`normalize_caption`). The three of a four-choice question are of three other pictures. Answers are balanced: of
    each two True-or-False rows, counted from the first, one is true, and in each four four-choice rows every letter is
    right once.

    With `features`, wrong captions are near ones: drawn among the `num_neighbors` nearest of the right one or, in
    three of four four-choice rows, of a near wrong one, so that the right caption is in the middle of the four no more
    often than another. A caption nearer than `max_similarity` to any caption of the picture is likely right and left
    out; where too few are left, random ones fill up.

    Args:
        rows: those of the index; gone through twice at once, once for captions ahead and once for pictures.
        reader: how they are read.
        index: of the same rows.
        kinds: some of `MATCHING_KINDS`.
        features: texts to vectors, `tfidf_features` or `clip_text_features(...)`; None draws at random.
        num_neighbors: how many near captions are drawn from.
        max_similarity: greatest cosine of a wrong caption with those of the picture.
        window_size: number of captions; a window holds whole rows.
        seed: equal seeds and equal rows give equal rows.
        counts: told what was left out and filled up, by reason.

    Yields:
        `{"id", "image", "messages", "kind", "captions"}`: `captions` names those shown, in their order, by row and
        place, as in `"12-0"`; the id is that of the right one and the kind.

    Raises:
        ValueError: an unknown kind; too few pictures or different captions for it; a caption around which there are
            too few wrong ones.
    """
    kinds = list(kinds)
    if not kinds or not set(kinds) <= set(MATCHING_KINDS):
        raise ValueError(f"kinds={kinds}: choose from {', '.join(MATCHING_KINDS)}.")
    needed = 4 if "four_choice" in kinds else 2
    if min(index.num_pictures, index.num_different_captions) < needed:
        raise ValueError(
            f"The data set has {index.num_different_captions} different captions of {index.num_pictures} pictures; "
            f"{' and '.join(kinds)} needs at least {needed} of each. Give a larger split."
        )
    if window_size < needed:
        raise ValueError(f"window_size={window_size}: wrong captions are drawn from at least {needed}.")
    return _matching_rows(
        rows,
        reader,
        index,
        kinds,
        lambda captions: _Window(
            captions, index, features, num_neighbors, max_similarity, Counter() if counts is None else counts
        ),
        window_size,
        seed,
    )


def _matching_rows(
    rows: Iterable[dict[str, Any]],
    reader: CaptionReader,
    index: CaptionIndex,
    kinds: list[str],
    make_window: Callable[[list[_Caption]], _Window],
    window_size: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    answers = {kind: _balanced_answers(kind, seed) for kind in kinds}
    behind = ((number, row) for number, row in enumerate(rows) if number not in index.skipped)
    before: list[_Caption] = []
    for number, own in enumerate(_windows(rows, reader, index, window_size)):
        missing = window_size - len(own)  # of the last window: captions of the one before it fill up
        borrowed = before[-missing:] if missing > 0 else []
        window = make_window(borrowed + own)
        before = own
        draws = {kind: np.random.default_rng([seed, MATCHING_KINDS.index(kind), number]) for kind in kinds}
        place = len(borrowed)
        while place < len(window.captions):
            row_number, row = next(behind)
            image = reader.image(row)
            while place < len(window.captions) and window.captions[place].row == row_number:
                for kind in kinds:
                    yield _matching_row(kind, next(answers[kind]), window, place, draws[kind], image)
                place += 1


def _windows(
    rows: Iterable[dict[str, Any]], reader: CaptionReader, index: CaptionIndex, window_size: int
) -> Iterator[list[_Caption]]:
    """The captions of all rows in windows of whole rows, each of at least `window_size` but for the last."""
    window: list[_Caption] = []
    for number, (row, picture) in enumerate(zip(rows, index.pictures, strict=True)):
        if number in index.skipped:
            continue
        for place, text in enumerate(reader.captions(row)):
            window.append(_Caption(number, place, int(picture), text, normalize_caption(text)))
        if len(window) >= window_size:
            yield window
            window = []
    if window:
        yield window


def _balanced_answers(kind: str, seed: int) -> Iterator[int]:
    """Places of the right answer, each once in every block of as many rows as there are answers."""
    num_answers = len(TRUE_OR_FALSE_ANSWERS if kind == "true_or_false" else FOUR_CHOICE_ANSWERS)
    rng = np.random.default_rng([seed, len(MATCHING_KINDS) + MATCHING_KINDS.index(kind)])
    while True:
        yield from rng.permutation(num_answers).tolist()


def _matching_row(
    kind: str, answer: int, window: _Window, place: int, rng: np.random.Generator, image: Any
) -> dict[str, Any]:
    right = window.captions[place]
    if kind == "true_or_false":
        shown = [right if answer == 0 else window.draw(place, 1, rng)[0]]
        prompt, said = TRUE_OR_FALSE_PROMPT.format(caption=shown[0].text), TRUE_OR_FALSE_ANSWERS[answer]
    else:
        shown = window.draw(place, 3, rng)
        rng.shuffle(shown)  # they were drawn one near another
        shown.insert(answer, right)
        texts = {letter: caption.text for letter, caption in zip("abcd", shown, strict=True)}
        prompt, said = FOUR_CHOICE_PROMPT.format(**texts), FOUR_CHOICE_ANSWERS[answer]
    return {
        "id": f"{right.name}-{kind}",
        "image": image,
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": said}]},
        ],
        "kind": kind,
        "captions": [caption.name for caption in shown],
    }


def matching_features(image: Any) -> datasets.Features:
    """The features of the rows `matching_rows` gives, for a Parquet file.

    Args:
        image: the `image` of one of them: where it is bytes, the column holds pictures, else paths.
    """
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Value("string") if isinstance(image, str | Path) else datasets.Image(),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)}),
            "kind": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
        }
    )


__all__ = [
    "FOUR_CHOICE_ANSWERS",
    "FOUR_CHOICE_PROMPT",
    "MATCHING_KINDS",
    "TRUE_OR_FALSE_ANSWERS",
    "TRUE_OR_FALSE_PROMPT",
    "CaptionIndex",
    "CaptionReader",
    "SimilarityFeatures",
    "clip_text_features",
    "index_captions",
    "matching_features",
    "matching_rows",
    "normalize_caption",
    "tfidf_features",
]
