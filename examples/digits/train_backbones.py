"""Trains the two tiny backbones of the digits world and writes them in the hub's own format.

The language model is a Llama that reads text only: described scenes, questions and answers, in the words of the prompt
that pictures will later use, `Image as evidence: {description}\\n Question: {question} \\nAnswer: {answer}</s>`, with
a description where `<img>` will stand, or behind the question, where `<img-d>` will stand. The CLIP is trained with
open_clip's contrastive loss on pictures of train handwriting and their captions, never on questions.

    python examples/digits/train_backbones.py --backbone language_model --minutes 30
    python examples/digits/train_backbones.py --backbone clip --minutes 34

Length is wall clock, on `--num_threads` cores. A run continues from `{work_dir}/{backbone}.pt` where that exists;
`--minutes 0` then only evaluates and writes the folder.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scenes import (
    CAPTION_INSTRUCTION,
    CELL,
    COLORS,
    DIGITS,
    HARD_KINDS,
    KINDS,
    NUM_PLATES,
    PLACES,
    Cell,
    Scenes,
    ask,
    compose,
    describe,
    load_scans,
    sample_questions,
    sample_scenes,
    split_scans,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


logger = logging.getLogger("train_backbones")

PATCH = 8
_ALL_KINDS = (*KINDS, *HARD_KINDS)
_KIND_PROBABILITIES = np.array([2, 1, 2, 3, 4, 3, 1]) / 16
_OTHER_WORDS = (
    "Image as evidence : . , ? ! Question Answer Which What Where When How Who many Is Are There there digit "
    "digits color is are at in on of to the The a an even or odd and not no yes none empty nothing number "
    "numbers picture image scene see do does you can Describe Does this caption fit match True False true false "
    "Human Assistant User A B C D"
)


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "Which one to train.", "choices": ["language_model", "clip"]})
    output_dir: str = field(default="examples/digits/backbones", metadata={"help": "Parent of the written folder."})
    work_dir: str = field(default="digits_backbones_work", metadata={"help": "Where checkpoints lie."})
    minutes: float = field(default=30.0, metadata={"help": "Length of the training in minutes of wall clock."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and samples."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak of the schedule, after the warmup."})
    evaluate_every: float = field(default=2.0, metadata={"help": "Minutes between evaluations and checkpoints."})


# Shared


def build_tokenizer(add_special_tokens: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of the digits world; white space is dropped, hyphenated words are one.

    Args:
        add_special_tokens: put `<s>` and `</s>` around every text, as CLIP wants; the language model adds neither.
    """
    specials = ["<pad>", "<s>", "<unk>", "</s>"]
    words = dict.fromkeys([*specials, *PLACES, *COLORS, *DIGITS, *_OTHER_WORDS.split()])
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[A-Za-z]+(-[A-Za-z]+)*"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[^A-Za-z0-9-]"), behavior="isolated"),
        ]
    )
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    if add_special_tokens:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", specials.index("<s>")), ("</s>", specials.index("</s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=77 if add_special_tokens else 512,
    )


