"""What a training run of the paper costs at its scale: bytes, tokens, FLOPs and GPU hours.

    python examples/estimate_training.py
    python examples/estimate_training.py --presets llama-7b --pairs 1700000 --conversations 150000

FLOPs are counted, not estimated: a training step of the real model at true width, with one and with two layers in the
language model and in the vision tower, under PyTorch's counter; layers are alike, so the rest is a straight line. GPU
hours are FLOPs through a GPU's peak rate and a utilization you can set. The default models take minutes and 5 GB of
memory on one core; weights are random and nothing is fetched.
"""

import copy
import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser

from transformers_lmeye import LMEyeConfig, LMEyeForConditionalGeneration
from transformers_lmeye.modeling.presets import PRESETS, preset_fields
from transformers_lmeye.modeling.towers import ImageFeatures


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}
"""Dense bfloat16 matrix products per second, by the vendor's data sheets."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass
class EstimateArguments:
    presets: list[str] = field(
        default_factory=lambda: ["opt-iml-1.3b", "llama-7b", "llama-13b", "blip2-flan-t5-xl"],
        metadata={"help": f"Which of {', '.join(PRESETS)}."},
    )
    interaction: str = field(default="clip_text", metadata={"help": "clip_text or cross_attention."})
    pairs: int = field(default=69_000_000, metadata={"help": "Samples of stage 1."})
    conversations: int = field(default=7_300_000, metadata={"help": "Samples of stage 2."})
    caption_tokens: int = field(default=16, metadata={"help": "Target tokens of a sample of stage 1."})
    prompt_tokens: int = field(default=40, metadata={"help": "Words of a prompt of stage 2, slots not counted."})
    answer_tokens: int = field(default=16, metadata={"help": "Target tokens of a sample of stage 2."})
    gpus: int = field(default=8, metadata={"help": "GPUs that work together."})
    utilization: float = field(default=0.4, metadata={"help": "Share of the GPU's peak rate that is reached."})


@dataclass
class SampleCosts:
    """FLOPs of one sample, tokens read, and bytes of one picture's features in half precision."""

    vision_tower: float
    stages: dict[str, float]
    tokens: dict[str, int]
    global_bytes: int
    patch_bytes: int


def with_layers(config: dict[str, Any], part: str, num_layers: int) -> dict[str, Any]:
    """A preset's fields with another number of layers in `part` (`"text_config"` or `"vision_config"`)."""
    config = copy.deepcopy(config)
    for name in _LAYERS:
        if name in config[part]:
            config[part][name] = num_layers
    return config


def num_layers_of(config: dict[str, Any], part: str) -> int:
    """The true number of layers in `part` of a preset's fields."""
    return next(config[part][name] for name in _LAYERS if name in config[part])


def count_flops(function) -> float:
    """FLOPs of one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def build(fields: dict[str, Any]) -> LMEyeForConditionalGeneration:
    """The model with random weights in bfloat16, the IPN in float32, attention in plain matrix products."""
    config = LMEyeConfig(**fields)
    return LMEyeForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation="eager")


def sample_of_stage(
    config: LMEyeConfig, stage: str, arguments: EstimateArguments, batch_size: int
) -> dict[str, torch.Tensor]:
    """`forward`'s words and labels for one stage, `[batch, seq]`; words are ids of no meaning."""
    image = [config.image_token_id] * config.num_static_tokens
    if stage == "pretrain":
        prompt, answer = image, [5] * arguments.caption_tokens
    else:
        asking = [config.request_token_id] if config.keep_request_token else []
        slots = (asking + [config.dynamic_token_id] * config.num_dynamic_tokens) * config.num_request_rounds
        prompt, answer = [*image, *[5] * arguments.prompt_tokens, *slots], [5] * arguments.answer_tokens
    if config.is_encoder_decoder:
        ids, labels = prompt, answer
    else:
        ids, labels = prompt + answer, [-100] * len(prompt) + answer
    return {
        "input_ids": torch.tensor([ids] * batch_size),
        "labels": torch.tensor([labels] * batch_size),
    }


