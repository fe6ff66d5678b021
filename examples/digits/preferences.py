"""Preference pairs of the digits world: true descriptions and answers, and twins with objects the scene does not show.

    python examples/digits/preferences.py --output_dir outputs/preferences --num_scenes 2000

writes `images/*.png` and `preferences.jsonl`, which `examples/run_dpo.py` reads. The object put in is any colored
digit that is not in the scene, each equally often, as scenes are drawn: by words alone neither side can be told.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scenes import CAPTION_INSTRUCTION, COLORS, DIGITS, PLACES, Cell, Scenes, describe, sample_scenes

from transformers_lmeye.data.writing import write_rows


KINDS = ("caption", "object")


def swap_cells(cells: Sequence[Cell], places: Sequence[int], rng: np.random.Generator) -> list[Cell]:
    """Cells of which those at `places` (numbers of cells) hold an object that none of `cells` holds."""
    shown = {(cell.color, cell.digit) for cell in cells}
    others = [
        (color, digit) for color in range(len(COLORS)) for digit in range(len(DIGITS)) if (color, digit) not in shown
    ]
    swapped = list(cells)
    for place in places:
        color, digit = others[rng.integers(len(others))]
        swapped[place] = replace(cells[place], color=color, digit=digit)
    return swapped


def preference_rows(
    scenes: Scenes, images: Sequence[Any], seed: int, kinds: Sequence[str] = KINDS, num_swaps: int = 1
) -> Iterator[dict[str, Any]]:
    """
    One pair of each kind for every scene that holds a digit.

    Args:
        scenes: what the pictures show.
        images: `images[i]` stands for scene i: a PIL image or a file name.
        seed: of what is asked and what is swapped.
        kinds: `"caption"`, the whole scene; `"object"`, what is at one of its places.
        num_swaps: objects of a caption that are swapped.

    Yields:
        `{"image", "kind", "prompt", "chosen", "rejected"}`, the last three lists of messages.
    """
    rng = np.random.default_rng(seed)
    for scene, image in enumerate(images):
        cells = scenes.cells(scene)
        if not cells:
            continue
        for kind in kinds:
            if kind == "caption":
                places = rng.choice(len(cells), size=min(num_swaps, len(cells)), replace=False).tolist()
                question = CAPTION_INSTRUCTION
                answers = [describe(told) for told in (cells, swap_cells(cells, places, rng))]
            else:
                place = int(rng.integers(len(cells)))
                question = f"What is at the {PLACES[cells[place].place]}?"
                told = (cells[place], swap_cells(cells, [place], rng)[place])
                answers = [f"{COLORS[cell.color]} {DIGITS[cell.digit]}" for cell in told]
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chosen, rejected = (
                [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] for answer in answers
            )
            prompt = [{"role": "user", "content": content}]
            yield {"image": image, "kind": kind, "prompt": prompt, "chosen": chosen, "rejected": rejected}


@dataclass
class PreferencesArguments:
    output_dir: str = field(metadata={"help": "Folder for images and JSON lines."})
    num_scenes: int = field(default=2000, metadata={"help": "How many scenes."})
    split: str = field(default="train", metadata={"help": "Handwriting: train, validation or test."})
    min_digits: int = field(default=1, metadata={"help": "Fewest digits in a scene."})
    max_digits: int = field(default=3, metadata={"help": "Most digits in a scene."})
    kinds: list[str] = field(default_factory=lambda: list(KINDS), metadata={"help": f"Some of {', '.join(KINDS)}."})
    num_swaps: int = field(default=1, metadata={"help": "Objects of a caption that are swapped."})
    mismatched: bool = field(
        default=False, metadata={"help": "Show another scene's picture with each pair: what is told without seeing."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of scenes and swaps."})


def main() -> None:
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(PreferencesArguments).parse_args_into_dataclasses()
    scenes = sample_scenes(args.num_scenes, args.split, args.seed, args.min_digits, args.max_digits)
    folder = Path(args.output_dir)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{i:06d}.png" for i in range(len(scenes))]
    for name, image in zip(names, scenes.images(), strict=True):
        image.save(folder / name)
    if args.mismatched:
        names = [*names[1:], names[0]]
    rows = preference_rows(scenes, names, args.seed, args.kinds, args.num_swaps)
    count = write_rows(rows, folder / "preferences.jsonl")
    print(f"{count} pairs of {len(scenes)} scenes written to {folder}")


if __name__ == "__main__":
    main()
