"""Data sets opened as rows: of the hub, and of local files in the forms they are published in.

Parquet and Arrow files and hub data sets are read by `datasets`. Files of text and archives are read record by record
(`records.py`), so that one broken record is one bad row, not the end of the run, and memory does not grow with the
file; the same rows come out map-style and streaming.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from .records import BROKEN_RECORD, ROW_SOURCE, files_of_folder, read_records, suffix_of


_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
_RECORDS = (".json", ".jsonl", ".csv", ".tsv", ".tar")
_RECORDS_FORMAT = 1  # raise it when the records of the same file come out differently: what was prepared is made anew


def load_rows(
    name_or_path: str | Path, config_name: str | None = None, split: str = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Opens a data set, pictures not yet decoded.

    Args:
        name_or_path: one of
            - a file of JSON (a list of records), JSON lines, CSV, TSV (either may be gzipped), Parquet or Arrow; or a
              WebDataset shard (`.tar`);
            - a pattern of such files: `"shards/*.parquet"`, `"shards/{000..009}.tar"`;
            - a folder of pictures, with `metadata.jsonl`, `.csv` or `.parquet` (its `file_name` names the picture) or
              with a text file beside each picture; its sub-folder named as the split, if there is one;
            - a folder written by `save_to_disk`;
            - a data set of the hub.
        config_name: configuration of a data set of the hub that has several.
        split: which split, slices included: `"train[:1000]"`, `"train[90%:]"`. Files are one split named `"train"`.
        streaming: rows are read one after another, nothing is prepared, and slices are not to be had.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` where streaming. Pictures inside it are
        `{"bytes", "path"}`. A record that could not be parsed is a row whose column `"broken_record"` says why.
        Archives and folders of pictures give the columns `id` (not folders), `image`, `caption` and what their records
        or metadata hold beside.

    Raises:
        ValueError: the split is not there, a local file is not there, no record can be read, a slice without a row,
            or a slice of a stream.
    """
    path = Path(name_or_path)
    name, bracket, part = split.partition("[")
    if streaming and bracket and not _is_saved(path):
        raise ValueError(
            f"split={split!r}: slices are read map-style. Stream a whole split, and keep what is held back in files "
            "or shards of its own."
        )
    suffix = suffix_of(path.name)
    if suffix in _RECORDS:
        rows = _of_records(_files(str(name_or_path)), split, streaming)
    elif suffix in _BUILDERS:
        files = _files(str(name_or_path))
        rows = datasets.load_dataset(_BUILDERS[suffix], data_files=files, split=split, streaming=streaming)
    elif _is_saved(path):
        rows = _from_disk(path, split, streaming)
    elif path.is_dir() and (files := files_of_folder(path, name)) is not None:
        rows = _of_records(files, f"train{bracket}{part}", streaming)
    else:
        rows = datasets.load_dataset(str(name_or_path), config_name, split=split, streaming=streaming)
    for column, feature in (rows.features or {}).items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            rows = rows.cast_column(column, undecoded)
    return rows


def image_folder_of(name_or_path: str | Path) -> Path | None:
    """Where relative image paths of a data set start unless one says so: the folder of its file, or of a pattern of
    files. `None` for others, whose paths are read as they stand."""
    file = Path(name_or_path)
    is_pattern = any(character in file.name for character in "*?[{")
    return file.parent if file.is_file() or (is_pattern and file.parent.is_dir()) else None


