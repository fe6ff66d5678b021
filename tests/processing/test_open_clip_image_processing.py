"""open_clip's preprocessing, bit for bit."""

import itertools
import json
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoImageProcessor, AutoProcessor

from transformers_lmeye import LMEyeProcessor
from transformers_lmeye.modeling import open_clip_towers
from transformers_lmeye.processing.open_clip_image_processing import (
    OpenCLIPImageProcessor,
    is_open_clip,
    open_clip_image_processor,
    open_clip_preprocess_config,
)


open_clip = pytest.importorskip("open_clip")


def generated_pictures() -> list[Image.Image]:
    """Pictures of noise: small, large, long, high, and in every mode that a file may have."""
    sizes = [(32, 32), (33, 31), (200, 37), (37, 200), (7, 90), (500, 375)]
    pictures = [tiny.picture(seed, size) for seed, size in enumerate(sizes)]
    odd = tiny.picture(9, (91, 63))
    alpha = odd.copy()
    alpha.putalpha(odd.convert("L"))
    return [*pictures, *(odd.convert(mode) for mode in ("L", "P", "1", "CMYK", "LA", "I", "F")), alpha]


def real_photos() -> list[Image.Image]:
    folder = tiny.REFERENCE_DATA / "photos" / "images"
    if not folder.is_dir():
        pytest.skip("the photos lie beside the repository only where it is developed")
    return [Image.open(file) for file in sorted(folder.glob("*.jpg"))]


def build(cfg: dict) -> tuple[OpenCLIPImageProcessor, object]:
    """Our image processor and open_clip's own transform of one `PreprocessCfg`."""
    size = cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    own = {
        "size": {"height": height, "width": width},
        "resample": 2 if cfg.get("interpolation") == "bilinear" else 3,
        **{f"image_{name}": cfg[name] for name in ("mean", "std") if name in cfg},
        **{name: cfg[name] for name in ("resize_mode", "fill_color") if name in cfg},
    }
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**cfg), is_train=False)
    return OpenCLIPImageProcessor(**own), transform


def check(image_processor: OpenCLIPImageProcessor, transform, pictures: list[Image.Image]) -> None:
    expected = torch.stack([transform(picture) for picture in pictures])
    found = image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert found.dtype == torch.float32 and torch.equal(found, expected)


