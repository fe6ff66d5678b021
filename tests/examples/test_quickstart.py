"""The quickstart: its parts on an untrained network, and, marked slow, the whole of it."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MODULES = ("scenes", "training", "quickstart")


@pytest.fixture(scope="module")
def quickstart():
    """examples/quickstart.py as a module."""
    previous_modules = {name: sys.modules.pop(name, None) for name in MODULES}
    previous_path = list(sys.path)
    sys.path.insert(0, str(EXAMPLES))
    try:
        module = importlib.import_module("quickstart")
        module.START = 0.0
        yield module
    finally:
        sys.path[:] = previous_path
        for name, previous in previous_modules.items():
            sys.modules.pop(name, None)
            if previous is not None:
                sys.modules[name] = previous


def test_table(quickstart, capsys):
    figures = dict.fromkeys((*quickstart.KINDS, "all"), 50.0)
    quickstart.print_table({"one": figures, "another": figures | {"color": 100.0}})
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[3].split("|")[3].strip() == "100.0"


def test_pictures_are_drawn(quickstart, tmp_path):
    model, processor = quickstart.build("ipn")
    scenes = quickstart.sample_scenes(2, "test", seed=0, min_digits=9)
    quickstart.draw_answers(model, processor, scenes, tmp_path / "answers.png")
    quickstart.draw_learning_curve({"one": [3.0] * 30, "two": [1.0] * 40}, tmp_path / "curve.png")
    assert (tmp_path / "answers.png").stat().st_size > 20_000 and (tmp_path / "curve.png").exists()


def test_the_reloaded_model_answers_alike(quickstart, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "OUTPUT_DIR", tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, processor = quickstart.build("ipn")
    scenes = quickstart.sample_scenes(3, "test", seed=0, min_digits=9)
    quickstart.reload_and_check(model, processor, scenes, quickstart.sample_questions(scenes, 2, seed=0))
    assert "generates the same ids" in capsys.readouterr().out
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "quickstart.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    row = re.search(r"\| IPN, as just trained +\|(.*)\|", result.stdout)
    assert float(row.group(1).split("|")[-1]) >= 95
    assert "generates the same ids" in result.stdout
    for name in ("answers.png", "learning_curve.png", "model/config.json"):
        assert (tmp_path / "outputs" / "quickstart" / name).exists()