class Trainer:
    """Steps, schedule and checkpoints of one run: Muon on the matrices of the layers, AdamW on everything else.

    The learning rate warms up over 3% of the time and falls along a cosine to a hundredth; time is measured, so that a
    run ends when it should whatever the machine.
    """

    def __init__(self, model: PreTrainedModel, args: Arguments) -> None:
        self.model = model
        self.args = args
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
        others = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
        self.optimizers = [
            torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.path = Path(args.work_dir) / f"{args.backbone}.pt"
        self.step = 0
        elapsed = 0.0
        if self.path.exists():
            state = torch.load(self.path)
            model.load_state_dict(state["model"])
            for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(optimizer_state)
            self.step, elapsed = state["step"], state["elapsed"]
            logger.info("continuing from %s: step %d, %.1f minutes", self.path, self.step, elapsed / 60)
        self.start = time.monotonic() - elapsed
        self.next_evaluation = elapsed + 60 * args.evaluate_every
        self.rng = np.random.default_rng([args.seed, self.step])

    @property
    def elapsed(self) -> float:
        """Seconds trained so far, those before a resume included."""
        return time.monotonic() - self.start

    @property
    def progress(self) -> float:
        """Share of the time used, 0..1."""
        return min(1.0, self.elapsed / (60 * self.args.minutes)) if self.args.minutes > 0 else 1.0

    def update(self, loss: torch.Tensor) -> None:
        """One optimiser step on `loss`."""
        progress = self.progress
        warm = min(1.0, progress / 0.03)
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.learning_rate * max(0.01, warm) * cosine
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1

    def evaluation_is_due(self) -> bool:
        """Whether `evaluate_every` minutes have passed; counts them anew where they have."""
        if self.elapsed < self.next_evaluation:
            return False
        self.next_evaluation = self.elapsed + 60 * self.args.evaluate_every
        return True

    def save(self) -> None:
        """Writes the checkpoint to continue from."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed": self.elapsed,
        }
        torch.save(state, self.path)


def table(figures: dict[str, float]) -> str:
    """A two-column Markdown table."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value:g} |" for name, value in figures.items())])


# Language model


def sample_cells(rng: np.random.Generator, max_digits: int) -> list[Cell]:
    """The cells of a random scene of 1 to `max_digits` digits in reading order; half of them hold `max_digits`."""
    count = max_digits if rng.random() < 0.5 else int(rng.integers(1, max_digits + 1))
    places = np.sort(rng.permutation(len(PLACES))[:count]).tolist()
    digits, colors = rng.integers(len(DIGITS), size=count).tolist(), rng.integers(len(COLORS), size=count).tolist()
    return [Cell(*cell) for cell in zip(places, digits, colors, strict=True)]


def relevant_text(cells: Sequence[Cell], question: str, answer: str, rng: np.random.Generator) -> str:
    """What has to be seen to answer a question: the cell asked about, or some of its words."""
    words = question.rstrip("?").split()
    place = next((word for word in words if word in PLACES), answer)
    color = next((word for word in words if word in COLORS), answer)
    digit = next((word for word in words if word in DIGITS), answer)
    if place in PLACES:
        cell = next(cell for cell in cells if PLACES[cell.place] == place)
    else:
        cell = next(cell for cell in cells if DIGITS[cell.digit] == digit and COLORS[cell.color] == color)
    place, color, digit = PLACES[cell.place], COLORS[cell.color], DIGITS[cell.digit]
    draw = rng.random()
    if draw < 0.4:
        return f"{place} {color} {digit}"
    if " " in answer:
        return answer
    if answer in PLACES:
        return place if draw < 0.7 else f"{place} {digit}"
    if answer in COLORS:
        return color if draw < 0.7 else f"{place} {color}"
    return digit if draw < 0.7 else f"{color} {digit}"


def reverse_lookups(cells: Sequence[Cell]) -> list[tuple[str, bool]]:
    """Cells told backwards, "three red top-left", as pieces `(text, is it a target)`; what is certain is a target."""
    pieces = []
    for cell in cells:
        digit_is_unique = [other.digit for other in cells].count(cell.digit) == 1
        pair_is_unique = [(other.digit, other.color) for other in cells].count((cell.digit, cell.color)) == 1
        pieces += [(DIGITS[cell.digit], False), (COLORS[cell.color], digit_is_unique)]
        pieces += [(PLACES[cell.place], pair_is_unique), (",", False)]
    return pieces


