"""Arguments of the training scripts. The defaults are the paper's recipe (arXiv 2305.03701, section 4)."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import TrainingArguments

from ..data.datasets import MixedDataset, MixedStream, SampleDataset, SampleStream, mix_texts
from ..data.features import FeatureCache
from ..data.images import DEFAULT_MAX_PIXELS, open_image
from ..data.rows import image_folder_of, load_rows
from ..data.samples import ConversationReader, PairReader
from ..modeling.modeling_lmeye import LMEyeForConditionalGeneration
from ..processing.processing_lmeye import LMEyeProcessor


OpenImage = Callable[..., Any]
"""Gives the picture of a value, or its features, as `data.open_image` and `data.FeatureCache` do."""


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
    visual_mapping: Literal["linear", "patch", "qformer", "resampler"] = field(
        default="linear", metadata={"help": "Static mapping of a new model (LMEyeConfig.visual_mapping)."}
    )
    num_static_tokens: int | None = field(
        default=None,
        metadata={"help": "<img> slots per image of a new model; by default 1, a Q-Former's queries, or every patch."},
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
    quantization_config: str | None = field(
        default=None,
        metadata={
            "help": "Quantise the frozen language model, the IPN apart: fields of a configuration of Transformers' as "
            """JSON, e.g. '{"load_in_4bit": true, "bnb_4bit_compute_dtype": "bfloat16"}' for bitsandbytes."""
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the backbones."})

    def loading_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`. Raises `ValueError` where `quantization_config` is no JSON object."""
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.quantization_config is not None:
            options["quantization_config"] = _json_object("quantization_config", self.quantization_config)
        return options

    def config_fields(self) -> dict[str, Any]:
        """The `LMEyeConfig` fields of a new model. Raises `ValueError` where `config_overrides` is no JSON object."""
        overrides = _json_object("config_overrides", self.config_overrides) if self.config_overrides else {}
        return {
            "interaction": self.interaction,
            "visual_mapping": self.visual_mapping,
            "num_static_tokens": self.num_static_tokens,
            "num_dynamic_tokens": self.num_dynamic_tokens,
            "num_request_rounds": self.num_request_rounds,
            **overrides,
        }


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, not {text!r}.")
    return value


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
    max_pixels: int = field(
        default=DEFAULT_MAX_PIXELS,
        metadata={"help": "A picture of more pixels is not decoded, and counts as a bad sample."},
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of examples/extract_features.py, whose features stand in for pictures."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the training data as a stream: no index, no copy; needs --max_steps."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Rows of a stream that are shuffled together, in each worker."}
    )
    text_dataset_name_or_path: str | None = field(
        default=None, metadata={"help": "Data without pictures that is mixed in, read by the same columns."}
    )
    text_split: str = field(default="train", metadata={"help": "Split of the data without pictures."})
    text_eval_split: str | None = field(
        default=None, metadata={"help": "Split of it to evaluate on: its loss is logged as eval_text_loss."}
    )
    text_rate: float = field(default=0.1, metadata={"help": "Share of the samples that are without pictures."})

    def open_features(
        self,
        model: LMEyeForConditionalGeneration,
        processor: LMEyeProcessor,
        stage: Literal["pretrain", "instruct"] | None = None,
    ) -> FeatureCache | None:
        """The cache of features that stand in for pictures, if the arguments name one. See `FeatureCache.open`."""
        if self.feature_cache is None:
            return None
        return FeatureCache.open(self.feature_cache, model, processor, self.image_root(), stage)

    def reader(
        self, features: OpenImage | None = None, evaluation: bool = False, words_alone: bool = False
    ) -> PairReader | ConversationReader:
        """What reads the training or evaluation rows, or those without pictures.

        `features`, such as a `FeatureCache`, is called in place of `open_image`: with a picture's value and
        `image_folder`.
        """
        image_folder = self.image_folder_of(evaluation)
        opened = partial(open_image, image_folder=image_folder, max_pixels=self.max_pixels)
        if features is not None:
            opened = partial(features, image_folder=image_folder)
        return self._reader(words_alone, image_column=self.image_column, lists=self.lists, open_image=opened)

    def _reader(self, words_alone: bool, **options: Any) -> PairReader | ConversationReader:
        raise NotImplementedError

    def train_dataset(
        self, seed: int, features: OpenImage | None = None
    ) -> SampleDataset | SampleStream | MixedDataset | MixedStream:
        """The samples to train on, bad ones named in their places, those without pictures mixed in."""

        def samples(words_alone: bool, *source: str | None) -> SampleDataset | SampleStream:
            rows = load_rows(*source, streaming=self.streaming)
            reader = self.reader(features, words_alone=words_alone)
            row_name = "text row" if words_alone else "row"
            if self.streaming:
                return SampleStream(rows, reader, shuffle_buffer=self.shuffle_buffer, seed=seed, row_name=row_name)
            return SampleDataset(rows, reader, skip_bad_samples=True, row_name=row_name)

        data = samples(False, self.dataset_name_or_path, self.dataset_config_name, self.train_split)
        if self.text_dataset_name_or_path is None:
            return data
        return mix_texts(data, samples(True, self.text_dataset_name_or_path, None, self.text_split), self.text_rate)

    def eval_dataset(self, features: OpenImage | None = None) -> SampleDataset | dict[str, SampleDataset] | None:
        """The samples to evaluate on, if the arguments name any; with `text_eval_split` those without pictures
        under `"text"` beside them. Never a stream."""
        rows = self.eval_rows()
        parts = {} if rows is None else {"": rows}
        if self.text_eval_split is not None:
            if self.text_dataset_name_or_path is None:
                raise ValueError("--text_eval_split is a split of --text_dataset_name_or_path: name that, too.")
            parts["text"] = load_rows(self.text_dataset_name_or_path, split=self.text_eval_split)
        samples = {
            name: SampleDataset(
                rows,
                self.reader(features, evaluation=True, words_alone=name == "text"),
                skip_bad_samples=True,
                row_name=f"{name} row".strip(),
            )
            for name, rows in parts.items()
        }
        return samples.get("") if set(samples) <= {""} else samples

    def eval_rows(self) -> datasets.Dataset | None:
        """The rows to evaluate on, if the arguments name any."""
        if self.eval_dataset_name_or_path is not None:
            return load_rows(self.eval_dataset_name_or_path, split=self.eval_split or "train")
        if self.eval_split is not None:
            return load_rows(self.dataset_name_or_path, self.dataset_config_name, self.eval_split)
        return None

    def image_root(self) -> Path | None:
        """What the paths of a feature cache are relative to: the image folder, or the folder that is the data set."""
        folder = Path(self.dataset_name_or_path)
        return self.image_folder_of() or (folder if folder.is_dir() else None)

    def image_folder_of(self, evaluation: bool = False) -> Path | None:
        """Where relative image paths of the training or evaluation rows start."""
        if self.image_folder is not None:
            return Path(self.image_folder)
        return image_folder_of((evaluation and self.eval_dataset_name_or_path) or self.dataset_name_or_path)


