"""LMEye in minutes: gives a small frozen language model eyes, and shows what it sees.

    pip install -e ".[demo]"
    python examples/quickstart.py

Scenes of nine colored handwritten digits hold 18 facts; the Interactive Perception Network may bring a language model
one static token and two dynamic ones. It is trained here in the paper's two stages, captions first and then questions,
while the CLIP and the language model stay as they are. Then it answers questions about handwriting that nothing was
trained on, next to rivals that had the same data and steps and, but for the one that sees every patch, as many tokens
(`examples/digits/study.py`). How far its losses are from those of earlier runs tells whether training went well.

Writes `outputs/quickstart/`: `answers.png`, `learning_curve.png`, and the model with its processor.
"""

import json
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModel, AutoProcessor
from transformers.utils.logging import disable_progress_bar


sys.path.insert(0, str(Path(__file__).parent / "digits"))

from curves import CurveDistance, compare_curves, plot_curve, smooth
from scenes import KINDS, Question, Scenes, sample_questions, sample_scenes
from training import (
    CHECKPOINTS,
    INSTRUCT_BATCH,
    INSTRUCT_STEPS,
    PRETRAIN_STEPS,
    REFERENCE_CURVE,
    blind_prompts,
    build,
    encode_pictures,
    exact_matches,
    exact_matches_of_texts,
    instruct,
    load,
    per_kind,
    pretrain,
    told_prompts,
    training_scenes,
)

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor


OUTPUT_DIR = Path("outputs/quickstart")
RIVALS = {
    "none": "stage 1 alone (IPN*)",
    "static_tuned": "static tokens, tuned",
    "static_resampled": "static tokens of the same stack, tuned",
    "llava_style": "LLaVA-style, all 36 patches, tuned",
    "clip_text": "IPN, interaction in CLIP's text encoder",
    "no_request": "IPN trained without its request",
}


def say(text: str) -> None:
    """Prints a line with the minutes since the start."""
    minutes, seconds = divmod(int(time.monotonic() - START), 60)
    print(f"[{minutes}:{seconds:02}] {text}", flush=True)


