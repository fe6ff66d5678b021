"""A row of a data set as samples of the two stages.

A sample of stage 1 is `{"id", "image", "caption"}`; one of stage 2 is `{"id", "messages"}`, chat messages whose
content is a list of parts, `{"type": "image", "image": PIL}` and `{"type": "text", "text": str}`. A sample of words
alone has the image `None`, or no image part.

A reader makes samples of a row. It holds no row and opens pictures when a sample is read, so that this happens in the
data loader's workers. `datasets.py` has the data sets that hand it their rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from .images import UNREADABLE_IMAGE_KINDS
from .images import open_image as open_picture
from .rows import BROKEN_RECORD


UNREADABLE_SAMPLE_KINDS = (
    *UNREADABLE_IMAGE_KINDS,
    "broken record",  # a line or an archive's member that cannot be parsed
    "no text",  # a caption, question or answer that is missing or empty
    "bad messages",  # messages that are no list of roles and contents
    "bad places",  # pictures and places for them differ in number, or there is no user turn to show them in
    "unusable",  # what an open_image of another make refuses without saying its kind
)
"""What may be wrong with a row: `UnreadableSample.kind` and `BadSample.kind`."""

_ROLES = ("system", "developer", "user", "assistant", "tool")  # of chat templates
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_LLAVA_IMAGE = "<image>"


class UnreadableSample(ValueError):
    """A row that is no sample. `kind` is one of `UNREADABLE_SAMPLE_KINDS`."""

    def __init__(self, message: str, kind: str = "unusable"):
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class BadSample:
    """What stands in a sample's place where it could not be read or encoded.

    Args:
        id: the sample's.
        kind: one word or two to count by; of those that readers give see `UNREADABLE_SAMPLE_KINDS`.
        reason: the whole message.
    """

    id: str
    kind: str
    reason: str

    @classmethod
    def from_error(cls, sample_id: str, error: ValueError) -> "BadSample":
        """Of the error that reading or encoding raised; its `kind` where it has one, else `"unusable"`."""
        return cls(sample_id, getattr(error, "kind", "unusable"), str(error))

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class Reader(Protocol):
    """What the data sets ask of a reader.

    Attributes:
        image_column: the column that is left on disk where texts alone are asked for.
    """

    image_column: str | None

    def check_columns(self, column_names: Sequence[str]) -> None:
        """Raises `ValueError` where rows of these columns hold no sample."""

    def counting_columns(self, column_names: Sequence[str]) -> list[str]:
        """The columns that decide `num_samples`; none where every row is one sample."""

    def num_samples(self, row: dict[str, Any]) -> int:
        """How many samples the row stands for: never 0, so that a row without any is refused by name, not lost."""

    def texts(self, row: dict[str, Any], place: int) -> list[str]:
        """The texts of a sample, its pictures unopened; none where it has no readable one."""

    def read(self, row: dict[str, Any], place: int, name: str) -> dict[str, Any]:
        """The row's sample number `place`, called `name`. Raises `UnreadableSample`."""


class _RowReader:
    """What both readers share: pictures, and lists of texts that stand for several samples."""

    def __init__(
        self,
        lists: Literal["all", "first"],
        image_folder: str | Path | None,
        open_image: Callable[[Any], Any] | None,
    ):
        if lists not in ("all", "first"):
            raise ValueError(f'lists={lists!r}: choose "all" or "first".')
        self.lists = lists
        self._open_image = open_image or partial(open_picture, image_folder=image_folder)

    def _open(self, value: Any, name: str) -> Any:
        try:
            return self._open_image(value)
        except ValueError as error:
            raise UnreadableSample(f"Sample {name}: {error}", getattr(error, "kind", "unusable")) from error

    def _num_texts(self, value: Any) -> int:
        return max(len(value), 1) if self.lists == "all" and isinstance(value, list) else 1

    @staticmethod
    def _text(value: Any, place: int, name: str, what: str) -> str:
        if isinstance(value, list):
            value = value[place] if place < len(value) else None
        if isinstance(value, str) and value.strip():
            return value
        found = "is empty" if value is None or isinstance(value, str) else f"is no text but {value!r:.80}"
        raise UnreadableSample(f"Sample {name} has no target token: its {what} {found}. Leave the row out.", "no text")

    @staticmethod
    def _refuse_broken(row: dict[str, Any], name: str) -> None:
        if row.get(BROKEN_RECORD) is not None:
            raise UnreadableSample(
                f"Sample {name} cannot be read: {row[BROKEN_RECORD]}. Mend the record or leave it out.",
                "broken record",
            )


