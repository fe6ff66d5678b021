"""Preference pairs against hallucination, the open problem of the paper (section 6), built from captions.

Of each caption a twin is made in which one object is swapped for another that the picture does not show: who prefers
the caption has looked. What is put in is drawn as often as the captions of the data set name it, so that neither side
can be told from the other by its words alone, and what a picture shows is taken from all of its captions and from
annotations where there are any.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .matching import CaptionReader


PREFERENCE_PROMPT = "Describe the picture."

_IRREGULAR = {
    "child": "children",
    "deer": "deer",
    "fish": "fish",
    "foot": "feet",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "sheep": "sheep",
    "shelf": "shelves",
    "tooth": "teeth",
    "wolf": "wolves",
    "woman": "women",
}


def plural(noun: str) -> str:
    """The plural of an English noun in lower case; of several words, that of the last."""
    *before, last = noun.split(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


@dataclass(frozen=True)
class Mention:
    """An object named in a caption: its number in the vocabulary, the characters of its name, and its grammatical
    number."""

    object: int
    start: int
    end: int
    is_plural: bool


class Vocabulary:
    """
    The objects that captions are searched for.

    Args:
        objects: nouns in the singular, `"bear"`, `"traffic light"`; or for one object several, `("person", "man")`,
            the first of which is put in for others.

    Raises:
        ValueError: no object, an empty name, or one name for two objects.
    """

    def __init__(self, objects: Iterable[str | Sequence[str]]):
        self.names: list[str] = []
        self._forms: dict[str, tuple[int, bool]] = {}
        for entry in objects:
            names = [" ".join(name.lower().split()) for name in ([entry] if isinstance(entry, str) else entry)]
            if not names or not all(names):
                raise ValueError(f"An object of the vocabulary has no name: {entry!r}.")
            for name in names:
                if self._forms.setdefault(name, (len(self.names), False))[0] != len(self.names):
                    raise ValueError(f"{name!r} names two objects of the vocabulary: write them as one.")
            for name in names:
                self._forms.setdefault(plural(name), (len(self.names), True))
            self.names.append(names[0])
        if not self.names:
            raise ValueError("The vocabulary is empty: name the objects that captions speak of.")
        longest_first = sorted(self._forms, key=len, reverse=True)
        alternatives = "|".join(re.escape(form).replace(r"\ ", r"\s+") for form in longest_first)
        self._pattern = re.compile(rf"\b(?:{alternatives})\b", re.IGNORECASE)

    def __len__(self) -> int:
        return len(self.names)

    def number(self, name: str) -> int | None:
        """Which object a name means, `None` for none of them."""
        found = self._forms.get(" ".join(name.lower().split()))
        return None if found is None else found[0]

    def mentions(self, caption: str) -> list[Mention]:
        """The objects a caption names, from left to right."""
        found = []
        for match in self._pattern.finditer(caption):
            number, is_plural = self._forms[" ".join(match.group().lower().split())]
            found.append(Mention(number, match.start(), match.end(), is_plural))
        return found


def swap_objects(caption: str, mentions: Sequence[Mention], swaps: dict[int, int], vocabulary: Vocabulary) -> str:
    """
    A caption with objects put in for others, plurals, capitals and `a` or `an` in their places.

    Args:
        caption, mentions: as `Vocabulary.mentions` found them.
        swaps: numbers of objects, each with that of what takes its place.
        vocabulary: of both.
    """
    swapped, position = "", 0
    for mention in mentions:
        if mention.object not in swaps:
            continue
        name = vocabulary.names[swaps[mention.object]]
        name = plural(name) if mention.is_plural else name
        before = caption[position : mention.start]
        article = re.search(r"\b(a)n?(\s+)$", before, re.IGNORECASE)
        if article is not None and not mention.is_plural:
            letters = article.group(1) + ("n" if name[0] in "aeiou" else "")
            before = before[: article.start()] + letters + article.group(2)
        if caption[mention.start].isupper():
            name = name[0].upper() + name[1:]
        swapped += before + name
        position = mention.end
    return swapped + caption[position:]


@dataclass(frozen=True)
class ObjectIndex:
    """Which objects the pictures of a data set show, and how often its captions name each.

    Attributes:
        shown: for each picture (`CaptionReader.picture`) the numbers of the objects in it.
        named: int64 `[objects]`, in how many captions each stands.
    """

    shown: dict[int, frozenset[int]]
    named: np.ndarray


_LABELS = ("category", "label", "name")


def annotated_objects(row: dict[str, Any], objects_column: str) -> list[str]:
    """The names in a row's annotations: a list of names, or of objects with a `category`, `label` or `name`, or one
    object with a list of them. Raises `ValueError` for anything else."""
    value = row.get(objects_column)
    if isinstance(value, dict):
        value = next((value[key] for key in _LABELS if key in value), value)
    items = [] if value is None else value if isinstance(value, list) else [value]
    names = []
    for item in items:
        if isinstance(item, dict):
            item = next((item[key] for key in _LABELS if isinstance(item.get(key), str)), None)
        if not isinstance(item, str) or not isinstance(value, list):
            raise ValueError(
                f"its column {objects_column!r} holds no names of objects: expected a list of names, or of objects "
                "with a category, label or name."
            )
        names.append(item)
    return names


def annotation_vocabulary(rows: Iterable[dict[str, Any]], objects_column: str) -> Vocabulary:
    """All objects that a data set is annotated with. Raises `ValueError` as `annotated_objects`."""
    names = {name.strip().lower() for row in rows for name in annotated_objects(row, objects_column)}
    return Vocabulary(sorted(names))


def index_objects(
    rows: Iterable[dict[str, Any]],
    reader: CaptionReader,
    vocabulary: Vocabulary,
    objects_column: str | None = None,
) -> ObjectIndex:
    """
    Goes through all rows once and notes what each picture shows: what any of its captions names, and its annotations.

    Args:
        rows: with captions, and annotations where there is a column of them.
        reader: how captions and pictures are read.
        vocabulary: the objects.
        objects_column: of annotations, as `annotated_objects` reads them; those outside the vocabulary count as not
            there.

    Raises:
        ValueError: a row cannot be read; the message names it.
    """
    shown: dict[int, set[int]] = defaultdict(set)
    named = np.zeros(len(vocabulary), dtype=np.int64)
    for number, row in enumerate(rows):
        try:
            captions, picture = reader.captions(row), reader.picture(row)
            annotated = [] if objects_column is None else annotated_objects(row, objects_column)
        except ValueError as error:
            raise ValueError(f"Row {number}: {error} Correct the row, or leave it out.") from error
        for caption in captions:
            objects = {mention.object for mention in vocabulary.mentions(caption)}
            shown[picture] |= objects
            named[sorted(objects)] += 1
        shown[picture].update(place for name in annotated if (place := vocabulary.number(name)) is not None)
    return ObjectIndex({picture: frozenset(objects) for picture, objects in shown.items()}, named)


def preference_rows(
    rows: Iterable[dict[str, Any]],
    reader: CaptionReader,
    vocabulary: Vocabulary,
    index: ObjectIndex,
    prompt: str = PREFERENCE_PROMPT,
    num_swaps: int = 1,
    seed: int = 0,
    counts: Counter | None = None,
) -> Iterator[dict[str, Any]]:
    """
    Preference pairs as TRL's `DPOTrainer` takes them: each caption that names an object, and its twin.

    Args:
        rows, reader, vocabulary: as `index` was made of.
        index: what the pictures show.
        prompt: the question that both answer.
        num_swaps: how many of a caption's objects are swapped; all of them where it names fewer.
        seed: a pair depends on it and on its row alone.
        counts: is told how many captions gave a pair, named no object, or found nothing to put in.

    Yields:
        `{"image", "prompt", "chosen", "rejected", "swaps"}`: the picture as it is stored, three lists of messages, and
        what was swapped, `"bear -> dog"`.

    Raises:
        ValueError: a row cannot be read; the message names it.
    """
    counts = Counter() if counts is None else counts
    for number, row in enumerate(rows):
        try:
            captions, picture, image = reader.captions(row), reader.picture(row), reader.image(row)
        except ValueError as error:
            raise ValueError(f"Row {number}: {error} Correct the row, or leave it out.") from error
        weights = index.named.astype(np.float64)
        weights[sorted(index.shown[picture])] = 0.0
        rng = np.random.default_rng([seed, number])
        for caption in captions:
            mentions = vocabulary.mentions(caption)
            objects = sorted({mention.object for mention in mentions})
            wanted = min(num_swaps, len(objects))
            if not objects:
                counts["captions that name no object"] += 1
                continue
            if np.count_nonzero(weights) < wanted:
                counts["captions of pictures that show too much"] += 1
                continue
            taken_out = rng.choice(objects, size=wanted, replace=False).tolist()
            put_in = rng.choice(len(vocabulary), size=wanted, replace=False, p=weights / weights.sum()).tolist()
            swaps = dict(zip(taken_out, put_in, strict=True))
            counts["pairs"] += 1
            yield {
                "image": image,
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                "chosen": _answer(caption),
                "rejected": _answer(swap_objects(caption, mentions, swaps, vocabulary)),
                "swaps": [f"{vocabulary.names[old]} -> {vocabulary.names[new]}" for old, new in swaps.items()],
            }


def _answer(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


__all__ = [
    "PREFERENCE_PROMPT",
    "ObjectIndex",
    "Vocabulary",
    "annotated_objects",
    "annotation_vocabulary",
    "index_objects",
    "plural",
    "preference_rows",
    "swap_objects",
]
