"""Readers of training data: pairs of image and caption (stage 1) and conversations about images (stage 2)."""

from .images import open_image
from .rows import ConversationDataset, PairDataset, load_rows


__all__ = ["ConversationDataset", "PairDataset", "load_rows", "open_image"]
