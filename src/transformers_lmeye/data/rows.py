"""Rows of a `datasets` data set as samples of the two stages.

A sample of stage 1 is `{"id", "image", "caption"}`; one of stage 2 is `{"id", "messages"}`, chat messages whose
content is a list of parts, `{"type": "image", "image": PIL}` and `{"type": "text", "text": str}`. Pictures are opened
when a sample is asked for, in the data loader's workers.
"""

from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from torch.utils.data import Dataset

from .images import open_image


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_LLAVA_IMAGE = "<image>"


def load_rows(name_or_path: str | Path, config_name: str | None = None, split: str = "train") -> datasets.Dataset:
    """Opens a data set, pictures not yet decoded.

    Args:
        name_or_path: a JSON, JSON lines, CSV, Parquet or Arrow file (or a pattern such as `"shards/*.parquet"`), a
            folder written by `save_to_disk`, a folder of pictures (`imagefolder`, with its `metadata.jsonl` or
            `.csv`), or a data set of the hub.
        config_name: configuration of a data set that has several.
        split: which split, slices included: `"train[:1000]"`, `"train[90%:]"`. A file is one split named `"train"`.

    Raises:
        ValueError: the split is not there, or the path looks like a local file and is not.
    """
    path = Path(name_or_path)
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is not None:
        if not any(character in path.name for character in "*?[") and not path.is_file():
            raise ValueError(f"There is no data file {path}.")
        options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        rows = datasets.load_dataset(builder, data_files=str(path), split=split, **options)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        rows = _from_disk(path, split)
    else:
        rows = datasets.load_dataset(str(name_or_path), config_name, split=split)
    for column, feature in rows.features.items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            rows = rows.cast_column(column, undecoded)
    return rows


def _from_disk(path: Path, split: str) -> datasets.Dataset:
    rows = datasets.load_from_disk(str(path))
    name, bracket, part = split.partition("[")
    if isinstance(rows, datasets.DatasetDict):
        if name not in rows:
            raise ValueError(f"{path} has no split {name!r}: it holds {', '.join(rows)}.")
        rows = rows[name]
    if bracket:
        read = datasets.ReadInstruction.from_spec(f"all[{part}").to_absolute({"all": len(rows)})
        rows = rows.select(range(read[0].from_, read[0].to))
    return rows


def _undecoded(feature: Any) -> Any:
    """The feature with its `Image`s left as bytes and path: decoding is ours, so that errors name the sample."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(mode=feature.mode, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(
            _undecoded(feature.feature), **({"length": feature.length} if hasattr(feature, "length") else {})
        )
    if isinstance(feature, dict):
        return {name: _undecoded(value) for name, value in feature.items()}
    return feature


class _RowDataset(Dataset):
    """Rows of which those that hold a list of texts stand for as many samples as the list is long.

    With `lists="all"` each text of a list is a sample of its own, as COCO's five captions of a picture are five pairs;
    with `lists="first"` only the first counts.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        text_column: str | None,
        image_folder: str | Path | None,
        lists: Literal["all", "first"],
    ):
        if lists not in ("all", "first"):
            raise ValueError(f'lists={lists!r}: choose "all" or "first".')
        self.rows = rows
        self.image_folder = image_folder
        self.text_column = text_column
        self._samples: np.ndarray | None = None  # [num_samples, 2]: row, place in its list
        if text_column is None or lists == "first" or isinstance(rows.features[text_column], datasets.Value):
            return
        texts = rows.select_columns([text_column])[text_column]
        # An empty list stays a sample, which is refused by name when it is read, rather than vanish.
        counts = np.array([max(len(text), 1) if isinstance(text, list) else 1 for text in texts], dtype=np.int64)
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        rows_of_samples = np.repeat(np.arange(len(counts)), counts)
        self._samples = np.stack([rows_of_samples, np.arange(len(starts)) - starts], axis=1)

    def __len__(self) -> int:
        return len(self.rows) if self._samples is None else len(self._samples)

    def _row(self, index: int) -> tuple[dict[str, Any], str, str | None]:
        """The row of a sample, the sample's name for messages, and its text where the data set has a text column."""
        number, place = (index, 0) if self._samples is None else self._samples[index].tolist()
        row = self.rows[number]
        text = None if self.text_column is None else row[self.text_column]
        if isinstance(text, list):
            text = text[place] if text else None
        own_name = "" if row.get("id") is None else f" (id {row['id']})"
        return row, f"row {number}{own_name}", text

    def _open(self, value: Any, sample: str) -> Any:
        try:
            return open_image(value, self.image_folder)
        except ValueError as error:
            raise ValueError(f"Sample {sample}: {error}") from error


def _require(rows: datasets.Dataset, **columns: str) -> None:
    for argument, column in columns.items():
        if column not in rows.column_names:
            raise ValueError(
                f"The data set has no column {column!r}; it has {', '.join(rows.column_names)}. "
                f"Name the right one with --{argument}."
            )


