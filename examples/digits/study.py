"""Compares IPNs with rivals on the digits world: same data, steps and tuning.

    python examples/digits/study.py --do tune         # learning rate of each arm, on validation handwriting
    python examples/digits/study.py --do train        # every arm, every seed; what is done already is skipped
    python examples/digits/study.py --do curve        # the same with other numbers of visual tokens
    python examples/digits/study.py --do time         # seconds per step of every arm, in turns
    python examples/digits/study.py --do evaluate     # test handwriting: study.json, Markdown tables, and a plot
    python examples/digits/study.py --do ship         # copies the rivals' IPNs of seed 0 into checkpoints/

    python examples/digits/study.py --do reference    # what the quickstart's loss looks like over several seeds:
                                                      # reference_curve.json

    python examples/digits/study.py --do family       # trains and evaluates every interaction, source and number of
                                                      # rounds of requests: family.json, and a Markdown table

`--arms` and `--seeds` choose a part, so that several processes can share the work.
"""

import json
import logging
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from curves import build_reference, smooth
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from scenes import KINDS, Question, Scenes, sample_questions, sample_scenes
from training import (
    ARMS,
    CHECKPOINTS,
    CONFIGURATIONS,
    CURVE,
    FAMILY,
    INSTRUCT_BATCH,
    INSTRUCT_LEARNING_RATE,
    INSTRUCT_STEPS,
    REFERENCE_CURVE,
    blind_prompts,
    build,
    choose_parameters,
    encode_pictures,
    exact_matches,
    exact_matches_of_texts,
    instruct,
    load,
    per_kind,
    pretrain,
    question_samples,
    told_prompts,
    train,
    training_questions,
    training_scenes,
)
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from transformers_lmeye import LMEyeConfig, LMEyeForConditionalGeneration
from transformers_lmeye.modeling.interactive_perception import ImageFeatures


logger = logging.getLogger("study")

STUDY = Path(__file__).parent / "study.json"
PLOT = Path(__file__).parent / "visual_tokens.png"
FAMILY_STUDY = Path(__file__).parent / "family.json"
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
TUNING_STEPS = 400
NUM_TEST_QUESTIONS = 1000
ONE_SEED = tuple(arm for arm in FAMILY if arm not in ARMS and arm != "ipn_two_rounds")
"""Arms that decide nothing."""
CURVE_ARMS = tuple(name for names in CURVE.values() for name in names.values())
ORDER = (
    "no_image",
    "none",
    "static_tuned",
    "static_resampled",
    "llava_style",
    "clip_text_no_request",
    "clip_text",
    "no_request",
    "ipn",
    "told",
)
"""Rows of the table."""
DEFAULT_ARMS: dict[str, tuple[str, ...]] = {
    "tune": tuple(ARMS),
    "train": tuple(ARMS),
    "curve": CURVE_ARMS,
    "time": tuple(dict.fromkeys((*ARMS, *CURVE_ARMS))),
    "evaluate": tuple(dict.fromkeys((*ARMS, *CURVE_ARMS))),
    "ship": tuple(ARMS),
    "reference": ("ipn",),
    "family": tuple(FAMILY),
}


