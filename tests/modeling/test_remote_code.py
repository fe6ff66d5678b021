"""Promise 6: a process that cannot import this package loads what it published, through every Auto class."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor


SCRIPT = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "transformers_lmeye":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=Image.open(sys.argv[1]), text="what is the man doing?", return_tensors="pt")
    found[folder] = {"config": type(config).__name__, "input_ids": inputs["input_ids"].tolist()}
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        found[folder][auto.__name__] = model.generate(**inputs, max_new_tokens=8).tolist()
assert not any(name.split(".")[0] == "transformers_lmeye" for name in sys.modules)
print("FOUND" + json.dumps(found))
"""


@pytest.fixture
def published(build, folders, tmp_path):
    """Folders of whole models and of an IPN alone, on a CLIP, a SigLIP and a BLIP-2, and what each answers here."""
    picture = tiny.picture(3)
    picture.save(tmp_path / "picture.png")
    vision, siglip, language, blip2 = map(
        str, (folders.vision(), folders.tower("siglip"), folders.language(), folders.blip2())
    )
    processor_of = LMEyeProcessor.from_vision_language_pretrained
    on_siglip = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        siglip, language, clip_text_model_name_or_path=vision
    )
    on_blip2 = LMEyeForConditionalGeneration.from_blip2_pretrained(blip2, vision)
    variants = {
        "whole": (build("llama", "clip_text"), processor_of(vision, language), True),
        "ipn": (
            build("llama", "cross_attention"),
            processor_of(vision, language, interaction="cross_attention"),
            False,
        ),
        "siglip": (on_siglip, processor_of(siglip, language), True),
        "siglip-ipn": (on_siglip, processor_of(siglip, language), False),
        "blip2": (on_blip2, LMEyeProcessor.from_blip2_pretrained(blip2), True),
        "blip2-ipn": (on_blip2, LMEyeProcessor.from_blip2_pretrained(blip2), False),
    }
    expected = {}
    for name, (model, processor, whole) in variants.items():
        folder = tmp_path / name
        tiny.randomise_ipn(model)
        model.save_pretrained(folder, save_backbones=whole)
        processor.save_pretrained(folder)
        inputs = processor(images=picture, text="what is the man doing?", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8).tolist()
        assert len(set(ids[0][0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1] :])) > 1
        expected[str(folder)] = {"input_ids": inputs["input_ids"].tolist(), "ids": ids}
    return tmp_path / "picture.png", expected


def test_all_auto_classes_without_the_package(published, tmp_path):
    picture, expected = published
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(picture), *expected],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.split("FOUND")[1])
    for folder, theirs in expected.items():
        ours = found[folder]
        assert ours["config"] == "LMEyeConfig" and ours["input_ids"] == theirs["input_ids"]
        for auto in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
            assert ours[auto] == theirs["ids"], auto


def test_all_auto_classes_with_the_package(published):
    """Registered, the same classes need no remote code."""
    from PIL import Image
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from transformers_lmeye import LMEyeConfig

    picture, expected = published
    for folder, theirs in expected.items():
        assert isinstance(AutoConfig.from_pretrained(folder), LMEyeConfig)
        processor = AutoProcessor.from_pretrained(folder)
        assert isinstance(processor, LMEyeProcessor)
        inputs = processor(images=Image.open(picture), text="what is the man doing?", return_tensors="pt")
        for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            model = auto.from_pretrained(folder)
            assert isinstance(model, LMEyeForConditionalGeneration)
            with torch.no_grad():
                assert model.generate(**inputs, max_new_tokens=8).tolist() == theirs["ids"]
