"""Arguments of the training scripts. The defaults are the paper's recipe (arXiv 2305.03701, section 4)."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import TrainingArguments

from ..data import load_rows


@dataclass
class ModelArguments:
    """Which model is trained: two frozen backbones and a new IPN between them, or a checkpoint."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "LMEye checkpoint to go on from, whole or IPN-only. Without it a new IPN is made."},
    )
    vision_model_name_or_path: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={
            "help": "Vision model of a new model, such as CLIP, SigLIP or BLIP-2: hub id, folder, open_clip name."
        },
    )
    language_model_name_or_path: str = field(
        default="facebook/opt-iml-1.3b",
        metadata={
            "help": "Language model of a new model, causal or encoder-decoder, or a BLIP-2's: hub id or folder."
        },
    )
    clip_text_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "CLIP whose text encoder clip_text uses in a new model; by default the vision model's own."},
    )
    interaction: Literal["clip_text", "cross_attention", "none"] = field(
        default="clip_text", metadata={"help": "How a new model answers requests (LMEyeConfig.interaction)."}
    )
    visual_mapping: Literal["linear", "qformer", "resampler"] = field(
        default="linear", metadata={"help": "Static mapping of a new model (LMEyeConfig.visual_mapping)."}
    )
    num_static_tokens: int | None = field(
        default=None, metadata={"help": "<img> slots per image of a new model; by default 1, and 32 with a Q-Former."}
    )
    num_dynamic_tokens: int = field(
        default=5, metadata={"help": "<img-d> slots per request of a new model (the paper: 5, with OPT-IML 1)."}
    )
    num_request_rounds: int = field(default=1, metadata={"help": "Requests a question asks one after another."})
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": """Other LMEyeConfig fields of a new model as JSON, e.g. '{"interaction_num_layers": 2}'."""
        },
    )
    add_bos: bool = field(default=False, metadata={"help": "Begin sequences with the language model's bos (LLaMA)."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "dtype of the frozen backbones; the IPN trains in float32."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of both backbones: eager, sdpa, flash_attention_2, ..."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the backbones."})

    def config_fields(self) -> dict[str, Any]:
        """The `LMEyeConfig` fields of a new model. Raises `ValueError` where `config_overrides` is no JSON object."""
        overrides = json.loads(self.config_overrides) if self.config_overrides else {}
        if not isinstance(overrides, dict):
            raise ValueError(f"config_overrides must be a JSON object, not {self.config_overrides!r}.")
        return {
            "interaction": self.interaction,
            "visual_mapping": self.visual_mapping,
            "num_static_tokens": self.num_static_tokens,
            "num_dynamic_tokens": self.num_dynamic_tokens,
            "num_request_rounds": self.num_request_rounds,
            **overrides,
        }


@dataclass
class DataArguments:
    """Which data both stages read. See docs/own-data.md for the forms of rows."""

    dataset_name_or_path: str = field(
        metadata={"help": "Hub id, JSON(L) / CSV / Parquet file or pattern, save_to_disk folder, or picture folder."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": 'Split to train on; slices work: "train[:1000]".'})
    eval_dataset_name_or_path: str | None = field(
        default=None, metadata={"help": "Data set to evaluate on, where it is another one."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": 'Split to evaluate on ("train" of another data set); none without either.'}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative image paths start; without it the folder of the data file."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the picture or pictures."})
    lists: Literal["all", "first"] = field(
        default="all",
        metadata={"help": "What a list of captions (or answers) stands for: a sample each, or its first alone."},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest sample in tokens; longer ones are cut at the end, never in a slot."}
    )

    def train_rows(self) -> datasets.Dataset:
        """The rows to train on."""
        return load_rows(self.dataset_name_or_path, self.dataset_config_name, self.train_split)

    def eval_rows(self) -> datasets.Dataset | None:
        """The rows to evaluate on, if the arguments name any."""
        if self.eval_dataset_name_or_path is not None:
            return load_rows(self.eval_dataset_name_or_path, split=self.eval_split or "train")
        if self.eval_split is not None:
            return load_rows(self.dataset_name_or_path, self.dataset_config_name, self.eval_split)
        return None

    def image_folder_of(self, evaluation: bool = False) -> Path | None:
        """Where relative image paths of the training or evaluation rows start."""
        if self.image_folder is not None:
            return Path(self.image_folder)
        file = Path((evaluation and self.eval_dataset_name_or_path) or self.dataset_name_or_path)
        return file.parent if file.is_file() else None


@dataclass
class PairDataArguments(DataArguments):
    """Pairs of image and caption, for stage 1."""

    caption_column: str = field(default="caption", metadata={"help": "Column of the caption or captions."})


@dataclass
class ConversationDataArguments(DataArguments):
    """Conversations about images, for stage 2."""

    messages_column: str = field(default="messages", metadata={"help": "Column of chat messages."})
    question_column: str = field(default="question", metadata={"help": "Column of single questions."})
    answer_column: str = field(default="answer", metadata={"help": "Column of their answers."})
    instruction: str | None = field(
        default=None,
        metadata={"help": "The same question about every picture; --answer_column may then hold captions."},
    )


@dataclass
class StageTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's recipe as defaults: AdamW, learning rate 1e-4, cosine, batch 256.

    The batch is `per_device_train_batch_size` x `gradient_accumulation_steps` x number of processes: on 8 GPUs set
    `--gradient_accumulation_steps 1`.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay; biases have none."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Samples per device and forward pass."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Forward passes per optimizer step."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two points of the curve."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the loss of the first step, too."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the oldest are deleted."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # Pinned memory is for copies to an accelerator; without one the data loader warns of it.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
