"""Folders and files that are there whole or not at all, whenever a run is killed.

A checkpoint is written into `output_dir/_unfinished` and renamed to `checkpoint-N` when every process has written its
part. A file list with sizes, written last, tells a whole one from one that was damaged afterwards.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..modeling.backbones import ADAPTER_FOLDER, SHARD_PATTERN


logger = logging.get_logger(__name__)

# Neither a checkpoint's name nor one that is uploaded to a hub: names with a leading underscore are left out there.
UNFINISHED_FOLDER = "_unfinished"
FILE_LIST_NAME = "checkpoint_files.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(value: Any, path: Path) -> None:
    """Writes `value` as JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Takes the entries for which `keep` is false out of a file of JSON lines, and a last line that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        with suppress(json.JSONDecodeError):
            if keep(json.loads(line)):
                kept.append(line + "\n")
    if not kept:
        path.unlink()
        return
    with replacing(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """Adds an entry to a file of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


# --- checkpoints ---------------------------------------------------------------------------------------------------


def flush_folder(folder: Path) -> None:
    """Has the disk hold every file of a folder, so that a rename that follows never shows less."""
    for file in sorted(folder.rglob("*")):
        _flush(file)
    _flush(folder)


def list_files(folder: Path) -> None:
    """Writes the list of a checkpoint's files and their sizes into it: what makes it complete."""
    write_json(_sizes(folder), folder / FILE_LIST_NAME)


def checkpoint_problem(folder: Path) -> str | None:
    """What a checkpoint lacks, in words; `None` where it is complete."""
    file = folder / FILE_LIST_NAME
    if not file.is_file():
        return f"it has no {FILE_LIST_NAME}: it was written by something else, or deleted in part"
    expected, found = json.loads(file.read_text(encoding="utf-8")), _sizes(folder)
    if missing := sorted(expected.keys() - found.keys()):
        return f"it lacks {', '.join(missing)}"
    if other := [name for name, size in expected.items() if found[name] != size]:
        sizes = ", ".join(f"{name} ({found[name]} of {expected[name]} bytes)" for name in other)
        return f"files were changed after it was written: {sizes}"
    return None


def publish_checkpoint(staged: Path, folder: Path) -> None:
    """Renames a finished checkpoint to its name; one of that name, of an earlier run, gives way."""
    if folder.exists():
        os.rename(folder, staged.with_name(f"replaced-{folder.name}"))
    os.rename(staged, folder)
    _flush(folder.parent)


def rotate_checkpoints(output_dir: Path, limit: int | None, protected: str | None) -> None:
    """
    Deletes the oldest checkpoints beyond `limit`, each renamed first, so that none is ever there in part.

    Args:
        output_dir: where they lie.
        limit: how many stay; all with `None` or 0. The newest always stays.
        protected: the best one, which stays whatever its age.
    """
    if not limit:
        return
    found = sorted(_checkpoints(output_dir), key=lambda folder: (folder.stat().st_mtime, _step(folder)))
    best = Path(protected) if protected is not None else None
    old = [folder for folder in found[:-1] if best is None or folder.resolve() != best.resolve()]
    for folder in old[: max(len(found) - limit, 0)]:
        aside = output_dir / UNFINISHED_FOLDER / "deleted" / folder.name
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, aside)
        shutil.rmtree(aside)


def clear_unfinished(output_dir: Path) -> None:
    """Removes what a killed run left behind; a checkpoint that lacked nothing but its name gets it."""
    unfinished = output_dir / UNFINISHED_FOLDER
    if not unfinished.is_dir():
        return
    for staged in _checkpoints(unfinished):
        if checkpoint_problem(staged) is None and not (output_dir / staged.name).exists():
            publish_checkpoint(staged, output_dir / staged.name)
    shutil.rmtree(unfinished, ignore_errors=True)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of the most steps; incomplete ones are passed over with a warning."""
    for folder in sorted(_checkpoints(Path(output_dir)), key=_step, reverse=True):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        logger.warning(f"{folder} is passed over: {problem}.")
    return None


# --- models --------------------------------------------------------------------------------------------------------


def publish_model(staged: Path, folder: Path) -> None:
    """
    Moves the files of a saved model into a folder, one by one, each whole; weights come last.

    Weight files and an adapter of an earlier save that have no successor are removed.
    """
    files = [file.relative_to(staged) for file in staged.rglob("*") if file.is_file()]
    for name in sorted(files, key=lambda name: (_is_weights(name.name), str(name))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, folder / name)
    for file in folder.iterdir():
        if _is_weights(file.name) and file.relative_to(folder) not in files:
            file.unlink()
    adapter = Path(ADAPTER_FOLDER, "adapter_config.json")
    if adapter not in files and (folder / adapter).is_file():
        shutil.rmtree(folder / ADAPTER_FOLDER)
    _flush(folder)


def _is_weights(name: str) -> bool:
    return name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) or SHARD_PATTERN.fullmatch(name) is not None


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != FILE_LIST_NAME)
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # another process's partial file is gone; Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # file systems without the call
        pass
    finally:
        os.close(descriptor)


__all__ = [
    "FILE_LIST_NAME",
    "UNFINISHED_FOLDER",
    "append_line",
    "checkpoint_problem",
    "clear_unfinished",
    "flush_folder",
    "keep_lines",
    "last_checkpoint",
    "list_files",
    "publish_checkpoint",
    "publish_model",
    "replacing",
    "rotate_checkpoints",
    "write_json",
]
