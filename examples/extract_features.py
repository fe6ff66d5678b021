"""Features of all pictures of a data set, computed once: the vision tower is frozen, so its outputs never change.

Takes the data flags of run_pretrain.py or run_instruct.py as they are (those about texts have no effect here), for the
training and the evaluation rows. The vision tower is that of a checkpoint, or of a model that is yet to be made:

    python examples/extract_features.py \
        --vision_model_name_or_path openai/clip-vit-large-patch14 --dtype bfloat16 \
        --dataset_name_or_path pairs.jsonl --output_dir features

    python examples/run_pretrain.py ... --dataset_name_or_path pairs.jsonl --feature_cache features

With a checkpoint, whatever its stage 2 reads is stored, patch tokens and a Q-Former's outputs among it:

    python examples/extract_features.py \
        --model_name_or_path outputs/opt-pretrain --dtype bfloat16 \
        --dataset_name_or_path llava_instruct_150k.json --image_folder coco/train2017 --output_dir features

Several GPUs: `accelerate launch --num_processes 8 examples/extract_features.py ...`. A run that was stopped goes on
when it is started again; rows that were added later are added to the cache. See docs/feature-cache.md.
"""

import time
from dataclasses import dataclass, field
from typing import Literal

from accelerate import PartialState
from transformers import HfArgumentParser

from transformers_lmeye.data import load_rows
from transformers_lmeye.data.feature_extraction import PictureSource, extract_features, load_vision_encoder
from transformers_lmeye.training import ConversationDataArguments, PairDataArguments


@dataclass
class ExtractionArguments:
    output_dir: str = field(metadata={"help": "Folder of the feature cache."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "LMEye checkpoint whose vision tower, layer and needs are taken."}
    )
    vision_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Vision model of a model yet to be made; beside a checkpoint, where its vision model is now."
        },
    )
    patches: bool | None = field(
        default=None, metadata={"help": "Store patch tokens; by default if the checkpoint reads them."}
    )
    queries: bool | None = field(
        default=None,
        metadata={"help": "Store the outputs of BLIP-2's Q-Former; by default if the checkpoint reads them."},
    )
    vision_feature_layer: int | None = field(
        default=None,
        metadata={"help": "Hidden states that patch tokens are taken from; by default the checkpoint's, -2."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "dtype of the vision tower."}
    )
    storage_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "dtype of the features on disk; by default that of the vision tower."}
    )
    batch_size: int = field(default=64, metadata={"help": "Pictures shown to the vision tower at once."})
    shard_size: int = field(
        default=2048,
        metadata={"help": "Pictures in a file; a run that is stopped loses as many at most, in each process."},
    )
    num_workers: int = field(default=4, metadata={"help": "Processes that open pictures, for each GPU."})
    max_bad_fraction: float = field(
        default=0.01,
        metadata={
            "help": "Share of the pictures (of 1,000 where there are fewer) that may be unreadable before the run "
            "stops; each is named in bad_samples.jsonl. 0: the first one stops it."
        },
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})


@dataclass
class RowArguments(PairDataArguments, ConversationDataArguments):
    """The data flags of both stages."""

    def sources(self) -> list[PictureSource]:
        """The training and the evaluation rows."""
        columns = {"image_column": self.image_column, "messages_column": self.messages_column}
        rows = load_rows(self.dataset_name_or_path, self.dataset_config_name, self.train_split, self.streaming)
        sources = [PictureSource(rows, image_folder=self.image_folder_of(), **columns)]
        if (rows := self.eval_rows()) is not None:
            folder = self.image_folder_of(evaluation=True)
            sources.append(PictureSource(rows, image_folder=folder, name="evaluation", **columns))
        return sources


def main() -> None:
    parser = HfArgumentParser((ExtractionArguments, RowArguments))
    args, data_args = parser.parse_args_into_dataclasses()

    encoder = load_vision_encoder(
        args.vision_model_name_or_path,
        args.model_name_or_path,
        patches=args.patches,
        queries=args.queries,
        vision_feature_layer=args.vision_feature_layer,
        dtype=args.dtype,
    )
    began = time.perf_counter()
    cache = extract_features(
        encoder,
        data_args.sources(),
        args.output_dir,
        root=data_args.image_root(),
        dtype=args.storage_dtype,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        num_workers=args.num_workers,
        max_pixels=data_args.max_pixels,
        max_bad_fraction=args.max_bad_fraction,
        use_cpu=args.use_cpu,
    )
    if PartialState().is_main_process:
        seconds = time.perf_counter() - began
        print(
            f"{args.output_dir} holds {', '.join(cache['features'])} of {cache['num_pictures']:,} pictures, "
            f"{cache['num_added']:,} of them new ({cache['num_added'] / seconds:.1f} a second); "
            f"{cache['num_bad_pictures']:,} could not be read."
        )


if __name__ == "__main__":
    main()
