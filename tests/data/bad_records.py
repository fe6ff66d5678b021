"""A folder of the bad pictures and bad records that real data has, each by name with what it must get.

`python tests/data/bad_records.py FOLDER` writes it and prints what each gets.
"""

import json
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Case:
    """One record of a file.

    Args:
        name: of the case, and the record's id.
        line: the record, or the bytes of its line.
        expected: for each of its samples the kind of `BadSample` it becomes; or the colour at the top left of the
            picture that is accepted; or `"words"`, a sample without picture.
    """

    name: str
    line: dict[str, Any] | bytes
    expected: list[str | tuple[int, int, int]]


RED, WHITE, GREY = (200, 30, 30), (255, 255, 255), (128, 128, 128)


def write_bad_records(folder: Path) -> dict[str, list[Case]]:
    """Writes `pairs.jsonl`, `conversations.jsonl` and their pictures.

    Returns:
        `dict`: the cases of each file, in the order of its lines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [
        Case(name, {"id": name, "image": _write(folder / file, content), "caption": "words"}, [expected])
        for name, (file, content, expected) in _pictures().items()
    ]
    (folder / "a folder.png").mkdir(exist_ok=True)
    pairs += [
        Case(name, line if isinstance(line, bytes) else {"id": name, **line}, expected)
        for name, (line, expected) in _pair_records().items()
    ]
    conversations = [Case(name, {"id": name, **row}, [expected]) for name, (row, expected) in _conversations().items()]
    for file, cases in (("pairs.jsonl", pairs), ("conversations.jsonl", conversations)):
        lines = [case.line if isinstance(case.line, bytes) else json.dumps(case.line).encode() for case in cases]
        (folder / file).write_bytes(b"\n".join(lines) + b"\n")
    return {"pairs.jsonl": pairs, "conversations.jsonl": conversations}


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return path.name


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png(width: int, height: int, bits: int, colour: int, pixels: bytes) -> bytes:
    """A PNG by hand: what libraries will not write."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(pixels)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _pictures() -> dict[str, tuple[str, bytes, str | tuple[int, int, int]]]:
    """Name: file, its content, and what it must get."""
    red = Image.new("RGB", (8, 6), RED)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    clear = Image.new("RGBA", (8, 6), (*RED, 0))
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    turned = Image.new("RGB", (8, 6), WHITE)
    turned.paste(RED, (0, 3, 4, 6))  # the lower left, which orientation 6 shows at the upper left
    orientation = Image.Exif()
    orientation[0x0112] = 6
    wide = np.zeros((4, 4), np.float32)
    deep = Image.fromarray(np.full((6, 8), 128 * 257, np.uint16))
    frames = {"save_all": True, "append_images": [Image.new("RGB", (8, 6), WHITE)], "duration": 50}
    jpeg, png, gif, webp, tiff = (_saved(noise, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"))
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    return {
        # Accepted: odd, not bad.
        "CMYK": (
            "cmyk.jpg",
            _saved(Image.new("CMYK", (8, 6), (0, 127, 127, 0)), "JPEG", quality=95),
            (255, 128, 128),
        ),
        "palette": ("palette.png", _saved(palette, "PNG"), RED),
        "palette, a colour transparent": ("transparent.gif", _saved(palette, "GIF", transparency=0), WHITE),
        "palette, transparent in parts": ("parts.png", _saved(palette, "PNG", transparency=bytes([0] * 4)), WHITE),
        "transparent RGBA": ("rgba.png", _saved(clear, "PNG"), WHITE),
        "half transparent grey": ("la.png", _saved(Image.new("LA", (8, 6), (0, 127)), "PNG"), GREY),
        "a transparent RGB colour": ("key.png", _saved(red, "PNG", transparency=RED), WHITE),
        "16-bit grey": ("grey16.png", _saved(deep, "PNG"), GREY),
        "16-bit grey TIFF": ("grey16.tif", _saved(deep, "TIFF"), GREY),
        "16-bit RGB": (
            "rgb16.png",
            _png(2, 1, 16, 2, b"\0" + struct.pack(">6H", *[value * 257 for value in RED * 2])),
            RED,
        ),
        "16-bit PGM": ("grey16.pgm", b"P5 2 2 65535\n" + struct.pack(">4H", *[128 * 257] * 4), GREY),
        "1 bit": ("bits.png", _saved(Image.new("1", (8, 6), 1), "PNG"), WHITE),
        "float TIFF": ("float.tiff", _saved(Image.fromarray(wide + 128 / 255), "TIFF"), GREY),
        "32-bit TIFF": ("int32.tiff", _saved(Image.fromarray(np.full((4, 4), 128, np.int32)), "TIFF"), GREY),
        "animated GIF": ("animated.gif", _saved(red, "GIF", **frames), RED),
        "animated PNG": ("animated.png", _saved(red, "PNG", **frames), RED),
        "animated WebP": ("animated.webp", _saved(red, "WEBP", lossless=True, **frames), RED),
        "turned by EXIF": ("turned.jpg", _saved(turned, "JPEG", exif=orientation, quality=95, subsampling=0), RED),
        "broken EXIF": ("exif.jpg", _saved(red, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f", quality=95), RED),
        "PNG named JPEG": ("wrong.jpg", _saved(red, "PNG"), RED),
        "no extension": ("picture", _saved(red, "PNG"), RED),
        "a name beyond ASCII": ("Gemälde 画.png", _saved(red, "PNG"), RED),
        "one pixel": ("pixel.png", _saved(red.crop((0, 0, 1, 1)), "PNG"), RED),
        # Bad.
        "empty file": ("empty.jpg", b"", "empty"),
        "truncated JPEG": ("half.jpg", jpeg[: len(jpeg) // 2], "truncated"),
        "truncated PNG": ("half.png", png[: len(png) // 2], "truncated"),
        "truncated GIF": ("half.gif", gif[: len(gif) // 2], "truncated"),
        "truncated WebP": ("half.webp", webp[: len(webp) // 2], "broken"),
        "truncated TIFF": ("half.tiff", tiff[: len(tiff) // 2], "truncated"),
        "damaged PNG": ("damaged.png", bytes(damaged), "broken"),
        "decompression bomb": ("bomb.png", _png(60_000, 60_000, 8, 0, b"\0" * 1000), "too large"),
        "no width": ("flat.png", _png(0, 10, 8, 0, b""), "no picture"),
        "a line of pixels": ("line.png", _saved(Image.new("RGB", (2000, 1)), "PNG"), "too narrow"),
        "float TIFF of NaN": ("nan.tiff", _saved(Image.fromarray(wide + np.float32("nan")), "TIFF"), "no numbers"),
        "a web page": ("page.jpg", b"<!DOCTYPE html><html>404 Not Found</html>", "no picture"),
        "a vector drawing": ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no picture"),
        "a program for a printer": ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
        "zeros": ("zeros.jpg", b"\0" * 5000, "no picture"),
    }


def _pair_records() -> dict[str, tuple[dict[str, Any] | bytes, list[str | tuple[int, int, int]]]]:
    good = "palette.png"
    return {
        "missing file": ({"image": "gone.png", "caption": "words"}, ["missing"]),
        "a folder for a file": ({"image": "a folder.png", "caption": "words"}, ["missing"]),
        "an address": ({"image": "https://example.org/a.png", "caption": "words"}, ["address"]),
        "no image": ({"caption": "words"}, ["missing"]),
        "image null": ({"image": None, "caption": "words"}, ["missing"]),
        "image of no letters": ({"image": "", "caption": "words"}, ["missing"]),
        "a number for an image": ({"image": 7, "caption": "words"}, ["wrong type"]),
        "a path with a zero byte": ({"image": "a\0.png", "caption": "words"}, ["missing"]),
        "a path longer than any": ({"image": "a" * 5000, "caption": "words"}, ["missing"]),
        "two pictures in a pair": ({"image": [good, good], "caption": "words"}, ["bad places"]),
        "no caption": ({"image": good}, ["no text"]),
        "caption null": ({"image": good, "caption": None}, ["no text"]),
        "caption of no letters": ({"image": good, "caption": ""}, ["no text"]),
        "caption of blanks": ({"image": good, "caption": " \n\t"}, ["no text"]),
        "a number for a caption": ({"image": good, "caption": 7}, ["no text"]),
        "an object for a caption": ({"image": good, "caption": {"en": "words"}}, ["no text"]),
        "no captions in a list": ({"image": good, "caption": []}, ["no text"]),
        "one of three captions empty": ({"image": good, "caption": ["a", "", "b"]}, [RED, "no text", RED]),
        "a cut line": (b'{"image": "palette.png", "capt', ["broken record"]),
        "a line that is no UTF-8": (b'{"image": "palette.png", "caption": "caf\xe9"}', ["broken record"]),
        "a line of another kind": (b'["palette.png", "words"]', ["broken record"]),
        "half a character": (b'{"image": "palette.png", "caption": "\\ud83d"}', ["broken record"]),
    }


def _conversations() -> dict[str, tuple[dict[str, Any], str | tuple[int, int, int]]]:
    good, ask, say = "palette.png", {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    place = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}
    return {
        "words alone": ({"messages": [ask, say]}, "words"),
        "a picture unmentioned": ({"image": good, "messages": [ask, say]}, RED),
        "a place without picture": ({"messages": [place, say]}, "bad places"),
        "a picture without place": ({"image": [good, good], "messages": [place, say]}, "bad places"),
        "no user to show it to": ({"image": good, "messages": [say]}, "bad places"),
        "nobody answers": ({"image": good, "messages": [place]}, "no text"),
        "an empty answer": ({"image": good, "messages": [ask, {"role": "assistant", "content": " "}]}, "no text"),
        "a turn without role": ({"image": good, "messages": [{"content": "q"}, say]}, "bad messages"),
        "messages of letters": ({"image": good, "messages": "q: a"}, "bad messages"),
        "a video": ({"messages": [{"role": "user", "content": [{"type": "video"}]}, say]}, "bad messages"),
        "text of a number": (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}, say]},
            "bad messages",
        ),
        "content of a number": ({"messages": [{"role": "user", "content": 7}, say]}, "bad messages"),
        "LLaVA, an unknown role": ({"conversations": [{"from": "dog", "value": "q"}]}, "bad messages"),
        "LLaVA, no value": ({"conversations": [{"from": "human"}]}, "bad messages"),
        "question null": ({"image": good, "question": None, "answer": "a"}, "no text"),
        "answer null": ({"image": good, "question": "q", "answer": None}, "no text"),
        "a broken picture": ({"image": "half.jpg", "question": "q", "answer": "a"}, "truncated"),
    }


def outcome(sample: Any) -> str | tuple[int, int, int]:
    """What a sample got, in the words of `Case.expected`."""
    from transformers_lmeye.data import BadSample

    if isinstance(sample, BadSample):
        return sample.kind
    images = (
        [sample["image"]]
        if "image" in sample
        else [
            part["image"] for message in sample["messages"] for part in message["content"] if part["type"] == "image"
        ]
    )
    return images[0].getpixel((0, 0)) if images else "words"


def print_outcomes(folder: Path, report: Callable[[str], None] = print) -> None:
    """Prints what each case gets, map-style, as a table in Markdown."""
    from transformers_lmeye.data import BadSample, ConversationReader, PairReader, SampleDataset, load_rows

    cases = write_bad_records(folder)
    report("| file | record | what it got | said |\n|---|---|---|---|")
    for file, reader in (("pairs.jsonl", PairReader), ("conversations.jsonl", ConversationReader)):
        data = SampleDataset(load_rows(folder / file), reader(image_folder=folder), skip_bad_samples=True)
        names = [case.name for case in cases[file] for _ in case.expected]
        for name, sample in zip(names, data, strict=True):
            if isinstance(sample, BadSample):
                reason = sample.reason.replace(str(folder) + "/", "").partition(": ")[2] or sample.reason
                report(f"| {file} | {name} | bad: {sample.kind} | {reason:.110} |")
            else:
                report(f"| {file} | {name} | accepted, first pixel {outcome(sample)} | |")


if __name__ == "__main__":
    print_outcomes(Path(sys.argv[1]))
