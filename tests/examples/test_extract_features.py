"""The extraction script as a user runs it, and the stage scripts on what it wrote."""

import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file

from transformers_lmeye.data.features import FeatureCache


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., str]:
    """`run("extract_features.py", "--flag", value, ...)` in this process -> what it printed."""

    def script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def write_data(folder: Path, count: int, size: tuple[int, int] = (40, 32)) -> Path:
    """Pictures `images/0.png` and so on, with captions and with questions."""
    (folder / "images").mkdir(parents=True)
    words = ("cat", "dog", "house", "man")
    with open(folder / "captions.jsonl", "w") as captions, open(folder / "questions.jsonl", "w") as questions:
        for number in range(count):
            name, word = f"images/{number}.png", words[number % 4]
            tiny.picture(number, size).save(folder / name)
            captions.write(json.dumps({"image": name, "caption": [f"a {word}", f"a {word} in a house"]}) + "\n")
            questions.write(json.dumps({"image": name, "question": "what?", "answer": f"a {word}"}) + "\n")
    return folder


def curve(folder: Path) -> tuple[list[float], list[float]]:
    content = json.loads((folder / "learning_curve.json").read_text())
    return tuple([point[name] for point in content[name]] for name in ("loss", "eval_loss"))


def test_both_stages_from_features(run, folders, tmp_path):
    """Stage 1 from pooled features, stage 2 from the patches too; the pictures are not there any more."""
    data, evaluation = write_data(tmp_path / "data", 8), write_data(tmp_path / "evaluation", 4, (32, 50))
    backbones = ("--vision_model_name_or_path", folders.vision())
    small = json.dumps(tiny.SMALL_STACK)
    train = ("--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", 4, "--learning_rate", "1e-2")
    train += ("--gradient_accumulation_steps", 1, "--logging_steps", 1, "--max_steps", 3, "--eval_strategy", "steps")
    train += ("--eval_steps", 1)

    def rows(name: str) -> tuple[object, ...]:
        return (
            *("--dataset_name_or_path", data / name),
            *("--eval_dataset_name_or_path", evaluation / name),
        )

    pretrain = ("run_pretrain.py", *backbones, "--language_model_name_or_path", folders.language("llama"))
    pretrain += ("--interaction", "cross_attention", "--config_overrides", small, *rows("captions.jsonl"), *train)
    run(*pretrain, "--output_dir", tmp_path / "one")
    instruct = ("run_instruct.py", "--model_name_or_path", tmp_path / "one", *rows("questions.jsonl"), *train)
    run(*instruct, "--output_dir", tmp_path / "two")

    extract = ("extract_features.py", "--num_workers", 2, "--batch_size", 4)
    pooled, everything = tmp_path / "pooled", tmp_path / "everything"
    printed = run(*extract, *backbones, *rows("captions.jsonl"), "--output_dir", pooled)
    assert f"{pooled} holds pooled of 12 pictures, 12 of them new" in printed
    checkpoint = ("--model_name_or_path", tmp_path / "one")
    printed = run(*extract, *checkpoint, *rows("questions.jsonl"), "--output_dir", everything)
    assert f"{everything} holds pooled, patches of 12 pictures, 12 of them new" in printed
    assert (everything / "bad_samples.jsonl").read_text() == ""

    for folder in (data, evaluation):
        shutil.rmtree(folder / "images")
    run(*pretrain, "--feature_cache", pooled, "--output_dir", tmp_path / "cached_one")
    run(*instruct, "--feature_cache", everything, "--output_dir", tmp_path / "cached_two")
    for stage in ("one", "two"):
        for cached, expected in zip(curve(tmp_path / f"cached_{stage}"), curve(tmp_path / stage), strict=True):
            assert cached == pytest.approx(expected, rel=1e-4) and len(expected) >= 3
        tensors = load_file(tmp_path / stage / "model.safetensors")
        for name, tensor in load_file(tmp_path / f"cached_{stage}" / "model.safetensors").items():
            torch.testing.assert_close(tensor, tensors[name], rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="also reads patches"):
        run(*instruct, "--feature_cache", pooled, "--output_dir", tmp_path / "none")


