"""python -m transformers_lmeye.conversion"""

import subprocess
import sys

import authors
import pytest
import tiny

from transformers_lmeye import LMEyeForConditionalGeneration
from transformers_lmeye.conversion.__main__ import main


@pytest.fixture
def run(monkeypatch):
    """`run(arguments)`: the command, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["conversion", *map(str, arguments)])
        main()

    return call


def test_help():
    command = [sys.executable, "-m", "transformers_lmeye.conversion", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    for option in ("--checkpoint", "--output", "--vision", "--language", "--clip-text", "--stage1", "--whole"):
        assert option in done.stdout


def test_stage2_with_its_stage1_file(run, folders, tmp_path, capsys):
    net = {name: value for name, value in authors.stage2_tensors().items() if not name.startswith("imgLinear")}
    del net["embedding_img"]
    arguments = ["--checkpoint", authors.write(tmp_path / "2.pth", net), "--output", tmp_path / "out"]
    arguments += ["--vision", folders.vision(), "--language", folders.language("opt"), "--whole"]
    with pytest.raises(SystemExit, match="missing: embedding_img"):
        run(*arguments)
    assert not (tmp_path / "out").exists()
    run(*arguments, "--stage1", authors.write(tmp_path / "1.pth", authors.stage1_tensors()))
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert LMEyeForConditionalGeneration.from_pretrained(tmp_path / "out").config.includes_backbones


def test_blip2(run, folders, tmp_path):
    blip2 = tiny.save_blip2(tmp_path / "blip2")
    file = authors.write(tmp_path / "net.pth", authors.v0_1_tensors(blip2), "module.")
    arguments = ("--checkpoint", file, "--output", tmp_path / "out", "--vision", blip2)
    with pytest.raises(SystemExit, match="--clip-text"):
        run(*arguments)
    run(*arguments, "--clip-text", folders.vision())
    model = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.is_encoder_decoder and not model.config.includes_backbones


def test_files_that_are_not_there(run, folders, tmp_path):
    with pytest.raises(SystemExit, match="No such file"):
        run("--checkpoint", tmp_path / "none.pth", "--output", tmp_path / "out", "--vision", folders.vision())
