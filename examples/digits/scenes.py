"""The digits world: small colour pictures composed of real handwriting, with captions, questions and answers.

A scene is a 3x3 grid on a 48x48 RGB canvas. Each cell of 16x16 pixels is empty or holds one scan of
`sklearn.datasets.load_digits`, drawn 12 to 14 pixels large in one of five colors on a dark, slightly noisy background.
The 1,797 scans are split once into train, validation and test handwriting; a scene uses scans of its own split only.

    scenes = sample_scenes(30_000, split="train", seed=0, min_digits=9)     # arrays, not pictures
    pixels = scenes.render()                                                # uint8 [30000, 48, 48, 3], about 2 s
    captions = scenes.captions()                                            # "top-left red three, top-middle ..."
    questions = sample_questions(scenes, per_scene=4, seed=0)               # list[Question], kinds equally likely

Write what the training scripts read (images as PNG, rows as JSON lines):

    python examples/digits/scenes.py --output_dir digits_data --num_scenes 20000 --split train
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = ("red", "green", "blue", "yellow", "purple")
PLACES = (
    "top-left",
    "top-middle",
    "top-right",
    "middle-left",
    "center",
    "middle-right",
    "bottom-left",
    "bottom-middle",
    "bottom-right",
)
KINDS = ("digit", "color", "parity", "object")
"""Question kinds: digit at a place, color at a place, even or odd at a place, color and digit at a place."""
HARD_KINDS = ("where", "color_of", "check")
"""Kinds that the shipped language model does not answer reliably even when told the scene, so that no eye can be
judged by them, asked only where they are named: place of a colored digit that occurs once, color of a digit that
occurs once, yes or no: is there this digit at this place (equally often yes and no)."""
SPLITS = {"train": 1200, "validation": 200, "test": 397}
"""Number of scans in each split of the handwriting."""

CELL = 16
CANVAS = 3 * CELL
EMPTY = -1
CAPTION_INSTRUCTION = "Describe the image."
_RGB = np.array([[235, 60, 55], [60, 205, 80], [75, 115, 255], [245, 215, 60], [200, 85, 235]], dtype=np.int32)
_SIZES = (12, 13, 14)
_SPLIT_SEED = 2305
NUM_PLATES = 256


@cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """The handwriting: `(ink, digits)`, float32 `[1797, 8, 8]` in 0..1 and int64 `[1797]`."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target.astype(np.int64)