class PairReader(_RowReader):
    """Pairs of image and caption, for stage 1.

    Args:
        image_column, caption_column: their names. A caption is a string or a list of strings. Without an image column
            (`None`) every sample is words alone.
        lists: what a list of captions stands for: `"all"`, a pair each, as COCO's five captions of a picture are five
            pairs; `"first"`, one pair.
        image_folder: where relative image paths start.
        open_image: opens a picture's value in place of `data.open_image` with `image_folder`: a function of other
            limits, or a `FeatureCache`. It must be picklable.

    Samples are `{"id": str, "image": PIL.Image.Image | None, "caption": str}`; with a `FeatureCache` the image is its
    `ImageFeatures`.
    """

    def __init__(
        self,
        image_column: str | None = "image",
        caption_column: str = "caption",
        lists: Literal["all", "first"] = "all",
        image_folder: str | Path | None = None,
        open_image: Callable[[Any], Any] | None = None,
    ):
        super().__init__(lists, image_folder, open_image)
        self.image_column = image_column
        self.caption_column = caption_column

    def check_columns(self, column_names: Sequence[str]) -> None:
        if self.image_column is not None:
            _require(column_names, image_column=self.image_column)
        _require(column_names, caption_column=self.caption_column)

    def counting_columns(self, column_names: Sequence[str]) -> list[str]:
        return [self.caption_column] if self.lists == "all" else []

    def num_samples(self, row: dict[str, Any]) -> int:
        return self._num_texts(row.get(self.caption_column))

    def texts(self, row: dict[str, Any], place: int) -> list[str]:
        try:
            return [self._text(row.get(self.caption_column), place, "", "caption")]
        except UnreadableSample:
            return []

    def read(self, row: dict[str, Any], place: int, name: str) -> dict[str, Any]:
        self._refuse_broken(row, name)
        caption = self._text(row.get(self.caption_column), place, name, "caption")
        if self.image_column is None:
            return {"id": name, "image": None, "caption": caption}
        image = row.get(self.image_column)
        if isinstance(image, list):
            if len(image) > 1:
                raise UnreadableSample(
                    f"Sample {name} has {len(image)} pictures, and a pair has one: keep one of them, or make a "
                    "conversation of it.",
                    "bad places",
                )
            image = image[0] if image else None
        return {"id": name, "image": self._open(image, name), "caption": caption}


class ConversationReader(_RowReader):
    """Conversations about images, for stage 2, from rows of any of these forms (the first that fits):

    - `messages`: chat messages, content a string or a list of parts. An image part may hold its picture (`"image"`,
      `"path"` or `"bytes"`) or be a place for the next picture of the row's image column.
    - `conversations`: LLaVA's turns `{"from": "human" | "gpt", "value"}`, `<image>` standing for the row's picture.
    - `question` and `answer`.
    - with `instruction`: the same question about every picture, `answer_column` holding what to answer, so that
      captions become conversations.

    A row whose messages leave its pictures unmentioned gets them at the head of its first user turn. Rows may have no
    picture, one, or a list.

    Args:
        image_column, messages_column, question_column, answer_column: their names.
        instruction: the question asked of every picture, in place of a question column.
        lists: what a list of answers stands for: `"all"`, a sample each; `"first"`, one sample.
        image_folder: where relative image paths start.
        open_image: as in `PairReader`.

    Samples are `{"id": str, "messages": list}`, every content a list of parts with opened pictures.
    """

    def __init__(
        self,
        image_column: str = "image",
        messages_column: str = "messages",
        question_column: str = "question",
        answer_column: str = "answer",
        instruction: str | None = None,
        lists: Literal["all", "first"] = "all",
        image_folder: str | Path | None = None,
        open_image: Callable[[Any], Any] | None = None,
    ):
        super().__init__(lists, image_folder, open_image)
        self.image_column = image_column
        self.messages_column = messages_column
        self.question_column = question_column
        self.answer_column = answer_column
        self.instruction = instruction

    def check_columns(self, column_names: Sequence[str]) -> None:
        if self.instruction is not None:
            _require(column_names, image_column=self.image_column, answer_column=self.answer_column)
        elif not (
            {self.messages_column, "conversations"}.intersection(column_names)
            or {self.question_column, self.answer_column}.issubset(column_names)
        ):
            raise ValueError(
                f"The data set's columns are {', '.join(column_names)}. A conversation is read from "
                f"{self.messages_column!r} (--messages_column), from 'conversations' (LLaVA), from "
                f"{self.question_column!r} and {self.answer_column!r} (--question_column, --answer_column), or from "
                "an answer column alone with --instruction."
            )

    def counting_columns(self, column_names: Sequence[str]) -> list[str]:
        if self.lists == "first" or self.answer_column not in column_names:
            return []
        forms = [] if self.instruction is not None else [self.messages_column, "conversations"]
        return [self.answer_column, *(column for column in forms if column in column_names)]

    def num_samples(self, row: dict[str, Any]) -> int:
        return 1 if self._has_messages(row) else self._num_texts(row.get(self.answer_column))

    def texts(self, row: dict[str, Any], place: int) -> list[str]:
        try:
            messages = self._messages(row, place, "")
        except UnreadableSample:
            return []
        return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]

    def read(self, row: dict[str, Any], place: int, name: str) -> dict[str, Any]:
        self._refuse_broken(row, name)
        messages = self._messages(row, place, name)
        self._place_images(messages, _as_list(row.get(self.image_column)), name)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not any(part.get("text", "").strip() for answer in answers for part in answer):
            raise UnreadableSample(
                f"Sample {name} has no target token: none of its assistant turns says anything. Leave the row out.",
                "no text",
            )
        return {"id": name, "messages": messages}

    def _has_messages(self, row: dict[str, Any]) -> bool:
        return self.instruction is None and (
            row.get(self.messages_column) is not None or row.get("conversations") is not None
        )

    def _messages(self, row: dict[str, Any], place: int, name: str) -> list[dict[str, Any]]:
        """A sample's messages, contents as lists of parts, pictures unopened."""
        if not self._has_messages(row):
            question = self.instruction
            if question is None:
                question = self._text(row.get(self.question_column), 0, name, "question")
            turns = [("user", question), ("assistant", self._text(row.get(self.answer_column), place, name, "answer"))]
        elif row.get(self.messages_column) is not None:
            turns = [_turn(message, name) for message in _list_of(row[self.messages_column], "messages", name)]
        else:
            turns = [_llava_turn(turn, name) for turn in _list_of(row["conversations"], "conversations", name)]
        return [{"role": role, "content": _parts(content, name)} for role, content in turns]

    def _place_images(self, messages: list[dict[str, Any]], images: list[Any], name: str) -> None:
        """Opens every picture, the row's own at the places left for them."""
        places = [part for message in messages for part in message["content"] if part["type"] == "image"]
        empty = [part for part in places if part["image"] is None]
        if not places and images:
            empty = [{"type": "image", "image": None} for _ in images]
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is None:
                raise UnreadableSample(f"Sample {name} has no user turn to show its picture in.", "bad places")
            first["content"][:0] = places = empty
        if len(empty) != len(images):
            raise UnreadableSample(
                f"Sample {name} has {len(images)} pictures in its column {self.image_column!r} and {len(empty)} "
                "places for them in its messages: give as many of one as of the other.",
                "bad places",
            )
        for part, image in zip(empty, images, strict=True):
            part["image"] = image
        for part in places:
            part["image"] = self._open(part["image"], name)


