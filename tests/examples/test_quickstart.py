"""The quickstart: its parts on an untrained network, and, marked slow, the whole of it."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MODULES = ("scenes", "training", "curves", "quickstart")


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
    assert (tmp_path / "answers.png").stat().st_size > 20_000


def test_losses_are_compared_with_the_reference(quickstart, tmp_path):
    """Losses like those of the stored runs are normal; those of a network that never learns to ask are not."""
    stages = json.loads(quickstart.REFERENCE_CURVE.read_text())["stages"]
    steps = {"stage 1: captions": quickstart.PRETRAIN_STEPS, "stage 2: questions": quickstart.INSTRUCT_STEPS}
    assert list(stages) == list(steps)
    like, unlike = {}, {}
    for stage, points in stages.items():
        # points stand at the end of the steps they are means of, about 10 after their middle
        like[stage] = np.interp(np.arange(steps[stage]) + 10, points["step"], points["mean"]).tolist()
        unlike[stage] = [points["mean"][0]] * steps[stage]
    found = quickstart.check_losses(like, tmp_path / "curve.png")
    assert all(distance.is_normal for distance in found.values())
    assert [distance.num_points for distance in found.values()] == [14, 119]
    assert (tmp_path / "curve.png").stat().st_size > 20_000
    assert not any(distance.is_normal for distance in quickstart.check_losses(unlike, tmp_path / "2.png").values())


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
    assert result.stdout.count("this is normal") == 2 and "NOT normal" not in result.stdout
    for name in ("answers.png", "learning_curve.png", "model/config.json"):
        assert (tmp_path / "outputs" / "quickstart" / name).exists()
