"""examples/digits/curves.py: a normal run is told from one that is not."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


pytestmark = pytest.mark.filterwarnings("error")

DIGITS_FOLDER = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def curves():
    """examples/digits/curves.py as a module."""
    previous = sys.modules.pop("curves", None)
    sys.path.insert(0, str(DIGITS_FOLDER))
    try:
        yield importlib.import_module("curves")
    finally:
        sys.path.remove(str(DIGITS_FOLDER))
        sys.modules.pop("curves", None)
        if previous is not None:
            sys.modules["curves"] = previous


def a_run(seed, offset=0.0, steps=range(10, 210, 10)):
    """Falls from 2 to 0.5, with noise of 0.1."""
    rng = np.random.default_rng(seed)
    return {step: 0.5 + 1.5 * np.exp(-step / 60) + offset + 0.1 * rng.standard_normal() for step in steps}


def test_points_are_means_over_the_last_steps(curves):
    assert curves.smooth([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], window=2, every=2) == {2: 1.5, 4: 3.5, 6: 5.5}
    assert list(curves.smooth([0.0] * 150)) == list(range(20, 151, 10))
    assert curves.smooth([0.0] * 19) == {}


def test_mean_and_spread_of_runs(curves):
    runs = [{10: 1.0, 20: 4.0}, {10: 2.0, 20: 4.0}, {10: 3.0, 20: 4.0}]
    reference = curves.build_reference(runs)
    # standard deviations 1 and 0, root mean square of both
    assert reference == {"step": [10, 20], "mean": [2.0, 4.0], "spread": [0.70711, 0.70711]}
    same = curves.build_reference([{1: 0.5}, {1: 0.5}])
    assert same["spread"] == [0.01]  # 2% of the mean


def test_neighbours_lend_their_spread(curves):
    """Five points: two on either side, fewer at the ends."""
    runs = [dict.fromkeys(range(7), 1.0), {**dict.fromkeys(range(7), 1.0), 0: 2.0}]
    variance = 0.5
    expected = [(variance / 3) ** 0.5, (variance / 4) ** 0.5, (variance / 5) ** 0.5, 0.02, 0.02, 0.02, 0.02]
    assert curves.build_reference(runs)["spread"] == pytest.approx([expected[0], *expected[1:]], abs=1e-4)


def test_distance_by_hand(curves):
    reference = {"step": [10, 20, 40], "mean": [2.0, 1.0, 0.5], "spread": [0.5, 0.1, 0.1]}
    distance = curves.compare_curves({5: 9.0, 10: 2.5, 20: 0.9, 30: 1.05, 50: 9.0}, reference)
    # distances 1, 1 and (1.05 - 0.75) / 0.1 = 3; steps 5 and 50 are outside
    assert distance.num_points == 3 and distance.largest_step == 30
    assert (distance.mean, distance.largest) == pytest.approx((5 / 3, 3.0))
    assert distance.mean_in_loss == pytest.approx((0.5 - 0.1 + 0.3) / 3)
    assert distance.is_normal
    assert str(distance) == (
        "on average 1.7 spreads from the reference (0.233 in loss, above it), at most 3.0 (step 30): this is normal"
    )


def test_other_runs_of_the_recipe_are_normal_and_shifted_ones_are_not(curves):
    reference = curves.build_reference([a_run(seed) for seed in range(3)])
    for seed in range(10, 20):
        assert curves.compare_curves(a_run(seed), reference).is_normal
        above, below = (curves.compare_curves(a_run(seed, offset), reference) for offset in (0.4, -0.4))
        assert not above.is_normal and above.mean_in_loss > 0.3 and "NOT normal" in str(above)
        assert not below.is_normal and "below it" in str(below)


def test_a_loss_that_is_no_number_is_not_normal(curves):
    reference = curves.build_reference([a_run(seed) for seed in range(3)])
    broken = {**a_run(4), 120: float("nan")}
    distance = curves.compare_curves(broken, reference)
    assert not distance.is_normal and distance.largest_step == 120


def test_what_cannot_be_compared(curves):
    with pytest.raises(ValueError, match="two runs or more, not 1"):
        curves.build_reference([a_run(0)])
    with pytest.raises(ValueError, match="Run 1 has its points at other steps"):
        curves.build_reference([a_run(0), a_run(1, steps=range(10, 110, 10))])
    reference = curves.build_reference([a_run(0), a_run(1)])
    with pytest.raises(ValueError, match="no point between step 10 and step 200"):
        curves.compare_curves({300: 1.0}, reference)


def test_command(tmp_path):
    """Reads what the stage scripts write."""
    for name, run in (("a", a_run(0)), ("b", a_run(1)), ("new", a_run(2, offset=3.0))):
        points = {"loss": [{"step": step, "loss": loss} for step, loss in run.items()], "eval_loss": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(points))
    result = subprocess.run(
        [sys.executable, DIGITS_FOLDER / "curves.py", "--run", "new.json", "--references", "a.json", "b.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "above it" in result.stdout and "NOT normal" in result.stdout


def test_stored_reference(curves):
    stored = json.loads((DIGITS_FOLDER / "reference_curve.json").read_text())
    assert stored["seeds"] == [0, 1, 2]
    assert {name: points["step"][-1] for name, points in stored["stages"].items()} == {
        "stage 1: captions": 150,
        "stage 2: questions": 1200,
    }
    for points in stored["stages"].values():
        assert len(points["step"]) == len(points["mean"]) == len(points["spread"])
        mean = dict(zip(points["step"], points["mean"], strict=True))
        assert curves.compare_curves(mean, points).mean == 0
        # learning that never sets in
        assert not curves.compare_curves(dict.fromkeys(mean, points["mean"][0]), points).is_normal
