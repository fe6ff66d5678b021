"""Outputs of the frozen vision tower, computed once and read from disk in place of pictures.

A cache is a folder, written by `examples/extract_features.py`:

    feature_cache.json            what the features were made with, their shapes, how many pictures there are
    index.npy                     where each picture is: int64 [3, pictures], sorted
    features-000000.safetensors   a shard: pooled [n, d_p], patches [n, P, d_v], .., picture_keys int64 [n, 2]
    bad_samples.jsonl             the pictures that could not be read, each with its reason

Index and shards are read through memory maps: memory does not grow with the number of pictures.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..modeling.configuration_lmeye import LMEyeConfig
from ..modeling.modeling_lmeye import LMEyeForConditionalGeneration
from ..modeling.towers import ImageFeatures, uses_patches
from ..processing.processing_lmeye import LMEyeProcessor
from .images import UnreadableImage


FORMAT = 1
DESCRIPTION, INDEX = "feature_cache.json", "index.npy"
_PARTIAL = ".partial"
_PICTURE_KEYS = "picture_keys"
# What an image processor's configuration says besides how pictures are prepared.
_VOLATILE = ("auto_map", "processor_class", "_processor_class", "_name_or_path", "name_or_path")
_COMMAND = "examples/extract_features.py"
SEVERAL_SHAPES = "A feature cache needs an image processor that brings all pictures to one size."


# --- what a picture and a cache are known by ------------------------------------------------------------------------


def picture_key(value: Any, image_folder: str | Path | None = None, root: str | Path | None = None) -> bytes:
    """
    What a picture is found by in a cache, 16 bytes: a sha256's beginning.

    A picture given as bytes is known by its bytes. One given as a path is known by the path, relative to `root` and
    with forward slashes: the file itself is not looked at.

    Args:
        value: a picture as rows hold it: a path, the bytes of a file, or a `{"bytes", "path"}` dict.
        image_folder: where the row's relative paths start.
        root: what the cache's paths are relative to; by default `image_folder`, and without either a path is taken as
            it is written.

    Raises:
        UnreadableImage: the value is neither.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        digest = hashlib.sha256(value)
    elif isinstance(value, str | Path) and str(value):
        path = os.path.normpath(os.path.join(image_folder or "", value))
        root = image_folder if root is None else root
        if root is not None:
            path = os.path.relpath(path, root)
        digest = hashlib.sha256(b"path:" + path.replace(os.sep, "/").encode())
    else:
        raise UnreadableImage(
            f"A feature cache knows pictures by path or by the bytes of their file; got {value!r:.80}.",
            "missing" if value is None or value == "" else "wrong type",
        )
    return digest.digest()[:16]


def preprocessing_of(image_processor: Any) -> dict[str, Any]:
    """An image processor's configuration as plain JSON, without what says nothing about how pictures are prepared."""
    options = json.loads(json.dumps(image_processor.to_dict(), default=str))
    return {name: options[name] for name in sorted(options) if options[name] is not None and name not in _VOLATILE}


def describe_cache(
    tower: str,
    image_processor: Any,
    vision_feature_layer: int,
    features: list[str],
    dtype: torch.dtype,
    tower_dtype: torch.dtype,
) -> dict[str, Any]:
    """
    The description of a cache that holds nothing yet.

    Args:
        tower: fingerprint of the vision model's weights, `config.backbones["vision"]["fingerprint"]["sampled"]`. The
            weights of a Q-Former are among them.
        image_processor: the vision tower's.
        vision_feature_layer: the hidden states that patch tokens are taken from.
        features: which are stored, `"pooled"`, `"patches"`, `"queries"`.
        dtype: of the features on disk.
        tower_dtype: that the vision tower runs in.

    Returns:
        `dict`: what makes two caches different, and `"key"`, the sha256 of all that.
    """
    made_with = {
        "format": FORMAT,
        "tower": tower,
        "preprocessing": preprocessing_of(image_processor),
        "features": features,
        "vision_feature_layer": vision_feature_layer if "patches" in features else None,
        "dtype": str(dtype).removeprefix("torch."),
        "tower_dtype": str(tower_dtype).removeprefix("torch."),
    }
    key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
    return {**made_with, "key": key}


