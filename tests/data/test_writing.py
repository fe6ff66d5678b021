"""Rows written are rows read, and a file is whole or not there."""

import json
from io import BytesIO

import datasets
import pyarrow.parquet as pq
import pytest
import tiny

from transformers_lmeye.data.writing import write_rows


def _rows(count: int) -> list[dict]:
    return [{"id": str(n), "parts": [{"type": "image"}, {"type": "text", "text": f"ü {n}"}]} for n in range(count)]


def test_json_lines(tmp_path):
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    assert write_rows(iter(_rows(5)), path) == 5
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == _rows(5)
    assert "ü" in path.read_text(encoding="utf-8")


def test_parquet(tmp_path):
    """More rows than are held at a time."""
    path = tmp_path / "rows.parquet"
    assert write_rows(iter(_rows(2100)), path) == 2100
    table = pq.read_table(path).to_pylist()
    assert [row["id"] for row in table] == [str(n) for n in range(2100)]
    assert table[7]["parts"] == [{"type": "image", "text": None}, {"type": "text", "text": "ü 7"}]
    assert pq.ParquetFile(path).num_row_groups == 3


def test_pictures_in_parquet(tmp_path):
    png = BytesIO()
    tiny.picture(3).save(png, "PNG")
    features = datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")})
    row = {"image": {"bytes": png.getvalue(), "path": None}, "n": 1}
    write_rows([row], tmp_path / "rows.parquet", features)
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    assert read.features == features and read[0]["image"].tobytes() == tiny.picture(3).tobytes()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_run_that_fails_leaves_what_was_there(tmp_path, name):
    def failing():
        yield from _rows(1500)
        raise RuntimeError("no more")

    (tmp_path / name).write_text("before")
    with pytest.raises(RuntimeError, match="no more"):
        write_rows(failing(), tmp_path / name)
    assert (tmp_path / name).read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing half-written beside it


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_no_rows(tmp_path, name):
    features = datasets.Features({"n": datasets.Value("int64")})
    assert write_rows([], tmp_path / name, features) == 0 and (tmp_path / name).is_file()


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.jsonl or a \.parquet"):
        write_rows([], tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=r"Row 1 does not fit JSON lines .*\.parquet"):
        write_rows([{"image": "a.png"}, {"image": b"png"}], tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())
