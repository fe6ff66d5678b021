"""Preference training against hallucination with TRL's DPOTrainer: true captions before swapped ones (docs/trl.md).

The IPN alone trains, and the reference shares the backbones with it: one language model lies in memory, not two.
CLIP ViT-L/14 and OPT-IML-1.3B on a GPU, after stage 2, on pairs of `build_preferences.py`:

    python examples/run_dpo.py \
        --model_name_or_path outputs/opt-instruct \
        --dtype bfloat16 --bf16 --dataloader_num_workers 8 \
        --dataset_name_or_path preferences.jsonl --image_folder coco/train2017 \
        --output_dir outputs/opt-dpo

The digits world, after its stage 2:

    python examples/digits/preferences.py --output_dir outputs/preferences --num_scenes 1600
    python examples/digits/preferences.py --output_dir outputs/preferences-test --num_scenes 300 --split test
    python examples/run_dpo.py \
        --model_name_or_path outputs/digits-instruct \
        --dataset_name_or_path outputs/preferences/preferences.jsonl \
        --eval_dataset_name_or_path outputs/preferences-test/preferences.jsonl \
        --max_steps 100 --gradient_accumulation_steps 1 --learning_rate 1e-3 \
        --output_dir outputs/digits-dpo
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from transformers_lmeye.data import load_rows, open_image
from transformers_lmeye.data.images import DEFAULT_MAX_PIXELS
from transformers_lmeye.training import LearningCurveCallback, ModelArguments, load_model, train_and_save
from transformers_lmeye.training.ipn_checkpoints import IPNCheckpointMixin
from transformers_lmeye.training.trl import as_trl_preferences, check_trl_head, reference_model


class IPNDPOTrainer(IPNCheckpointMixin, DPOTrainer):
    """TRL's trainer with checkpoints that hold the IPN alone."""

    def count_preferred(self, dataset: Dataset) -> dict[str, float]:
        """
        How the model as it is now, without its reference, ranks the pairs of a data set.

        Returns:
            `accuracy`: share of the pairs whose true side is the likelier; `margin`: mean difference of their
            log-probabilities, in nats; `pairs`: their number.
        """
        self.model.eval()
        margins = []
        for inputs in self.get_eval_dataloader(dataset):
            true, swapped = self.compute_ref_log_probs(self.model, self._prepare_inputs(inputs))
            margins.append(self.accelerator.gather_for_metrics((true - swapped).float()).cpu())
        margins = torch.cat(margins)
        return {
            "accuracy": float((margins > 0).double().mean()),
            "margin": float(margins.mean()),
            "pairs": len(margins),
        }


@dataclass
class PreferenceDataArguments:
    dataset_name_or_path: str = field(metadata={"help": "Rows of pictures, prompt, chosen and rejected."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name_or_path: str | None = field(default=None, metadata={"help": "Held-out pairs in other files."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of held-out pairs."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative image paths start; without it the folder of the data file."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the picture or pictures."})
    max_pixels: int = field(default=DEFAULT_MAX_PIXELS, metadata={"help": "A larger picture stops the run."})

    def pairs(self, name_or_path: str, split: str) -> Dataset:
        """The pairs of one split."""
        rows = load_rows(name_or_path, self.dataset_config_name, split)
        folder = self.image_folder
        if folder is None and Path(name_or_path).is_file():
            folder = Path(name_or_path).parent
        opened = partial(open_image, image_folder=folder, max_pixels=self.max_pixels)
        return as_trl_preferences(rows, self.image_column, opened)

    def eval_pairs(self) -> Dataset | None:
        """The held-out pairs, if the arguments name any."""
        if self.eval_dataset_name_or_path is None and self.eval_split is None:
            return None
        return self.pairs(self.eval_dataset_name_or_path or self.dataset_name_or_path, self.eval_split or "train")


@dataclass
class DPOArguments(DPOConfig):
    """`DPOConfig` with defaults for an IPN, which stands higher rates than a language model."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Highest learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs per device and forward pass."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Forward passes per optimizer step."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the loss of the first step, too."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the oldest are deleted."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 by autocast, where TRL's default is to."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of --activation_checkpointing, which is off here and on in TRL."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Longest prompt and answer in tokens."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are made as they are read: leave off."})
    trust_remote_code: bool = field(default=False, init=False)  # as ModelArguments has it

    def __post_init__(self) -> None:
        super().__post_init__()
        # Pinned memory is for copies to an accelerator; without one the data loader warns of it.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


def main() -> None:
    parser = HfArgumentParser((ModelArguments, PreferenceDataArguments, DPOArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    model, processor = load_model(model_args, training_args.seed)
    num_trained = model.freeze_for_stage("instruct")
    if training_args.should_log:
        print(f"DPO trains {num_trained:,} of {model.num_parameters():,} parameters.")
    trainer = IPNDPOTrainer(
        model,
        reference_model(model),
        training_args,
        train_dataset=data_args.pairs(data_args.dataset_name_or_path, data_args.train_split),
        eval_dataset=data_args.eval_pairs(),
        processing_class=processor,
        callbacks=[LearningCurveCallback()],
    )
    check_trl_head(model)
    held_out = trainer.eval_dataset
    results = {}
    if held_out is not None:
        results["before"] = trainer.count_preferred(held_out)
    train_and_save(trainer)
    if held_out is not None:
        results["after"] = trainer.count_preferred(held_out)
        for when, found in results.items():
            trainer.log_metrics(f"preferred_{when}", found)
        if trainer.is_world_process_zero():
            file = Path(training_args.output_dir) / "preferred.json"
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
