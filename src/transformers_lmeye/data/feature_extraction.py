"""From rows to a feature cache: each picture opened, preprocessed and shown to the vision tower once."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.utils import logging

from ..modeling.backbones import VisionConfigs, load_part, load_vision_config, load_vision_tower
from ..modeling.configuration_lmeye import LMEyeConfig
from ..modeling.fingerprints import check_fingerprint, fingerprint
from ..modeling.modeling_lmeye import LMEyeForConditionalGeneration
from ..modeling.towers import ImageFeatures, QFormer, read_images
from ..processing.open_clip_image_processing import is_open_clip, open_clip_image_processor
from ..processing.processing_lmeye import LMEyeProcessor
from .features import (
    SEVERAL_SHAPES,
    FeatureCacheWriter,
    describe_cache,
    features_read,
    find_key,
    finish_cache,
    key_columns,
    open_index,
    picture_key,
    read_description,
    start_cache,
    tower_fingerprint,
)
from .images import DEFAULT_MAX_PIXELS, open_image
from .rows import BROKEN_RECORD, ROW_SOURCE, column_names_of
from .samples import BadSample, ConversationReader


BAD_PICTURES = "bad_samples{}.jsonl"
_LONGEST_WAIT = timedelta(days=30)  # of a process that is through, for the others
_LONGEST_SET = 1 << 16

logger = logging.get_logger(__name__)


# --- what is computed ------------------------------------------------------------------------------------------------


@dataclass
class VisionEncoder:
    """A vision tower, the Q-Former behind it where there is one, and what prepares its pictures.

    Args:
        tower, qformer: the frozen encoders, in eval mode.
        image_processor: the tower's.
        fingerprint: of their weights.
        vision_feature_layer: the hidden states that patch tokens are taken from.
        patches: whether patch tokens are computed.
    """

    tower: PreTrainedModel
    qformer: QFormer | None
    image_processor: Any
    fingerprint: str
    vision_feature_layer: int
    patches: bool

    @property
    def features(self) -> list[str]:
        """What is computed of a picture."""
        return ["pooled"] + ["patches"] * self.patches + ["queries"] * (self.qformer is not None)

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, **vision_inputs: torch.Tensor) -> ImageFeatures:
        """The features of `N` pictures, as [`~LMEyeForConditionalGeneration.get_image_features`] gives them."""
        return read_images(
            self.tower, self.qformer, pixel_values, self.vision_feature_layer, self.patches, **vision_inputs
        )

    def to(self, device: torch.device) -> "VisionEncoder":
        """Moves the encoders."""
        self.tower.to(device)
        if self.qformer is not None:
            self.qformer.to(device)
        return self


def load_vision_encoder(
    vision_model_name_or_path: str | None = None,
    model_name_or_path: str | None = None,
    patches: bool | None = None,
    queries: bool | None = None,
    vision_feature_layer: int | None = None,
    dtype: str = "float32",
) -> VisionEncoder:
    """
    Loads what the pictures are shown to; a language model only with a checkpoint that holds all in one.

    Args:
        vision_model_name_or_path: hub id, folder or open_clip name of a vision model; beside `model_name_or_path`,
            where that model's is now.
        model_name_or_path: an LMEye checkpoint, whose vision tower, layer and needs are taken.
        patches, queries: whether patch tokens and a Q-Former's outputs are computed; by default what the checkpoint
            reads, and neither without one.
        vision_feature_layer: the hidden states that patch tokens are taken from; by default the checkpoint's.
        dtype: the vision tower's.

    Raises:
        ValueError: neither model is named; there are no queries without a Q-Former; the vision model is not the one
            that the checkpoint was trained with.
    """
    if model_name_or_path is not None:
        config = LMEyeConfig.from_pretrained(model_name_or_path)
        image_processor = LMEyeProcessor.from_pretrained(model_name_or_path).image_processor
        found, needed = tower_fingerprint(config), features_read(config)
        patches = "patches" in needed if patches is None else patches
        queries = "queries" in needed if queries is None else queries
        configs = VisionConfigs(
            config.vision_config, qformer=config.qformer_config, num_query_tokens=config.num_query_tokens
        )
        layer = config.vision_feature_layer
    elif vision_model_name_or_path is not None:
        configs = load_vision_config(vision_model_name_or_path)
        from_open_clip = is_open_clip(vision_model_name_or_path)
        load_image_processor = open_clip_image_processor if from_open_clip else AutoImageProcessor.from_pretrained
        image_processor = load_image_processor(vision_model_name_or_path)
        found, layer = fingerprint(vision_model_name_or_path)["sampled"], LMEyeConfig.vision_feature_layer
    else:
        raise ValueError("Name a vision model (--vision_model_name_or_path) or a checkpoint (--model_name_or_path).")
    if queries and configs.qformer is None:
        raise ValueError(
            f"{model_name_or_path or vision_model_name_or_path} has no Q-Former, whose outputs the queries are: leave "
            "--queries out, or name a BLIP-2."
        )
    if model_name_or_path is not None and config.includes_backbones:
        model = LMEyeForConditionalGeneration.from_pretrained(model_name_or_path, dtype=dtype)
        tower, qformer = model.vision_tower, model.qformer if queries else None
    else:
        hub = {}
        if model_name_or_path is not None:
            source = config.backbones["vision"]
            if vision_model_name_or_path is None and source["revision"] is not None:
                hub["revision"] = source["revision"]
            vision_model_name_or_path = vision_model_name_or_path or source["name_or_path"]
            check_fingerprint("vision", vision_model_name_or_path, source["fingerprint"], **hub)
        tower = load_vision_tower(vision_model_name_or_path, configs.vision, dtype=dtype, **hub).eval()
        qformer = None
        if queries:
            options = {"num_query_tokens": configs.num_query_tokens, "dtype": torch.float32, **hub}
            qformer = load_part(QFormer, vision_model_name_or_path, configs.qformer, **options).eval()
    layer = layer if vision_feature_layer is None else vision_feature_layer
    return VisionEncoder(tower, qformer, image_processor, found, layer, bool(patches))


# --- which pictures --------------------------------------------------------------------------------------------------


@dataclass
class PictureSource:
    """Rows whose pictures are wanted.

    Args:
        rows: as `load_rows` gives them, map-style or streaming.
        image_column: of the picture or pictures.
        messages_column: of chat messages, which may bring pictures of their own.
        image_folder: where relative paths start.
        name: of the data, said with the row of a bad picture.
    """

    rows: datasets.Dataset | datasets.IterableDataset
    image_column: str = "image"
    messages_column: str = "messages"
    image_folder: str | Path | None = None
    name: str = ""

    def named_rows(self, rank: int = 0, num_ranks: int = 1) -> Iterator[tuple[dict[str, Any], str]]:
        """The rows of one process and their names; each row is that of one process alone."""
        rows, first, part = self.rows, 0, ""
        if isinstance(rows, datasets.Dataset):
            first = len(rows) * rank // num_ranks
            rows = rows.select(range(first, len(rows) * (rank + 1) // num_ranks))
        elif num_ranks > 1:
            rows = split_dataset_by_node(rows, rank, num_ranks)
            part = f" of part {rank} of {num_ranks}"
        for number, row in enumerate(rows, first):
            name = row.pop(ROW_SOURCE, None) or f"row {number}{part}"
            own_id = "" if row.get("id") is None else f" (id {row['id']})"
            yield row, f"{self.name} {name}{own_id}".strip()

    def check_columns(self) -> None:
        """Raises `ValueError` where the rows have no column of pictures."""
        columns = column_names_of(self.rows)
        if {self.image_column, self.messages_column, "conversations"}.isdisjoint(columns):
            raise ValueError(
                f"The data set has no column {self.image_column!r}; it has {', '.join(columns)}. Name the column of "
                "pictures with --image_column, or that of messages which hold them with --messages_column."
            )

    def pictures_of(self, row: dict[str, Any], name: str) -> list[Any]:
        """The pictures of a row, unopened. Raises `ValueError` where the row is broken."""
        in_messages = row.get(self.messages_column) is not None or row.get("conversations") is not None
        if in_messages or row.get(BROKEN_RECORD) is not None:
            reader = ConversationReader(self.image_column, self.messages_column, open_image=_unopened)
            messages = reader.read(row, 0, name)["messages"]
            return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        pictures = row.get(self.image_column)
        pictures = pictures if isinstance(pictures, list) else [pictures]
        return [picture for picture in pictures if picture is not None and picture != ""]


def _unopened(value: Any) -> Any:
    return value


@dataclass
class _Task:
    """A picture to be opened."""

    key: bytes
    name: str
    value: Any
    image_folder: str | Path | None


class _Tasks:
    """
    The pictures of all sources that this process is to open, each once: those in the cache already are left out.

    Where pictures are paths, rows are cheap to read: every process reads them all, and takes the pictures that its
    share of the keys says, so that none is opened by two. Where rows hold the files themselves each process reads its
    own rows; a picture in rows of several processes is then computed by each, and found once.
    """

    def __init__(
        self, sources: Sequence[PictureSource], root: str | Path | None, folder: Path, rank: int, num_ranks: int
    ):
        self.sources, self.root, self.rank, self.num_ranks = sources, root, rank, num_ranks
        self.index = open_index(folder)
        self.num_met = 0
        self._bad: list[BadSample] = []

    def __iter__(self) -> Iterator[_Task]:
        met = _KeySet()
        for source in self.sources:
            by_key = self.num_ranks > 1 and self._holds_paths(source)
            for row, name in source.named_rows(*(() if by_key else (self.rank, self.num_ranks))):
                try:
                    pictures = source.pictures_of(row, name)
                    keys = [picture_key(picture, source.image_folder, self.root) for picture in pictures]
                except ValueError as error:
                    if not by_key or self.rank == 0:
                        self._bad.append(BadSample.from_error(name, error))
                    continue
                for key, picture in zip(keys, pictures, strict=True):
                    if by_key and int.from_bytes(key[:8]) % self.num_ranks != self.rank:
                        continue
                    self.num_met += 1
                    if key in met or find_key(self.index, key) is not None:
                        continue
                    met.add(key)
                    yield _Task(key, name, picture, source.image_folder)

    def take_bad(self) -> list[BadSample]:
        """The rows that were found bad since this was asked last, before a picture of theirs was opened."""
        bad, self._bad = self._bad, []
        return bad

    @staticmethod
    def _holds_paths(source: PictureSource) -> bool:
        """Whether the first picture of a source is a path."""
        for row, name in source.named_rows():
            try:
                pictures = source.pictures_of(row, name)
            except ValueError:
                continue
            if pictures:
                picture = pictures[0]
                return not isinstance(picture.get("bytes") if isinstance(picture, dict) else picture, bytes)
        return True


class _KeySet:
    """Keys met so far, 16 bytes each in sorted runs."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []  # int64 [2, n], sorted by the first row; each at least twice the next
        self._recent: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._recent or any(find_key(run, key) is not None for run in self._runs)

    def add(self, key: bytes) -> None:
        self._recent.add(key)
        if len(self._recent) < _LONGEST_SET:
            return
        run = key_columns(self._recent)
        self._recent.clear()
        while self._runs and self._runs[-1].shape[1] < 2 * run.shape[1]:
            run = np.concatenate([self._runs.pop(), run], axis=1)
        self._runs.append(run[:, np.argsort(run[0], kind="stable")])


