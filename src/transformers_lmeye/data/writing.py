"""Rows to a file, whole or not at all."""

import json
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq


_ROWS_PER_GROUP = 1000


def write_rows(rows: Iterable[dict[str, Any]], path: str | Path, features: datasets.Features | None = None) -> int:
    """
    Writes rows one after another to JSON lines or Parquet. The file appears under its name when it is complete.

    Args:
        rows: a generator will do; of a Parquet file 1,000 rows are held at a time.
        path: ends with `.jsonl` or `.parquet`; folders are made where they are missing.
        features: of a Parquet file; without them they are taken from the first 1,000 rows.

    Returns:
        `int`: number of rows written.

    Raises:
        ValueError: another ending; or a row for JSON lines that holds bytes.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"Rows are written to a .jsonl or a .parquet file, not to {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        count = (
            _write_json_lines(rows, partial) if path.suffix == ".jsonl" else _write_parquet(rows, partial, features)
        )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write_json_lines(rows: Iterable[dict[str, Any]], path: Path) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for count, row in enumerate(rows, start=1):
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except TypeError as error:
                raise ValueError(
                    f"Row {count - 1} does not fit JSON lines ({error}): pictures inside a data set are bytes. Write "
                    "a .parquet file."
                ) from error
    return count


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path, features: datasets.Features | None) -> int:
    rows = iter(rows)
    group = list(islice(rows, _ROWS_PER_GROUP))
    schema = features.arrow_schema if features is not None else pa.Table.from_pylist(group).schema
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        while group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
            group = list(islice(rows, _ROWS_PER_GROUP))
    return count


__all__ = ["write_rows"]
