"""Fixtures shared by all tests: folders of tiny backbones, and LMEye built from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from reference import Reference


torch.set_num_threads(1)  # several workers share the cores

REFERENCE_DATA = Path(__file__).parents[2] / "shared" / "reference"


class Folders:
    """Hub-format folders of tiny backbones, written on first use."""

    def __init__(self, root: Path):
        self.root = root

    def vision(self, **kwargs: Any) -> Path:
        path = self.root / f"vision-{_slug(kwargs)}"
        return path if path.exists() else tiny.save_vision(path, **kwargs)

    def language(self, family: str = "llama", **kwargs: Any) -> Path:
        path = self.root / f"{family}-{_slug(kwargs)}"
        return path if path.exists() else tiny.save_language(path, family, **kwargs)


def _slug(kwargs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kwargs, sort_keys=True).encode()).hexdigest()[:12]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def build(folders: Folders) -> Callable[..., Any]:
    """`build(family, interaction, **config)` -> LMEye in eval mode, every IPN parameter drawn anew."""

    def make(family: str = "llama", interaction: str = "clip_text", **config: Any):
        from transformers_lmeye import LMEyeForConditionalGeneration

        if interaction == "cross_attention" or config.get("visual_mapping") == "resampler":
            config = {**tiny.SMALL_STACK, **config}
        model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
            str(folders.vision()), str(folders.language(family)), interaction=interaction, **config
        )
        tiny.randomise_ipn(model)
        return model.eval()

    return make


@pytest.fixture
def reference(folders: Folders) -> Callable[..., Reference]:
    """`reference(model, family)` -> the plain computation on the same backbones and `model`'s IPN parameters."""

    def make(model: Any, family: str = "llama") -> Reference:
        return Reference(folders.vision(), folders.language(family), model)

    return make


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real pretrained language model of 260K parameters, kept beside the repository."""
    folder = REFERENCE_DATA / "stories260k"
    if not folder.exists():
        pytest.skip("the reference model stories260k lies beside the repository only where it is developed")
    return folder