# --- the run ---------------------------------------------------------------------------------------------------------


class _Opener(Dataset):
    """Opens and preprocesses pictures in the data loader's workers."""

    def __init__(self, image_processor: Any, max_pixels: int):
        self.image_processor, self.max_pixels = image_processor, max_pixels

    def __getitem__(self, task: _Task) -> tuple[bytes, dict[str, torch.Tensor]] | BadSample:
        try:
            image = open_image(task.value, task.image_folder, self.max_pixels)
            return task.key, dict(self.image_processor([image], return_tensors="pt"))
        except ValueError as error:
            return BadSample.from_error(task.name, error)


def _as_batch(
    opened: list[tuple[bytes, dict[str, torch.Tensor]] | BadSample],
) -> tuple[list[bytes], dict[str, torch.Tensor], list[BadSample]]:
    """The keys of the pictures that could be opened, what the vision tower takes of them, and the others."""
    bad = [picture for picture in opened if isinstance(picture, BadSample)]
    good = [picture for picture in opened if not isinstance(picture, BadSample)]
    if len({inputs["pixel_values"].shape for _, inputs in good}) > 1:
        raise ValueError(SEVERAL_SHAPES)
    inputs = {name: torch.cat([inputs[name] for _, inputs in good]) for name in good[0][1]} if good else {}
    return [key for key, _ in good], inputs, bad


