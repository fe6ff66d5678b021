"""Pictures in every form a row may hold them."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from transformers_lmeye.data import open_image


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))


@pytest.fixture
def png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_every_form_gives_the_same_pixels(tmp_path, picture, png):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png)
    forms = [
        (picture, None),
        (png, None),
        ("sub/a.png", tmp_path),
        (str(tmp_path / "sub" / "a.png"), None),
        (str(tmp_path / "sub" / "a.png"), "elsewhere"),
        ({"bytes": png, "path": "gone.png"}, None),
        ({"bytes": None, "path": "sub/a.png"}, tmp_path),
    ]
    for value, folder in forms:
        image = open_image(value, folder)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(_pixels(image), _pixels(picture))


def test_orientation_is_applied_and_grey_becomes_rgb(tmp_path):
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    grey.save(tmp_path / "a.png", exif=exif)
    image = open_image("a.png", tmp_path)
    expected = np.rot90(np.arange(12, dtype=np.uint8).reshape(3, 4), -1)
    np.testing.assert_array_equal(_pixels(image), np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, png: "missing.png", "There is no file .*missing.png.*image folder"),
        (lambda folder, png: "https://example.org/a.png", "download the pictures first"),
        (lambda folder, png: b"no picture at all", "an image of 17 bytes cannot be read as a picture"),
        (lambda folder, png: png[: len(png) // 2], "cannot be read as a picture"),
        (lambda folder, png: (folder / "a.png").write_text("hello") and "a.png", "a.png cannot be read as a picture"),
        (lambda folder, png: None, "An image is a PIL image, bytes or a path; got None"),
        (lambda folder, png: 3, "got 3"),
        (lambda folder, png: {"bytes": None, "path": None}, "got None"),
    ],
    ids=["missing", "address", "no-picture", "truncated", "text-file", "none", "number", "empty-dict"],
)
def test_errors_say_what_was_wrong(tmp_path, png, make, message):
    value = make(tmp_path, png)
    with pytest.raises(ValueError, match=message):
        open_image(value, tmp_path)
