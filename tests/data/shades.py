"""Three pictures that are told apart by their shade, and rows about them."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from transformers_lmeye.data import ConversationReader, PairReader, SampleDataset, SampleStream, load_rows


SHADES = (10, 20, 30)
PAIRS = [{"image": f"images/{shade}.png", "caption": f"shade {shade}"} for shade in SHADES]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (shade, shade, shade))


def png(shade: int) -> bytes:
    buffer = BytesIO()
    picture(shade).save(buffer, "PNG")
    return buffer.getvalue()


def shade_of(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(rows: datasets.Dataset, *args: Any, **kwargs: Any) -> SampleDataset:
    return SampleDataset(rows, PairReader(*args, **kwargs))


def conversations(rows: datasets.Dataset, **kwargs: Any) -> SampleDataset:
    return SampleDataset(rows, ConversationReader(**kwargs))


def read_both_ways(path: Any, reader: Any, skip_bad_samples: bool = False, **source: Any) -> list[dict[str, Any]]:
    """The samples, read map-style; asserts that a stream gives the same but for their ids."""
    data = SampleDataset(load_rows(path, **source), reader, skip_bad_samples)
    stream = SampleStream(
        load_rows(path, streaming=True, **source), reader, skip_bad_samples=skip_bad_samples, num_passes=1
    )
    samples = [data[index] for index in range(len(data))]
    assert [_content(sample) for sample in stream] == [_content(sample) for sample in samples]
    return samples


def _content(sample: Any) -> Any:
    """What two samples that are the same have in common, pictures as their shades."""
    if not isinstance(sample, dict):
        return sample.kind
    if "caption" in sample:
        return sample["image"] and shade_of(sample["image"]), sample["caption"]
    return flat(sample)


def flat(sample: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """A conversation as roles and contents, pictures as their shades."""
    return [
        (m["role"], [p["text"] if p["type"] == "text" else shade_of(p["image"]) for p in m["content"]])
        for m in sample["messages"]
    ]
