"""Stage 2 with TRL's SFTTrainer in place of ours: the same data, the same steps, the same result (docs/trl.md).

Arguments are those of `run_instruct.py` and TRL's `SFTConfig`. CLIP ViT-L/14 and OPT-IML-1.3B on a GPU, after stage 1:

    python examples/run_sft_trl.py \
        --model_name_or_path outputs/opt-pretrain \
        --dtype bfloat16 --bf16 --dataloader_num_workers 8 \
        --dataset_name_or_path llava_instruct_150k.json --image_folder coco/train2017 \
        --output_dir outputs/opt-sft

The digits world, after its stage 1:

    python examples/run_sft_trl.py \
        --model_name_or_path outputs/digits-pretrain \
        --dataset_name_or_path outputs/scenes/conversations.jsonl \
        --per_device_train_batch_size 64 --gradient_accumulation_steps 1 --learning_rate 1e-3 \
        --output_dir outputs/digits-sft
"""

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from transformers_lmeye.training import (
    ConversationCollator,
    ConversationDataArguments,
    LearningCurveCallback,
    ModelArguments,
    collect_requests,
    load_model,
    standardize_requests,
    train_and_save,
)
from transformers_lmeye.training.ipn_checkpoints import IPNCheckpointMixin
from transformers_lmeye.training.trl import as_trl_dataset, check_trl_head


class IPNSFTTrainer(IPNCheckpointMixin, SFTTrainer):
    """TRL's trainer with checkpoints that hold the IPN alone."""


@dataclass
class SFTArguments(SFTConfig):
    """`SFTConfig` with the defaults of `run_instruct.py`, the paper's recipe."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay; biases have none."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Samples per device and forward pass."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Forward passes per optimizer step."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the loss of the first step, too."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the oldest are deleted."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 by autocast, where TRL's default is to."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of --activation_checkpointing, which is off here and on in TRL."}
    )
    assistant_only_loss: bool = field(default=True, metadata={"help": "Only answers are targets: leave it on."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are made as they are read: leave off."})
    max_length: int | None = field(default=None, init=False)  # as ConversationDataArguments has it
    trust_remote_code: bool = field(default=False, init=False)  # as ModelArguments has it
    standardize_requests: int = field(
        default=0,
        metadata={"help": "Start the request projection on mean and deviation of this many samples' requests."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Pinned memory is for copies to an accelerator; without one the data loader warns of it.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


def main() -> None:
    parser = HfArgumentParser((ModelArguments, ConversationDataArguments, SFTArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    training_args.max_length = data_args.max_length
    if data_args.streaming or data_args.feature_cache is not None:
        raise ValueError("TRL's trainer takes neither --streaming nor --feature_cache here: use run_instruct.py.")

    model, processor = load_model(model_args, training_args.seed)
    num_trained = model.freeze_for_stage("instruct")
    if training_args.should_log:
        print(f"Stage 2 trains {num_trained:,} of {model.num_parameters():,} parameters.")

    samples, eval_samples = data_args.train_dataset(training_args.seed), data_args.eval_dataset()
    if isinstance(eval_samples, dict):  # the samples without pictures apart
        eval_samples = {name or "images": as_trl_dataset(part) for name, part in eval_samples.items()}
    elif eval_samples is not None:
        eval_samples = as_trl_dataset(eval_samples)
    if training_args.standardize_requests and not training_args.resume_from_checkpoint:
        collator = ConversationCollator(processor)
        requests = collect_requests(model, collator, samples, training_args.standardize_requests)
        standardize_requests(model.ipn, requests)
    trainer = IPNSFTTrainer(
        model,
        training_args,
        train_dataset=as_trl_dataset(samples),
        eval_dataset=eval_samples,
        processing_class=processor,
        callbacks=[LearningCurveCallback()],
    )
    check_trl_head(model)
    train_and_save(trainer)


if __name__ == "__main__":
    main()
