"""Checkpoints that hold the IPN alone, for any trainer."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import CONFIG_NAME

from ..modeling.backbones import ADAPTER_FOLDER, restore_adapter


class IPNCheckpointMixin:
    """
    Put before a `Trainer` class, of Transformers or of TRL, makes its checkpoints hold the IPN alone.

    A checkpoint is whole only where the backbones have no source to be loaded from again. A PEFT adapter of the
    language model is saved with the IPN and restored with it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The Trainer leaves this field on the configuration, which has none of its own, and it would be saved.
        vars(self.accelerator.unwrap_model(self.model).config).pop("use_cache", None)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            self._save_files(Path(output_dir if output_dir is not None else self.args.output_dir), state_dict)

    def _save_files(self, folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(folder, state_dict=state_dict, save_backbones=model.config.backbones is None)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_backbones(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore_adapter(resume_from_checkpoint)

    def _check_backbones(self, checkpoint: str) -> None:
        file = Path(checkpoint) / CONFIG_NAME
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        backbones = self.accelerator.unwrap_model(self.model).config.backbones or {}
        for role, source in (config.get("backbones") or {}).items():
            if role in backbones and backbones[role]["fingerprint"] != source["fingerprint"]:
                raise ValueError(
                    f"{checkpoint} was trained with another {role} model, {source['name_or_path']}, than "
                    f"{backbones[role]['name_or_path']}: resume with the one it was trained with."
                )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restore_adapter(self.state.best_model_checkpoint)

    def _restore_adapter(self, checkpoint: str) -> None:
        if self.is_deepspeed_enabled:
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


__all__ = ["IPNCheckpointMixin"]
