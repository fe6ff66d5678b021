"""Training and evaluating LMEyes on the digits world; `quickstart.py` shows one of them, `study.py` compares several.

Everything frozen is computed once: pictures become `ImageFeatures`, prompts become ids, and a training step is a plain
`model(**samples[rows], image_features=features[...])`.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scenes import CANVAS, KINDS, Question, Scenes, sample_questions, sample_scenes
from tqdm import tqdm

from transformers_lmeye import LMEyeConfig, LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.modeling.interactive_perception import ImageFeatures
from transformers_lmeye.training import standardize_requests
from transformers_lmeye.training.collators import IGNORED


logger = logging.getLogger("study")

BACKBONES = Path(__file__).parent / "backbones"
CHECKPOINTS = Path(__file__).parent / "checkpoints"
REFERENCE_CURVE = Path(__file__).parent / "reference_curve.json"
"""Losses of both stages of `ipn` over several seeds, by `study.py --do reference`."""

STACK = {
    "interaction_hidden_size": 192,
    "interaction_intermediate_size": 384,
    "interaction_num_layers": 3,
    "interaction_num_heads": 8,
}
NUM_DYNAMIC_TOKENS = 2
NUM_STATIC_TOKENS = 1 + NUM_DYNAMIC_TOKENS
"""What a model without requests gets: as many visual tokens as one with requests has in all."""

ARMS: dict[str, dict[str, Any]] = {
    "ipn": {"interaction": "cross_attention", "num_request_vectors": NUM_STATIC_TOKENS, **STACK},
    "none": {"interaction": "none"},
    "static_tuned": {"interaction": "none", "num_static_tokens": NUM_STATIC_TOKENS},
    "static_resampled": {
        "interaction": "none",
        "visual_mapping": "resampler",
        "num_static_tokens": NUM_STATIC_TOKENS,
        **STACK,
    },
    "llava_style": {"interaction": "none", "visual_mapping": "patch"},
    "clip_text": {"interaction": "clip_text"},
    "clip_text_no_request": {"interaction": "clip_text", "use_request": False},
    "no_request": {
        "interaction": "cross_attention",
        "num_request_vectors": NUM_STATIC_TOKENS,
        "use_request": False,
        **STACK,
    },
}
"""Configurations that are compared: the network; its stage 1 alone (the paper's IPN*); as many visual tokens that see
no question, from one matrix or from the same stack on the same patches, tuned on the questions as well; every patch
through one matrix, tuned likewise, which is twelve times as many; the paper's first interaction; and both interactions
with zeros for a request."""

NUM_PATCHES = 36
TOKEN_COUNTS = (1, 2, 3, 6, 12, NUM_PATCHES)


def with_visual_tokens(arm: str, num_tokens: int) -> dict[str, Any]:
    """The configuration of an arm of `ARMS` with another number of visual tokens, static and dynamic ones together.

    A model with requests keeps one static token, so that its least are two.
    """
    if "num_static_tokens" in ARMS[arm] or arm == "llava_style":
        return {**ARMS[arm], "num_static_tokens": num_tokens}
    return {**ARMS[arm], "num_dynamic_tokens": num_tokens - 1, "num_request_vectors": num_tokens}


CURVE: dict[str, dict[int, str]] = {
    arm: {
        count: arm if count == own else f"{arm}_{count}_token{'s' * (count > 1)}"
        for count in TOKEN_COUNTS
        if count >= least
    }
    for arm, own, least in (
        ("static_resampled", NUM_STATIC_TOKENS, 1),
        ("llava_style", NUM_PATCHES, 1),
        ("ipn", NUM_STATIC_TOKENS, 2),
    )
}
"""The arms whose number of visual tokens is varied: their names by that number."""

ONE_ROUND: dict[str, dict[str, Any]] = {
    "clip_text": ARMS["clip_text"],
    "clip_text_patch": {"interaction": "clip_text", "fine_grained_source": "patch"},
    "cross_attention_global": {**ARMS["ipn"], "fine_grained_source": "global"},
    "ipn_one_block": {**ARMS["ipn"], "interaction_num_layers": 1},
    "ipn": ARMS["ipn"],
}
FAMILY: dict[str, dict[str, Any]] = {
    "none": ARMS["none"],
    "static_tuned": ARMS["static_tuned"],
    **ONE_ROUND,
    **{f"{arm}_two_rounds": {**given, "num_request_rounds": 2} for arm, given in ONE_ROUND.items()},
}
"""Every interaction on every source of image features that this CLIP has, with one round of requests and with two,
beside static perception alone. Two rounds have twice the dynamic tokens. `ipn_one_block` has one block in place of
three: does a second round stand in for depth?"""

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    **FAMILY,
    **{name: with_visual_tokens(arm, count) for arm, names in CURVE.items() for count, name in names.items()},
    **ARMS,
}
"""All of them by name."""

PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LEARNING_RATE = 150, 32, 1e-3
INSTRUCT_STEPS, INSTRUCT_BATCH, INSTRUCT_LEARNING_RATE = 1200, 64, 1e-3


def build(arm: str, seed: int = 0, **config: Any) -> tuple[LMEyeForConditionalGeneration, LMEyeProcessor]:
    """A new model of one of `CONFIGURATIONS` around the shipped backbones, and its processor; `config` overrides
    fields."""
    torch.manual_seed(seed)
    fields_of_arm = {"num_dynamic_tokens": NUM_DYNAMIC_TOKENS, **CONFIGURATIONS[arm], **config}
    backbones = (str(BACKBONES / "clip"), str(BACKBONES / "language_model"))
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(*backbones, **fields_of_arm)
    return model, build_processor(model)


def load(folder: str | Path, **config: Any) -> tuple[LMEyeForConditionalGeneration, LMEyeProcessor]:
    """A trained IPN from `folder`, attached to the shipped backbones, and its processor; `config` overrides fields."""
    model = LMEyeForConditionalGeneration.from_pretrained(
        folder,
        vision_model_name_or_path=str(BACKBONES / "clip"),
        language_model_name_or_path=str(BACKBONES / "language_model"),
        config=LMEyeConfig.from_pretrained(folder, **config),
    )
    return model, build_processor(model)


def build_processor(model: LMEyeForConditionalGeneration) -> LMEyeProcessor:
    """The processor that places as many slots as `model` has tokens."""
    return LMEyeProcessor.from_vision_language_pretrained(
        str(BACKBONES / "clip"),
        str(BACKBONES / "language_model"),
        interaction=model.config.interaction,
        num_static_tokens=model.config.num_static_tokens,
        num_dynamic_tokens=model.config.num_dynamic_tokens,
        num_request_rounds=model.config.num_request_rounds,
    )


# Data


@dataclass
class Samples:
    """Tokenised samples; `prompt_length` columns of prompt, padded on the left, then targets, padded on the right.

    Attributes:
        input_ids, attention_mask, labels: int64 `[num_samples, length]`; labels are -100 where nothing is predicted.
        scenes: int64 `[num_samples]`, the scene each sample is about.
        prompt_length: columns before the first target.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    scenes: torch.Tensor
    prompt_length: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: torch.Tensor | slice) -> "Samples":
        tensors = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "prompt_length"}
        return Samples(**tensors, prompt_length=self.prompt_length)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Arguments of `forward`."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}

    def prompts(self) -> dict[str, torch.Tensor]:
        """Arguments of `generate` and `perceive`."""
        columns = slice(0, self.prompt_length)
        return {"input_ids": self.input_ids[:, columns], "attention_mask": self.attention_mask[:, columns]}


