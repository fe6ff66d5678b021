"""Stage-2 data from captions: True-or-False and four-choice semantic matching (docs/building-data.md).

From any captions that run_pretrain.py reads:

    python examples/build_matching.py \
        --dataset_name_or_path pairs.jsonl \
        --output_file matching.jsonl
    python examples/run_instruct.py \
        --model_name_or_path outputs/opt-pretrain \
        --dataset_name_or_path matching.jsonl --image_folder . \
        --output_dir outputs/opt-instruct

Wrong captions that resemble the right one: `--hard_negatives tfidf`, or a CLIP's name in place of `tfidf`.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser

from transformers_lmeye.data import load_rows
from transformers_lmeye.data.matching import (
    MATCHING_KINDS,
    CaptionReader,
    clip_text_features,
    index_captions,
    matching_features,
    matching_rows,
    tfidf_features,
)
from transformers_lmeye.data.rows import image_folder_of
from transformers_lmeye.data.writing import write_rows


@dataclass
class MatchingArguments:
    dataset_name_or_path: str = field(metadata={"help": "Captions, in any form that run_pretrain.py reads."})
    output_file: str = field(metadata={"help": "Ends with .jsonl, or with .parquet, which pictures in bytes need."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    split: str = field(default="train", metadata={"help": "Split; wrong captions come from the same one."})
    streaming: bool = field(default=False, metadata={"help": "Read the data set without keeping a copy of it."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative image paths start; without it the folder of the data file."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the picture."})
    caption_column: str = field(default="caption", metadata={"help": "Column of the caption or captions."})
    lists: Literal["all", "first"] = field(
        default="all", metadata={"help": "Which captions of a list are matched: each, or the first alone."}
    )
    image_id_column: str | None = field(
        default=None, metadata={"help": "Column with a name for the picture: rows with equal names show the same."}
    )
    identity: Literal["content", "path"] = field(
        default="content",
        metadata={"help": "What makes pictures the same without --image_id_column: equal bytes, or equal paths."},
    )
    kinds: list[str] = field(
        default_factory=lambda: list(MATCHING_KINDS), metadata={"help": f"Some of {', '.join(MATCHING_KINDS)}."}
    )
    hard_negatives: str | None = field(
        default=None,
        metadata={"help": "Draw wrong captions among the nearest: by tfidf, or by the CLIP of this name or folder."},
    )
    num_neighbors: int = field(default=32, metadata={"help": "How many nearest captions are drawn from."})
    max_similarity: float = field(
        default=0.5, metadata={"help": "A caption of greater cosine with one of the picture's may be right: left out."}
    )
    window_size: int = field(default=20_000, metadata={"help": "How many captions wrong ones are drawn from."})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out rows that cannot be read, and list them beside the output file."}
    )
    device: str = field(default="cpu", metadata={"help": "Where the CLIP of --hard_negatives runs."})
    seed: int = field(default=0, metadata={"help": "Equal seeds give equal files."})


def main() -> None:
    (args,) = HfArgumentParser(MatchingArguments).parse_args_into_dataclasses()

    rows = load_rows(args.dataset_name_or_path, args.dataset_config_name, args.split, streaming=args.streaming)
    image_folder = args.image_folder or image_folder_of(args.dataset_name_or_path)
    reader = CaptionReader(
        args.image_column, args.caption_column, args.lists, image_folder, args.image_id_column, args.identity
    )
    if rows.column_names is not None:
        reader.check_columns(rows.column_names)
    bad_rows: list[dict] = []

    def note(row: int, reason: str) -> None:
        bad_rows.append({"row": row, "reason": reason})

    index = index_captions(rows, reader, note if args.skip_bad_rows else None)
    features = None
    if args.hard_negatives == "tfidf":
        features = tfidf_features
    elif args.hard_negatives is not None:
        features = clip_text_features(args.hard_negatives, args.device)
    counts: Counter[str] = Counter()
    matching = matching_rows(
        rows,
        reader,
        index,
        args.kinds,
        features=features,
        num_neighbors=args.num_neighbors,
        max_similarity=args.max_similarity,
        window_size=args.window_size,
        seed=args.seed,
        counts=counts,
    )
    first = next(matching)
    num_written = write_rows(chain([first], matching), args.output_file, matching_features(first["image"]))

    print(
        f"{index.num_captions} captions of {index.num_pictures} pictures gave {num_written} rows: {args.output_file}"
    )
    for reason, count in sorted(counts.items()):
        print(f"wrong captions {reason}: {count}")
    if bad_rows:
        bad_file = Path(args.output_file).with_suffix(".bad_rows.jsonl")
        write_rows(bad_rows, bad_file)
        print(f"{len(bad_rows)} rows could not be read and were left out: {bad_file}")
    if isinstance(first["image"], str) and image_folder is not None:
        print(f"Image paths start at {image_folder}: train with --image_folder {image_folder}")


if __name__ == "__main__":
    main()