@cache
def split_scans(split: str) -> np.ndarray:
    """Indices of the scans of one split, sorted, int64 `[SPLITS[split]]`. Raises `ValueError` for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
    order = np.random.default_rng(_SPLIT_SEED).permutation(sum(SPLITS.values()))
    start = 0
    for name, count in SPLITS.items():
        if name == split:
            break
        start += count
    return np.sort(order[start : start + count])


@cache
def _variants() -> list[tuple[int, int, int]]:
    """(size, row, column) in pixels of every placement of a scan within its cell."""
    return [(s, r, c) for s in _SIZES for r in range(CELL - s + 1) for c in range(CELL - s + 1)]


@cache
def _ink() -> np.ndarray:
    """Every scan in every placement, uint8 `[1797, placements, 16, 16]`, 255 is full ink."""
    scans, _ = load_scans()
    resized = {
        size: np.stack(
            [np.asarray(Image.fromarray(scan).resize((size, size), Image.Resampling.BILINEAR)) for scan in scans]
        )
        for size in _SIZES
    }
    ink = np.zeros((len(scans), len(_variants()), CELL, CELL), dtype=np.uint8)
    for i, (size, row, column) in enumerate(_variants()):
        ink[:, i, row : row + size, column : column + size] = np.clip(resized[size] * 255, 0, 255)
    return ink


@cache
def _plates() -> np.ndarray:
    """Dark noisy backgrounds, uint8 `[256, 48, 48, 3]`."""
    return np.random.default_rng(_SPLIT_SEED).integers(8, 40, size=(NUM_PLATES, CANVAS, CANVAS, 3)).astype(np.uint8)


def compose(ink: np.ndarray, colors: np.ndarray, plates: np.ndarray) -> np.ndarray:
    """Draws cells on backgrounds.

    Args:
        ink: uint8 `[batch, 9, 16, 16]`, 0 where nothing is drawn.
        colors: int `[batch, 9]`, indices into `COLORS`; any value where the cell is empty.
        plates: int `[batch]`, which background.

    Returns:
        uint8 `[batch, 48, 48, 3]`.
    """
    batch = len(ink)
    ink = ink.reshape(batch, 3, 3, CELL, CELL).transpose(0, 1, 3, 2, 4).reshape(batch, CANVAS, CANVAS, 1)
    ink = ink.astype(np.int32)
    paint = _RGB[colors].reshape(batch, 3, 1, 3, 1, 3)
    paint = np.broadcast_to(paint, (batch, 3, CELL, 3, CELL, 3)).reshape(batch, CANVAS, CANVAS, 3)
    background = _plates()[plates].astype(np.int32)
    return (background + (paint - background) * ink // 255).astype(np.uint8)


@dataclass(frozen=True)
class Cell:
    """One drawn digit: `place`, `digit` and `color` are indices into `PLACES`, `DIGITS` and `COLORS`."""

    place: int
    digit: int
    color: int

    def __str__(self) -> str:
        return f"{PLACES[self.place]} {COLORS[self.color]} {DIGITS[self.digit]}"


@dataclass(frozen=True)
class Question:
    """A question about scene number `scene`, its one right answer, and which of `KINDS` or `HARD_KINDS` it is."""

    scene: int
    kind: str
    question: str
    answer: str


def describe(cells: Sequence[Cell]) -> str:
    """The caption of cells in the order given: `"top-left red three, center blue seven"`."""
    return ", ".join(str(cell) for cell in cells)


def ask(cells: Sequence[Cell], kind: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """One random question of one kind with its answer, or None where the scene allows none.

    Places asked about hold a digit; "where" and "color_of" name only what occurs once.
    """
    if kind == "where":
        pairs = [(cell.color, cell.digit) for cell in cells]
        cells = [cell for cell, pair in zip(cells, pairs, strict=True) if pairs.count(pair) == 1]
    elif kind == "color_of":
        digits = [cell.digit for cell in cells]
        cells = [cell for cell in cells if digits.count(cell.digit) == 1]
    elif kind not in (*KINDS, *HARD_KINDS):
        raise ValueError(f"Unknown kind {kind!r}: choose one of {', '.join((*KINDS, *HARD_KINDS))}.")
    if not cells:
        return None
    cell = cells[rng.integers(len(cells))]
    place, digit, color = PLACES[cell.place], DIGITS[cell.digit], COLORS[cell.color]
    if kind == "digit":
        return f"Which digit is at the {place}?", digit
    if kind == "color":
        return f"What color is at the {place}?", color
    if kind == "parity":
        return f"Is the digit at the {place} even or odd?", ("even", "odd")[cell.digit % 2]
    if kind == "object":
        return f"What is at the {place}?", f"{color} {digit}"
    if kind == "where":
        return f"Where is the {color} {digit}?", place
    if kind == "color_of":
        return f"What color is the {digit}?", color
    if rng.random() < 0.5:
        return f"Is there a {digit} at the {place}?", "yes"
    # Half of the wrong digits stand elsewhere in the scene, so that naming what is seen anywhere does not help.
    others = sorted({other.digit for other in cells} - {cell.digit})
    if not others or rng.random() < 0.5:
        others = [other for other in range(len(DIGITS)) if other != cell.digit]
    return f"Is there a {DIGITS[others[rng.integers(len(others))]]} at the {place}?", "no"


@dataclass(frozen=True)
class Scenes:
    """Many scenes as arrays; pictures are made by `render`, text by `captions`.

    Attributes:
        digits: int8 `[num_scenes, 9]`, 0..9, or `EMPTY`.
        colors: int8 `[num_scenes, 9]`, indices into `COLORS`, or `EMPTY`.
        scans: int16 `[num_scenes, 9]`, indices into the 1,797 scans, or `EMPTY`.
        placements: int8 `[num_scenes, 9]`, size and position of the scan within its cell.
        plates: int16 `[num_scenes]`, which background.
    """

    digits: np.ndarray
    colors: np.ndarray
    scans: np.ndarray
    placements: np.ndarray
    plates: np.ndarray

    def __len__(self) -> int:
        return len(self.digits)

    def select(self, indices: np.ndarray | slice) -> "Scenes":
        """The scenes of `indices`, as numpy indexing gives them."""
        fields = ("digits", "colors", "scans", "placements", "plates")
        return replace(self, **{name: getattr(self, name)[indices] for name in fields})

    def cells(self, scene: int) -> list[Cell]:
        """The occupied cells of one scene in reading order."""
        rows = zip(self.digits[scene].tolist(), self.colors[scene].tolist(), strict=True)
        return [Cell(place, digit, color) for place, (digit, color) in enumerate(rows) if digit != EMPTY]

    def captions(self) -> list[str]:
        """One caption per scene: every occupied cell in reading order, empty cells unmentioned."""
        return [describe(self.cells(i)) for i in range(len(self))]

    def render(self) -> np.ndarray:
        """The pictures, uint8 `[num_scenes, 48, 48, 3]`; the same scene always gives the same picture."""
        pixels = np.empty((len(self), CANVAS, CANVAS, 3), dtype=np.uint8)
        for start in range(0, len(self), 512):
            rows = slice(start, start + 512)
            ink = _ink()[self.scans[rows], self.placements[rows]]
            ink = ink * (self.digits[rows] != EMPTY)[:, :, None, None]
            pixels[rows] = compose(ink, self.colors[rows], self.plates[rows])
        return pixels

    def images(self) -> list[Image.Image]:
        """The pictures as PIL images, as processors take them."""
        return [Image.fromarray(pixels) for pixels in self.render()]


def sample_scenes(num_scenes: int, split: str, seed: int, min_digits: int = 1, max_digits: int = 9) -> Scenes:
    """Random scenes from the handwriting of one split.

    Each scene holds `min_digits` to `max_digits` digits (each number equally likely) at random places; digits and
    colors are uniform and independent. 1 to 4 digits make sparse scenes, 9 and 9 full ones of 18 facts each.

    Args:
        num_scenes: how many.
        split: "train", "validation" or "test".
        seed: the same seed, split and limits give the same scenes.
        min_digits, max_digits: 0 <= min_digits <= max_digits <= 9, else `ValueError`.
    """
    if not 0 <= min_digits <= max_digits <= len(PLACES):
        raise ValueError(
            f"A scene holds 0 to {len(PLACES)} digits; got min_digits={min_digits}, max_digits={max_digits}."
        )
    rng = np.random.default_rng([seed, list(SPLITS).index(split) if split in SPLITS else 0])
    own = split_scans(split)
    targets = load_scans()[1]
    by_digit = [own[targets[own] == digit] for digit in range(len(DIGITS))]
    shape = (num_scenes, len(PLACES))
    counts = rng.integers(min_digits, max_digits + 1, size=(num_scenes, 1))
    occupied = rng.random(shape).argsort(axis=1) < counts
    digits = rng.integers(len(DIGITS), size=shape)
    colors = rng.integers(len(COLORS), size=shape)
    sizes = np.array([len(scans) for scans in by_digit])
    table = np.zeros((len(DIGITS), sizes.max()), dtype=np.int64)
    for digit, scans in enumerate(by_digit):
        table[digit, : len(scans)] = scans
    scans = table[digits, (rng.random(shape) * sizes[digits]).astype(np.int64)]
    placements = rng.integers(len(_variants()), size=shape)
    plates = rng.integers(NUM_PLATES, size=num_scenes)
    return Scenes(
        digits=np.where(occupied, digits, EMPTY).astype(np.int8),
        colors=np.where(occupied, colors, EMPTY).astype(np.int8),
        scans=np.where(occupied, scans, EMPTY).astype(np.int16),
        placements=placements.astype(np.int8),
        plates=plates.astype(np.int16),
    )


def sample_questions(scenes: Scenes, per_scene: int, seed: int, kinds: Sequence[str] = KINDS) -> list[Question]:
    """`per_scene` questions about every scene, scene after scene, each of a kind drawn uniformly from `kinds`.

    A kind that a scene does not allow is drawn again; a scene that allows none of the kinds gets no questions.
    """
    rng = np.random.default_rng(seed)
    questions = []
    for scene in range(len(scenes)):
        cells = scenes.cells(scene)
        asked = 0
        while cells and asked < per_scene:
            kind = kinds[rng.integers(len(kinds))]
            pair = ask(cells, kind, rng)
            if pair is None:
                # Only "where" and "color_of" can be impossible; a scene may allow none of the kinds wanted.
                if all(ask(cells, other, rng) is None for other in kinds):
                    break
                continue
            questions.append(Question(scene, kind, *pair))
            asked += 1
    return questions


def caption_rows(scenes: Scenes, images: Sequence) -> Iterator[dict]:
    """`{"image", "caption"}` rows for stage 1; `images[i]` is what stands for scene i: a PIL image or a file name."""
    for image, caption in zip(images, scenes.captions(), strict=True):
        yield {"image": image, "caption": caption}


def question_rows(questions: Sequence[Question], images: Sequence) -> Iterator[dict]:
    """`{"image", "question", "answer", "kind"}` rows for stage 2 and for evaluation."""
    for item in questions:
        yield {
            "image": images[item.scene],
            "question": item.question,
            "answer": item.answer,
            "kind": item.kind,
        }


def conversation_rows(questions: Sequence[Question], images: Sequence) -> Iterator[dict]:
    """`{"image", "messages"}` rows: all questions of a scene as the turns of one conversation."""
    turns: dict[int, list[dict]] = {}
    for item in questions:
        messages = turns.setdefault(item.scene, [])
        content = [{"type": "text", "text": item.question}]
        if not messages:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": item.answer}]})
    for scene, messages in turns.items():
        yield {"image": images[scene], "messages": messages}


def write_scenes(output_dir: str | Path, scenes: Scenes, questions: Sequence[Question]) -> None:
    """Writes `images/*.png`, `captions.jsonl`, `questions.jsonl` and `conversations.jsonl` into `output_dir`.

    Image names in the rows are relative to `output_dir`.
    """
    output_dir = Path(output_dir)
    (output_dir / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{i:06d}.png" for i in range(len(scenes))]
    for name, image in zip(names, scenes.images(), strict=True):
        image.save(output_dir / name)
    rows = {
        "captions.jsonl": caption_rows(scenes, names),
        "questions.jsonl": question_rows(questions, names),
        "conversations.jsonl": conversation_rows(questions, names),
    }
    for name, lines in rows.items():
        with open(output_dir / name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


@dataclass
class ScenesArguments:
    output_dir: str = field(metadata={"help": "Folder for images and JSON lines."})
    num_scenes: int = field(default=20_000, metadata={"help": "How many scenes."})
    questions_per_scene: int = field(default=4, metadata={"help": "How many questions about each scene."})
    split: str = field(default="train", metadata={"help": "Handwriting: train, validation or test."})
    min_digits: int = field(default=1, metadata={"help": "Fewest digits in a scene."})
    max_digits: int = field(default=9, metadata={"help": "Most digits in a scene."})
    seed: int = field(default=0, metadata={"help": "Seed of scenes and questions."})


def main() -> None:
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(ScenesArguments).parse_args_into_dataclasses()
    scenes = sample_scenes(args.num_scenes, args.split, args.seed, args.min_digits, args.max_digits)
    questions = sample_questions(scenes, args.questions_per_scene, args.seed)
    write_scenes(args.output_dir, scenes, questions)
    print(f"{len(scenes)} scenes and {len(questions)} questions written to {args.output_dir}")


if __name__ == "__main__":
    main()