def features_read(config: LMEyeConfig, stage: Literal["pretrain", "instruct"] | None = None) -> set[str]:
    """
    Which of a picture's features a model reads.

    Args:
        config: the model's.
        stage: in stage `"pretrain"` no request is asked, so that only what the static mapping reads is needed.
    """
    patches, queries = uses_patches(config), config.qformer_config is not None
    if stage == "pretrain":
        patches, queries = config.visual_mapping in ("patch", "resampler"), config.visual_mapping == "qformer"
    return {"pooled"} | ({"patches"} if patches else set()) | ({"queries"} if queries else set())


def tower_fingerprint(config: LMEyeConfig) -> str:
    """
    What identifies the weights of a model's vision tower, and of its Q-Former.

    Raises:
        ValueError: the model does not know where its vision tower came from.
    """
    if not config.backbones:
        raise ValueError(
            "The model does not record where its vision tower came from (config.backbones), so nothing tells whether "
            "cached features are that tower's: build it with from_vision_language_pretrained, or train from pictures."
        )
    return config.backbones["vision"]["fingerprint"]["sampled"]


# --- reading ---------------------------------------------------------------------------------------------------------


class FeatureCache:
    """
    Features of pictures by what their rows say of them: called as `open_image` is, it gives [`ImageFeatures`].

    Args:
        folder: of the cache.
        root: what the paths of its pictures are relative to, as when they were extracted (see [`picture_key`]).
        names: which features are read; all that there are by default.

    Raises:
        ValueError: there is no cache in the folder, or it is not finished.
    """

    def __init__(self, folder: str | Path, root: str | Path | None = None, names: Sequence[str] | None = None):
        self.folder, self.root = Path(folder), root
        self.description = read_description(self.folder)
        if not self.description["complete"]:
            raise ValueError(
                f"The feature cache {folder} is not finished: run {_COMMAND} again with the same arguments, it goes "
                "on where it stopped."
            )
        wanted = set(self.description["shapes"] if names is None else names)
        self.names = [name for name in self.description["shapes"] if name in wanted]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        model: LMEyeForConditionalGeneration,
        processor: LMEyeProcessor,
        root: str | Path | None = None,
        stage: Literal["pretrain", "instruct"] | None = None,
    ) -> "FeatureCache":
        """
        Opens a cache for a model, if it holds what the model's own vision tower would make of the pictures.

        Args:
            folder: of the cache.
            model, processor: what the features are for. Of the model only the configuration is read.
            root: what the paths of its pictures are relative to, as when they were extracted (see [`picture_key`]).
            stage: `"pretrain"` if only the static mapping reads the features, as in stage 1: a cache of pooled
                features is then enough for a model whose interaction reads patches.

        Raises:
            ValueError: the cache was made by another vision tower, with other preprocessing or of another layer; it
                lacks features that the model reads; it is not finished; there is none.
        """
        names = features_read(model.config, stage)
        cache = cls(folder, root)
        made_with = cache.description
        other = f"The feature cache {folder} is not this model's: "
        remedy = f"Extract the features anew into another folder ({_COMMAND}), or train from pictures."
        found = tower_fingerprint(model.config)
        if found != made_with["tower"]:
            raise ValueError(
                f"{other}it was made by another vision tower, with fingerprint {made_with['tower'][:12]}, and "
                f"{model.config.backbones['vision']['name_or_path']} has {found[:12]}. {remedy}"
            )
        if differences := _differences(made_with["preprocessing"], preprocessing_of(processor.image_processor)):
            raise ValueError(f"{other}its pictures were preprocessed in another way ({differences}). {remedy}")
        if missing := sorted(names.difference(made_with["features"])):
            raise ValueError(
                f"The feature cache {folder} holds {', '.join(made_with['features'])}, and the model also reads "
                f"{', '.join(missing)}: extract the features anew with --{' --'.join(missing)} into another folder."
            )
        layer = model.config.vision_feature_layer
        if "patches" in names and layer != made_with["vision_feature_layer"]:
            raise ValueError(
                f"{other}its patch tokens are of layer {made_with['vision_feature_layer']}, and the model reads those "
                f"of layer {layer} (vision_feature_layer). {remedy}"
            )
        if "patches" in names:
            names |= {"patch_mask", "spatial_shapes"}
        return cls(folder, root, sorted(names))

    def __len__(self) -> int:
        """How many pictures there are."""
        return self.description["num_pictures"]

    def __call__(self, value: Any, image_folder: str | Path | None = None) -> ImageFeatures:
        """
        Reads the features of one picture.

        Args:
            value: the picture as its row holds it, see [`picture_key`].
            image_folder: where the row's relative paths start.

        Returns:
            [`ImageFeatures`] of one image, in the dtype of the cache.

        Raises:
            UnreadableImage: of kind `"not cached"`; the message names the picture.
        """
        place = find_key(self._index, picture_key(value, image_folder, self.root))
        if place is None:
            raise UnreadableImage(
                f"{_name_of(value)} is not in the feature cache {self.folder}: run {_COMMAND} again with the same "
                "arguments, it adds what is missing and names in bad_samples.jsonl what it cannot read.",
                "not cached",
            )
        shard, row = divmod(int(self._index[2, place]), 1 << 32)
        with safe_open(shard_path(self.folder, shard), "pt") as stored:
            # Clones: a slice keeps, and would hand to other processes, the map of the whole shard.
            return ImageFeatures(**{name: stored.get_slice(name)[row : row + 1].clone() for name in self.names})

    @cached_property
    def _index(self) -> np.ndarray:
        return open_index(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        # Data loaders' workers map the index themselves: pickled, a memory map is all that it holds.
        return {name: value for name, value in vars(self).items() if name != "_index"}


def read_description(folder: str | Path) -> dict[str, Any]:
    """
    What a cache says of itself.

    Raises:
        ValueError: there is no cache in the folder, or one of another format.
    """
    file = Path(folder) / DESCRIPTION
    if not file.is_file():
        raise ValueError(f"There is no feature cache in {folder} (no {DESCRIPTION}): make one with {_COMMAND}.")
    description = json.loads(file.read_text(encoding="utf-8"))
    if description["format"] != FORMAT:
        raise ValueError(
            f"The feature cache {folder} has format {description['format']}, this version reads format {FORMAT}: "
            f"extract the features anew ({_COMMAND})."
        )
    return description


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is."""
    return folder / f"features-{number:06d}.safetensors"


def open_index(folder: Path) -> np.ndarray:
    """The index of a cache as a memory map: int64 `[3, pictures]`, see [`build_index`]."""
    return np.asarray(np.load(folder / INDEX, mmap_mode="r"))


def key_columns(keys: Iterable[bytes]) -> np.ndarray:
    """Keys as int64 `[2, n]`: their first and second halves."""
    return np.frombuffer(b"".join(keys), dtype=">i8").astype(np.int64).reshape(-1, 2).T


def find_key(columns: np.ndarray, key: bytes) -> int | None:
    """The place of a key among `columns`, int64 `[2 or more, n]` sorted by the first row; `None` where it is none."""
    high, low = np.frombuffer(key, dtype=">i8").astype(np.int64)
    place = int(np.searchsorted(columns[0], high))
    while place < columns.shape[1] and columns[0, place] == high:
        if columns[1, place] == low:
            return place
        place += 1
    return None


def _differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name)!r}, the model's is {other.get(name)!r}" for name in names)


def _name_of(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("path") or value["bytes"]
    return f"A picture of {len(value)} bytes" if isinstance(value, bytes) else str(value)


# --- writing ---------------------------------------------------------------------------------------------------------


class FeatureCacheWriter:
    """
    Writes the shards of one process.

    A shard appears under its name when it is complete. Keys of its pictures are in it: nothing else says what is done.

    Args:
        folder: of the cache.
        description: see [`describe_cache`].
        shard_size: pictures in a shard.
        rank, num_ranks: which of how many processes this one is. All must begin before any of them writes.
    """

    def __init__(
        self, folder: str | Path, description: dict[str, Any], shard_size: int, rank: int = 0, num_ranks: int = 1
    ):
        self.folder, self.shard_size, self.num_ranks = Path(folder), shard_size, num_ranks
        self.dtype = getattr(torch, description["dtype"])
        self.number = max(shard_numbers(self.folder), default=-1) + 1 + rank
        self.num_pictures = 0  # written and waiting
        self._keys: list[bytes] = []
        self._waiting: dict[str, torch.Tensor] = {}  # [shard_size, ..] each, the first len(self._keys) rows filled

    def add(self, keys: Sequence[bytes], features: ImageFeatures) -> None:
        """
        Takes the features of some pictures.

        Raises:
            ValueError: the pictures have features of several shapes, or some that are not finite in the cache's dtype.
        """
        features = features.to(device="cpu", dtype=self.dtype)
        tensors = {field.name: getattr(features, field.name) for field in fields(features)}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"Some {name} features are not finite in {self.dtype}: run the vision tower and store its "
                    "features in a dtype of a wider range (--dtype, --storage_dtype)."
                )
        done = 0
        while done < len(keys):
            count = min(len(keys) - done, self.shard_size - len(self._keys))
            self._fill({name: tensor[done : done + count] for name, tensor in tensors.items()}, count)
            self._keys += keys[done : done + count]
            done += count
            if len(self._keys) == self.shard_size:
                self.flush()
        self.num_pictures += len(keys)

    def _fill(self, tensors: dict[str, torch.Tensor], count: int) -> None:
        start = len(self._keys)
        if not self._waiting:
            self._waiting = {
                name: tensor.new_empty(self.shard_size, *tensor.shape[1:]) for name, tensor in tensors.items()
            }
        shapes, expected = (
            {name: list(tensor.shape[1:]) for name, tensor in each.items()} for each in (tensors, self._waiting)
        )
        if shapes != expected:
            raise ValueError(f"{SEVERAL_SHAPES} Here they are {expected} and {shapes}.")
        for name, tensor in tensors.items():
            self._waiting[name][start : start + count] = tensor

    def flush(self) -> None:
        """Writes what is waiting as a shard."""
        if not self._keys:
            return
        count = len(self._keys)
        tensors = {name: tensor[:count] for name, tensor in self._waiting.items()}
        tensors[_PICTURE_KEYS] = torch.from_numpy(np.ascontiguousarray(key_columns(self._keys).T))
        path = shard_path(self.folder, self.number)
        partial = path.with_name(path.name + _PARTIAL)
        save_file(tensors, partial)
        shutil.copymode(self.folder / DESCRIPTION, partial)  # safetensors lets nobody but the owner read
        os.replace(partial, path)
        self.number += self.num_ranks
        self._keys = []


def start_cache(folder: str | Path, description: dict[str, Any]) -> int:
    """
    Makes a folder ready for writing, by one process before any writes; a cache that is there is gone on with.

    Returns:
        `int`: the number of pictures that are there already, all of them in the folder's index.

    Raises:
        ValueError: the folder holds a cache made with something else.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DESCRIPTION).is_file():
        found = read_description(folder)
        names = [n for n in description if n != "key" and found.get(n) != description[n]]
        if names:
            raise ValueError(
                f"{folder} holds a feature cache with other {', '.join(names)}: give another --output_dir, or the "
                "arguments it was begun with."
            )
    for partial in folder.glob(f"*{_PARTIAL}"):
        partial.unlink()
    write_description(folder, {**description, "complete": False})
    return build_index(folder)


