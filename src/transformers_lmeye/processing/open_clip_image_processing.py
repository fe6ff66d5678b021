"""open_clip's own preprocessing as an image processor of transformers.

A model is named `open_clip:ViT-B-32/laion2b_s34b_b79k` (architecture and pretrained tag),
`open_clip:ViT-B-32//path/to/weights.pt` (architecture and weight file), `hf-hub:org/name`, `local-dir:path`, or by a
folder with `open_clip_config.json`.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    pil_torch_interpolation_mapping,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import cached_file


OPEN_CLIP_CONFIG = "open_clip_config.json"


class OpenCLIPImageProcessorKwargs(ImagesKwargs, total=False):
    """
    Args:
        resize_mode (`str`): `"shortest"` resizes the shorter edge and crops the longer one; `"longest"` resizes the
            longer edge and fills the shorter one; `"squash"` resizes both.
        fill_color (`int`): what `"longest"` fills with, 0 to 255.
    """

    resize_mode: Literal["shortest", "longest", "squash"]
    fill_color: int


class OpenCLIPImageProcessor(TorchvisionBackend):
    """
    Pixel values of pictures, bit for bit as open_clip's inference transform gives them.

    Pictures are PIL images, arrays or tensors (`[height, width, channels]` or `[channels, height, width]`), paths,
    URLs or lists of these. Eight-bit arrays and tensors count as pictures; floating-point ones are resized as they are
    and multiplied by 1/255 unless `do_rescale=False` says that they lie between 0 and 1.
    """

    _auto_class = "AutoImageProcessor"
    valid_kwargs = OpenCLIPImageProcessorKwargs

    size = {"height": 224, "width": 224}  # noqa: RUF012
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    resample = PILImageResampling.BICUBIC
    resize_mode = "shortest"
    fill_color = 0
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[OpenCLIPImageProcessorKwargs]):
        super().__init__(**kwargs)

    # Pictures are resized as PIL images, before they become tensors.
    fetch_images = ImageProcessingMixin.fetch_images

    def process_image(
        self, image: Any, input_data_format: str | ChannelDimension | None = None, **kwargs: Any
    ) -> Image.Image | torch.Tensor:
        """A PIL image, or for floating-point input a tensor `[3, height, width]`."""
        if isinstance(image, Image.Image):
            return image
        tensor = image.detach().cpu() if isinstance(image, torch.Tensor) else torch.from_numpy(np.asarray(image))
        if input_data_format is None:
            input_data_format = infer_channel_dimension_format(tensor, num_channels=(1, 3, 4))
        if input_data_format == ChannelDimension.LAST:
            tensor = tensor.permute(2, 0, 1)
        if tensor.dtype == torch.uint8:
            return tv.to_pil_image(tensor)
        return self.convert_to_rgb(tensor.float(), input_data_format=ChannelDimension.FIRST)

    def _preprocess(
        self,
        images: list[Image.Image | torch.Tensor],
        size: SizeDict,
        resample: PILImageResampling | int,
        resize_mode: str,
        fill_color: int,
        do_resize: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        interpolation = pil_torch_interpolation_mapping[resample]
        pixel_values = []
        for image in images:
            if do_resize:
                image = resize(image, (size.height, size.width), resize_mode, interpolation, fill_color)
            if isinstance(image, Image.Image):
                image = image.convert("RGB")
                # `to_tensor` divides by 255, which is not the same in floating point as multiplying by 1/255.
                if do_rescale and rescale_factor == 1 / 255:
                    image = tv.to_tensor(image)
                else:
                    image = tv.pil_to_tensor(image).float() * (rescale_factor if do_rescale else 1)
            elif do_rescale:
                image = image * rescale_factor
            image = tv.normalize(image, image_mean, image_std) if do_normalize else image
            pixel_values.append(image if device is None else image.to(device))
        if return_tensors is not None:
            pixel_values = torch.stack(pixel_values)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)


def resize(
    image: Image.Image | torch.Tensor,
    size: tuple[int, int],
    mode: str,
    interpolation: InterpolationMode,
    fill_color: int = 0,
) -> Image.Image | torch.Tensor:
    """
    A picture brought to `size` (height, width) as open_clip does it.

    Args:
        image: a PIL image, or a tensor `[channels, height, width]`.
        size: the size of the result.
        mode, fill_color: see [`OpenCLIPImageProcessorKwargs`].
        interpolation (`InterpolationMode`): of the resizing. Cropping to sizes that are no square is always bicubic.
    """
    _, image_height, image_width = tv.get_dimensions(image)
    height, width = size
    if mode == "squash":
        return tv.resize(image, [height, width], interpolation)
    if mode == "shortest" and height == width:
        return tv.center_crop(tv.resize(image, [height], interpolation), [height, width])
    ratios = (image_height / height, image_width / width)
    ratio = min(ratios) if mode == "shortest" else max(ratios)
    target = [round(image_height / ratio), round(image_width / ratio)]
    if mode == "shortest":
        return tv.center_crop(tv.resize(image, target, InterpolationMode.BICUBIC), [height, width])
    image = tv.resize(image, target, interpolation)
    missing = (max(width - target[1], 0), max(height - target[0], 0))
    if any(missing):
        left, top = missing[0] // 2, missing[1] // 2
        image = tv.pad(image, [left, top, missing[0] - left, missing[1] - top], fill=fill_color)
    return tv.center_crop(image, [height, width])


# --- names ---------------------------------------------------------------------------------------------------------


def is_open_clip(name_or_path: str) -> bool:
    """Whether a name is one of open_clip's; a folder with a checkpoint of transformers besides is not."""
    name = str(name_or_path)
    if name.startswith(("open_clip:", "hf-hub:", "local-dir:")):
        return True
    folder = Path(name)
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        return False
    config = folder / "config.json"
    return not (config.is_file() and "model_type" in json.loads(config.read_text()))