@dataclass
class Arguments:
    do: str = field(metadata={"help": "What to do.", "choices": list(DEFAULT_ARMS)})
    arms: list[str] | None = field(
        default=None, metadata={"help": "Which arms; default: all that what is done is about."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Which seeds; arms that decide nothing use seed 0 alone."}
    )
    work_dir: str = field(default="digits_study_work", metadata={"help": "Where trained IPNs and logs lie."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads."})
    learning_rates: list[float] = field(
        default_factory=lambda: list(LEARNING_RATES), metadata={"help": "What tuning tries."}
    )


def seeds_of(arm: str, args: Arguments) -> list[int]:
    """The seeds an arm is trained with."""
    return [seed for seed in args.seeds if seed == 0 or arm not in ONE_SEED]


def training_data(seed: int, work_dir: Path) -> tuple[Scenes, ImageFeatures]:
    """Scenes of one seed and all the vision tower says of them, computed once for all arms."""
    scenes = training_scenes(seed)
    path = work_dir / f"features_{seed}.pt"
    if not path.exists():
        model, processor = build("ipn")
        features = encode_pictures(model, processor, scenes)
        torch.save({"pooled": features.pooled, "patches": features.patches}, partial := f"{path}.{os.getpid()}")
        os.replace(partial, path)
    return scenes, ImageFeatures(**torch.load(path))


def evaluation_questions(split: str, num_questions: int) -> dict[str, tuple[Scenes, list[Question]]]:
    """Full scenes of nine digits and sparse ones of one to four, four questions about each."""
    limits = {"full": (9, 9), "sparse": (1, 4)}
    result = {}
    for number, (name, (low, high)) in enumerate(limits.items()):
        scenes = sample_scenes(num_questions // 4, split, 1000 + number, low, high)
        result[name] = (scenes, sample_questions(scenes, 4, 1000 + number))
    return result


def train_arm(
    arm: str,
    seed: int,
    work_dir: Path,
    learning_rate: float,
    steps: int = INSTRUCT_STEPS,
) -> LMEyeForConditionalGeneration:
    """Both stages. Stage 1 is shared by all arms that have the same static perception."""
    scenes, features = training_data(seed, work_dir)
    model, processor = build(arm, seed)
    config = model.config
    static = f"stage1_{config.visual_mapping}{config.num_static_tokens}_{seed}.pt"
    path = work_dir / static
    if not path.exists():
        pretrain(model, processor, scenes, features, seed, progress=False)
        state = {name: t for name, t in model.ipn.state_dict().items() if name.startswith(("visual_", "image_token"))}
        torch.save(state, partial := f"{path}.{os.getpid()}")
        os.replace(partial, path)
    model.ipn.load_state_dict(torch.load(path), strict=False)
    if arm != "none":
        start = time.monotonic()
        losses = instruct(model, processor, scenes, features, seed, steps, learning_rate, progress=False)
        seconds, tail = time.monotonic() - start, np.mean(losses[-50:])
        logger.info(
            "%s seed %d rate %g: %d steps in %.0f s, loss %.4f", arm, seed, learning_rate, steps, seconds, tail
        )
    return model


def evaluate(model: LMEyeForConditionalGeneration, processor, split: str, num_questions: int) -> dict[str, np.ndarray]:
    """Which questions about full and about sparse scenes are answered right."""
    right = {}
    for name, (scenes, questions) in evaluation_questions(split, num_questions).items():
        right[name] = exact_matches(model, processor, questions, encode_pictures(model, processor, scenes))
    return right


def tune(args: Arguments, work_dir: Path) -> None:
    """Tries the learning rates that were not tried yet with a shortened stage 2; writes `tune_{arm}.json`."""
    for arm in (arm for arm in args.arms if arm != "none"):
        path = work_dir / f"tune_{arm}.json"
        figures = json.loads(path.read_text()) if path.exists() else {}
        for rate in (rate for rate in args.learning_rates if f"{rate:g}" not in figures):
            model = train_arm(arm, 0, work_dir, rate, TUNING_STEPS)
            _, processor = build(arm)
            right = evaluate(model, processor, "validation", 600)
            figures[f"{rate:g}"] = round(100 * float(np.mean([hits.mean() for hits in right.values()])), 2)
            logger.info("tune %s rate %g: %.2f", arm, rate, figures[f"{rate:g}"])
        path.write_text(json.dumps(figures) + "\n")


def best_rate(arm: str, work_dir: Path) -> float:
    """The learning rate that read most of the validation handwriting, by the tuning in `work_dir` or else by that in
    study.json; with another number of visual tokens or rounds that of its kind, the IPN's for what was not tuned."""
    arm = next((kind for kind, names in CURVE.items() if arm in names.values()), arm.removesuffix("_two_rounds"))
    tuned = json.loads(STUDY.read_text())["learning_rates"]
    tuned |= {path.stem.removeprefix("tune_"): json.loads(path.read_text()) for path in work_dir.glob("tune_*.json")}
    figures = tuned.get(arm, tuned["ipn"])
    return float(max(figures, key=figures.get))


def train_all(args: Arguments, work_dir: Path) -> None:
    """Trains what is missing; writes `{arm}_{seed}/`."""
    for seed in args.seeds:
        for arm in args.arms:
            folder = work_dir / f"{arm}_{seed}"
            if seed not in seeds_of(arm, args) or (folder / "model.safetensors").exists():
                continue
            model = train_arm(arm, seed, work_dir, best_rate(arm, work_dir))
            for role, name in (("vision", "clip"), ("language", "language_model")):
                model.config.backbones[role]["name_or_path"] = f"examples/digits/backbones/{name}"
            model.save_pretrained(folder, save_backbones=False)
            store_in_half_precision(folder / "model.safetensors")
            logger.info("saved %s", folder.name)


def measure_seconds(args: Arguments, work_dir: Path, rounds: int = 5, steps: int = 5) -> None:
    """Seconds of a step of stage 2 on full scenes, all arms in turns so that a busy machine is busy for all alike;
    writes `timing.json`.

    Counted are seconds of the processor, which on one thread are those of a clock on an idle machine. `ratio` is the
    median over rounds of an arm's seconds over those of `ipn` in the same round.
    """
    scenes, features = training_data(0, work_dir)
    questions = training_questions(scenes, INSTRUCT_STEPS, INSTRUCT_BATCH, 0)[-steps * INSTRUCT_BATCH :]
    prepared = {}
    for arm in (arm for arm in args.arms if arm != "none"):
        model, processor = build(arm)
        choose_parameters(model, "instruct")
        prepared[arm] = (model, question_samples(processor, questions))
    seconds: dict[str, list[float]] = {arm: [] for arm in prepared}
    for round_number in range(-1, rounds):  # the first is thrown away
        for arm, (model, samples) in prepared.items():
            start = time.process_time()
            train(model, samples, features, INSTRUCT_BATCH, INSTRUCT_LEARNING_RATE, arm, progress=False)
            if round_number >= 0:
                seconds[arm].append((time.process_time() - start) / steps)
    figures = {
        arm: {
            "seconds_per_step": round(float(np.median(values)), 4),
            "ratio": round(float(np.median(np.array(values) / seconds["ipn"])), 3),
        }
        for arm, values in seconds.items()
    }
    (work_dir / "timing.json").write_text(json.dumps(figures, indent=1) + "\n")
    for arm, figure in figures.items():
        print(arm, figure)


def make_reference(args: Arguments, work_dir: Path) -> None:
    """Trains the quickstart's IPN with every seed and writes the losses of both stages, their mean and spread."""
    runs: dict[str, list[dict[int, float]]] = {"stage 1: captions": [], "stage 2: questions": []}
    for seed in args.seeds:
        path = work_dir / f"losses_{seed}.json"
        if not path.exists():
            scenes, features = training_data(seed, work_dir)
            model, processor = build("ipn", seed)
            losses = [
                stage(model, processor, scenes, features, seed, progress=False) for stage in (pretrain, instruct)
            ]
            path.write_text(json.dumps(losses) + "\n")
        for stage, losses in zip(runs, json.loads(path.read_text()), strict=True):
            runs[stage].append(smooth(losses))
    reference = {"seeds": args.seeds, "stages": {stage: build_reference(of_seeds) for stage, of_seeds in runs.items()}}
    REFERENCE_CURVE.write_text(json.dumps(reference) + "\n")


def store_in_half_precision(path: Path) -> None:
    """Rewrites an IPN's weights in float16: half the bytes to ship; loading makes them float32 again."""
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def bootstrap_interval(
    ours: np.ndarray, theirs: np.ndarray, samples: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two arms in percentage points with its 95% interval.

    Args:
        ours, theirs: bool `[seeds, questions]`, the same questions; questions and seeds are drawn again with
            replacement, each arm's seeds by themselves, a question for both arms.
    """
    rng = np.random.default_rng(seed)
    num_questions = ours.shape[1]
    differences = np.empty(samples)
    for i in range(samples):
        columns = rng.integers(num_questions, size=num_questions)
        a, b = (hits[rng.integers(len(hits), size=len(hits))].mean(0) for hits in (ours, theirs))
        differences[i] = (a[columns] - b[columns]).mean()
    low, high = np.quantile(differences, [0.025, 0.975])
    return tuple(round(100 * float(x), 1) for x in (ours.mean() - theirs.mean(), low, high))


def test_hits(
    arm: str, args: Arguments, work_dir: Path, num_request_rounds: int | None = None
) -> dict[str, list[np.ndarray]]:
    """Which questions of the test each trained seed of an arm answers right, computed once.

    `num_request_rounds` makes it ask in another number of rounds than it was trained with.
    """
    hits: dict[str, list[np.ndarray]] = {}
    for seed in seeds_of(arm, args):
        folder = work_dir / f"{arm}_{seed}"
        if not (folder / "model.safetensors").exists():
            logger.warning("%s seed %d is not trained", arm, seed)
            continue
        other = {} if num_request_rounds is None else {"num_request_rounds": num_request_rounds}
        cached = folder / f"test{''.join(f'_{rounds}_rounds' for rounds in other.values())}.npz"
        if not cached.exists():
            np.savez(cached, **evaluate(*load(folder, **other), "test", NUM_TEST_QUESTIONS))
        for name, right in np.load(cached).items():
            hits.setdefault(name, []).append(right)
    return hits


def summary(hits: list[np.ndarray], questions: list[Question]) -> dict:
    """Percent right per kind: mean and standard deviation over seeds, and of each seed the mean over kinds."""
    figures = [per_kind(right, questions) for right in hits]
    columns = (*KINDS, "all")
    result: dict = {kind: round(float(np.mean([f[kind] for f in figures])), 1) for kind in columns}
    result["per_seed"] = [round(f["all"], 1) for f in figures]
    if len(figures) > 1:
        result["spread"] = {kind: round(float(np.std([f[kind] for f in figures], ddof=1)), 1) for kind in columns}
    return result


def visual_tokens(config: LMEyeConfig) -> int:
    """Static tokens and, with requests, the dynamic ones of all rounds of a question."""
    rounds = 0 if config.interaction == "none" else config.num_request_rounds
    return config.num_static_tokens + rounds * config.num_dynamic_tokens


def costs(arm: str, timing: dict[str, dict[str, float]]) -> dict[str, float]:
    """Visual tokens, parameters trained in both stages, and seconds per step where they were measured."""
    model, _ = build(arm)
    trained: dict[str, int] = {}
    for stage in ("pretrain",) if arm == "none" else ("pretrain", "instruct"):
        choose_parameters(model, stage)
        trained |= {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return {
        "visual_tokens": visual_tokens(model.config),
        "trained_parameters": sum(trained.values()),
        **timing.get(arm, {}),
    }


def evaluate_all(args: Arguments, work_dir: Path) -> None:
    """Answers on test handwriting; writes `study.json` and the plot next to this file and prints the tables."""
    tests = evaluation_questions("test", NUM_TEST_QUESTIONS)
    hits = {arm: by_name for arm in args.arms if (by_name := test_hits(arm, args, work_dir))}
    model, processor = build("none")
    for name, (scenes, questions) in tests.items():
        prompts = {"no_image": blind_prompts(questions), "told": told_prompts(questions, scenes)}
        for arm, texts in prompts.items():
            right = exact_matches_of_texts(model, processor, questions, texts)
            hits.setdefault(arm, {})[name] = [right]
    timing = json.loads(path.read_text()) if (path := work_dir / "timing.json").exists() else {}
    result: dict = {
        "learning_rates": {
            arm: json.loads(p.read_text()) for arm in ARMS if (p := work_dir / f"tune_{arm}.json").exists()
        },
        "costs": {arm: costs(arm, timing) for arm in hits if arm in CONFIGURATIONS},
        "exact_match": {},
        "ipn_minus": {},
    }
    for name, (_, questions) in tests.items():
        for arm, by_name in hits.items():
            result["exact_match"].setdefault(name, {})[arm] = summary(by_name[name], questions)
            if arm in ARMS and arm != "ipn" and "ipn" in hits:
                ours, theirs = (np.stack(hits[a][name]) for a in ("ipn", arm))
                result["ipn_minus"].setdefault(name, {})[arm] = bootstrap_interval(ours, theirs)
    STUDY.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(curve_table(result))
    draw_curve(result, PLOT)


def with_spread(figures: dict, kind: str) -> str:
    """Mean and standard deviation over seeds."""
    spread = figures.get("spread")
    return f"{figures[kind]:.1f}" + (f" ± {spread[kind]:.1f}" if spread else "")


def table(result: dict) -> str:
    """The results as Markdown."""
    lines = []
    for name, arms in result["exact_match"].items():
        head = ["arm", "visual tokens", "trained", "s / step", *KINDS, "all", "per seed", "IPN minus it"]
        lines += [f"{name} scenes", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for arm in (arm for arm in ORDER if arm in arms):
            figures, cost = arms[arm], result["costs"].get(arm, {})
            gap = result["ipn_minus"].get(name, {}).get(arm)
            cells = [f"`{arm}`", cost.get("visual_tokens", "-")]
            cells += [f"{cost['trained_parameters']:,}" if cost else "-"]
            cells += [f"{cost['seconds_per_step']:.3f} ({cost['ratio']:.2f})" if "ratio" in cost else "-"]
            cells += [with_spread(figures, kind) for kind in (*KINDS, "all")]
            cells += [", ".join(f"{x:.1f}" for x in figures["per_seed"]) if cost else ""]
            cells += [f"{gap[0]} [{gap[1]}, {gap[2]}]" if gap else ""]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def curve_table(result: dict) -> str:
    """Exact match against the number of visual tokens, as Markdown."""
    counts = sorted({count for names in CURVE.values() for count in names})
    lines = []
    for name, arms in result["exact_match"].items():
        lines += [f"{name} scenes", "", f"| visual tokens | {' | '.join(f'`{kind}`' for kind in CURVE)} |"]
        lines.append("|---" * (1 + len(CURVE)) + "|")
        for count in counts:
            cells = []
            for names in CURVE.values():
                figures = arms.get(names.get(count))
                seeds = f" ({len(figures['per_seed'])})" if figures else ""
                cells.append(with_spread(figures, "all") + seeds if figures else "-")
            lines.append(f"| {count} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def draw_curve(result: dict, path: Path) -> None:
    """Draws exact match against the number of visual tokens: a dot for each seed, a line through the means."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    labels = {
        "static_resampled": "static, resampled",
        "llava_style": "LLaVA-style (patches)",
        "ipn": "IPN (1 static, others asked for)",
    }
    panels = figure.subplots(1, len(result["exact_match"]), sharey=True, squeeze=False)[0]
    for axes, (name, arms) in zip(panels, result["exact_match"].items(), strict=True):
        for kind, marker in zip(CURVE, "so^", strict=True):
            found = {count: arms[arm] for count, arm in CURVE[kind].items() if arm in arms}
            (line,) = axes.plot(list(found), [f["all"] for f in found.values()], label=labels[kind])
            for count, figures in found.items():
                dots = figures["per_seed"]
                axes.plot([count] * len(dots), dots, marker, color=line.get_color(), markersize=4)
        for arm, text in (("told", "told in words"), ("no_image", "no image")):
            axes.axhline(arms[arm]["all"], color="gray", linestyle=":")
            axes.annotate(text, (1, arms[arm]["all"]), (0, -9), textcoords="offset points", fontsize=8, color="gray")
        counts = sorted({count for names in CURVE.values() for count in names})
        axes.set_xscale("log")
        axes.set_xticks(counts, counts)
        axes.set_xticks([], minor=True)
        axes.set(title=f"{name} scenes", xlabel="visual tokens", ylim=(0, 103))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("exact match, %")
    panels[0].legend(fontsize=8, loc="center right")
    figure.savefig(path, dpi=100)


def compare_family(args: Arguments, work_dir: Path) -> None:
    """Trains what is missing, answers on test handwriting in one and in two rounds of requests; writes `family.json`
    next to this file and prints the table."""
    train_all(args, work_dir)
    tests = evaluation_questions("test", NUM_TEST_QUESTIONS)
    result: dict = {name: {} for name in tests}
    hits = {arm: by_name for arm in args.arms if (by_name := test_hits(arm, args, work_dir))}
    for arm, by_name in hits.items():
        config = load(work_dir / f"{arm}_{args.seeds[0]}")[0].config
        rounds = 0 if config.interaction == "none" else config.num_request_rounds
        otherwise = test_hits(arm, args, work_dir, num_request_rounds=3 - rounds) if rounds else None
        for name, (_, questions) in tests.items():
            figures = {"rounds": rounds, "visual_tokens": visual_tokens(config)}
            figures |= summary(by_name[name], questions)
            if rounds:
                figures["in_the_other_number_of_rounds"] = summary(otherwise[name], questions)["all"]
            if (one := arm.removesuffix("_two_rounds")) != arm and one in hits:
                both = (np.stack(hits[a][name]) for a in (arm, one))
                figures["minus_one_round"] = bootstrap_interval(*both)
            result[name][arm] = figures
    FAMILY_STUDY.write_text(json.dumps(result, indent=1) + "\n")
    print(family_table(result))


def family_table(result: dict) -> str:
    """`compare_family`'s results as Markdown."""
    lines = []
    for name, arms in result.items():
        head = [
            "arm",
            "rounds",
            "visual tokens",
            *KINDS,
            "all",
            "per seed",
            "asked in 1 / 2 rounds",
            "2 minus 1 round",
        ]
        lines += [f"{name} scenes", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for arm, figures in arms.items():
            rounds, asked = figures["rounds"], ""
            if rounds:
                own_and_other = figures["all"], figures["in_the_other_number_of_rounds"]
                asked = " / ".join(f"{x:.1f}" for x in own_and_other[:: 1 if rounds == 1 else -1])
            gap = figures.get("minus_one_round")
            cells = [f"`{arm}`", rounds or "-", figures["visual_tokens"]]
            cells += [f"{figures[kind]:.1f}" for kind in (*KINDS, "all")]
            cells += [", ".join(f"{x:.1f}" for x in figures["per_seed"]), asked]
            cells += [f"{gap[0]} [{gap[1]}, {gap[2]}]" if gap else ""]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def ship(args: Arguments, work_dir: Path) -> None:
    """Copies configuration and weights of seed 0 of every rival."""
    for arm in args.arms:
        if arm == "ipn":  # the quickstart trains it
            continue
        folder = CHECKPOINTS / arm
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(work_dir / f"{arm}_0" / name, folder / name)
        logger.info("shipped %s", arm)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    disable_progress_bar()
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    args.arms = args.arms or list(DEFAULT_ARMS[args.do])
    torch.set_num_threads(args.num_threads)
    work_dir = Path(args.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    work = {
        "tune": tune,
        "train": train_all,
        "curve": train_all,
        "time": measure_seconds,
        "evaluate": evaluate_all,
        "ship": ship,
        "reference": make_reference,
        "family": compare_family,
    }
    work[args.do](args, work_dir)


if __name__ == "__main__":
    main()