def finish_cache(folder: str | Path, description: dict[str, Any], **notes: Any) -> dict[str, Any]:
    """
    Makes the shards of all processes a cache, by one process after all have written.

    Args:
        folder: of the cache.
        description: see [`describe_cache`].
        notes: to be written into the description, too.

    Returns:
        `dict`: the cache's description.

    Raises:
        ValueError: there is not one picture.
    """
    folder = Path(folder)
    num_pictures = build_index(folder)
    if not num_pictures:
        raise ValueError(f"Not one picture could be read, so there is no feature cache in {folder}.")
    with safe_open(shard_path(folder, shard_numbers(folder)[0]), "pt") as stored:
        shapes = {name: stored.get_slice(name).get_shape()[1:] for name in stored.keys() if name != _PICTURE_KEYS}
    described = {
        **description,
        "shapes": {field.name: shapes[field.name] for field in fields(ImageFeatures) if field.name in shapes},
        "num_pictures": num_pictures,
        "complete": True,
        "versions": {name: version(name) for name in ("transformers_lmeye", "transformers", "torch")},
        **notes,
    }
    write_description(folder, described)
    return described


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Writes what a cache says of itself, whole or not at all."""
    partial = folder / (DESCRIPTION + _PARTIAL)
    partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / DESCRIPTION)


def shard_numbers(folder: Path) -> list[int]:
    """The numbers of the shards that there are, in order."""
    return sorted(int(path.stem.removeprefix("features-")) for path in folder.glob("features-*.safetensors"))


def build_index(folder: Path) -> int:
    """
    Writes the index of all shards: columns (first half of the key, second half, shard * 2**32 + row), sorted.

    Keys are dealt into 256 buckets on disk by their first byte, then sorted bucket by bucket, so that memory stays
    small. A picture that several processes have stored is found in the first of its shards.

    Returns:
        `int`: the number of pictures.
    """
    numbers = shard_numbers(folder)
    counts = np.zeros(256, dtype=np.int64)
    for number in numbers:
        counts += np.bincount(_buckets(_stored_keys(folder, number)), minlength=256)
    total = int(counts.sum())
    if not total:
        np.save(folder / INDEX, np.zeros((3, 0), dtype=np.int64))
        return 0
    free = np.cumsum(counts) - counts
    scratch, partial = folder / f"buckets{_PARTIAL}", folder / (INDEX + _PARTIAL)
    entries = np.memmap(scratch, dtype=np.int64, mode="w+", shape=(3, total))
    for number in numbers:
        keys = _stored_keys(folder, number)
        buckets = _buckets(keys)
        rows = np.argsort(buckets, kind="stable")
        own = np.bincount(buckets, minlength=256)
        places = np.repeat(free - (np.cumsum(own) - own), own) + np.arange(len(rows))
        entries[:2, places] = keys[rows].T
        entries[2, places] = (number << 32) + rows
        free += own
    kept = 0
    for end, count in zip(free, counts, strict=True):
        bucket = np.array(entries[:, end - count : end])
        bucket = bucket[:, np.lexsort(bucket[::-1])]
        first = np.ones(bucket.shape[1], dtype=bool)
        first[1:] = (bucket[:2, 1:] != bucket[:2, :-1]).any(axis=0)
        bucket = bucket[:, first]
        entries[:, kept : kept + bucket.shape[1]] = bucket
        kept += bucket.shape[1]
    index = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int64, shape=(3, kept))
    for start in range(0, kept, 1 << 20):
        index[:, start : start + (1 << 20)] = entries[:, start : min(start + (1 << 20), kept)]
    index.flush()
    del index, entries
    scratch.unlink()
    os.replace(partial, folder / INDEX)
    return kept


def _stored_keys(folder: Path, number: int) -> np.ndarray:
    """The keys of a shard's pictures, int64 `[n, 2]`."""
    path = shard_path(folder, number)
    try:
        with safe_open(path, "pt") as stored:
            return stored.get_tensor(_PICTURE_KEYS).numpy()
    except SafetensorError as error:
        raise ValueError(f"{path} is no shard of a feature cache ({error}): delete it and run again.") from error


def _buckets(keys: np.ndarray) -> np.ndarray:
    """The first byte of each key, in the order of the signed first halves."""
    return (keys[:, 0] >> 56) + 128


__all__ = ["FeatureCache", "picture_key"]
