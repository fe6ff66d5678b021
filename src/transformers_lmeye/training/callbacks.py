"""The learning curve of a run, as numbers and as a picture."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import replacing


_LOSS = re.compile(r"loss|eval_(\w+_)?loss")


class LearningCurveCallback(TrainerCallback):
    """Writes the losses logged so far to `output_dir`, as numbers and as a picture."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if find_spec("matplotlib") is None:
            raise ImportError("The learning curve needs matplotlib: pip install 'transformers_lmeye[train]'.")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._write(args, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._write(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._write(args, state)

    @staticmethod
    def _write(args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero:
            write_learning_curve(state.log_history, args.output_dir)


def write_learning_curve(log_history: list[dict[str, float]], output_dir: str | Path) -> Path:
    """Writes `learning_curve.json` (steps, losses and learning rates) and `learning_curve.png`.

    Args:
        log_history: as `TrainerState` holds it. The loss of an evaluation set of its own name is `eval_NAME_loss`.
        output_dir: folder of both files; made where it is missing.

    Returns:
        `Path`: of the picture.
    """
    from matplotlib.figure import Figure  # an extra: needed for training alone

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    losses = [key for key in dict.fromkeys(key for entry in log_history for key in entry) if _LOSS.fullmatch(key)]
    curves = {}
    for key in (*losses, "learning_rate"):
        points = {entry["step"]: entry[key] for entry in log_history if key in entry}  # a step evaluated twice is one
        curves[key] = [{"step": step, key: value} for step, value in points.items()]
    text = json.dumps({key: points for key, points in curves.items() if points}, indent=1)
    with replacing(output_dir / "learning_curve.json") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")  # no pyplot: nothing global, no display
    axes = figure.add_subplot()
    for key in losses:
        name = key.removeprefix("eval_").removesuffix("loss").rstrip("_")
        label = "training" if key == "loss" else " ".join(["evaluation", name]).strip()
        axes.plot(
            [p["step"] for p in curves[key]],
            [p[key] for p in curves[key]],
            "-" if key == "loss" else "o--",
            label=label,
            linewidth=1.2,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    path = output_dir / "learning_curve.png"
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return path


__all__ = ["LearningCurveCallback", "write_learning_curve"]