def random_features(model: LMEyeForConditionalGeneration, num_images: int) -> ImageFeatures:
    """Features of pictures nobody took, with the shapes of the vision tower's and the Q-Former's."""
    vision = model.config.vision_config
    num_patches = (vision.image_size // vision.patch_size) ** 2
    queries = None
    if model.qformer is not None:
        queries = torch.randn(num_images, model.config.num_query_tokens, model.config.qformer_config.hidden_size)
    return ImageFeatures(
        torch.randn(num_images, getattr(vision, "projection_dim", None) or vision.hidden_size),
        torch.randn(num_images, num_patches, vision.hidden_size),
        queries,
    )


def costs_of(preset: str, arguments: EstimateArguments, batch_size: int = 2) -> SampleCosts:
    """What one sample of `preset` costs in either stage."""
    fields = preset_fields(preset, interaction=arguments.interaction)
    true_layers = num_layers_of(fields, "text_config")
    stages: dict[str, list[float]] = {"pretrain": [], "instruct": []}
    tokens: dict[str, int] = {}
    vision: list[float] = []
    for layers in (1, 2):
        small = with_layers(with_layers(fields, "text_config", layers), "vision_config", layers)
        model = build(small)
        model.train()
        size = model.config.vision_config.image_size
        pixels = torch.zeros(batch_size, 3, size, size, dtype=torch.bfloat16)
        with torch.no_grad():
            vision.append(count_flops(lambda model=model, pixels=pixels: model.get_image_features(pixels)))
        for stage, counted in stages.items():
            model.freeze_for_stage(stage)
            inputs = sample_of_stage(model.config, stage, arguments, batch_size)
            features = random_features(model, batch_size)

            def step(model=model, inputs=inputs, features=features) -> None:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(**inputs, image_features=features).loss
                loss.backward()

            counted.append(count_flops(step))
            tokens[stage] = inputs["input_ids"].shape[1]
        features = random_features(model, 1)
        global_bytes = 2 * (features.pooled if features.queries is None else features.queries).numel()
        patch_bytes = 2 * features.patches.numel()
        del model
        gc.collect()

    def at(counted: list[float], layers: int) -> float:
        return (counted[0] + (layers - 1) * (counted[1] - counted[0])) / batch_size

    return SampleCosts(
        at(vision, num_layers_of(fields, "vision_config")),
        {stage: at(counted, true_layers) for stage, counted in stages.items()},
        tokens,
        global_bytes,
        patch_bytes,
    )


def report(costs: dict[str, SampleCosts], arguments: EstimateArguments) -> str:
    """Markdown tables of what `costs` come to."""
    samples = {"pretrain": arguments.pairs, "instruct": arguments.conversations}
    lines = [
        "Per sample: GFLOPs, and tokens the language model is given",
        "",
        "| preset | vision tower | stage 1 | tokens | stage 2 | tokens |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for preset, cost in costs.items():
        cells = [f"{cost.vision_tower / 1e9:,.0f}"]
        for stage in samples:
            cells += [f"{cost.stages[stage] / 1e9:,.0f}", str(cost.tokens[stage])]
        lines.append(f"| {preset} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Features of {arguments.pairs:,} pictures in half precision",
        "",
        "| preset | global or Q-Former, bytes each | in all | patches, bytes each | in all |",
        "|---|---:|---:|---:|---:|",
    ]
    for preset, cost in costs.items():
        cells = []
        for size in (cost.global_bytes, cost.patch_bytes):
            cells += [f"{size:,}", f"{size * arguments.pairs / 1e12:,.2f} TB"]
        lines.append(f"| {preset} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Hours on {arguments.gpus} GPUs at {arguments.utilization:.0%} of their peak rate "
        f"({arguments.pairs:,} pairs, {arguments.conversations:,} conversations); in brackets with cached features",
        "",
        f"| preset | {' | '.join(f'stage {n}, {gpu}' for n in (1, 2) for gpu in PEAK_FLOPS)} |",
        f"|---|{'---:|' * 2 * len(PEAK_FLOPS)}",
    ]
    for preset, cost in costs.items():
        cells = []
        for stage, count in samples.items():
            for peak in PEAK_FLOPS.values():
                rate = peak * arguments.utilization * arguments.gpus * 3600
                with_tower, cached = (
                    flops * count / rate for flops in (cost.stages[stage] + cost.vision_tower, cost.stages[stage])
                )
                cells.append(f"{with_tower:,.1f} ({cached:,.1f})")
        lines.append(f"| {preset} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    (arguments,) = HfArgumentParser(EstimateArguments).parse_args_into_dataclasses()
    print(report({preset: costs_of(preset, arguments) for preset in arguments.presets}, arguments))


if __name__ == "__main__":
    main()
