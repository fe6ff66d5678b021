"""Pictures as rows of a data set hold them, opened under guard."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError


DEFAULT_MAX_PIXELS = 100_000_000
"""Largest picture that is decoded, in pixels: 100 megapixels are 300 MB in RGB."""

MAX_ASPECT_RATIO = 100
"""Longest side over shortest. Resizing the shortest side to a tower's resolution would multiply the other one."""

UNREADABLE_IMAGE_KINDS = (
    "missing",  # no value, or a path to no file
    "address",  # a web address in place of a path
    "wrong type",  # a value that is neither picture, bytes nor path
    "empty",  # no bytes
    "no picture",  # bytes that begin as no raster picture does
    "truncated",  # a picture that ends too early
    "broken",  # a picture that cannot be decoded
    "too large",  # more than max_pixels, as its header says
    "too narrow",  # an aspect ratio above MAX_ASPECT_RATIO
    "no numbers",  # float pixels that are NaN or infinite
    "not cached",  # a picture that is not in the feature cache that is read in place of pictures
)
"""What may be wrong with a picture: `UnreadableImage.kind`."""

# Formats of pixels alone, known by their first bytes. Others run programs (EPS, WMF), have no signature to know them
# by (TGA, PCX) or hold no photographs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "PPM", "QOI", "ICO", "SGI")


class UnreadableImage(ValueError):
    """A picture that cannot be used. `kind` is one of `UNREADABLE_IMAGE_KINDS`."""

    def __init__(self, message: str, kind: str = "broken"):
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return self.args[0]


def open_image(
    value: Any, image_folder: str | Path | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Image.Image:
    """Opens a picture: upright (its EXIF orientation applied) and in RGB.

    What a file holds decides, not its name. Of an animation the first frame counts; what is transparent becomes white;
    16 bits are scaled to 8; floats and 32-bit integers are taken as 0..1, 0..255 or 0..65535, whichever first holds
    them, and stretched to their own range else. A broken EXIF block leaves the picture as it lies. The size is read
    from the header: a picture that is too large is refused before it is decoded.

    Args:
        value: a PIL image, the bytes of a file, a path, or a `{"bytes", "path"}` dict as `datasets` stores pictures.
        image_folder: where relative paths start.
        max_pixels: most pixels a picture may have.

    Returns:
        `PIL.Image.Image`: RGB, fully read, so that a broken file is noticed here.

    Raises:
        UnreadableImage: a `ValueError` whose `kind` says what is wrong and whose message names file and remedy.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, Image.Image):
        return _read(value, "the image", max_pixels)
    file, name = _locate(value, image_folder)
    with _strict_decoding(max_pixels):
        try:
            image = Image.open(file, formats=_formats())
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise _too_large(name, error, max_pixels) from error
        except UnidentifiedImageError as error:
            raise UnreadableImage(
                f"{name} cannot be read as a picture (it begins as none of {', '.join(_formats())} does).",
                "no picture",
            ) from error
        except (
            Exception
        ) as error:  # decoders of broken headers raise anything: struct.error, KeyError, IndexError, ...
            raise _undecodable(name, error) from error
    with image:
        return _read(image, name, max_pixels)


def _locate(value: Any, image_folder: str | Path | None) -> tuple[Any, str]:
    """What `Image.open` takes, and what to call it in messages."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UnreadableImage(
            f"There is no picture. An image is a PIL image, bytes or a path; got {value!r}.", "missing"
        )
    if isinstance(value, bytes):
        if not value:
            raise UnreadableImage("The image is empty (0 bytes): fetch it again or leave the row out.", "empty")
        return BytesIO(value), f"an image of {len(value)} bytes"
    if not isinstance(value, str | Path):
        raise UnreadableImage(f"An image is a PIL image, bytes or a path; got {value!r:.80}.", "wrong type")
    if str(value).startswith(("http://", "https://")):
        raise UnreadableImage(f"{value} is an address: download the pictures first and give their paths.", "address")
    path = os.path.join(image_folder or "", value)
    if not os.path.isfile(path):
        raise UnreadableImage(
            f"There is no file {path}: relative image paths start at the image folder (--image_folder).", "missing"
        )
    try:
        if not os.path.getsize(path):
            raise UnreadableImage(f"{path} is empty (0 bytes): fetch it again or leave the row out.", "empty")
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise UnreadableImage(f"{path} cannot be read ({error.strerror}).", "missing") from error
    return path, path


def _read(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(name, f"{width * height} pixels", max_pixels)
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UnreadableImage(
            f"{name} is {width} x {height} pixels: its longest side may be {MAX_ASPECT_RATIO} times its shortest. "
            "Crop it or leave the row out.",
            "too narrow",
        )
    with _strict_decoding(max_pixels):
        try:
            image.load()
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise _too_large(name, error, max_pixels) from error
        except Exception as error:  # decoders of broken files raise anything, see above
            raise _undecodable(name, error) from error
        try:
            upright = ImageOps.exif_transpose(image)
        except Exception:  # what a broken EXIF block raises says nothing about the pixels
            upright = image.copy()
        try:
            return _to_rgb(upright, name, is_16_bit=image.format == "PPM")
        except UnreadableImage:
            raise
        except Exception as error:  # such as a palette of a few bytes
            raise _undecodable(name, error) from error


def _to_rgb(image: Image.Image, name: str, is_16_bit: bool) -> Image.Image:
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bit(np.asarray(image).astype(np.float64), name, is_16_bit)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(pixels: np.ndarray, name: str, is_16_bit: bool) -> np.ndarray:
    """float64 pixels of an unknown range, or of 16 bits, as uint8."""
    if not np.isfinite(pixels).all():
        raise UnreadableImage(f"{name} has pixels that are NaN or infinite: leave the row out.", "no numbers")
    low, high = float(pixels.min()), float(pixels.max())
    if is_16_bit:
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, next(limit for limit in (1.0, 255.0, 65535.0) if high <= limit)
    return np.round((pixels - low) * (255 / (high - low or 1))).astype(np.uint8)


@contextmanager
def _strict_decoding(max_pixels: int) -> Iterator[None]:
    """PIL's limit is ours, it refuses truncated files whatever others have set, and says nothing beside its errors."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _too_large(name: str, reason: Any, max_pixels: int) -> UnreadableImage:
    found = re.search(r"(\d+) pixels", str(reason))
    size = f"{int(found[1]):,} pixels" if found else str(reason)
    return UnreadableImage(
        f"{name} is too large: {size}, more than max_pixels={max_pixels:,}. Make it smaller, leave the row out, or "
        "raise max_pixels.",
        "too large",
    )


def _undecodable(name: str, error: Exception) -> UnreadableImage:
    reason = f"{error}" or type(error).__name__
    words = ("truncated", "not enough", "unexpected end", "incomplete", "end of file", "eof")
    kind = "truncated" if isinstance(error, EOFError) or any(w in reason.lower() for w in words) else "broken"
    return UnreadableImage(
        f"{name} cannot be read as a picture ({reason}). Fetch it again or leave the row out.", kind
    )


__all__ = [
    "DEFAULT_MAX_PIXELS",
    "MAX_ASPECT_RATIO",
    "UNREADABLE_IMAGE_KINDS",
    "UnreadableImage",
    "open_image",
]
