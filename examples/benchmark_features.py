"""What a feature cache saves: training from pictures against training from their features, in turns in one process.

    python examples/benchmark_features.py \
        --dataset_name_or_path photos.jsonl --image_column file --caption_column captions

A sample's way is timed whole, from its row to the optimizer step, on one process without data loader workers; and the
model's part of it alone (forward, backward, AdamW), which is what is left where workers open pictures fast enough.
Stage 2 asks one question of every picture, its caption the answer. Both sides train the same weights on the same
samples and take turns; a ratio is the median over the rounds, with an interval that holds it with 95% probability.

The default vision tower is a CLIP of ViT-B/16's size with random weights (they do not change times), the default
language model that of examples/digits.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from benchmark import median_with_interval
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, HfArgumentParser

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.data import ConversationReader, PairReader, SampleDataset, load_rows
from transformers_lmeye.data.feature_extraction import PictureSource, extract_features, load_vision_encoder
from transformers_lmeye.data.features import FeatureCache
from transformers_lmeye.training import ConversationCollator, PairCollator, PairDataArguments


@dataclass
class BenchmarkArguments:
    vision_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Vision model; by default a random CLIP of ViT-B/16's size."}
    )
    language_model_name_or_path: str = field(
        default=str(Path(__file__).parent / "digits" / "backbones" / "language_model"),
        metadata={"help": "Language model."},
    )
    interaction: str = field(default="cross_attention", metadata={"help": "clip_text or cross_attention."})
    batch_size: int = field(
        default=8, metadata={"help": "Samples of a training step, pictures of an extraction step."}
    )
    rounds: int = field(default=12, metadata={"help": "Training steps of each side in each stage."})
    storage_dtype: str = field(default="bfloat16", metadata={"help": "dtype of the features on disk."})
    device: str = "cpu"


def save_vit_b16(folder: Path) -> str:
    """A CLIP with the vision tower of ViT-B/16, random weights and a small text encoder, in the hub's format."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"image_size": 224, "patch_size": 16}
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=512)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return str(folder)


def timed(function: Callable[[], object], device: str) -> tuple[float, object]:
    """Seconds of a call, and what it returned."""
    began = time.perf_counter()
    result = function()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began, result


def compare(
    arguments: BenchmarkArguments,
    model: LMEyeForConditionalGeneration,
    collator: PairCollator | ConversationCollator,
    sides: list[SampleDataset],
) -> tuple[list[list[float]], list[list[float]]]:
    """
    Seconds of every round of both sides, pictures first.

    Returns:
        `[2][rounds]` of the whole way of a batch, and of the model's part.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    whole: list[list[float]] = [[], []]
    models_part: list[list[float]] = [[], []]

    def read(samples: SampleDataset, places: list[int]) -> dict:
        return collator([samples[place] for place in places])

    def train(batch: dict) -> None:
        model(**{name: value.to(arguments.device) for name, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(-1, arguments.rounds):  # the first is to warm up
        places = [(number * arguments.batch_size + place) % len(sides[0]) for place in range(arguments.batch_size)]
        for side, samples in enumerate(sides):
            opening, batch = timed(partial(read, samples, places), "cpu")
            training, _ = timed(partial(train, batch), arguments.device)
            if number >= 0:
                whole[side].append(opening + training)
                models_part[side].append(training)
    return whole, models_part


def line(name: str, batch_size: int, seconds: list[list[float]]) -> str:
    """A row of the table."""
    rates = [batch_size / median_with_interval(side)[0] for side in seconds]
    ratios = [pictures / features for pictures, features in zip(*seconds, strict=True)]
    median, low, high = median_with_interval(ratios)
    return f"| {name} | {rates[0]:.1f} | {rates[1]:.1f} | {median:.2f} | {low:.2f} .. {high:.2f} |"


def main() -> None:
    arguments, data_args = HfArgumentParser((BenchmarkArguments, PairDataArguments)).parse_args_into_dataclasses()
    rows = load_rows(data_args.dataset_name_or_path, data_args.dataset_config_name, data_args.train_split)
    folder, column = data_args.image_folder_of(), data_args.image_column
    with tempfile.TemporaryDirectory() as scratch:
        vision = arguments.vision_model_name_or_path or save_vit_b16(Path(scratch, "vision"))
        backbones = (vision, arguments.language_model_name_or_path)
        model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
            *backbones, interaction=arguments.interaction
        ).to(arguments.device)
        processor = LMEyeProcessor.from_vision_language_pretrained(*backbones, interaction=arguments.interaction)
        encoder = load_vision_encoder(vision, patches=arguments.interaction == "cross_attention")
        source = PictureSource(rows, column, image_folder=folder)
        seconds, cache = timed(
            lambda: extract_features(
                encoder,
                [source],
                Path(scratch, "features"),
                dtype=arguments.storage_dtype,
                batch_size=arguments.batch_size,
                use_cpu=arguments.device == "cpu",
            ),
            arguments.device,
        )
        size = sum(file.stat().st_size for file in Path(scratch, "features").iterdir())
        print(
            f"{cache['num_pictures']} pictures extracted, {cache['num_pictures'] / seconds:.1f} a second, "
            f"{size / cache['num_pictures']:,.0f} bytes each on disk."
        )
        print("\n| training | from pictures, samples/s | from the cache, samples/s | ratio | 95% interval |")
        print("| --- | --- | --- | --- | --- |")
        for stage in ("pretrain", "instruct"):
            model.train()
            model.freeze_for_stage(stage)
            features = FeatureCache.open(Path(scratch, "features"), model, processor, folder, stage)
            options = [{"image_folder": folder}, {"open_image": partial(features, image_folder=folder)}]
            texts = {"image_column": column, "lists": "first"}
            if stage == "pretrain":
                collator, readers = (
                    PairCollator(processor),
                    [PairReader(caption_column=data_args.caption_column, **texts, **each) for each in options],
                )
            else:
                texts |= {"instruction": "What is to be seen?", "answer_column": data_args.caption_column}
                collator, readers = (
                    ConversationCollator(processor),
                    [ConversationReader(**texts, **each) for each in options],
                )
            whole, models_part = compare(
                arguments, model, collator, [SampleDataset(rows, reader) for reader in readers]
            )
            number = {"pretrain": 1, "instruct": 2}[stage]
            print(line(f"stage {number}, whole", arguments.batch_size, whole), flush=True)
            print(line(f"stage {number}, the model's part", arguments.batch_size, models_part), flush=True)


if __name__ == "__main__":
    main()
