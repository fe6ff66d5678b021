"""The Transformers `Trainer` for a model of which a small part trains."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import CONFIG_NAME

from ..modeling.backbones import ADAPTER_FOLDER, restore_adapter


class LMEyeTrainer(Trainer):
    """
    `Trainer` whose checkpoints hold the IPN alone and whose losses are means over target tokens.

    Call `model.freeze_for_stage` first: what it leaves trainable is what is trained. A checkpoint holds the IPN and
    the state of optimizer, schedule and random numbers, megabytes whatever the language model; it is whole only where
    the backbones have no source to be loaded from again. A PEFT adapter of the language model is saved with the IPN
    and restored with it.

    Training and evaluation loss are sums over all target tokens divided by their number, across gradient accumulation,
    batches and processes: a short answer counts as many tokens as it has. The learning curve is written to
    `output_dir` as `learning_curve.json` and `learning_curve.png` with every checkpoint, evaluation and at the end.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The Trainer leaves this field on the configuration, which has none of its own, and it would be saved.
        vars(self.model.config).pop("use_cache", None)
        self.add_callback(LearningCurveCallback())
        self._evaluated = [0.0, 0.0]  # summed loss and number of the target tokens evaluated

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        # Samples are made for the collator; the model's signature says nothing about their keys.
        return data_collator

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if torch.is_grad_enabled() and not loss.requires_grad:
            # A batch of words alone reaches no trained parameter: its gradient is zero, not an error.
            loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        count = self._get_num_items_in_batch([inputs], self.args.device)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None:
            self._evaluated[0] += float(loss) * int(count)
            self._evaluated[1] += int(count)
        return loss, logits, labels

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._evaluated = [0.0, 0.0]
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        evaluated = torch.tensor(self._evaluated, device=self.args.device)
        total, count = self.accelerator.reduce(evaluated, reduction="sum").tolist()
        if count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(output_dir, state_dict=state_dict, save_backbones=model.config.backbones is None)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / CONFIG_NAME
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        backbones = self.accelerator.unwrap_model(self.model).config.backbones or {}
        for role, source in (config.get("backbones") or {}).items():
            if role in backbones and backbones[role]["fingerprint"] != source["fingerprint"]:
                raise ValueError(
                    f"{resume_from_checkpoint} was trained with another {role} model, {source['name_or_path']}, than "
                    f"{backbones[role]['name_or_path']}: resume with the one it was trained with."
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restore_adapter(self.state.best_model_checkpoint)

    def _restore_adapter(self, checkpoint: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # their own files hold every parameter
        language_model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).language_model
        folder = Path(checkpoint) / ADAPTER_FOLDER
        saved, attached = folder.is_dir(), bool(getattr(language_model, "peft_config", None))
        if saved and not attached:
            raise ValueError(
                f"{checkpoint} holds an adapter of the language model, and the model has none: attach one of the same "
                "configuration with peft.get_peft_model."
            )
        if attached and not saved:
            raise ValueError(
                f"{checkpoint} holds no adapter of the language model, and the model has one: resume without it, or "
                "load the checkpoint with from_pretrained, attach the adapter and start anew."
            )
        if attached:
            restore_adapter(language_model, folder)

    def _issue_warnings_after_load(self, load_result) -> None:
        # An IPN-only checkpoint lacks the backbones, which came from their own source. It may lack nothing else.
        model = self.accelerator.unwrap_model(self.model)
        frozen = {id(parameter) for backbone in model.backbones() for parameter in backbone.parameters()}
        own = {name for name, parameter in model.named_parameters() if id(parameter) not in frozen}
        missing = sorted(own.intersection(load_result.missing_keys))
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint does not fit the model. It lacks: {', '.join(missing) or 'nothing'}. "
                f"It alone has: {', '.join(load_result.unexpected_keys) or 'nothing'}."
            )


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
    """Writes `learning_curve.json` (steps and losses) and `learning_curve.png`.

    Args:
        log_history: as `TrainerState` holds it.
        output_dir: folder of both files; made where it is missing.

    Returns:
        `Path`: of the picture.
    """
    from matplotlib.figure import Figure  # an extra: needed for training alone

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    curves = {}
    for key in ("loss", "eval_loss", "learning_rate"):
        points = {entry["step"]: entry[key] for entry in log_history if key in entry}  # a step evaluated twice is one
        curves[key] = [{"step": step, key: value} for step, value in points.items()]
    text = json.dumps({key: points for key, points in curves.items() if points}, indent=1)
    (output_dir / "learning_curve.json").write_text(text + "\n", encoding="utf-8")
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")  # no pyplot: nothing global, no display
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o--")):
        if curves[key]:
            axes.plot(
                [p["step"] for p in curves[key]], [p[key] for p in curves[key]], style, label=label, linewidth=1.2
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per target token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    path = output_dir / "learning_curve.png"
    figure.savefig(path, dpi=150)
    return path


__all__ = ["LMEyeTrainer", "LearningCurveCallback", "write_learning_curve"]