def compare(
    model: LMEyeForConditionalGeneration, processor: LMEyeProcessor, scenes: Scenes, questions: list[Question]
) -> dict[str, dict[str, float]]:
    """Exact match in percent per kind of question, for `model`, the shipped rivals and the language model alone."""
    rows = {
        "no image": per_kind(exact_matches_of_texts(model, processor, questions, blind_prompts(questions)), questions)
    }
    for arm, name in RIVALS.items():
        rival, rival_processor = load(CHECKPOINTS / arm)
        features = encode_pictures(rival, rival_processor, scenes)
        rows[name] = per_kind(exact_matches(rival, rival_processor, questions, features), questions)
    features = encode_pictures(model, processor, scenes)
    rows["IPN, as just trained"] = per_kind(exact_matches(model, processor, questions, features), questions)
    told = exact_matches_of_texts(model, processor, questions, told_prompts(questions, scenes))
    rows["told the scene in words"] = per_kind(told, questions)
    return rows


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Prints `rows` as Markdown, one line per model."""
    columns = (*KINDS, "all")
    width = max(map(len, ["exact match, %", *rows]))
    print(f"\n| {'exact match, %':{width}} | {' | '.join(f'{name:>6}' for name in columns)} |")
    print(f"|{'-' * (width + 2)}|{'|'.join(['-' * 7 + ':'] * len(columns))}|")
    for name, figures in rows.items():
        print(f"| {name:{width}} | {' | '.join(f'{figures[column]:6.1f}' for column in columns)} |")
    print(flush=True)


@torch.no_grad()
def draw_answers(model: LMEyeForConditionalGeneration, processor: LMEyeProcessor, scenes: Scenes, path: Path) -> None:
    """Draws pictures, a question of each kind with the model's answer, and where each request looked."""
    images = scenes.images()
    figure = Figure(figsize=(14, 3.1 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(KINDS), squeeze=False)
    for scene, image in enumerate(images):
        axes[scene, 0].imshow(image)
        axes[scene, 0].set_title("unseen handwriting" if scene == 0 else "")
        for column, kind in enumerate(KINDS, start=1):
            (question,) = sample_questions(scenes.select([scene]), 1, seed=10 * scene + column, kinds=[kind])
            inputs = processor(images=image, text=question.question, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            (answer,) = processor.post_process_image_text_to_text(ids)
            maps = model.perceive(**inputs).attention_maps  # [1, layers, request vectors, 1, 6, 6]
            heat = torch.nn.functional.interpolate(maps.mean(dim=(1, 2)), size=image.size[::-1], mode="bilinear")
            ax = axes[scene, column]
            ax.imshow(image.convert("L"), cmap="gray")
            ax.imshow(heat[0, 0].numpy(), cmap="inferno", alpha=0.55)
            right = answer.strip() == question.answer
            ax.set_title(f"{question.question}\n{answer.strip()}", fontsize=9, color="green" if right else "red")
    for ax in axes.flat:
        ax.set_axis_off()
    figure.savefig(path, dpi=110)


def check_losses(losses: dict[str, list[float]], path: Path) -> dict[str, CurveDistance]:
    """How far the losses of both stages are from the reference; draws them over the band of normal runs."""
    reference = json.loads(REFERENCE_CURVE.read_text())["stages"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    distances = {}
    for ax, (stage, values) in zip(figure.subplots(1, len(losses)), losses.items(), strict=True):
        curve = smooth(values)
        distances[stage] = compare_curves(curve, reference[stage])
        plot_curve(ax, curve, reference[stage])
        ax.set_title(stage)
    figure.savefig(path, dpi=110)
    return distances


def reload_and_check(
    model: LMEyeForConditionalGeneration, processor: LMEyeProcessor, scenes: Scenes, questions: list[Question]
) -> None:
    """Saves model and processor, loads them as anyone would, and compares the generated ids."""
    folder = OUTPUT_DIR / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True)
    loaded_processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    images = scenes.images()
    arguments = {"images": [images[q.scene] for q in questions], "text": [q.question for q in questions]}
    ids = [
        net.generate(**inputs(**arguments, return_tensors="pt"), max_new_tokens=3, do_sample=False)
        for net, inputs in ((model, processor), (loaded, loaded_processor))
    ]
    if not torch.equal(*ids):
        raise RuntimeError("The reloaded model answers differently.")
    say(f"saved to {folder}; AutoModel.from_pretrained(..., trust_remote_code=True) generates the same ids")


def main() -> None:
    disable_progress_bar()
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    model, processor = build("ipn")
    scenes = training_scenes(seed=0)
    say(f"reading {len(scenes):,} pictures once with the frozen CLIP")
    features = encode_pictures(model, processor, scenes)
    say(f"stage 1: {PRETRAIN_STEPS} steps on captions train the static token")
    losses = {"stage 1: captions": pretrain(model, processor, scenes, features, seed=0)}
    say(f"stage 2: {INSTRUCT_STEPS} steps of {INSTRUCT_BATCH} questions train the request and what it brings back")
    losses["stage 2: questions"] = instruct(model, processor, scenes, features, seed=0)
    for stage, distance in check_losses(losses, OUTPUT_DIR / "learning_curve.png").items():
        first, last = (sum(values) / len(values) for values in (losses[stage][:20], losses[stage][-50:]))
        say(f"{stage}, loss {first:.3f} at the start, {last:.3f} at the end;")
        say(f"    {distance}")

    test_scenes = sample_scenes(250, "test", seed=1000, min_digits=9)
    questions = sample_questions(test_scenes, per_scene=4, seed=1000)
    say(f"{len(questions):,} questions about {len(test_scenes)} full scenes in unseen handwriting")
    print_table(compare(model, processor, test_scenes, questions))
    draw_answers(model, processor, test_scenes.select(slice(0, 3)), OUTPUT_DIR / "answers.png")
    say(f"pictures: {OUTPUT_DIR / 'answers.png'}, {OUTPUT_DIR / 'learning_curve.png'}")
    reload_and_check(model, processor, test_scenes, questions[:20])


if __name__ == "__main__":
    START = time.monotonic()
    main()
