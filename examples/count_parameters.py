"""Counts the parameters of the paper's models, part by part, at true width. No weight is allocated or fetched.

python examples/count_parameters.py
python examples/count_parameters.py --preset llama-7b
python examples/count_parameters.py --preset llama-7b --interaction none
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import HfArgumentParser

from transformers_lmeye import LMEyeConfig, LMEyeForConditionalGeneration
from transformers_lmeye.modeling.presets import PRESETS


FROZEN = ("vision tower", "Q-Former", "CLIP text encoder", "language model")
STAGES = {"stage 1": "pretrain", "stage 2": "instruct"}


@dataclass
class CountArguments:
    preset: str | None = field(default=None, metadata={"help": f"One of {', '.join(PRESETS)}. All by default."})
    interaction: str | None = field(
        default=None, metadata={"help": "clip_text, cross_attention, or none. The paper's and none by default."}
    )


def parameter_counts(name: str, **overrides: Any) -> dict[str, int]:
    """
    Parameters of a preset: of the frozen parts, of each trained part (`ipn.` and its name), and of what either stage
    trains.

    Args:
        name (`str`): a preset.
        overrides: fields of [`LMEyeConfig`] to set otherwise.
    """
    with torch.device("meta"):
        model = LMEyeForConditionalGeneration(LMEyeConfig.from_preset(name, **overrides))
    frozen = {"vision_tower": FROZEN[0], "qformer": FROZEN[1], "language_model": FROZEN[3]}
    if model.config.interaction == "clip_text":
        frozen["ipn.interaction"] = FROZEN[2]
    counts = dict.fromkeys(FROZEN, 0)
    for parameter_name, parameter in model.named_parameters():
        depth = 2 if parameter_name.startswith("ipn.") else 1
        part = ".".join(parameter_name.split(".")[:depth])
        part = frozen.get(part, part)
        counts[part] = counts.get(part, 0) + parameter.numel()
    for label, stage in STAGES.items():
        has_stage = stage == "pretrain" or model.config.interaction != "none"
        counts[label] = model.freeze_for_stage(stage) if has_stage else 0
    return counts


def table(rows: list[tuple[str, str, dict[str, int]]]) -> str:
    """A Markdown table of presets' counts."""
    columns = (*FROZEN, *STAGES, "trained in all")
    lines = [f"| preset | interaction | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for name, interaction, counts in rows:
        counts = {**counts, "trained in all": sum(counts[stage] for stage in STAGES)}
        figures = " | ".join(f"{counts[column]:,}" if counts[column] else "-" for column in columns)
        lines.append(f"| {name} | {interaction} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    (arguments,) = HfArgumentParser(CountArguments).parse_args_into_dataclasses()
    interactions = [arguments.interaction] if arguments.interaction else ["clip_text", "none"]
    names = [arguments.preset] if arguments.preset else list(PRESETS)
    rows = [(name, kind, parameter_counts(name, interaction=kind)) for name in names for kind in interactions]
    print(table(rows))
    if arguments.preset:
        for name, kind, counts in rows:
            parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if part.startswith("ipn."))
            print(f"\n{name}, interaction {kind}: {parts}")


if __name__ == "__main__":
    main()
