"""Is this loss curve a normal one? Compares a run with earlier runs of the same training.

    python examples/digits/curves.py --run new/learning_curve.json \\
        --references old/learning_curve.json older/learning_curve.json

A run is a mapping from steps to losses, such as `learning_curve.json` of the stage scripts holds. `quickstart.py`
compares its own with `reference_curve.json`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


NORMAL_DISTANCE = 2.0
"""How far from the mean of the earlier runs a normal run is at most, on average over its points, in spreads."""
NEIGHBOURS = 5
LEAST_SPREAD = 0.02


def smooth(losses: Sequence[float], window: int = 20, every: int = 10) -> dict[int, float]:
    """Points of a curve: at every `every`-th step from step `window` on, the mean over the last `window` steps.

    Args:
        losses: the loss of each step, the first is step 1.
    """
    return {step: float(np.mean(losses[step - window : step])) for step in range(window, len(losses) + 1, every)}


def build_reference(runs: Sequence[Mapping[int, float]]) -> dict[str, list[float]]:
    """What a normal run looks like, of two or more of them that differ in their seeds.

    Args:
        runs: loss by step, all at the same steps.

    Returns:
        `dict`: `"step"`, `"mean"` and `"spread"`, each one value per point. The spread is the standard deviation over
        runs (of a sample, n - 1), as root mean square over 5 neighbouring points, and at least 2% of the mean: few
        runs meet at some points by chance.

    Raises:
        ValueError: fewer than two runs, or at different steps.
    """
    if len(runs) < 2:
        raise ValueError(f"A spread takes two runs or more, not {len(runs)}.")
    steps = sorted(runs[0])
    for number, run in enumerate(runs):
        if sorted(run) != steps:
            raise ValueError(f"Run {number} has its points at other steps than run 0: compare runs of one recipe.")
    losses = np.array([[run[step] for step in steps] for run in runs])
    variances = losses.var(axis=0, ddof=1)
    near = [slice(max(i - NEIGHBOURS // 2, 0), i + NEIGHBOURS // 2 + 1) for i in range(len(steps))]
    mean = losses.mean(axis=0)
    spread = np.maximum([math.sqrt(variances[part].mean()) for part in near], LEAST_SPREAD * mean)
    return {"step": steps, "mean": mean.round(4).tolist(), "spread": spread.round(5).tolist()}


@dataclass(frozen=True)
class CurveDistance:
    """How far a curve is from a reference.

    Attributes:
        mean, largest: distance from the reference's mean over all points, in spreads.
        largest_step: where it is largest.
        mean_in_loss: mean distance in units of the loss; positive above the reference.
        num_points: how many points of the curve lie within the reference's steps.
    """

    mean: float
    largest: float
    largest_step: int
    mean_in_loss: float
    num_points: int

    @property
    def is_normal(self) -> bool:
        """Whether the mean distance is at most `NORMAL_DISTANCE`; a loss that is no number is not normal."""
        return self.mean <= NORMAL_DISTANCE

    def __str__(self) -> str:
        where = "above" if self.mean_in_loss > 0 else "below"
        verdict = "this is normal" if self.is_normal else "this is NOT normal"
        return (
            f"on average {self.mean:.1f} spreads from the reference ({abs(self.mean_in_loss):.3f} in loss, {where} "
            f"it), at most {self.largest:.1f} (step {self.largest_step}): {verdict}"
        )


def compare_curves(curve: Mapping[int, float], reference: Mapping[str, Sequence[float]]) -> CurveDistance:
    """
    Compares a run with what earlier runs of the same recipe looked like.

    Args:
        curve: loss by step, averaged over about as many steps as the reference's points are: single batches scatter
            more.
        reference: of [`build_reference`]; between its points mean and spread are interpolated.

    Raises:
        ValueError: the curve has no point within the reference's steps.
    """
    first, last = reference["step"][0], reference["step"][-1]
    steps = np.array(sorted(step for step in curve if first <= step <= last))
    if len(steps) == 0:
        raise ValueError(f"The curve has no point between step {first} and step {last}, where the reference lies.")
    mean, spread = (np.interp(steps, reference["step"], reference[name]) for name in ("mean", "spread"))
    above = np.array([curve[step] for step in steps]) - mean
    distances = np.abs(above) / spread
    largest = int(np.argmax(distances))  # the first that is no number, if there is one
    return CurveDistance(
        mean=float(distances.mean()),
        largest=float(distances[largest]),
        largest_step=int(steps[largest]),
        mean_in_loss=float(above.mean()),
        num_points=len(steps),
    )


def read_learning_curve(path: str | Path) -> dict[int, float]:
    """Training losses by step, of a `learning_curve.json` of the stage scripts."""
    return {point["step"]: point["loss"] for point in json.loads(Path(path).read_text())["loss"]}


def plot_curve(axes: Any, curve: Mapping[int, float], reference: Mapping[str, Sequence[float]]) -> None:
    """Draws a run over the band of normal ones, two spreads to either side, on matplotlib `axes`."""
    steps, mean, spread = (np.array(reference[name]) for name in ("step", "mean", "spread"))
    low = np.maximum(mean - NORMAL_DISTANCE * spread, 0)
    axes.fill_between(steps, low, mean + NORMAL_DISTANCE * spread, alpha=0.25, color="gray", linewidth=0)
    axes.plot(steps, mean, color="gray", linestyle="--", label="reference")
    axes.plot(sorted(curve), [curve[step] for step in sorted(curve)], label="this run")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


@dataclass
class Arguments:
    run: str = field(metadata={"help": "learning_curve.json of the run in question."})
    references: list[str] = field(metadata={"help": "learning_curve.json of two or more earlier runs."})


def main() -> None:
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    reference = build_reference([read_learning_curve(path) for path in args.references])
    print(compare_curves(read_learning_curve(args.run), reference))


if __name__ == "__main__":
    main()
