"""The authors' released checkpoints (LingCloud, `.pth`) in this package's format."""

from .converting import convert


__all__ = ["convert"]
