"""Readers of training data: pairs of image and caption (stage 1) and conversations about images (stage 2)."""

from .datasets import MixedDataset, MixedStream, SampleDataset, SampleStream, mix_texts
from .images import UnreadableImage, open_image
from .rows import load_rows
from .samples import BadSample, ConversationReader, PairReader, Reader, UnreadableSample


__all__ = [
    "BadSample",
    "ConversationReader",
    "MixedDataset",
    "MixedStream",
    "PairReader",
    "Reader",
    "SampleDataset",
    "SampleStream",
    "UnreadableImage",
    "UnreadableSample",
    "load_rows",
    "mix_texts",
    "open_image",
]