def sample_text(
    rng: np.random.Generator, max_digits: int, max_turns: int, describing: float
) -> list[tuple[str, bool]]:
    """One training text of the language model as pieces `(text, is it a target)`.

    6% are plain captions with nothing before them, a share of `describing` are told scenes in any order to be
    described in reading order or told backwards, the rest are questions in up to `max_turns` turns: mostly behind the
    whole or a part of the description; a fifth with what has to be seen behind each question; a few without any
    description.
    """
    cells = sample_cells(rng, max_digits)
    draw = rng.random()
    if draw < 0.06:
        return [(describe(cells), True), ("</s>", True)]
    shuffled = [cells[i] for i in rng.permutation(len(cells))]
    told = cells if rng.random() < 0.6 else shuffled
    pieces = [("Image as evidence:" if rng.random() < 0.75 else "Image:", False)]
    if draw < 0.06 + describing:
        if rng.random() < 0.8:
            backwards = reverse_lookups([cells[i] for i in rng.permutation(len(cells))])
            return [*pieces, (describe(told), False), *backwards]
        instruction = f"Question: {CAPTION_INSTRUCTION}" if rng.random() < 0.5 else CAPTION_INSTRUCTION
        sides = [(describe(told), False), (instruction, False)]
        pieces += sides if rng.random() < 0.7 else sides[::-1]
        return [*pieces, ("Answer:", False), (describe(cells), True), ("</s>", True)]
    evidence = "before" if draw < 0.78 else "behind" if draw < 0.97 else "nowhere"
    known = cells
    if evidence == "before":
        if rng.random() < 0.2:
            known = told = told[: rng.integers(1, len(told) + 1)]
        pieces.append((describe(told), False))
    elif evidence == "behind" and rng.random() < 0.3:
        pieces.append((describe(shuffled[: rng.integers(0, len(cells) + 1)]), False))
    # Where turns do not end with </s>, its absence is no target: every answer the model gives ends.
    ends = rng.random() < 0.85
    question_word = "Question: " if rng.random() < 0.9 else ""
    for _ in range(int(rng.integers(1, max_turns + 1))):
        pair = None
        while pair is None:
            pair = ask(known, rng.choice(_ALL_KINDS, p=_KIND_PROBABILITIES), rng)
        question, answer = pair
        pieces.append((question_word + question, False))
        if evidence == "behind":
            whole = rng.random() < 0.25
            pieces.append((describe(told) if whole else relevant_text(cells, question, answer, rng), False))
        pieces += [("Answer:", False), (answer, True)]
        if ends:
            pieces.append(("</s>", True))
    return pieces


class TextBatches:
    """Makes training batches of texts; `tokenizer` is asked once per phrase."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch_size: int = 32, batches: int = 8) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        self.batch_size = batch_size
        self.batches = batches
        self.encode = lru_cache(maxsize=65536)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])

    def sample(
        self, rng: np.random.Generator, max_digits: int, max_turns: int, describing: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`batches` pairs of `(input_ids, labels)`, int64 `[batch_size, length]`, right-padded, alike in length."""
        samples = []
        for _ in range(self.batches * self.batch_size):
            ids: list[int] = []
            labels: list[int] = []
            for text, target in sample_text(rng, max_digits, max_turns, describing):
                piece = self.encode(text)
                ids += piece
                labels += piece if target else [-100] * len(piece)
            samples.append((ids, labels))
        samples.sort(key=lambda sample: len(sample[0]))
        pairs = []
        for i in rng.permutation(self.batches).tolist():
            rows = samples[i * self.batch_size : (i + 1) * self.batch_size]
            shape = (self.batch_size, max(len(ids) for ids, _ in rows))
            input_ids, target_ids = torch.full(shape, self.pad_token_id), torch.full(shape, -100)
            for row, (ids, labels) in enumerate(rows):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                target_ids[row, : len(labels)] = torch.tensor(labels)
            pairs.append((input_ids, target_ids))
        return pairs