def build_samples(prompts: list[list[int]], targets: list[list[int]], scenes: list[int], pad_token_id: int) -> Samples:
    """Lays out ids of prompts and targets."""
    before, behind = max(map(len, prompts)), max(map(len, targets))
    shape = (len(prompts), before + behind)
    input_ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        start, end = before - len(prompt), before + len(target)
        input_ids[row, start:end] = torch.tensor(prompt + target)
        attention_mask[row, start:end] = 1
        labels[row, before:end] = torch.tensor(target)
    return Samples(input_ids, attention_mask, labels, torch.tensor(scenes), before)


def caption_samples(processor: LMEyeProcessor, scenes: Scenes) -> Samples:
    """Stage 1: `<img>` at column 0, then the caption and the end of text as targets; one sample per scene."""
    tokenizer = processor.tokenizer
    blank = Image.new("RGB", (CANVAS, CANVAS))
    prompt = processor(images=blank, text=processor.image_token)["input_ids"]
    targets = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(scenes.captions())["input_ids"]]
    return build_samples([prompt] * len(scenes), targets, list(range(len(scenes))), tokenizer.pad_token_id)


def question_samples(processor: LMEyeProcessor, questions: Sequence[Question]) -> Samples:
    """Stage 2 and evaluation: questions in the processor's default prompt, answers and ends of text as targets."""
    tokenizer = processor.tokenizer
    blank = Image.new("RGB", (CANVAS, CANVAS))
    prompts = {text: processor(images=blank, text=text)["input_ids"] for text in {q.question for q in questions}}
    answers = {text: [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in {q.answer for q in questions}}
    return build_samples(
        [prompts[q.question] for q in questions],
        [answers[q.answer] for q in questions],
        [q.scene for q in questions],
        tokenizer.pad_token_id,
    )


@torch.no_grad()
def encode_pictures(
    model: LMEyeForConditionalGeneration, processor: LMEyeProcessor, scenes: Scenes, batch_size: int = 250
) -> ImageFeatures:
    """What the frozen vision tower says of every scene: `pooled` `[N, 128]` and, if the model uses it, `patches`
    `[N, 36, 128]`, float32."""
    pixels = torch.from_numpy(scenes.render()).permute(0, 3, 1, 2)
    pooled, patches = [], []
    for chunk in pixels.split(batch_size):
        features = model.get_image_features(
            processor.image_processor(list(chunk), return_tensors="pt")["pixel_values"]
        )
        pooled.append(features.pooled)
        patches.append(features.patches)
    return ImageFeatures(torch.cat(pooled), None if patches[0] is None else torch.cat(patches))


@dataclass(frozen=True)
class Lesson:
    """Part of stage 2, up to step `end` (`None`: the last): `num_scenes` scenes, evenly divided among `limits`, each
    the fewest and most digits of a scene."""

    end: int | None
    limits: tuple[tuple[int, int], ...]
    num_scenes: int


LESSONS = (Lesson(100, ((1, 1),), 1000), Lesson(300, ((1, 3),), 1000), Lesson(None, ((1, 9), (9, 9)), 8000))
"""One digit shows what an answer looks like in the patches, few digits that the place asked about matters; with nine
from the start nothing is learned for hundreds of steps."""


def training_scenes(seed: int, lessons: Sequence[Lesson] = LESSONS) -> Scenes:
    """The scenes of all lessons, one lesson after the other, in train handwriting."""
    parts = []
    for number, lesson in enumerate(lessons):
        for part, limits in enumerate(lesson.limits):
            scene_seed = 100 * seed + 10 * number + part
            parts.append(sample_scenes(lesson.num_scenes // len(lesson.limits), "train", scene_seed, *limits))
    return Scenes(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Scenes)))


def training_questions(
    scenes: Scenes, steps: int, batch_size: int, seed: int, lessons: Sequence[Lesson] = LESSONS
) -> list[Question]:
    """`steps * batch_size` questions in the order of training, each lesson's shuffled; `scenes` as `training_scenes`
    makes them."""
    rng = np.random.default_rng(seed)
    questions: list[Question] = []
    start = 0
    for number, lesson in enumerate(lessons):
        end = steps if lesson.end is None else min(lesson.end, steps)
        wanted = end * batch_size - len(questions)
        own = scenes.select(slice(start, start + lesson.num_scenes))
        pool = sample_questions(own, math.ceil(wanted / lesson.num_scenes), seed=100 * seed + number)
        for i in rng.permutation(len(pool))[:wanted]:
            q = pool[i]
            questions.append(Question(q.scene + start, q.kind, q.question, q.answer))
        start += lesson.num_scenes
    return questions


# Training


def choose_parameters(model: LMEyeForConditionalGeneration, stage: str) -> None:
    """`freeze_for_stage`; a model without requests, which the paper trains in stage 1 only, is tuned in both."""
    model.freeze_for_stage("pretrain" if model.config.interaction == "none" else stage)


@torch.no_grad()
def start_requests(
    model: LMEyeForConditionalGeneration,
    processor: LMEyeProcessor,
    samples: Samples,
    features: ImageFeatures,
    num_samples: int = 512,
) -> None:
    """Starts the request so that from the first step on it depends on the question where the network looks.

    Most of a hidden state is the same whatever is asked. The request token starts as the word "Answer", behind which
    the place asked about weighs more than behind a random vector. Mean and standard deviation over some training
    samples are taken off. In the cross-attention stack requests then outweigh the learned queries tenfold, and keys
    are half as large again.
    """
    word = torch.tensor(processor.tokenizer.convert_tokens_to_ids("Answer"))
    model.ipn.request_token.copy_(model.get_input_embeddings()(word))
    samples = samples[-num_samples:]
    requests = model.perceive(**samples.prompts(), image_features=features[samples.scenes]).requests
    standardize_requests(model.ipn, requests)
    if model.config.interaction == "cross_attention":
        model.ipn.request_projection[1].weight.mul_(3)
        model.ipn.interaction.queries.mul_(0.3)
        for block in model.ipn.interaction.blocks:
            block.cross_attention.key.weight.mul_(1.5)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warmup, then a cosine down to 2%."""
    return min(1, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: LMEyeForConditionalGeneration,
    samples: Samples,
    features: ImageFeatures,
    batch_size: int,
    learning_rate: float,
    description: str,
    progress: bool = True,
) -> list[float]:
    """One pass over `samples` in their order: AdamW without weight decay, warmup over 40 steps, gradients
    clipped at norm 1. Trains what requires gradients; returns the loss of every step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    steps = len(samples) // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, warmup=40))
    losses: list[float] = []
    model.train()
    with tqdm(range(steps), desc=description, disable=not progress) as bar:
        for step in bar:
            batch = samples[slice(step * batch_size, (step + 1) * batch_size)]
            loss = model(**batch.inputs(), image_features=features[batch.scenes]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not progress and (step + 1) % 100 == 0:
                logger.info("%s: step %d, loss %.4f", description, step + 1, np.mean(losses[-100:]))
            if (step + 1) % 10 == 0:
                bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
    model.eval()
    return losses


def pretrain(
    model: LMEyeForConditionalGeneration,
    processor: LMEyeProcessor,
    scenes: Scenes,
    features: ImageFeatures,
    seed: int,
    steps: int = PRETRAIN_STEPS,
    progress: bool = True,
) -> list[float]:
    """Stage 1: captions of scenes drawn from `scenes`."""
    rows = np.random.default_rng(seed).choice(len(scenes), steps * PRETRAIN_BATCH, replace=False)
    samples = caption_samples(processor, scenes.select(rows))
    samples.scenes = torch.from_numpy(rows)
    choose_parameters(model, "pretrain")
    return train(model, samples, features, PRETRAIN_BATCH, PRETRAIN_LEARNING_RATE, "stage 1, captions ", progress)


def instruct(
    model: LMEyeForConditionalGeneration,
    processor: LMEyeProcessor,
    scenes: Scenes,
    features: ImageFeatures,
    seed: int,
    steps: int = INSTRUCT_STEPS,
    learning_rate: float = INSTRUCT_LEARNING_RATE,
    progress: bool = True,
) -> list[float]:
    """Stage 2: questions about `scenes`, which are `training_scenes`, lesson by lesson."""
    samples = question_samples(processor, training_questions(scenes, steps, INSTRUCT_BATCH, seed))
    if model.config.interaction != "none" and model.config.use_request:
        start_requests(model, processor, samples, features)
    choose_parameters(model, "instruct")
    return train(model, samples, features, INSTRUCT_BATCH, learning_rate, "stage 2, questions", progress)


# Evaluation


@torch.no_grad()
def exact_matches(
    model: LMEyeForConditionalGeneration,
    processor: LMEyeProcessor,
    questions: Sequence[Question],
    features: ImageFeatures,
    batch_size: int = 250,
) -> np.ndarray:
    """Whether the greedy answer to each question is right, and ends: bool `[len(questions)]`."""
    samples = question_samples(processor, questions)
    right = []
    for start in range(0, len(samples), batch_size):
        batch = samples[slice(start, start + batch_size)]
        sequences = model.generate(**batch.prompts(), image_features=features[batch.scenes], **GREEDY)
        right.append(matches(sequences, batch))
    return np.concatenate(right)


@torch.no_grad()
def exact_matches_of_texts(
    model: LMEyeForConditionalGeneration,
    processor: LMEyeProcessor,
    questions: Sequence[Question],
    prompts: Sequence[str],
    batch_size: int = 250,
) -> np.ndarray:
    """`exact_matches` of the language model alone, which is given `prompts` of words in place of pictures."""
    tokenizer = processor.tokenizer
    right = []
    for start in range(0, len(questions), batch_size):
        chunk = slice(start, start + batch_size)
        inputs = processor(text=list(prompts[chunk]), return_tensors="pt")
        targets = [[*tokenizer(q.answer)["input_ids"], tokenizer.eos_token_id] for q in questions[chunk]]
        samples = build_samples(
            inputs["input_ids"].tolist(), targets, [q.scene for q in questions[chunk]], tokenizer.pad_token_id
        )
        right.append(matches(model.generate(**inputs, **GREEDY), samples))
    return np.concatenate(right)


GREEDY = {"max_new_tokens": 3, "do_sample": False}


def matches(sequences: torch.Tensor, samples: Samples) -> np.ndarray:
    """Whether generated `sequences` continue the prompts with the targets, bool `[len(samples)]`."""
    targets = samples.labels[:, samples.prompt_length :]
    new = sequences[:, samples.prompt_length :]
    width = max(targets.shape[1], new.shape[1])
    new, targets = (torch.nn.functional.pad(t, (0, width - t.shape[1]), value=IGNORED) for t in (new, targets))
    return ((new == targets) | (targets == IGNORED)).all(1).numpy()


def blind_prompts(questions: Sequence[Question]) -> list[str]:
    """The questions without any evidence."""
    return [f"Question: {q.question} \nAnswer:" for q in questions]


def told_prompts(questions: Sequence[Question], scenes: Scenes) -> list[str]:
    """The questions with the scene's caption where the picture stands: the ceiling of every eye."""
    captions = scenes.captions()
    return [f"Image as evidence: {captions[q.scene]}\n Question: {q.question} \nAnswer:" for q in questions]


def per_kind(right: np.ndarray, questions: Sequence[Question]) -> dict[str, float]:
    """Percent right for each kind of question, and "all": their mean."""
    kinds = np.array([q.kind for q in questions])
    figures = {kind: 100 * float(right[kinds == kind].mean()) for kind in KINDS}
    return {**figures, "all": float(np.mean(list(figures.values())))}