class _BadPictures:
    """Records bad pictures, and stops the run where there are more than the user allows.

    Args:
        path: of the record.
        max_fraction: the share of the pictures met that may be bad, of the first 1,000 (or of all rows, where there
            are fewer) at least.
        num_rows: how many rows there are, where it is known.
    """

    def __init__(self, path: Path, max_fraction: float, num_rows: int | None):
        self.path, self.max_fraction, self.count = path, max_fraction, 0
        self.fewest = 1000 if num_rows is None else min(num_rows, 1000)
        path.write_text("")

    def record(self, bad: Sequence[BadSample], num_met: int) -> None:
        """Takes the bad ones of `num_met` pictures, as they are found. Raises `ValueError` where they are too many."""
        if not bad:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            for sample in bad:
                file.write(json.dumps(sample.as_dict(), ensure_ascii=False) + "\n")
                logger.warning(f"{sample.id} is left out ({sample.kind}): {sample.reason}")
        self.count += len(bad)
        allowed = math.floor(self.max_fraction * max(num_met, self.fewest) + 1e-9)
        if self.count > allowed:
            raise ValueError(
                f"{self.count} of {num_met} pictures could not be read, and max_bad_fraction={self.max_fraction} "
                f"allows {allowed}. The last: {bad[-1].reason.rstrip('.')}. {self.path} names them all. Repair the "
                "data, or raise --max_bad_fraction."
            )


