"""Both stage scripts as a user runs them, on tiny backbones: what they train, write, refuse and go on with."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor


EXAMPLES = Path(__file__).parents[2] / "examples"
PHOTOS = Path(__file__).parents[2] / "../shared/reference/photos"
STATIC = ("ipn.visual_mapping.", "ipn.image_token")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(monkeypatch) -> Callable[..., None]:
    """`run("run_pretrain.py", "--flag", value, ...)` in this process."""

    def script(name: str, *arguments: object) -> None:
        quick = (
            "--use_cpu",
            "--disable_tqdm",
            "true",
            "--per_device_train_batch_size",
            "4",
            "--learning_rate",
            "1e-2",
        )
        quick += ("--gradient_accumulation_steps", "2", "--logging_steps", "1")
        monkeypatch.setattr(sys, "argv", [name, *quick, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return script


@pytest.fixture
def backbones(folders) -> list[str]:
    return [
        "--vision_model_name_or_path",
        str(folders.vision()),
        "--language_model_name_or_path",
        str(folders.language("llama")),
    ]


@pytest.fixture
def data(tmp_path) -> Path:
    """Twelve pictures with captions and with conversations of two turns."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    words = ("cat", "dog", "house")
    with open(folder / "captions.jsonl", "w") as captions, open(folder / "conversations.jsonl", "w") as conversations:
        for index in range(12):
            name, word = f"images/{index}.png", words[index % 3]
            tiny.picture(index).save(folder / name)
            captions.write(json.dumps({"image": name, "caption": f"a {word} in a house"}) + "\n")
            messages = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"a {word}"}]},
                {"role": "user", "content": [{"type": "text", "text": "where?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "in a house"}]},
            ]
            conversations.write(json.dumps({"image": name, "messages": messages}) + "\n")
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_both_stages(run, backbones, data, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    run(
        "run_pretrain.py",
        *backbones,
        *("--num_dynamic_tokens", 2, "--config_overrides", '{"num_fine_grained_tokens": 3}'),
        *("--dataset_name_or_path", data / "captions.jsonl", "--train_split", "train[:10]"),
        *("--eval_split", "train[10:]", "--max_steps", 4, "--output_dir", one),
    )
    model = LMEyeForConditionalGeneration.from_pretrained(one)
    static = sum(tensor.numel() for name, tensor in _tensors(one).items() if name.startswith(STATIC))
    assert f"Stage 1 trains {static:,} of {model.num_parameters():,} parameters." in capsys.readouterr().out
    assert model.config.num_dynamic_tokens == 2 and model.config.num_fine_grained_tokens == 3
    assert LMEyeProcessor.from_pretrained(one).num_dynamic_tokens == 2
    curve = json.loads((one / "learning_curve.json").read_text())
    assert [point["step"] for point in curve["loss"]] == [1, 2, 3, 4]
    assert curve["loss"][-1]["loss"] < curve["loss"][0]["loss"]
    assert json.loads((one / "eval_results.json").read_text())["eval_loss"] > 0
    with Image.open(one / "learning_curve.png") as image:
        assert image.format == "PNG"
    # The IPN, tokenizer and code; not a byte of the backbones.
    assert not any(name.startswith(("vision_tower.", "language_model.")) for name in _tensors(one))
    assert not any(".interaction." in name for name in _tensors(one))

    run(
        "run_instruct.py",
        *("--standardize_requests", 4),
        *("--model_name_or_path", one, "--dataset_name_or_path", data / "conversations.jsonl"),
        *("--max_steps", 4, "--save_steps", 2, "--output_dir", two),
    )
    before, after = _tensors(one), _tensors(two)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith(STATIC)}
    trained = sum(before[name].numel() for name in changed)
    assert f"Stage 2 trains {trained:,} of {model.num_parameters():,} parameters." in capsys.readouterr().out
    curve = json.loads((two / "learning_curve.json").read_text())
    assert curve["loss"][-1]["loss"] < curve["loss"][0]["loss"]

    # A run that was killed after its second step, and goes on.
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copytree(two / "checkpoint-2", cut / "checkpoint-2")
    run(
        "run_instruct.py",
        *("--model_name_or_path", one, "--dataset_name_or_path", data / "conversations.jsonl"),
        *("--max_steps", 4, "--save_steps", 2, "--output_dir", cut, "--resume_from_checkpoint", "last"),
    )
    assert all(torch.equal(tensor, after[name]) for name, tensor in _tensors(cut).items())

    # The result answers.
    model = LMEyeForConditionalGeneration.from_pretrained(two)
    processor = LMEyeProcessor.from_pretrained(two)
    inputs = processor(images=tiny.picture(0), text="what?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_the_static_rival_trains_on_conversations(run, backbones, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    none = ("--interaction", "none", "--num_static_tokens", 2)
    run(
        "run_pretrain.py",
        *backbones,
        *none,
        *("--dataset_name_or_path", data / "captions.jsonl", "--max_steps", 1, "--output_dir", one),
    )
    instruct = ("--model_name_or_path", one, "--dataset_name_or_path", data / "conversations.jsonl", "--max_steps", 1)
    with pytest.raises(ValueError, match="has nothing to train in stage"):
        run("run_instruct.py", *instruct, "--output_dir", two)
    run("run_instruct.py", *instruct, "--output_dir", two, "--train_static_mapping")
    before, after = _tensors(one), _tensors(two)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_what_the_scripts_refuse(run, backbones, data, tmp_path):
    pretrain = ("run_pretrain.py", *backbones, "--output_dir", tmp_path / "out", "--max_steps", 1)
    captions = ("--dataset_name_or_path", data / "captions.jsonl")
    with pytest.raises(ValueError, match=r"There is no checkpoint in .* to resume from"):
        run(*pretrain, *captions, "--resume_from_checkpoint", "last")
    with pytest.raises(ValueError, match="config_overrides must be a JSON object"):
        run(*pretrain, *captions, "--config_overrides", "[1]")
    with pytest.raises(ValueError, match=r"There is no data file .*gone\.jsonl"):
        run(*pretrain, "--dataset_name_or_path", "gone.jsonl")
    with pytest.raises(ValueError, match=r"no column 'text'.*--caption_column"):
        run(*pretrain, *captions, "--caption_column", "text")
    with pytest.raises(ValueError, match=r"Sample row \d+: There is no file .*image folder"):
        run(*pretrain, *captions, "--image_folder", tmp_path)
    (data / "empty.jsonl").write_text(json.dumps({"image": "images/0.png", "caption": " "}))
    with pytest.raises(
        ValueError, match=r"1 of \d+ samples could not be used.*Sample row 0 has no target token: its caption is empty"
    ):
        run(*pretrain, "--dataset_name_or_path", data / "empty.jsonl")
    with pytest.raises(ValueError, match=r"it is \d+ tokens long, .* would cut a slot"):
        run(
            "run_instruct.py",
            *backbones,
            *("--dataset_name_or_path", data / "conversations.jsonl", "--max_length", 30),
            *("--output_dir", tmp_path / "out", "--max_steps", 1),
        )


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the reference photographs are not beside the repository")
def test_the_photographs_through_the_same_scripts(run, backbones, tmp_path):
    """Real pictures of many sizes, five human captions each: pairs in stage 1, conversations in stage 2."""
    photos = ("--dataset_name_or_path", PHOTOS / "photos.jsonl", "--image_column", "file", "--lists", "first")
    photos += ("--train_split", "train[:16]", "--num_train_epochs", 2)
    one, two = tmp_path / "one", tmp_path / "two"
    run("run_pretrain.py", *backbones, *photos, "--caption_column", "captions", "--output_dir", one)
    describe = ("--instruction", "what is the man doing?", "--answer_column", "captions")
    run("run_instruct.py", "--model_name_or_path", one, *photos, *describe, "--output_dir", two)
    for folder in (one, two):
        losses = [p["loss"] for p in json.loads((folder / "learning_curve.json").read_text())["loss"]]
        assert len(losses) == 4 and losses[-1] < losses[0]


def test_the_digits_world_through_the_same_scripts(run, backbones, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits world needs scikit-learn")
    monkeypatch.syspath_prepend(EXAMPLES / "digits")
    scenes_module = runpy.run_path(str(EXAMPLES / "digits" / "scenes.py"))
    scenes = scenes_module["sample_scenes"](16, "train", seed=0)
    questions = scenes_module["sample_questions"](scenes, per_scene=2, seed=0)
    scenes_module["write_scenes"](tmp_path / "scenes", scenes, questions)
    one, two = tmp_path / "one", tmp_path / "two"
    captions = ("--dataset_name_or_path", tmp_path / "scenes" / "captions.jsonl")
    run("run_pretrain.py", *backbones, *captions, "--max_steps", 1, "--output_dir", one)
    for name in ("questions", "conversations"):
        rows = ("--dataset_name_or_path", tmp_path / "scenes" / f"{name}.jsonl")
        half = ("--dtype", "bfloat16") if name == "questions" else ()
        run("run_instruct.py", "--model_name_or_path", one, *rows, *half, "--max_steps", 1, "--output_dir", two / name)
        assert (two / name / "learning_curve.png").is_file()
        assert {tensor.dtype for tensor in _tensors(two / name).values()} == {torch.float32}