def _require(column_names: Sequence[str], **columns: str) -> None:
    for argument, column in columns.items():
        if column not in column_names:
            raise ValueError(
                f"The data set has no column {column!r}; it has {', '.join(column_names)}. "
                f"Name the right one with --{argument}."
            )


def _as_list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _list_of(value: Any, what: str, name: str) -> Iterable[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UnreadableSample(f"Sample {name}: its {what} are no list of objects but {value!r:.80}.", "bad messages")
    return value


_REQUIRED = object()


def _field(message: dict[str, Any], key: str, name: str, default: Any = _REQUIRED) -> Any:
    value = message.get(key, default)
    if value is _REQUIRED or (key != "content" and not isinstance(value, str)):
        raise UnreadableSample(f"Sample {name}: a message has no {key!r} but {message!r:.80}.", "bad messages")
    return value


def _turn(message: dict[str, Any], name: str) -> tuple[str, Any]:
    role, content = _field(message, "role", name), _field(message, "content", name, None)
    if role not in _ROLES:
        raise UnreadableSample(
            f"Sample {name}: a message is of the role {role!r}; expected one of {', '.join(_ROLES)}.", "bad messages"
        )
    return role, content


def _llava_turn(turn: dict[str, Any], name: str) -> tuple[str, list[dict[str, Any]]]:
    role, value = _field(turn, "from", name), _field(turn, "value", name)
    if role not in _LLAVA_ROLES:
        raise UnreadableSample(
            f"Sample {name}: a turn is from {role!r}; expected one of {', '.join(_LLAVA_ROLES)}.", "bad messages"
        )
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(value.split(_LLAVA_IMAGE)):
        if number:
            parts.append({"type": "image"})
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
    return _LLAVA_ROLES[role], parts


def _parts(content: Any, name: str) -> list[dict[str, Any]]:
    """A message's content as new image and text parts. Arrow fills absent keys of a part with None."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content or ""}]
    parts: list[dict[str, Any]] = []
    for part in _list_of(content, "contents", name):
        if part.get("type") == "text":
            text = part.get("text") or ""
            if not isinstance(text, str):
                raise UnreadableSample(f"Sample {name}: a text part holds {text!r:.80}.", "bad messages")
            parts.append({"type": "text", "text": text})
        elif part.get("type") == "image":
            image = next((part[key] for key in ("image", "path", "bytes") if part.get(key) is not None), None)
            parts.append({"type": "image", "image": image})
        else:
            raise UnreadableSample(
                f"Sample {name}: a content part is of type {part.get('type')!r}; expected 'text' or 'image'.",
                "bad messages",
            )
    return parts


__all__ = [
    "UNREADABLE_SAMPLE_KINDS",
    "BadSample",
    "ConversationReader",
    "PairReader",
    "Reader",
    "UnreadableSample",
]
