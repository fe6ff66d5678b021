"""Pictures as rows of a data set hold them, opened."""

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps


def open_image(value: Any, image_folder: str | Path | None = None) -> Image.Image:
    """Opens a picture: upright (its EXIF orientation applied) and in RGB.

    Args:
        value: a PIL image, the bytes of a file, a path, or a `{"bytes", "path"}` dict as `datasets` stores pictures.
        image_folder: where relative paths start.

    Returns:
        `PIL.Image.Image`: RGB, fully read, so that a broken file is noticed here.

    Raises:
        ValueError: the value is none of these, the file is missing, or what it holds is no picture.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        image, name = value, "the image"
    elif isinstance(value, bytes):
        image, name = BytesIO(value), f"an image of {len(value)} bytes"
    elif isinstance(value, str | Path) and str(value):
        if str(value).startswith(("http://", "https://")):
            raise ValueError(f"{value} is an address: download the pictures first and give their paths.")
        image = name = Path(image_folder or "") / value
        if not image.is_file():
            raise ValueError(
                f"There is no file {image}: relative image paths start at the image folder (--image_folder)."
            )
    else:
        raise ValueError(f"An image is a PIL image, bytes or a path; got {value!r:.80}.")
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture ({error}).") from error
