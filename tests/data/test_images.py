"""Pictures in every form a row may hold them."""

import pickle
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile

from transformers_lmeye.data import UnreadableImage, open_image


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


def test_alpha_is_laid_on_white(picture):
    """Against the blend computed here, to the rounding of 8 bits; a transparent palette entry likewise."""
    alpha = np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)
    rgba = Image.fromarray(np.dstack([np.asarray(picture), alpha]))
    expected = 255 + (np.asarray(picture).astype(float) - 255) * alpha[..., None] / 255
    assert np.abs(_pixels(open_image(rgba)) - expected).max() <= 1
    grey = Image.fromarray(np.asarray(picture)[..., 0])
    grey.putalpha(Image.fromarray(alpha))
    expected = 255 + (np.asarray(picture)[..., :1].astype(float) - 255) * alpha[..., None] / 255
    assert grey.mode == "LA"
    assert np.abs(_pixels(open_image(grey)) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, kind)
    expected = np.round(values / 65535 * 255)
    np.testing.assert_array_equal(_pixels(open_image(buffer.getvalue()))[..., 0], expected)
    dark = BytesIO()
    Image.fromarray(values // 512).save(dark, kind)  # 0..127 of 65535: black, not stretched
    assert _pixels(open_image(dark.getvalue())).max() == 0


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 200), (0, 60000), (-3, 5), (0, 1e9)])
def test_float_pixels_are_scaled_by_their_range(low, high):
    values = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    limits = {1: (0, 1), 200: (0, 255), 60000: (0, 65535)}.get(high, (low, high))
    expected = (values.astype(float) - limits[0]) / (limits[1] - limits[0]) * 255
    assert np.abs(_pixels(open_image(buffer.getvalue()))[..., 0] - expected).max() <= 0.501


def test_the_size_is_refused_before_decoding(monkeypatch, picture, png):
    """By the header, whatever PIL's own limit is; and PIL's limit and warnings stay out of it."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the picture was decoded"))
    for limit in (34, 20, 1):
        with pytest.raises(UnreadableImage, match=rf"is too large: 35 pixels, more than max_pixels={limit}") as error:
            open_image(png, max_pixels=limit)
        assert error.value.kind == "too large"
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(_pixels(open_image(png, max_pixels=35)), _pixels(picture))
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(UnreadableImage, match="35 pixels"):
        open_image(picture, max_pixels=34)


def test_truncated_pictures_are_refused_whatever_others_have_set(monkeypatch, picture):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    buffer = BytesIO()
    picture.resize((70, 50)).save(buffer, "JPEG")
    with pytest.raises(UnreadableImage) as error:
        open_image(buffer.getvalue()[:-300])
    assert error.value.kind == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_the_picture_handed_in_stays_as_it_is(picture):
    opened = open_image(picture)
    opened.paste((0, 0, 0), (0, 0, 7, 5))
    assert _pixels(picture).any()


def test_errors_reach_the_main_process_whole():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png is empty", "empty")))
    assert (str(error), error.kind) == ("a.png is empty", "empty")
    assert UnreadableImage("as torch makes it anew, of a message alone").kind == "broken"
