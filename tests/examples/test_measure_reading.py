"""examples/measure_reading.py: what it writes is read once each, in every mode, and its figures are there."""

import importlib.util
import json
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image


SCRIPT = Path(__file__).parents[2] / "examples" / "measure_reading.py"


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    spec = importlib.util.spec_from_file_location("measure_reading", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_every_reading_reads_what_was_written(script, tmp_path, monkeypatch, capsys):
    for shade in range(3):
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
    # In this process: a fresh one for each takes seconds, and its memory alone is another.
    monkeypatch.setattr(script, "_measure_afresh", lambda cache, *arguments: script.measure(*arguments))
    monkeypatch.setattr(
        sys,
        "argv",
        ["x", "--image_folder", f"{tmp_path}", "--sizes", "7", "301", "--output_dir", f"{tmp_path / 'out'}"],
    )
    script.main()
    rows = json.loads((tmp_path / "out" / "reading.json").read_text())
    assert [row["samples"] for row in rows] == [0, *[7] * 4, *[301] * 4]
    assert all(row["peak"] >= row["own"] > 0 for row in rows)
    assert len(list((tmp_path / "out" / "301").glob("*.tar"))) == 3
    assert capsys.readouterr().out.count("| parquet | map-style | 301 |") == 1
    with pytest.raises(ValueError, match="There is no JPEG or PNG"):
        script.write_shards(tmp_path / "nothing", tmp_path / "out", 3)
