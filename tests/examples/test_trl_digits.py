"""TRL's trainers on the digits world, by their scripts: a few steps lower the loss, and true captions win."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from safetensors.torch import load_file

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor


pytest.importorskip("trl")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = EXAMPLES / "digits"
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--logging_steps", 1, "--save_strategy", "no"]
QUICK += ["--gradient_accumulation_steps", 1, "--per_device_train_batch_size", 8, "--learning_rate", 1e-3]

# TRL asks Transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(monkeypatch) -> Callable[..., None]:
    """`run("run_dpo.py", "--flag", value, ...)` in this process."""

    def script(name: str, *arguments: object) -> None:
        monkeypatch.syspath_prepend(str(DIGITS))
        monkeypatch.delitem(sys.modules, "scenes", raising=False)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        sys.modules.pop("scenes", None)

    return script


@pytest.fixture
def start(tmp_path) -> Path:
    """A trained IPN of the digits world, with its processor."""
    backbones = (str(DIGITS / "backbones" / "clip"), str(DIGITS / "backbones" / "language_model"))
    model = LMEyeForConditionalGeneration.from_pretrained(
        DIGITS / "checkpoints" / "no_request",
        vision_model_name_or_path=backbones[0],
        language_model_name_or_path=backbones[1],
    )
    model.save_pretrained(tmp_path / "start", save_backbones=False)
    processor = LMEyeProcessor.from_vision_language_pretrained(
        *backbones, num_dynamic_tokens=model.config.num_dynamic_tokens
    )
    processor.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def test_stage_two(run, start, tmp_path):
    """A network that has answered questions alone learns to describe."""
    run("digits/scenes.py", "--output_dir", tmp_path / "train", "--num_scenes", 96, "--max_digits", 3)
    out = tmp_path / "out"
    run(
        "run_sft_trl.py",
        *("--model_name_or_path", start, "--dataset_name_or_path", tmp_path / "train" / "captions.jsonl"),
        *("--instruction", "Describe the image.", "--answer_column", "caption"),
        *(*QUICK, "--max_steps", 12, "--output_dir", out),
    )
    curve = [point["loss"] for point in json.loads((out / "learning_curve.json").read_text())["loss"]]
    assert sum(curve[-3:]) / 3 < curve[0] - 0.3
    weights = load_file(out / "model.safetensors")
    assert weights and all(name.startswith("ipn.") for name in weights)


def test_digits_prefer_what_is_there(run, start, tmp_path):
    """A few steps on swapped captions lower the loss, and true captions of held-out handwriting win more often."""
    for split, count in (("train", 96), ("test", 80)):
        flags = ["--output_dir", tmp_path / split, "--num_scenes", count, "--split", split, "--kinds", "caption"]
        run("digits/preferences.py", *flags)
    out = tmp_path / "out"
    run(
        "run_dpo.py",
        *("--model_name_or_path", start, "--dataset_name_or_path", tmp_path / "train" / "preferences.jsonl"),
        *("--eval_dataset_name_or_path", tmp_path / "test" / "preferences.jsonl", "--output_dir", out),
        *(*QUICK, "--max_steps", 12, "--per_device_eval_batch_size", 40),
    )
    curve = [point["loss"] for point in json.loads((out / "learning_curve.json").read_text())["loss"]]
    assert curve[0] == pytest.approx(0.6931, abs=1e-3)
    assert sum(curve[-4:]) / 4 < 0.65
    preferred = json.loads((out / "preferred.json").read_text())
    assert preferred["before"]["pairs"] == preferred["after"]["pairs"] == 80
    assert preferred["after"]["accuracy"] > preferred["before"]["accuracy"] > 0.5
    assert preferred["after"]["margin"] > preferred["before"]["margin"] + 0.5
    weights = load_file(out / "model.safetensors")
    assert weights and all(name.startswith("ipn.") for name in weights)
    assert LMEyeForConditionalGeneration.from_pretrained(out).ipn is not None


def test_pairs_of_digits(run, tmp_path):
    """The twin differs in the swapped cells alone, and in what no cell of the scene holds."""
    run("digits/preferences.py", "--output_dir", tmp_path / "a", "--num_scenes", 40, "--num_swaps", 2)
    run("digits/preferences.py", "--output_dir", tmp_path / "b", "--num_scenes", 40, "--num_swaps", 2)
    text = (tmp_path / "a" / "preferences.jsonl").read_text()
    assert text == (tmp_path / "b" / "preferences.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 80 and len(list((tmp_path / "a" / "images").iterdir())) == 40
    answers = [[row[name][0]["content"][0]["text"] for name in ("chosen", "rejected")] for row in rows]
    for (caption, twin), (true, wrong) in zip(answers[::2], answers[1::2], strict=True):
        cells, swapped = (dict(cell.split(" ", 1) for cell in text.split(", ")) for text in (caption, twin))
        assert cells.keys() == swapped.keys()
        differing = {place for place in cells if cells[place] != swapped[place]}
        assert len(differing) == min(2, len(cells))
        assert not {swapped[place] for place in differing} & set(cells.values())
        assert true in cells.values() and wrong not in cells.values()