@torch.no_grad()
def told_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, scenes: Scenes, per_scene: int, seed: int
) -> dict[str, float]:
    """Exact match in percent, per kind, of the language model that is told the scene: the ceiling of every eye on it.

    The answer and the end of the text behind it must be the greedy continuation of the default prompt.
    """
    model.eval()
    captions = scenes.captions()
    right: dict[str, list[bool]] = {kind: [] for kind in _ALL_KINDS}
    questions = sample_questions(scenes, per_scene, seed, _ALL_KINDS)
    for start in range(0, len(questions), 250):
        chunk = questions[start : start + 250]
        prompts = [f"Image as evidence: {captions[q.scene]}\n Question: {q.question} \nAnswer:" for q in chunk]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for question, row in zip(chunk, ids.tolist(), strict=True):
            wanted = tokenizer(question.answer)["input_ids"] + [tokenizer.eos_token_id]
            right[question.kind].append(row[: len(wanted)] == wanted)
    return {kind: round(100 * float(np.mean(hits)), 2) for kind, hits in right.items() if hits}


def build_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 4 layers, 192 wide, with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )
    return LlamaForCausalLM(config)


def train_language_model(args: Arguments) -> None:
    """Trains, evaluates and writes the language model."""
    tokenizer = build_tokenizer(add_special_tokens=False)
    model = build_language_model(tokenizer)
    logger.info("language model: %d parameters", model.num_parameters())
    trainer = Trainer(model, args)
    texts = TextBatches(tokenizer)
    told = sample_scenes(150, "validation", seed=1, min_digits=9)
    losses = []
    while trainer.progress < 1:
        # Small scenes and much copying first: looking up is learned from copying.
        progress = trainer.progress
        max_digits = 4 if progress < 0.5 else 6 if progress < 0.6 else 9
        describing = 0.55 if progress < 0.7 else 0.1
        model.train()
        for input_ids, labels in texts.sample(trainer.rng, max_digits, max_turns=8, describing=describing):
            logits = model(input_ids=input_ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            trainer.update(loss)
            losses.append(loss.item())
        if trainer.evaluation_is_due():
            accuracy = told_accuracy(model, tokenizer, told, per_scene=4, seed=0)
            message = "step %d, %.1f minutes, loss %.4f, told: %s"
            logger.info(message, trainer.step, trainer.elapsed / 60, np.mean(losses[-100:]), accuracy)
            trainer.save()
    trainer.save()
    full = sample_scenes(1500, "test", seed=2, min_digits=9)
    sparse = sample_scenes(500, "test", seed=3, max_digits=4)
    figures = {f"{kind}, 9 digits": value for kind, value in told_accuracy(model, tokenizer, full, 2, 0).items()}
    figures |= {f"{kind}, 1-4 digits": value for kind, value in told_accuracy(model, tokenizer, sparse, 2, 0).items()}
    logger.info("told: %s", figures)
    folder = Path(args.output_dir) / "language_model"
    model.save_pretrained(folder)
    build_tokenizer(add_special_tokens=False).save_pretrained(folder)
    card = _LANGUAGE_MODEL_CARD.format(
        parameters=model.num_parameters(),
        steps=trainer.step,
        figures=table(figures),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    logger.info("written to %s", folder)


_LANGUAGE_MODEL_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Language model of the digits world

A Llama of {parameters} parameters (4 layers, width 192, word-level tokenizer) that has read text only: invented scenes
of colored digits on a 3x3 grid, described in words, with questions and answers. It can look things up in a description
and answer in a word or two. It has never seen a picture and knows nothing else.

    Image as evidence: top-left red three, center blue seven
     Question: Which digit is at the center?
    Answer: seven</s>

Made by `python examples/digits/train_backbones.py --backbone language_model` ({steps} steps of 32 texts).

Exact match in percent when told the scene (3,000 questions on scenes of 9 digits, 1,000 on scenes of 1 to 4; greedy):

{figures}
"""


# CLIP


@dataclass
class Pictures:
    """A contrastive batch before it is drawn: row i of the arrays is the picture of caption i.

    Attributes:
        digits, colors: int `[batch, 9]`.
        occupied: bool `[batch, 9]`, which cells are drawn.
        visible: int `[batch, places]`, the cells whose patches the vision tower is given, or None for all patches.
        captions: `batch` texts, each about some of the drawn cells.
    """

    digits: np.ndarray
    colors: np.ndarray
    occupied: np.ndarray
    visible: np.ndarray | None
    captions: list[str]


def sample_single_digits(rng: np.random.Generator) -> Pictures:
    """All 450 places x digits x colors, one digit per picture; only the patches of its cell are looked at."""
    rows, classes = np.arange(450), rng.permutation(450)
    places = classes // 50
    digits, colors, occupied = np.zeros((450, 9), int), np.zeros((450, 9), int), np.zeros((450, 9), bool)
    digits[rows, places] = classes % 10
    colors[rows, places] = classes // 10 % 5
    occupied[rows, places] = True
    captions = [describe([Cell(p, int(digits[i, p]), int(colors[i, p]))]) for i, p in enumerate(places.tolist())]
    return Pictures(digits, colors, occupied, places[:, None], captions)


def sample_pairs(rng: np.random.Generator, num_visible: int) -> Pictures:
    """100 pictures that hold every pair of digits at two places once; the captions name these two cells alone.

    Mostly all pictures share one layout of colors, so that nothing but the digits tells them apart. The picture cannot
    know which two cells will be named, so it has to hold all of them.
    """
    batch = 100
    digits = rng.integers(10, size=(batch, 9))
    colors = rng.integers(5, size=(batch, 9))
    if rng.random() < 0.6:
        colors[:] = colors[0]
    places = rng.permutation(9)
    first, second = sorted(places[:2].tolist())
    pairs = rng.permutation(batch)
    digits[:, first], digits[:, second] = pairs // 10, pairs % 10
    occupied = np.ones((batch, 9), bool)
    visible = None
    if num_visible < 9:
        visible = np.repeat(np.sort(places[:num_visible])[None], batch, axis=0)
    elif rng.random() < 0.35:
        occupied = rng.random((batch, 9)) < rng.random((batch, 1))
        occupied[:, [first, second]] = True
    captions = [
        describe([Cell(first, d[first], c[first]), Cell(second, d[second], c[second])])
        for d, c in zip(digits.tolist(), colors.tolist(), strict=True)
    ]
    return Pictures(digits, colors, occupied, visible, captions)


def sample_captioned(rng: np.random.Generator) -> Pictures:
    """64 pictures with their whole captions, in eight groups whose members differ in one digit or color."""
    digits = np.repeat(rng.integers(10, size=(8, 9)), 8, axis=0)
    colors = np.repeat(rng.integers(5, size=(8, 9)), 8, axis=0)
    occupied = np.ones((8, 9), bool)
    if rng.random() < 0.5:
        occupied = rng.random((8, 9)) < rng.random((8, 1))
        occupied[np.arange(8), rng.integers(9, size=8)] = True
    occupied = np.repeat(occupied, 8, axis=0)
    for row in range(64):
        if row % 8:
            places = np.flatnonzero(occupied[row])
            place = places[(row % 8 + row // 8) % len(places)]
            if rng.random() < 0.75:
                digits[row, place] = (digits[row, place] + rng.integers(1, 10)) % 10
            else:
                colors[row, place] = (colors[row, place] + rng.integers(1, 5)) % 5
    captions = [
        describe([Cell(place, d[place], c[place]) for place in np.flatnonzero(o).tolist()])
        for d, c, o in zip(digits.tolist(), colors.tolist(), occupied, strict=True)
    ]
    return Pictures(digits, colors, occupied, None, captions)


def augment_scans(indices: np.ndarray, copies: int, seed: int) -> np.ndarray:
    """Random sizes, positions, rotations, slants, warps, stroke widths and textures of scans within their cells.

    Args:
        indices: `[scans]`, which of the 1,797 scans.
        copies: variants of each.
        seed: the same seed gives the same variants.

    Returns:
        uint8 `[scans, copies, 16, 16]`, 255 is full ink.
    """
    generator = torch.Generator().manual_seed(seed)
    scans = torch.from_numpy(load_scans()[0][indices])[:, None]
    count = len(scans)
    ink = torch.empty(count, copies, CELL, CELL, dtype=torch.uint8)
    ys, xs = torch.meshgrid(torch.arange(CELL) + 0.5, torch.arange(CELL) + 0.5, indexing="ij")

    def uniform(low: float, high: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * (high - low) + low)[:, None, None]

    for copy in range(copies):
        size, aspect = uniform(11.5, 14.5), uniform(0.87, 1.15)
        angle, slant = uniform(-0.26, 0.26), uniform(-0.25, 0.25)
        x = xs - CELL / 2 - (CELL - size) / 2 * uniform(-1, 1)
        y = ys - CELL / 2 - (CELL - size) / 2 * uniform(-1, 1)
        x = x + slant * y
        x, y = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
        grid = torch.stack([2 * x / size * aspect, 2 * y / size / aspect], dim=-1)
        warp = 0.085 * torch.randn(count, 2, 3, 3, generator=generator)
        grid = grid + F.interpolate(warp, size=CELL, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        drawn = F.grid_sample(scans, grid, align_corners=False).squeeze(1).clamp(0, 1) ** uniform(0.55, 1.7)
        texture = torch.randn(drawn.shape, generator=generator) * uniform(0, 0.12)
        drawn = (drawn + texture * (drawn > 0.02)).clamp(0, 1) * uniform(0.75, 1)
        ink[:, copy] = (255 * drawn).to(torch.uint8)
    return ink.numpy()


class Painter:
    """Draws contrastive batches with augmented train handwriting."""

    def __init__(self, seed: int, copies: int = 250) -> None:
        own = split_scans("train")
        digits = load_scans()[1][own]
        by_digit = [np.flatnonzero(digits == digit) for digit in range(len(DIGITS))]
        self.counts = np.array([len(scans) for scans in by_digit])
        self.table = np.stack([np.resize(scans, self.counts.max()) for scans in by_digit])
        self.ink = augment_scans(own, copies, seed)

    def draw(self, pictures: Pictures, rng: np.random.Generator) -> np.ndarray:
        """uint8 `[batch, 48, 48, 3]`."""
        digits = pictures.digits
        scans = self.table[digits, (rng.random(digits.shape) * self.counts[digits]).astype(np.int64)]
        ink = self.ink[scans, rng.integers(self.ink.shape[1], size=digits.shape)]
        plates = rng.integers(NUM_PLATES, size=len(digits))
        return compose(ink * pictures.occupied[:, :, None, None], pictures.colors, plates)


def to_pixel_values(pixels: np.ndarray) -> torch.Tensor:
    """What the image processor makes of uint8 `[batch, 48, 48, 3]`: float32 `[batch, 3, 48, 48]` in -1..1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def patch_positions(places: np.ndarray) -> torch.Tensor:
    """Places `[batch, n]` -> positions of the class token and of the places' patches, int64 `[batch, 1 + 4 * n]`."""
    side = CELL // PATCH
    rows, columns = places // 3 * side, places % 3 * side
    patches = [(rows + i) * 3 * side + columns + j + 1 for i in range(side) for j in range(side)]
    classes = np.zeros((len(places), 1), dtype=np.int64)
    return torch.from_numpy(np.concatenate([classes, *patches], axis=1))


def embed_pictures(model: CLIPModel, pixel_values: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Normalised image features `[batch, projection]`, seen through some of the patches or, with None, all of them."""
    tower = model.vision_model
    hidden = tower.embeddings(pixel_values)  # [B, 37, D]
    if positions is not None:
        hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden)).last_hidden_state[:, 0]
    return F.normalize(model.visual_projection(tower.post_layernorm(hidden)), dim=-1)


def embed_captions(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Normalised text features `[batch, projection]`."""
    inputs = tokenizer(captions, return_tensors="pt", padding=True)
    return F.normalize(model.text_projection(model.text_model(**inputs).pooler_output), dim=-1)


def fit_probe(
    features: torch.Tensor, targets: torch.Tensor, unseen: torch.Tensor, unseen_targets: torch.Tensor
) -> float:
    """Accuracy in percent, on unseen features `[m, D]`, of a linear classifier trained on features `[n, D]`."""
    mean, std = features.mean(0), features.std(0) + 1e-4
    features, unseen = (features - mean) / std, (unseen - mean) / std
    generator = torch.Generator().manual_seed(0)
    probe = torch.nn.Linear(features.shape[1], int(targets.max()) + 1)
    torch.nn.init.zeros_(probe.weight)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.01, weight_decay=0.05)
    for _ in range(150):
        rows = torch.randint(len(features), (4096,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(probe(features[rows]), targets[rows]).backward()
        optimizer.step()
    return 100 * (probe(unseen).argmax(1) == unseen_targets).float().mean().item()


@torch.no_grad()
def vision_features(model: CLIPModel, scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of the last but one layer `[scenes, 36, D]` and normalised image features `[scenes, projection]`."""
    patches, pooled = [], []
    pixels = scenes.render()
    for start in range(0, len(pixels), 250):
        output = model.vision_model(to_pixel_values(pixels[start : start + 250]), output_hidden_states=True)
        patches.append(output.hidden_states[-2][:, 1:])
        pooled.append(F.normalize(model.visual_projection(output.pooler_output), dim=-1))
    return torch.cat(patches), torch.cat(pooled)


def probe_vision(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, split: str, num_scenes: int = 400
) -> dict[str, float]:
    """How much of scenes of nine digits in unseen handwriting can be read from the vision tower, in percent.

    Linear probes, trained on train handwriting, read the digit and the color of a cell from the four patches of the
    last but one layer that lie on it, and the digit from any one of them. "zero-shot digit": which of the ten captions
    of one cell, its color given, is nearest to the pooled feature.
    """
    model.eval()
    seen = sample_scenes(1000, "train", seed=5, min_digits=9)
    unseen = sample_scenes(num_scenes, split, seed=6, min_digits=9)
    (seen_patches, _), (patches, pooled) = vision_features(model, seen), vision_features(model, unseen)
    side = CELL // PATCH

    def by_cell(hidden: torch.Tensor) -> torch.Tensor:
        grid = hidden.unflatten(1, (3, side, 3, side)).permute(0, 1, 3, 2, 4, 5)  # [B, 3, 3, side, side, D]
        return grid.reshape(-1, side * side, hidden.shape[-1])

    def targets(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).flatten()

    a, b = by_cell(seen_patches), by_cell(patches)
    digits = targets(seen.digits), targets(unseen.digits)
    colors = targets(seen.colors), targets(unseen.colors)
    each = [values.repeat_interleave(side * side) for values in digits]
    figures = {
        "digit of a cell": fit_probe(a.flatten(1), digits[0], b.flatten(1), digits[1]),
        "color of a cell": fit_probe(a.flatten(1), colors[0], b.flatten(1), colors[1]),
        "digit from one patch": fit_probe(a.flatten(0, 1), each[0], b.flatten(0, 1), each[1]),
    }
    hits = []
    for place in range(len(PLACES)):
        captions = [describe([Cell(place, d, c)]) for c in range(len(COLORS)) for d in range(len(DIGITS))]
        with torch.no_grad():
            scores = pooled @ embed_captions(model, tokenizer, captions).T
        scores = scores.unflatten(1, (len(COLORS), len(DIGITS)))[torch.arange(len(unseen)), unseen.colors[:, place]]
        hits.append((scores.argmax(1).numpy() == unseen.digits[:, place]).mean())
    figures["zero-shot digit"] = 100 * float(np.mean(hits))
    return {name: round(value, 2) for name, value in figures.items()}


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP with random weights: ViT of 4 layers on 36 patches, text transformer of 2 layers, both 128 wide."""
    width = 128
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 4,
        "projection_dim": width,
    }
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": 3 * CELL, "patch_size": PATCH, "num_hidden_layers": 4}
    return CLIPModel(CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=width))


def build_image_processor() -> CLIPImageProcessor:
    """48 pixels square, values in -1..1."""
    edge = 3 * CELL
    return CLIPImageProcessor(
        size={"shortest_edge": edge},
        crop_size={"height": edge, "width": edge},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def sample_pictures(rng: np.random.Generator, progress: float) -> Pictures:
    """The curriculum: single digits, then parts of scenes, then whole ones; single digits stay throughout."""
    if progress < 0.35 or rng.random() < 0.25:
        return sample_single_digits(rng)
    if progress < 0.5:
        return sample_pairs(rng, num_visible=int(rng.integers(2, 6)))
    return sample_captioned(rng) if rng.random() < 0.2 else sample_pairs(rng, num_visible=9)


def train_clip(args: Arguments) -> None:
    """Trains, probes and writes the CLIP."""
    from open_clip.loss import ClipLoss

    tokenizer = build_tokenizer(add_special_tokens=True)
    model = build_clip(tokenizer)
    logger.info("CLIP: %d parameters", model.num_parameters())
    trainer = Trainer(model, args)
    painter = Painter(args.seed)
    contrast = ClipLoss()
    losses = []
    while trainer.progress < 1:
        model.train()
        pictures = sample_pictures(trainer.rng, trainer.progress)
        positions = None if pictures.visible is None else patch_positions(pictures.visible)
        image_features = embed_pictures(model, to_pixel_values(painter.draw(pictures, trainer.rng)), positions)
        text_features = embed_captions(model, tokenizer, pictures.captions)
        loss = contrast(image_features, text_features, model.logit_scale.exp().clamp(max=100))
        trainer.update(loss)
        losses.append(loss.item())
        if trainer.evaluation_is_due():
            figures = probe_vision(model, tokenizer, "validation")
            message = "step %d, %.1f minutes, loss %.4f, validation handwriting: %s"
            logger.info(message, trainer.step, trainer.elapsed / 60, np.mean(losses[-100:]), figures)
            trainer.save()
    trainer.save()
    figures = {
        f"{name}, {split} handwriting": value
        for split in ("validation", "test")
        for name, value in probe_vision(model, tokenizer, split, num_scenes=1000).items()
    }
    logger.info("%s", figures)
    folder = Path(args.output_dir) / "clip"
    model.save_pretrained(folder)
    build_tokenizer(add_special_tokens=True).save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
    card = _CLIP_CARD.format(parameters=model.num_parameters(), steps=trainer.step, figures=table(figures))
    (folder / "README.md").write_text(card, encoding="utf-8")
    logger.info("written to %s", folder)


_CLIP_CARD = """---
license: apache-2.0
library_name: transformers
---
# CLIP of the digits world

A CLIP of {parameters} parameters (ViT of 4 layers on 36 patches of a 48x48 picture, text transformer of 2 layers,
width 128) trained with open_clip's contrastive loss on scenes of colored handwritten digits and captions of some or
all of their cells. Handwriting: the train scans of `sklearn.datasets.load_digits` as `scenes.py` splits them.

Made by `python examples/digits/train_backbones.py --backbone clip` ({steps} steps).

Percent right on scenes of nine digits in handwriting that it was not trained on. Linear probes on the patches of the
last but one layer, trained on train handwriting, read the digit and the color from the four patches of a cell, and the
digit from any one of them; "zero-shot" compares the pooled feature with the ten captions of a cell.

{figures}
"""


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    if args.backbone == "clip":
        train_clip(args)
    else:
        train_language_model(args)


if __name__ == "__main__":
    main()
