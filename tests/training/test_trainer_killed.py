"""Runs killed with SIGKILL in the middle of writing and resumed end with the weights of a run that was not.

Stage 2 with dropout of 0.5, gradient accumulation, missing pictures, a shuffle buffer and loader workers. Kills fall
on the k-th act of writing below `output_dir`: opening, renaming or removing a file, with half of it written where that
can be seen to; a checkpoint takes about 60 of them.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file


SCRIPT = Path(__file__).with_name("killed_runs.py")


def _run(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Runs the script; every kill must have happened, and every last process ended well."""
    (folder / "plan.json").write_text(json.dumps({"folder": str(folder), "runs": runs}))
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder / "plan.json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads((folder / "ends.json").read_text())
    killed = {name: [-signal.SIGKILL] * (len(run["kills"]) - 1) + [0] for name, run in runs.items()}
    assert ends == killed, done.stderr


def _check_same(whole: Path, killed: Path) -> None:
    expected, found = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert expected.keys() == found.keys()
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) == 0.0, killed.name
    bad = sorted(file.name for file in whole.glob("bad_samples*.jsonl"))
    assert bad and "missing" in (whole / bad[0]).read_text()
    for name in ("learning_curve.json", "checkpoint-8/progress.json", *bad):
        assert (killed / name).read_text() == (whole / name).read_text(), f"{killed.name}: {name}"
    for folder in (whole, killed):
        left = {path.name for path in folder.iterdir() if path.is_dir()}
        # One killed before it deleted the oldest leaves that to the next save, if there is one.
        assert {"checkpoint-6", "checkpoint-8"} <= left <= {"checkpoint-4", "checkpoint-6", "checkpoint-8"}
        assert not [path for path in folder.rglob("*") if path.name.endswith(".partial")]
    steps = [point["step"] for point in json.loads((killed / "learning_curve.json").read_text())["loss"]]
    assert steps == list(range(1, 9))


STREAM = {"streaming": True, "workers": 2}
MAP = {"streaming": False, "workers": 0}


@pytest.mark.slow
def test_two_kills_each_change_nothing(tmp_path):
    """In the first checkpoint and a later one; where one is replaced and where the model is saved at the end."""
    runs = {
        "stream": {**STREAM, "kills": [0]},
        "stream killed": {**STREAM, "kills": [100, 45, 0]},
        "map": {**MAP, "kills": [0]},
        "map killed": {**MAP, "kills": [190, 95, 0]},
    }
    _run(tmp_path, runs)
    for name in ("stream", "map"):
        _check_same(tmp_path / name, tmp_path / f"{name} killed")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("stream", "map"))
    assert any(not first[name].equal(second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("run", "num_points"), [(STREAM, 5), ({**MAP, "workers": 2}, 3)], ids=["stream", "map with workers"]
)
def test_kills_all_over_change_nothing(tmp_path, run, num_points):
    _run(tmp_path, {"whole": {**run, "kills": [0]}})
    acts = int((tmp_path / "whole.0.acts").read_text())
    runs = {}
    for first in range(1, acts, acts // num_points):
        runs[f"killed at {first}"] = {**run, "kills": [first, 1 + first * 7 % 55, 0]}
    _run(tmp_path, runs)
    for name in runs:
        _check_same(tmp_path / "whole", tmp_path / name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_of_either_process_of_two_changes_nothing(tmp_path):
    """The first writes nearly all, the second its random numbers; each dies while the other waits."""
    runs: dict[str, dict[str, Any]] = {}
    for kind, run in (("stream", STREAM), ("map", MAP)):
        runs[kind] = {**run, "two": True, "kills": [[0, 0]]}
        for number, kills in enumerate(([[1, 5], [0, 70]], [[0, 150], [1, 3]])):
            runs[f"{kind} {number}"] = {**run, "two": True, "kills": [*kills, [0, 0]]}
    _run(tmp_path, runs)
    for name in runs:
        if name not in ("stream", "map"):
            _check_same(tmp_path / name.split()[0], tmp_path / name)