CONFIGS = [
    {"size": size, "resize_mode": mode, "interpolation": interpolation}
    for size, mode, interpolation in itertools.product(
        (32, (24, 40)), ("shortest", "longest", "squash"), ("bicubic", "bilinear")
    )
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: "-".join(map(str, cfg.values())))
def test_equal_to_open_clip(cfg):
    if cfg["resize_mode"] == "longest":
        cfg = {**cfg, "fill_color": 77}
    cfg = {**cfg, "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    check(*build(cfg), generated_pictures())


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_equal_to_open_clip_on_photos(mode):
    check(*build({"size": 224, "resize_mode": mode}), real_photos())


def test_arrays_and_tensors_count_as_pictures(tmp_path):
    image_processor, transform = build({"size": 32})
    picture = tiny.picture(1, (61, 47))
    picture.save(tmp_path / "picture.png")
    expected = transform(picture)[None]
    array, tensor = np.array(picture), pil_to_tensor(picture)
    for image in (array, tensor, tensor.numpy(), tensor.permute(1, 2, 0), str(tmp_path / "picture.png"), [array]):
        assert torch.equal(image_processor(image, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(image_processor(np.stack([array] * 2), return_tensors="pt")["pixel_values"][1:], expected)
    grey = picture.convert("L")
    for image in (np.array(grey)[..., None], pil_to_tensor(grey)):
        assert torch.equal(image_processor(image, return_tensors="pt")["pixel_values"][0], transform(grey))
    assert isinstance(image_processor(picture, return_tensors="np")["pixel_values"], np.ndarray)
    assert torch.equal(image_processor(picture)["pixel_values"][0], expected[0])


def test_floating_point_pictures():
    """They keep what eight bits cannot hold, and otherwise come as near as rounding allows."""
    image_processor, transform = build({"size": 32})
    slopes = torch.linspace(20, 220, 61) * torch.tensor([1.0, 0.7, 0.4])[:, None, None]
    values = slopes.expand(3, 47, 61).double()
    expected = transform(Image.fromarray(values.round().to(torch.uint8).permute(1, 2, 0).numpy()))
    for image, rescale in ((values, {}), (values / 255, {"do_rescale": False}), (values[:1], {})):
        found = image_processor(image, return_tensors="pt", **rescale)["pixel_values"][0]
        assert found.dtype == torch.float32 and found.shape == (3, 32, 32)
        assert 0 < (found[0] - expected[0]).abs().max() < 0.02
        if image.shape[0] == 3:
            assert (found - expected).abs().max() < 0.02


def test_steps_can_be_left_out():
    image_processor, _ = build({"size": 32})
    picture = tiny.picture(2, (32, 32))
    values = pil_to_tensor(picture).float()
    whole = image_processor(picture, return_tensors="pt", do_normalize=False)["pixel_values"][0]
    assert torch.equal(whole, values / 255)
    raw = image_processor(picture, return_tensors="pt", do_normalize=False, do_rescale=False)["pixel_values"][0]
    assert torch.equal(raw, values)
    half = image_processor(picture, return_tensors="pt", do_normalize=False, rescale_factor=0.5)["pixel_values"][0]
    assert torch.equal(half, values / 2)
    large = tiny.picture(2, (50, 40))
    unresized = image_processor(large, return_tensors="pt", do_resize=False, do_normalize=False)["pixel_values"][0]
    assert torch.equal(unresized, pil_to_tensor(large).float() / 255)


def test_wrong_arguments():
    image_processor, _ = build({"size": 32})
    with pytest.raises(Exception, match="resize_mode"):
        image_processor(tiny.picture(), resize_mode="somehow")
    with pytest.raises(TypeError, match="only a single or a list of entries"):
        image_processor(object())


# --- names ---------------------------------------------------------------------------------------------------------


def write_config(folder, preprocess_cfg, image_size=32):
    folder.mkdir(parents=True, exist_ok=True)
    vision_cfg = {"image_size": image_size, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text_cfg = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    content = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision_cfg, "text_cfg": text_cfg}}
    (folder / "open_clip_config.json").write_text(json.dumps({**content, "preprocess_cfg": preprocess_cfg}))
    return folder


PREPROCESSING = [
    {},
    {"size": 999, "mode": "RGB", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"},
    {"mean": 0.5, "std": 0.25, "resize_mode": "longest", "fill_color": 9, "interpolation": "random"},
    {"resize_mode": "squash", "interpolation": None, "mean": None},
]


@pytest.mark.parametrize("preprocess_cfg", PREPROCESSING)
@pytest.mark.parametrize("image_size", [32, [24, 40]])
def test_a_folder(tmp_path, preprocess_cfg, image_size):
    """As open_clip makes it of the same folder; the size is the architecture's."""
    folder = write_config(tmp_path, preprocess_cfg, image_size)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    for name in (str(folder), f"local-dir:{folder}", f"open_clip:local-dir:{folder}"):
        check(open_clip_image_processor(name), transform, generated_pictures())


@pytest.mark.parametrize(
    ("architecture", "tag"),
    [
        ("ViT-B-32", "laion2b_s34b_b79k"),
        ("ViT-B-16-SigLIP", "webli"),
        ("ViT-H-14-378", "dfn5b"),
        ("EVA02-B-16", "merged2b_s8b_b131k"),
        ("MobileCLIP-S1", "datacompdr"),
    ],
)
def test_a_pretrained_tag(architecture, tag):
    """What open_clip's own tables say of a tag, without its weights."""
    image_size = open_clip.get_model_config(architecture)["vision_cfg"]["image_size"]
    cfg = open_clip.transform.merge_preprocess_dict(
        open_clip.transform.PreprocessCfg(), open_clip.get_pretrained_cfg(architecture, tag)
    )
    cfg = open_clip.transform.PreprocessCfg(**{**cfg, "size": image_size})
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    check(open_clip_image_processor(f"open_clip:{architecture}/{tag}"), transform, [tiny.picture(0, (300, 411))])


def test_a_weight_file(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"")
    assert open_clip_preprocess_config(f"open_clip:ViT-L-14-336/{file}") == {"size": 336}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("open_clip:ViT-B-32", ValueError, '"" is neither a pretrained tag of ViT-B-32 .*laion2b_s34b_b79k'),
        ("open_clip:ViT-B-32/no_such_tag", ValueError, '"no_such_tag" is neither a pretrained tag'),
        ("open_clip:ViT-B/32", ValueError, 'no architecture "ViT-B"'),
        ("local-dir:/nowhere", OSError, "nowhere"),
    ],
)
def test_wrong_names(name, error, message):
    with pytest.raises(error, match=message):
        open_clip_image_processor(name)


def test_without_open_clip(tmp_path, monkeypatch):
    """Needed for its register of architectures alone."""
    folder = write_config(tmp_path, {"resize_mode": "squash"})
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert open_clip_image_processor(str(folder)).resize_mode == "squash"
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        open_clip_image_processor("open_clip:ViT-B-32/openai")


def test_both_folders_of_the_package_know_the_same_names(tmp_path):
    folder = write_config(tmp_path / "clip", {})
    names = ["open_clip:ViT-B-32/openai", "hf-hub:a/b", "local-dir:x", "a/b", str(tmp_path), str(folder)]
    (tmp_path / "both").mkdir()
    for file, content in (("open_clip_config.json", "{}"), ("config.json", '{"model_type": "clip"}')):
        (tmp_path / "both" / file).write_text(content)
    names.append(str(tmp_path / "both"))
    expected = [True, True, True, False, False, True, False]
    assert [is_open_clip(name) for name in names] == expected
    assert [open_clip_towers.is_open_clip(name) for name in names] == expected


# --- saving and loading --------------------------------------------------------------------------------------------


def test_round_trips(tmp_path, folders):
    """Alone, and inside a processor."""
    folder = write_config(tmp_path / "clip", {"mean": 0.5, "std": 0.25, "resize_mode": "longest", "fill_color": 9})
    image_processor = open_clip_image_processor(str(folder))
    pictures = generated_pictures()[:6]
    expected = image_processor(pictures, return_tensors="pt")["pixel_values"]
    image_processor.save_pretrained(tmp_path / "alone")
    processor = LMEyeProcessor.from_vision_language_pretrained(str(folder), str(folders.language()))
    assert isinstance(processor.image_processor, OpenCLIPImageProcessor)
    processor.save_pretrained(tmp_path / "inside")
    loaded = [
        OpenCLIPImageProcessor.from_pretrained(tmp_path / "alone"),
        AutoImageProcessor.from_pretrained(tmp_path / "alone"),
        AutoImageProcessor.from_pretrained(tmp_path / "inside"),
        AutoProcessor.from_pretrained(tmp_path / "inside").image_processor,
        LMEyeProcessor.from_pretrained(tmp_path / "inside").image_processor,
    ]
    for found in loaded:
        assert type(found) is OpenCLIPImageProcessor
        assert torch.equal(found(pictures, return_tensors="pt")["pixel_values"], expected)
    inputs = processor(images=pictures[2], text="what is it?", return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected[2:3])
