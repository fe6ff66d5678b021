"""The benchmark of the feature cache runs, and says what it measured."""

import json
import re
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import tiny


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_a_short_run(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.syspath_prepend(EXAMPLES)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for number in range(5):
            tiny.picture(number).save(tmp_path / f"{number}.png")
            file.write(json.dumps({"image": f"{number}.png", "caption": ["a cat", "a dog"]}) + "\n")
    arguments = ["--vision_model_name_or_path", folders.vision(), "--dataset_name_or_path", tmp_path / "pairs.jsonl"]
    arguments += ["--language_model_name_or_path", folders.language("llama"), "--batch_size", 2, "--rounds", 6]
    monkeypatch.setattr(sys, "argv", ["benchmark_features.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / "benchmark_features.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "5 pictures extracted" in printed
    rates = re.findall(
        r"\| stage (\d), (\S+).* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \.\. ([\d.]+) \|", printed
    )
    assert [(stage, what) for stage, what, *_ in rates] == [("1", "whole"), ("1", "the"), ("2", "whole"), ("2", "the")]
    for _, _, pictures, cached, ratio, low, high in rates:
        assert float(pictures) > 0 and float(cached) > 0
        assert float(low) <= float(ratio) <= float(high)
