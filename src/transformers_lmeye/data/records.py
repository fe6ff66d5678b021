"""Records of text files, archives and folders of pictures, read one at a time.

A record is a dict of its columns. One that cannot be parsed is `{BROKEN_RECORD: reason}`: it keeps its place, and what
stands behind it is read. Every record says under `ROW_SOURCE` where it stands.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


BROKEN_RECORD = "broken_record"
"""Column of what is wrong with a record that could not be parsed; `None`, or absent, in all others."""

ROW_SOURCE = "__source__"
"""Key of where a record stands: file and line, or file and name."""

_PICTURES = {
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "j2k", "avif", "ppm", "pgm"),
    *("pbm", "pnm", "qoi", "ico"),
}
_CAPTIONS = {"txt", "text", "caption"}
_JSON = {"json", "jsn"}
_METADATA = ("metadata.jsonl", "metadata.csv")
_CHUNK = 1 << 20


def suffix_of(path: str) -> str:
    """What a file's name says it holds, compression aside: `".jsonl"` of `a.jsonl.gz`; `""` of a name without."""
    name = os.path.basename(path).lower()
    name = name.removesuffix(".gz") if not name.endswith(".tgz") else name.removesuffix(".tgz") + ".tar"
    return os.path.splitext(name)[1]


def files_of_folder(folder: Path, split: str) -> list[str] | None:
    """What `read_records` reads of a folder: its shards, the list of its pictures, or the folder itself where its
    pictures have text files beside them; in its sub-folder named `split` where there is one. `None` for others."""
    folder = folder / split if (folder / split).is_dir() else folder
    if shards := sorted(str(path) for path in folder.glob("*.tar")):
        return shards
    for name in _METADATA:
        if (folder / name).is_file():
            return [str(folder / name)]
    for path, is_picture in _walk(folder):
        if is_picture and os.path.isfile(os.path.splitext(path)[0] + ".txt"):
            return [str(folder)]
    return None


def read_records(files: list[str]) -> Iterator[dict[str, Any]]:
    """The records of each file, archive or folder of pictures in turn."""
    for path in files:
        suffix = suffix_of(path)
        if os.path.isdir(path):
            yield from _folder_records(path)
        elif suffix == ".tar":
            yield from _tar_records(path)
        else:
            read = _csv_records if suffix in (".csv", ".tsv") else _json_records
            metadata_folder = os.path.dirname(path) if os.path.basename(path) in _METADATA else None
            for place, record in _until_broken(read(path)):
                if isinstance(record, str):
                    record = {BROKEN_RECORD: f"{path}, {place}: {record}"}
                elif metadata_folder is not None and isinstance(record.get("file_name"), str):
                    record = {"image": os.path.join(metadata_folder, record["file_name"]), **record}
                record[ROW_SOURCE] = f"{os.path.basename(path)}, {place}"
                yield record