class PairDataset(_RowDataset):
    """Pairs of image and caption, for stage 1.

    Args:
        rows: as `load_rows` gives them.
        image_column, caption_column: their names. A caption is a string or a list of strings.
        image_folder: where relative image paths start.
        lists: what a list of captions stands for: `"all"`, a pair each; `"first"`, one pair.

    Items are `{"id": str, "image": PIL.Image.Image, "caption": str}`.

    Raises:
        ValueError: a column is missing; or, when an item is read, a picture cannot be opened. The message names the
            row.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str = "image",
        caption_column: str = "caption",
        image_folder: str | Path | None = None,
        lists: Literal["all", "first"] = "all",
    ):
        _require(rows, image_column=image_column, caption_column=caption_column)
        super().__init__(rows, caption_column, image_folder, lists)
        self.image_column = image_column

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, sample, caption = self._row(index)
        return {"id": sample, "image": self._open(row[self.image_column], sample), "caption": caption or ""}


class ConversationDataset(_RowDataset):
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
        rows: as `load_rows` gives them.
        image_column, messages_column, question_column, answer_column: their names.
        instruction: the question asked of every picture, in place of a question column.
        image_folder: where relative image paths start.
        lists: what a list of answers stands for: `"all"`, a sample each; `"first"`, one sample.

    Items are `{"id": str, "messages": list}`, every content a list of parts with opened pictures.

    Raises:
        ValueError: no form fits the columns; or, when an item is read, pictures and their places differ in number, a
            picture cannot be opened, or a role or part is unknown. The message names the row.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str = "image",
        messages_column: str = "messages",
        question_column: str = "question",
        answer_column: str = "answer",
        instruction: str | None = None,
        image_folder: str | Path | None = None,
        lists: Literal["all", "first"] = "all",
    ):
        columns = rows.column_names
        text_column = None
        if instruction is not None:
            _require(rows, image_column=image_column, answer_column=answer_column)
            text_column = answer_column
        elif messages_column in columns or "conversations" in columns:
            pass
        elif question_column in columns and answer_column in columns:
            text_column = answer_column
        else:
            raise ValueError(
                f"The data set's columns are {', '.join(columns)}. A conversation is read from {messages_column!r} "
                f"(--messages_column), from 'conversations' (LLaVA), from {question_column!r} and {answer_column!r} "
                "(--question_column, --answer_column), or from an answer column alone with --instruction."
            )
        super().__init__(rows, text_column, image_folder, lists)
        self.image_column = image_column
        self.messages_column = messages_column
        self.question_column = question_column
        self.instruction = instruction

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, sample, answer = self._row(index)
        if self.text_column is not None:
            question = row[self.question_column] if self.instruction is None else self.instruction
            turns = [("user", question), ("assistant", answer)]
        elif row.get(self.messages_column) is not None:
            turns = [(message["role"], message["content"]) for message in row[self.messages_column]]
        else:
            turns = [_llava_turn(turn, sample) for turn in row["conversations"] or []]
        messages = [{"role": role, "content": _parts(content, sample)} for role, content in turns]
        self._place_images(messages, _as_list(row.get(self.image_column)), sample)
        return {"id": sample, "messages": messages}

    def _place_images(self, messages: list[dict[str, Any]], images: list[Any], sample: str) -> None:
        """Opens every picture, the row's own at the places left for them."""
        places = [part for message in messages for part in message["content"] if part["type"] == "image"]
        empty = [part for part in places if part["image"] is None]
        if not places and images:
            empty = [{"type": "image", "image": None} for _ in images]
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is None:
                raise ValueError(f"Sample {sample} has no user turn to show its picture in.")
            first["content"][:0] = places = empty
        if len(empty) != len(images):
            raise ValueError(
                f"Sample {sample} has {len(images)} pictures in its column {self.image_column!r} and {len(empty)} "
                "places for them in its messages: give as many of one as of the other."
            )
        for part, image in zip(empty, images, strict=True):
            part["image"] = image
        for part in places:
            part["image"] = self._open(part["image"], sample)


def _as_list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _llava_turn(turn: dict[str, str], sample: str) -> tuple[str, list[dict[str, Any]]]:
    if turn["from"] not in _LLAVA_ROLES:
        raise ValueError(
            f"Sample {sample}: a turn is from {turn['from']!r}; expected one of {', '.join(_LLAVA_ROLES)}."
        )
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(turn["value"].split(_LLAVA_IMAGE)):
        if number:
            parts.append({"type": "image"})
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
    return _LLAVA_ROLES[turn["from"]], parts


def _parts(content: Any, sample: str) -> list[dict[str, Any]]:
    """A message's content as new image and text parts. Arrow fills absent keys of a part with None."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content or ""}]
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.get("type") == "text":
            parts.append({"type": "text", "text": part.get("text") or ""})
        elif part.get("type") == "image":
            image = next((part[key] for key in ("image", "path", "bytes") if part.get(key) is not None), None)
            parts.append({"type": "image", "image": image})
        else:
            raise ValueError(
                f"Sample {sample}: a content part is of type {part.get('type')!r}; expected 'text' or 'image'."
            )
    return parts