def open_clip_preprocess_config(name_or_path: str, **hub_kwargs: Any) -> dict[str, Any]:
    """
    open_clip's preprocessing of a model: `size`, `mean`, `std`, `interpolation`, `resize_mode` and others of its
    `PreprocessCfg`, where they are not its defaults.

    Args:
        name_or_path (`str`): see the top of this file.
        hub_kwargs: `cache_dir`, `token`, `revision`, `local_files_only`, `force_download`, `proxies`, `subfolder`.

    Raises:
        ImportError: open_clip is not installed, and the name is one of its architectures.
        OSError, ValueError: there is no such model.
    """
    name = str(name_or_path).removeprefix("open_clip:")
    if str(name_or_path).startswith("open_clip:") and not name.startswith(("hf-hub:", "local-dir:")):
        architecture, _, weights = name.partition("/")
        try:
            import open_clip
        except ImportError as error:
            raise ImportError(f"{name_or_path} is one of open_clip's models: pip install open_clip_torch.") from error
        model = open_clip.get_model_config(architecture)
        if model is None:
            raise ValueError(f'open_clip knows no architecture "{architecture}" (open_clip.list_models() names all).')
        own = open_clip.get_pretrained_cfg(architecture, weights) or {}
        if not own and not Path(weights).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
            raise ValueError(
                f'"{weights}" is neither a pretrained tag of {architecture} nor a weight file: write '
                f"open_clip:{architecture}/ and a tag or a path. Tags: {tags or 'none'}."
            )
    else:
        location = name.removeprefix("hf-hub:").removeprefix("local-dir:")
        content = json.loads(Path(cached_file(location, OPEN_CLIP_CONFIG, **hub_kwargs)).read_text())
        model, own = content.get("model_cfg", content), content.get("preprocess_cfg", {})
    known = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    # The size is the architecture's, whatever the preprocessing says.
    return {
        "size": model["vision_cfg"].get("image_size", 224),
        **{key: own[key] for key in known if own.get(key) is not None},
    }


def open_clip_image_processor(name_or_path: str, **hub_kwargs: Any) -> OpenCLIPImageProcessor:
    """The image processor of an open_clip model; arguments and errors are those of [`open_clip_preprocess_config`]."""
    config = open_clip_preprocess_config(name_or_path, **hub_kwargs)
    size = config.pop("size")
    height, width = (size, size) if isinstance(size, int) else size
    for name in ("mean", "std"):
        if name in config:
            value = config.pop(name)
            config[f"image_{name}"] = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    # Any other word, such as "random" for training, means bicubic at inference.
    bilinear = config.pop("interpolation", None) == "bilinear"
    resample = PILImageResampling.BILINEAR if bilinear else PILImageResampling.BICUBIC
    return OpenCLIPImageProcessor(size={"height": height, "width": width}, resample=resample, **config)


__all__ = ["OpenCLIPImageProcessor", "is_open_clip", "open_clip_image_processor", "open_clip_preprocess_config"]
