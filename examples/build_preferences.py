"""Preference pairs against hallucination: captions, and twins in which an object is swapped (docs/trl.md).

Objects are those of a file, one on a line, synonyms behind a comma (`person, man, woman`), or what the data set's own
annotations name:

    python examples/build_preferences.py \
        --dataset_name_or_path photos.jsonl --image_column file --caption_column captions --objects_column instances \
        --output_file preferences.jsonl
    python examples/run_dpo.py \
        --model_name_or_path outputs/opt-instruct \
        --dataset_name_or_path preferences.jsonl --image_folder . \
        --output_dir outputs/opt-dpo
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser

from transformers_lmeye.data import load_rows
from transformers_lmeye.data.matching import CaptionReader
from transformers_lmeye.data.preferences import (
    PREFERENCE_PROMPT,
    Vocabulary,
    annotation_vocabulary,
    index_objects,
    preference_rows,
)
from transformers_lmeye.data.rows import image_folder_of
from transformers_lmeye.data.writing import write_rows


@dataclass
class PreferenceArguments:
    dataset_name_or_path: str = field(metadata={"help": "Captions, in any form that run_pretrain.py reads."})
    output_file: str = field(metadata={"help": "Ends with .jsonl, or with .parquet, which pictures in bytes need."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    split: str = field(default="train", metadata={"help": "Split; objects put in are those its captions name."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative image paths start; without it the folder of the data file."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the picture."})
    caption_column: str = field(default="caption", metadata={"help": "Column of the caption or captions."})
    lists: Literal["all", "first"] = field(
        default="all", metadata={"help": "Which captions of a list get a pair: each, or the first alone."}
    )
    image_id_column: str | None = field(
        default=None, metadata={"help": "Column with a name for the picture: rows with equal names show the same."}
    )
    identity: Literal["content", "path"] = field(
        default="content",
        metadata={"help": "What makes pictures the same without --image_id_column: equal bytes, or equal paths."},
    )
    objects_column: str | None = field(
        default=None, metadata={"help": "Column of what a picture shows: names, or boxes with a category or label."}
    )
    vocabulary_file: str | None = field(
        default=None, metadata={"help": "Objects, one on a line, synonyms behind commas; else those of the column."}
    )
    prompt: str = field(default=PREFERENCE_PROMPT, metadata={"help": "What both captions answer."})
    num_swaps: int = field(default=1, metadata={"help": "Objects of a caption that are swapped."})
    seed: int = field(default=0, metadata={"help": "Equal seeds give equal files."})


def main() -> None:
    (args,) = HfArgumentParser(PreferenceArguments).parse_args_into_dataclasses()

    rows = load_rows(args.dataset_name_or_path, args.dataset_config_name, args.split)
    image_folder = args.image_folder or image_folder_of(args.dataset_name_or_path)
    reader = CaptionReader(
        args.image_column, args.caption_column, args.lists, image_folder, args.image_id_column, args.identity
    )
    reader.check_columns(rows.column_names)
    if args.objects_column is not None and args.objects_column not in rows.column_names:
        raise ValueError(
            f"The data set has no column {args.objects_column!r}; it has {', '.join(rows.column_names)}. "
            "Name the right one with --objects_column."
        )
    if args.vocabulary_file is not None:
        lines = Path(args.vocabulary_file).read_text(encoding="utf-8").splitlines()
        vocabulary = Vocabulary([part.strip() for part in line.split(",")] for line in lines if line.strip())
    elif args.objects_column is not None:
        vocabulary = annotation_vocabulary(rows, args.objects_column)
    else:
        raise ValueError("Objects come from --vocabulary_file, from --objects_column, or from both: name one.")

    index = index_objects(rows, reader, vocabulary, args.objects_column)
    counts: Counter[str] = Counter()
    pairs = preference_rows(rows, reader, vocabulary, index, args.prompt, args.num_swaps, args.seed, counts)
    write_rows(pairs, args.output_file)

    print(f"{len(vocabulary)} objects, {len(index.shown)} pictures: {args.output_file}")
    for what, count in sorted(counts.items()):
        print(f"{what}: {count}")
    if image_folder is not None:
        print(f"Image paths start at {image_folder}: train with --image_folder {image_folder}")


if __name__ == "__main__":
    main()