def column_names_of(rows: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """The columns of rows; where a stream does not know them, those of its first hundred rows.

    Raises:
        ValueError: there is no row, or none of these can be read.
    """
    if rows.column_names is not None:
        return list(rows.column_names)
    first = list(islice(rows, 100))
    found = dict.fromkeys(column for row in first for column in row if column != ROW_SOURCE)
    if not set(found) - {BROKEN_RECORD}:
        raise _nothing_read(first[0][BROKEN_RECORD] if first else None)
    return list(found)


def _files(name: str) -> list[str]:
    """The files a name, a pattern or a range in braces stands for."""
    if "://" in name:
        if suffix_of(name) in _BUILDERS:
            return [name]
        raise ValueError(f"{name} is an address: copy the files here first, or keep the data as Parquet.")
    files = []
    for pattern in _expand_braces(name):
        found = [pattern] if os.path.isfile(pattern) else sorted(glob(pattern, recursive=True))
        if not found:
            raise ValueError(f"There is no data file {pattern}.")
        files += found
    return [os.path.abspath(file) for file in dict.fromkeys(files)]


def _expand_braces(name: str) -> list[str]:
    """`a-{000..002}.tar` as three names, `{train,val}.csv` as two."""
    match = re.search(r"\{([^{}]*)\}", name)
    if match is None or os.path.exists(name):
        return [name]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        values = [str(n).zfill(len(span[1])) for n in range(int(span[1]), int(span[2]) + 1)]
    else:
        values = match[1].split(",")
    return [tail for value in values for tail in _expand_braces(name[: match.start()] + value + name[match.end() :])]


def _of_records(files: list[str], split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    name, bracket, part = split.partition("[")
    if name != "train":
        raise ValueError(f"{files[0]} has no split {name!r}: files are one split named 'train'.")
    if streaming:
        return datasets.IterableDataset.from_generator(read_records, gen_kwargs={"files": files})
    versions = [_version(file) for file in files]
    features = _features(files, versions)
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    rows = datasets.Dataset.from_generator(
        _encoded_records,
        features=features,
        gen_kwargs={"files": files, "versions": versions, "kinds": kinds, "format": _RECORDS_FORMAT},
        writer_batch_size=100 if any(kind in ("Image", "List") for kind in kinds.values()) else 1000,
    )
    return _slice(rows, part) if bracket else rows


def _version(path: str) -> tuple[int, int]:
    """What changes when a file does, or a caption of a folder: what was prepared of it is then prepared anew."""
    time = size = 0
    for found in _texts_of(path) if os.path.isdir(path) else [path]:
        status = os.stat(found)
        time, size = time + status.st_mtime_ns, size + status.st_size
    return time, size


def _texts_of(path: str) -> Iterator[str]:
    """A folder and its sub-folders, whose times change when pictures come and go, and the text files in them."""
    for folder, _, names in os.walk(path):
        yield folder
        yield from (os.path.join(folder, name) for name in names if name.endswith(".txt"))


def _features(files: list[str], versions: list[tuple[int, int]]) -> datasets.Features:
    """The types of columns: one that is not the same throughout is JSON. All records are read for it, once: what they
    hold is kept in the cache of `datasets`, beside what is prepared of them."""
    key = hashlib.sha256(json.dumps([files, versions, _RECORDS_FORMAT]).encode()).hexdigest()
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "transformers_lmeye" / f"columns-{key}.json"
    if kept.is_file():
        kinds = json.loads(kept.read_text(encoding="utf-8"))
    else:
        kinds = _kinds(files)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(kinds), encoding="utf-8")
        os.replace(partial, kept)
    return datasets.Features({column: _feature(set(found) - {"nothing"}) for column, found in kinds.items()})


def _kinds(files: list[str]) -> dict[str, list[str]]:
    """Which kinds of values each column holds."""
    kinds: dict[str, set[str]] = {}
    broken = None
    for record in read_records(files):
        broken = broken or record.get(BROKEN_RECORD)
        for column, value in record.items():
            if column != ROW_SOURCE:
                kinds.setdefault(column, set()).add(_kind(value))
    if not set(kinds) - {BROKEN_RECORD}:
        raise _nothing_read(broken)
    return {column: sorted(found) for column, found in kinds.items()}


def _nothing_read(broken: str | None) -> ValueError:
    if broken is None:
        return ValueError("The data set holds no record.")
    return ValueError(
        f"No record can be read: {broken}. JSON is a list of objects or an object per line; CSV has a head."
    )


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return "picture"
    if isinstance(value, list):
        kinds = {_kind(item) for item in value}
        if not kinds:
            return "empty"
        return {"text": "texts", "picture": "pictures"}.get(kinds.pop(), "other") if len(kinds) == 1 else "other"
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return "int"
    return {str: "text", bool: "bool", float: "float"}.get(type(value), "other")


def _feature(kinds: set[str]) -> Any:
    if not kinds or kinds == {"text"}:
        return datasets.Value("string")
    if kinds <= {"text", "texts", "empty"}:
        return datasets.List(datasets.Value("string"))
    if "picture" in kinds and kinds <= {"picture", "text"}:
        return datasets.Image(decode=False)
    if kinds & {"picture", "pictures"} and kinds <= {"picture", "pictures", "text", "empty"}:
        return datasets.List(datasets.Image(decode=False))
    numbers = {"int": "int64", "float": "float64", "bool": "bool"}
    if len(kinds) == 1 and kinds <= set(numbers):
        return datasets.Value(numbers[next(iter(kinds))])
    return datasets.Json()


def _encoded_records(files: list[str], versions: Any, kinds: dict[str, str], format: int) -> Iterator[dict[str, Any]]:
    """Records with every column. `versions` and `format` are there to be part of what names the prepared file."""
    for record in read_records(files):
        row = {column: record.get(column) for column in kinds}
        for column, kind in kinds.items():
            value = row[column]
            if kind == "List" and value is not None and not isinstance(value, list):
                row[column] = [value]
            elif kind == "Json" and value is not None:
                # Written out here: the feature takes a string for JSON where it can be read as some, such as "4.0".
                row[column] = json.dumps(value)
        yield row


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _from_disk(path: Path, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    rows = datasets.load_from_disk(str(path))
    name, bracket, part = split.partition("[")
    if isinstance(rows, datasets.DatasetDict):
        if name not in rows:
            raise ValueError(f"{path} has no split {name!r}: it holds {', '.join(rows)}.")
        rows = rows[name]
    rows = _slice(rows, part) if bracket else rows
    return rows.to_iterable_dataset(num_shards=max(1, min(256, len(rows) // 100))) if streaming else rows


def _slice(rows: datasets.Dataset, part: str) -> datasets.Dataset:
    """`part` is a slice without its opening bracket, such as `90%:]`."""
    (read,) = datasets.ReadInstruction.from_spec(f"all[{part}").to_absolute({"all": len(rows)})
    if read.from_ >= read.to:
        raise ValueError(f"The slice [{part} of {len(rows)} rows corresponds to no data: name another.")
    return rows.select(range(read.from_, read.to))


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


__all__ = ["column_names_of", "image_folder_of", "load_rows"]
