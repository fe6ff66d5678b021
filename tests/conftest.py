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
from reference import EncoderDecoderReference, Reference


torch.set_num_threads(1)  # several workers share the cores


class Folders:
    """Hub-format folders of tiny backbones, written on first use."""

    def __init__(self, root: Path):
        self.root = root

    def vision(self, **kwargs: Any) -> Path:
        path = self.root / f"vision-{_slug(kwargs)}"
        return path if path.exists() else tiny.save_vision(path, **kwargs)

    def language(self, family: str = "llama", **kwargs: Any) -> Path:
        path = self.root / f"{family}-{_slug(kwargs)}"
        if path.exists():
            return path
        save = tiny.save_encoder_decoder if family in tiny.ENCODER_DECODERS else tiny.save_language
        return save(path, family, **kwargs)

    def tower(self, kind: str, **kwargs: Any) -> Path:
        """A vision model other than CLIP: "siglip", "siglip2", or the type of a vision tower alone."""
        path = self.root / f"{kind}-{_slug(kwargs)}"
        if path.exists():
            return path
        if kind in ("siglip", "siglip2"):
            return {"siglip": tiny.save_siglip, "siglip2": tiny.save_siglip2}[kind](path, **kwargs)
        return tiny.save_tower(path, kind, **kwargs)

    def blip2(self, family: str = "t5", **kwargs: Any) -> Path:
        path = self.root / f"blip2-{family}-{_slug(kwargs)}"
        return path if path.exists() else tiny.save_blip2(path, family, **kwargs)


def _slug(kwargs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kwargs, sort_keys=True).encode()).hexdigest()[:12]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def _vision(folders: Folders, kind: str) -> Path:
    if kind == "clip":
        return folders.vision()
    return folders.blip2("opt", num_queries=4) if kind == "blip2-square" else folders.blip2("opt")


@pytest.fixture
def build(folders: Folders) -> Callable[..., Any]:
    """
    `build(family, interaction, vision, **config)` -> LMEye in eval mode, every IPN parameter drawn anew.

    `vision` is "clip"; or "blip2", whose vision tower and Q-Former are taken, with CLIP's text encoder beside them; or
    "blip2-square", whose Q-Former has four queries.
    """

    def make(family: str = "llama", interaction: str = "clip_text", vision: str = "clip", **config: Any):
        from transformers_lmeye import LMEyeForConditionalGeneration

        if interaction == "cross_attention" or config.get("visual_mapping") == "resampler":
            config = {**tiny.SMALL_STACK, **config}
        if vision != "clip" and interaction == "clip_text":
            config["clip_text_model_name_or_path"] = str(folders.vision())
        model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
            str(_vision(folders, vision)),
            str(folders.language(family)),
            interaction=interaction,
            **config,
        )
        tiny.randomise_ipn(model)
        return model.eval()

    return make


@pytest.fixture
def reference(folders: Folders) -> Callable[..., Reference]:
    """
    `reference(model, family, vision)` -> the plain computation on the same backbones and `model`'s IPN parameters.
    """

    def make(model: Any, family: str = "llama", vision: str = "clip") -> Reference:
        kind = EncoderDecoderReference if family in tiny.ENCODER_DECODERS else Reference
        return kind(_vision(folders, vision), folders.language(family), model, clip_text=folders.vision())

    return make


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real pretrained language model of 260K parameters, kept beside the repository."""
    folder = tiny.REFERENCE_DATA / "stories260k"
    if not folder.exists():
        pytest.skip("the reference model stories260k lies beside the repository only where it is developed")
    return folder
