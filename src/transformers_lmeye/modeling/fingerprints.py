"""Fingerprints of backbones: which weights an IPN was trained on, told from their source files."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from .open_clip_towers import is_open_clip, open_clip_weight_file


SAMPLES_PER_TENSOR = 4096

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def weight_files(name_or_path: str, **hub_kwargs: Any) -> list[Path]:
    """
    The weight files of a checkpoint, as `from_pretrained` would choose them.

    Args:
        name_or_path (`str`): a local folder, a hub id (fetched if it is not in the cache), or a name of open_clip's.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

    Raises:
        OSError: there are none.
    """
    if is_open_clip(name_or_path):
        return [open_clip_weight_file(name_or_path, **hub_kwargs)]
    for index_name, single_name in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
        for name in (single_name, index_name):
            found = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
            if found is None:
                continue
            if name == single_name:
                return [Path(found)]
            shards = sorted(set(json.loads(Path(found).read_text())["weight_map"].values()))
            return [Path(cached_file(name_or_path, shard, **hub_kwargs)) for shard in shards]
    raise OSError(f"{name_or_path} holds no {SAFE_WEIGHTS_NAME}, no {WEIGHTS_NAME} and no index of either.")


def fingerprint(name_or_path: str, **hub_kwargs: Any) -> dict[str, Any]:
    """
    What identifies a backbone's weights, whatever dtype, sharding, quantisation or adapters they are loaded with.

    Returns:
        `dict`: `"sampled"`, a hash over names, shapes and up to 4,096 evenly spaced values of every tensor (values
        rounded to bfloat16, so that a bfloat16 copy of the files has the same one); and `"sha256"`, the hub's own hash
        of each file, where the files come from the hub.
    """
    files = weight_files(name_or_path, **hub_kwargs)
    digest = hashlib.sha256()
    for name, shape, values in sorted(
        (entry for file in files for entry in _sampled(file)), key=lambda entry: entry[0]
    ):
        digest.update(f"{name}{shape}".encode())
        digest.update(values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    result: dict[str, Any] = {"sampled": digest.hexdigest()}
    # The hub's cache names large files by their sha256.
    blobs = {file.name: file.resolve().name for file in files}
    if all(re.fullmatch(r"[0-9a-f]{64}", blob) for blob in blobs.values()):
        result["sha256"] = blobs
    return result


def _sampled(file: Path) -> Iterator[tuple[str, list[int], torch.Tensor]]:
    """Name, shape and sampled values of each tensor of a weight file, read through a memory map."""
    if file.suffix == ".safetensors":
        size = file.stat().st_size
        with open(file, "rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_size))
        data = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)[8 + header_size :]
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype = _SAFETENSORS_DTYPES.get(entry["dtype"], torch.uint8)
            item = dtype.itemsize
            rows = data[begin:end].view(-1, item)
            chosen = rows[_sample_indices(rows.shape[0])].contiguous()
            yield name, entry["shape"], chosen.view(dtype).flatten().float()
    else:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        # open_clip's training checkpoints hold more than tensors, and DistributedDataParallel's names of them.
        for name, tensor in content.get("state_dict", content).items():
            name = name.removeprefix("module.")
            flat = tensor.flatten()
            yield name, list(tensor.shape), flat[_sample_indices(flat.numel())].float()


def _sample_indices(count: int) -> torch.Tensor:
    if count <= SAMPLES_PER_TENSOR:
        return torch.arange(count)
    return torch.linspace(0, count - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long()


def check_fingerprint(role: str, name_or_path: str, recorded: dict[str, Any], **hub_kwargs: Any) -> None:
    """
    Refuses a backbone other than the one an IPN was trained on.

    Args:
        role (`str`): `"vision"` or `"language"`, for the message.
        name_or_path (`str`): where the backbone is now.
        recorded (`dict`): the fingerprint in the IPN's configuration.

    Raises:
        ValueError: the weights differ.
    """
    found = fingerprint(name_or_path, **hub_kwargs)
    if found == recorded or found["sampled"] == recorded["sampled"]:
        return
    raise ValueError(
        f"The {role} model at {name_or_path} is not the one this IPN was trained on: its weights' fingerprint is "
        f"{found['sampled'][:12]}, recorded is {recorded['sampled'][:12]}. Pass {role}_model_name_or_path= the "
        "location of the original weights (any dtype, sharding or quantisation of them will do), or train the IPN "
        "again."
    )


__all__ = ["check_fingerprint", "fingerprint", "weight_files"]