def extract_features(
    encoder: VisionEncoder,
    sources: Sequence[PictureSource],
    folder: str | Path,
    root: str | Path | None = None,
    dtype: str | None = None,
    batch_size: int = 64,
    shard_size: int = 2048,
    num_workers: int = 0,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_bad_fraction: float = 0.01,
    use_cpu: bool = False,
) -> dict[str, Any]:
    """
    Writes the features of all pictures of some rows into a cache, or adds those that it lacks.

    Every process of a launch calls this; what each does follows from its rank. A run that was stopped is run again: it
    loses the shard that each process was in. Pictures that cannot be read are named in `bad_samples.jsonl`.

    Args:
        encoder: what the pictures are shown to.
        sources: where they are.
        folder: of the cache.
        root: what paths are kept relative to, so that data and cache may move; by default each source's image folder.
        dtype: of the features on disk, `"float32"`, `"bfloat16"` or `"float16"`; by default the vision tower's.
        batch_size: pictures shown to the tower at once.
        shard_size: pictures in a file; as many are lost at most, per process, when a run is stopped.
        num_workers: processes that open pictures, for each process of the launch.
        max_pixels: a picture of more is bad.
        max_bad_fraction: the share of the pictures (of 1,000, or of all rows, where there are fewer) that may be bad
            before a process stops; 0: the first one stops it.
        use_cpu: whether to leave accelerators alone.

    Returns:
        `dict`: the description of the cache, as in `feature_cache.json`, and `"num_added"`, its new pictures.

    Raises:
        ValueError: too many pictures are bad; the folder holds a cache made with something else; the rows have no
            column of pictures; features are not finite in the dtype.
    """
    state = PartialState(cpu=use_cpu or not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RuntimeError(
            f"{os.environ['WORLD_SIZE']} processes were launched and {state.num_processes} work together: a "
            "PartialState or Accelerator was made before with other arguments. Make none before extract_features."
        )
    folder = Path(folder)
    for source in sources:
        source.check_columns()
    description = describe_cache(
        encoder.fingerprint,
        encoder.image_processor,
        encoder.vision_feature_layer,
        encoder.features,
        dtype=encoder.tower.dtype if dtype is None else getattr(torch, dtype),
        tower_dtype=encoder.tower.dtype,
    )
    if state.is_main_process:
        if num_found := start_cache(folder, description):
            logger.warning(f"{folder} holds the features of {num_found:,} pictures already: the others are added.")
        for file in folder.glob(BAD_PICTURES.format("*")):
            file.unlink()
    state.wait_for_everyone()
    rank, num_ranks = state.process_index, state.num_processes
    tasks = _Tasks(sources, root, folder, rank, num_ranks)
    writer = FeatureCacheWriter(folder, description, shard_size, rank, num_ranks)
    num_rows = [len(s.rows) if isinstance(s.rows, datasets.Dataset) else None for s in sources]
    bad_pictures = _BadPictures(
        folder / BAD_PICTURES.format(f"-{rank}" if num_ranks > 1 else ""),
        max_bad_fraction,
        None if None in num_rows else sum(num_rows),
    )
    state.wait_for_everyone()
    encoder.to(state.device)
    loader = DataLoader(
        _Opener(encoder.image_processor, max_pixels),
        batch_size=batch_size,
        sampler=tasks,
        num_workers=num_workers,
        collate_fn=_as_batch,
    )
    with logging.tqdm(unit=" pictures", disable=not state.is_main_process or None) as progress:
        for keys, inputs, bad in loader:
            if keys:
                writer.add(keys, encoder(**inputs))
            bad_pictures.record(bad + tasks.take_bad(), tasks.num_met)
            progress.update(len(keys))
    bad_pictures.record(tasks.take_bad(), tasks.num_met)
    writer.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        if num_ranks > 1:
            parts = [folder / BAD_PICTURES.format(f"-{number}") for number in range(num_ranks)]
            (folder / BAD_PICTURES.format("")).write_text("".join(part.read_text("utf-8") for part in parts), "utf-8")
            for part in parts:
                part.unlink()
        with open(folder / BAD_PICTURES.format(""), encoding="utf-8") as file:
            num_bad = sum(1 for _ in file)
        finish_cache(folder, description, num_bad_pictures=num_bad)
    state.wait_for_everyone()
    found = read_description(folder)
    return {**found, "num_added": found["num_pictures"] - tasks.index.shape[1]}


__all__ = ["PictureSource", "VisionEncoder", "extract_features", "load_vision_encoder"]