def test_shards_streams_and_lists_of_files_give_the_same_features(run, folders, tmp_path):
    data = write_data(tmp_path / "data", 6)
    backbones = ("--vision_model_name_or_path", folders.vision(), "--patches", "true", "--storage_dtype", "float16")
    extract = ("extract_features.py", *backbones, "--num_workers", 0, "--batch_size", 1)
    for number in range(2):
        with tarfile.open(data / f"shard-{number}.tar", "w") as archive:
            for member in range(number * 3, number * 3 + 3):
                archive.add(data / f"images/{member}.png", f"{member:03d}.png")
                text = tarfile.TarInfo(f"{member:03d}.txt")
                text.size = 5
                archive.addfile(text, io.BytesIO(b"a cat"))
    sources = {
        "list": ("--dataset_name_or_path", data / "captions.jsonl"),
        "stream": ("--dataset_name_or_path", data / "captions.jsonl", "--streaming"),
        "folder": ("--dataset_name_or_path", data / "images", "--image_folder", data),
        "shards": ("--dataset_name_or_path", data / "shard-*.tar"),
        "stream of shards": ("--dataset_name_or_path", data / "shard-{0..1}.tar", "--streaming"),
    }
    for name, source in sources.items():
        assert "of 6 pictures, 6 of them new" in run(*extract, *source, "--output_dir", tmp_path / name)
        assert "0 of them new" in run(*extract, *source, "--output_dir", tmp_path / name)
    expected = FeatureCache(tmp_path / "list")
    for name in sources:
        cache = FeatureCache(tmp_path / name)
        for number in range(6):
            path = data / f"images/{number}.png"
            found = cache(path.read_bytes() if "shards" in name else path, image_folder=data)
            assert found.patches.dtype == torch.float16
            assert torch.equal(found.patches, expected(f"images/{number}.png").patches)


@pytest.mark.slow
def test_two_processes_killed_twice(run, folders, tmp_path):
    """What two processes write, killed with SIGKILL and started again, is what one writes that is left in peace."""
    data = write_data(tmp_path / "data", 60, (700, 700))
    with open(data / "captions.jsonl", "a") as file:
        file.write("".join(file_line + "\n" for file_line in (data / "captions.jsonl").read_text().splitlines()[:30]))
        file.write(json.dumps({"image": "images/none.png", "caption": "a cat"}) + "\n")
    arguments = ("--vision_model_name_or_path", folders.vision(), "--dataset_name_or_path", data / "captions.jsonl")
    arguments += ("--num_workers", 0, "--batch_size", 2, "--shard_size", 5, "--use_cpu", "--max_bad_fraction", 0.1)
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(EXAMPLES / "extract_features.py"), *map(str, arguments), "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}

    written = 0
    for _ in range(2):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                deadline = time.monotonic() + 120
                while len(list(folder.glob("*.safetensors"))) < written + 4:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.005)
            finally:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    each.send_signal(signal.SIGKILL)
        assert not json.loads((folder / "feature_cache.json").read_text())["complete"]
        written = len(list(folder.glob("*.safetensors")))
    before = {file: file.read_bytes() for file in folder.glob("*.safetensors")}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    printed = again.stdout
    assert again.returncode == 0, again.stderr
    assert "of 60 pictures" in printed and "1 could not be read" in printed
    assert all(file.read_bytes() == content for file, content in before.items())
    assert [json.loads(line)["kind"] for line in (folder / "bad_samples.jsonl").read_text().splitlines()] == [
        "missing"
    ]
    stored = [load_file(file) for file in folder.glob("*.safetensors")]
    assert sum(len(shard["pooled"]) for shard in stored) == 60  # each once, whichever process met it

    run("extract_features.py", *arguments, "--output_dir", tmp_path / "one")
    one, two = FeatureCache(tmp_path / "one"), FeatureCache(folder)
    for number in range(60):
        name = f"images/{number}.png"
        torch.testing.assert_close(two(name).pooled, one(name).pooled, rtol=1e-5, atol=1e-5)