@dataclass
class PairDataArguments(DataArguments):
    """Pairs of image and caption, for stage 1."""

    caption_column: str = field(default="caption", metadata={"help": "Column of the caption or captions."})

    def _reader(self, words_alone: bool, **options: Any) -> PairReader:
        if words_alone:
            options["image_column"] = None
        return PairReader(caption_column=self.caption_column, **options)


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

    def _reader(self, words_alone: bool, **options: Any) -> ConversationReader:
        return ConversationReader(
            messages_column=self.messages_column,
            question_column=self.question_column,
            answer_column=self.answer_column,
            instruction=None if words_alone else self.instruction,
            **options,
        )


@dataclass
class StageTwoArguments:
    """What stage 2 alone can be told."""

    standardize_requests: int = field(
        default=0,
        metadata={
            "help": "Start the request projection on mean and deviation of this many samples' requests (0: not at "
            "all). A few hundred spare a new IPN the plateau at the start."
        },
    )
    train_static_mapping: bool = field(
        default=False,
        metadata={"help": "Train the static mapping on the conversations in place of the rest of the IPN."},
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
    max_bad_fraction: float = field(
        default=0.01,
        metadata={
            "help": "Share of the samples read (at least of the first 1,000, or of all) that may be bad before "
            "training stops; each is named in bad_samples.jsonl. 0: the first one stops it."
        },
    )
    num_generated_samples: int = field(
        default=4, metadata={"help": "Answers to evaluation samples that are generated and logged at each evaluation."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Pinned memory is for copies to an accelerator; without one the data loader warns of it.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