def _until_broken(records: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The records up to where a file cannot be read on, such as a compressed one that was cut; then what is wrong."""
    try:
        yield from records
    except (OSError, EOFError, zlib.error) as error:
        yield "its end", f"the file ends or breaks ({error}); nothing behind it can be read"


def _open(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


def _json_records(path: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Place and record, or what is wrong with it, of a list of objects or of an object per line."""
    with _open(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            yield from _json_list(file)
            return
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield f"line {number}", _parse(line)


def _parse(text: bytes) -> dict[str, Any] | str:
    try:
        decoded = text.decode("utf-8")
        return _checked(json.loads(decoded), decoded)
    except UnicodeDecodeError as error:
        return f"it is no UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return f"it is no JSON ({error})"


def _checked(record: Any, text: str) -> dict[str, Any] | str:
    if not isinstance(record, dict):
        return f"it is no object but {text.strip():.60}"
    if "\\ud" in text.lower():  # half a character, which no file can hold
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            return f"it holds half a surrogate pair ({error.reason})"
    return record


def _json_list(file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The objects of one list, of which no more is in memory than a record and a chunk."""
    decoder, text, position = json.JSONDecoder(), "", 0
    chars = codecs.getincrementaldecoder("utf-8-sig")()
    number, ended = -1, False
    separator = re.compile(r"[\s,]*")

    def more() -> None:
        nonlocal text, position, ended
        data = file.read1(max(_CHUNK, len(text) - position))  # twice as much each time, so that long records are cheap
        ended = not data
        text, position = text[position:] + chars.decode(data, final=ended), 0

    try:
        while "[" not in text:
            more()
        position = text.index("[") + 1
        while True:
            position = separator.match(text, position).end()
            if position >= len(text) and not ended:
                more()
                continue
            if text[position : position + 1] == "]":
                return
            number += 1
            while True:
                try:
                    record, end = decoder.raw_decode(text, position)
                    break
                except json.JSONDecodeError as error:
                    # An error far from the end of what was read is one of the file, not of the chunk.
                    cut = "Unterminated" in error.msg or error.pos > len(text) - 16
                    if ended or not cut:
                        raise
                    more()
            yield f"record {number}", _checked(record, text[position:end])
            position = end
    except (ValueError, RecursionError) as error:
        yield f"record {max(number, 0)}", f"it is no JSON ({error}); nothing behind it in this file can be read"


def _csv_records(path: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Place and record, or what is wrong with it, of a table with a head. Every value is a string."""
    encoding = _encoding(path)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    with io.TextIOWrapper(_open(path), encoding, errors, newline="") as file:
        lines = _Lines(file)
        head_line = next(iter(lines), "")
        separators = [head_line.count(separator) for separator in "\t,;"]
        separator = "\t,;"[separators.index(max(separators))] if any(separators) else ","
        # A quoted field of the head may go on in the next line.
        rows = csv.reader(lines.again(head_line), delimiter=separator)
        try:
            head = next(rows)
        except (StopIteration, csv.Error):
            return
        while True:
            first_line = lines.number + 1
            lines.ended_inside = lines.inside = False
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"lines {first_line} to {lines.number}", f"it is no row of a table ({error})"
                continue
            place = f"line {first_line}" if first_line >= lines.number else f"lines {first_line} to {lines.number}"
            if lines.ended_inside:
                yield place, 'a quote (") is opened and not closed before the end of the file'
            elif not values:
                continue
            elif len(values) != len(head):
                yield place, f"it has {len(values)} fields, and the head has {len(head)}"
            elif any("\udc80" <= char <= "\udcff" for value in values for char in value):
                yield place, "it is no UTF-8"
            else:
                yield place, dict(zip(head, values, strict=True))


class _Lines:
    """Lines for `csv.reader`: how many it has taken, and whether they ended while it was inside a row."""

    def __init__(self, file: Any):
        self._file = file
        self.number = 0
        self.inside = False
        self.ended_inside = False

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            self.inside = True
            yield line
        self.ended_inside = self.inside

    def again(self, line: str) -> Iterator[str]:
        yield line
        yield from self


def _encoding(path: str) -> str:
    """UTF-8 or UTF-16 where the file is; Windows' Latin where more of its lines are no UTF-8 than are it beyond ASCII.

    A file of UTF-8 with a broken line stays UTF-8.
    """
    valid = invalid = 0
    with _open(path) as file:
        start = file.read(4)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        file.seek(0)
        undefined = set(b"\x81\x8d\x8f\x90\x9d")  # of Windows' Latin
        encoding = "cp1252"
        for line in file:
            if line.isascii():
                continue
            encoding = "latin-1" if undefined.intersection(line) else encoding
            try:
                line.decode("utf-8")
                valid += 1
            except UnicodeDecodeError:
                invalid += 1
    return encoding if invalid > valid else "utf-8-sig"


def _tar_records(path: str) -> Iterator[dict[str, Any]]:
    """The records of a WebDataset shard: members that share a name up to its first dot, and lie side by side."""
    key, members = None, []
    shard = os.path.basename(path)
    count = 0

    def record() -> dict[str, Any]:
        return {**_member_record(path, key, members), ROW_SOURCE: f"{shard}, {key}"}

    try:
        with tarfile.open(path, "r:gz" if path.lower().endswith("gz") else "r:") as archive:
            for member in archive:
                archive.members = []  # else every header stays in memory
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not member.isfile() or not stem or not extension:
                    continue
                member_key = f"{folder}/{stem}".removeprefix("./").removeprefix("/")
                if members and member_key != key:
                    yield record()
                    count, members = count + 1, []
                key = member_key
                kind = extension.rpartition(".")[2].lower()
                if kind in _PICTURES | _CAPTIONS | _JSON:
                    members.append((kind, member.name, archive.extractfile(member).read()))
            _check_end(archive)
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        members = []
        reason = f"{path} ends or breaks behind {count} records ({error}); nothing behind them can be read"
        yield {BROKEN_RECORD: reason, ROW_SOURCE: f"{shard}, record {count}"}
    if members:
        yield record()


def _check_end(archive: tarfile.TarFile) -> None:
    """An archive ends with zeros. `tarfile` takes one that was cut at a header for one that has ended."""
    if isinstance(archive.fileobj, gzip.GzipFile):
        return  # which notices itself, and would have to be read again
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("there is no end of archive")


def _member_record(path: str, key: str, members: list[tuple[str, str, bytes]]) -> dict[str, Any]:
    pictures = [{"bytes": data, "path": name} for kind, name, data in members if kind in _PICTURES]
    fields: dict[str, Any] = {}
    captions = []
    for kind, name, data in members:
        if kind in _JSON:
            parsed = _parse(data)
            if isinstance(parsed, str):
                return {"id": key, BROKEN_RECORD: f"{path}, {name}: {parsed}"}
            fields.update(parsed)
        elif kind in _CAPTIONS:
            try:
                captions.append(data.decode("utf-8-sig").strip())
            except UnicodeDecodeError as error:
                return {"id": key, BROKEN_RECORD: f"{path}, {name}: it is no UTF-8 ({error.reason})"}
    if pictures:
        fields["image"] = pictures[0] if len(pictures) == 1 else pictures
    if captions:
        fields["caption"] = captions[0] if len(captions) == 1 else captions
    return {"id": key, **fields}


def _folder_records(folder: str) -> Iterator[dict[str, Any]]:
    """A record for each picture of a folder, in order of their names, its caption in the text file beside it."""
    for path, is_picture in _walk(Path(folder)):
        if not is_picture:
            continue
        record: dict[str, Any] = {"image": path, ROW_SOURCE: os.path.relpath(path, folder)}
        text = os.path.splitext(path)[0] + ".txt"
        if not os.path.isfile(text):
            record["caption"] = None
        else:
            try:
                record["caption"] = Path(text).read_bytes().decode("utf-8-sig").strip()
            except (UnicodeDecodeError, OSError) as error:
                record = {BROKEN_RECORD: f"{text}: {error}", ROW_SOURCE: record[ROW_SOURCE]}
        yield record


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """Files in order, one folder's names in memory at a time, and whether their names are pictures'."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield os.path.join(root, name), os.path.splitext(name)[1][1:].lower() in _PICTURES
