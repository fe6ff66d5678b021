"""LMEye, an interactive perception network that gives a frozen language model a pair of eyes (arXiv 2305.03701)."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .modeling.configuration_lmeye import LMEyeConfig
from .modeling.interactive_perception import InteractivePerceptionNetwork
from .modeling.modeling_lmeye import LMEyeForConditionalGeneration
from .modeling.open_clip_towers import OpenCLIPVisionConfig
from .modeling.outputs import LMEyePerception
from .modeling.towers import ImageFeatures
from .processing.open_clip_image_processing import OpenCLIPImageProcessor
from .processing.processing_lmeye import LMEyeProcessor


AutoConfig.register(LMEyeConfig.model_type, LMEyeConfig, exist_ok=True)
for _auto_model in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_model.register(LMEyeConfig, LMEyeForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LMEyeConfig, LMEyeProcessor, exist_ok=True)
AutoImageProcessor.register(
    OpenCLIPVisionConfig,
    image_processor_classes={"torchvision": OpenCLIPImageProcessor, "pil": OpenCLIPImageProcessor},
    exist_ok=True,
)

__version__ = "0.1.0"

__all__ = [
    "ImageFeatures",
    "InteractivePerceptionNetwork",
    "LMEyeConfig",
    "LMEyeForConditionalGeneration",
    "LMEyePerception",
    "LMEyeProcessor",
]
