"""What the released files hold, at their true shapes and without a weight, and files that are something else."""

import authors
import pytest
import torch

from transformers_lmeye import LMEyeConfig, LMEyeForConditionalGeneration
from transformers_lmeye.conversion.converting import _widths
from transformers_lmeye.conversion.released import (
    Widths,
    expected_shapes,
    layout_of,
    problems,
    read_released,
    token_counts,
)


def stage2(d_l, k):
    """A stage-2 file over CLIP ViT-L/14 (768 wide, text and projection), as method and code of the authors have it."""
    return {
        "imgdLinear.weight": [k * d_l, 768],
        "imgdLinear.bias": [k * d_l],
        "imgLinear.weight": [d_l, 768],
        "imgLinear.bias": [d_l],
        "promptMlp.weight": [3840, 768],
        "promptMlp.bias": [3840],
        "embedding_img": [1, d_l],
        "embedding_imgd": [1, d_l],
        "llm2clip.weight": [768, d_l],
        "llm2clip.bias": [768],
    }


def stage1(d_l):
    return {"imageLinear.weight": [d_l, 768], "imageLinear.bias": [d_l], "new_embedding": [1, d_l]}


def v0_1(d_l):
    return {
        "instruction_embedding_imgd": [1, d_l],
        "instruction_embedding_imgq": [1, d_l],
        "instruction_blip22clip.weight": [3840, d_l],
        "instruction_blip22clip.bias": [3840],
        "instruction_linear.weight": [768, 768],
        "instruction_linear.bias": [768],
        "instruction_imgdLinear.weight": [d_l, 768],
        "instruction_imgdLinear.bias": [d_l],
        "query_tokens": [1, 32, 768],
        "language_projection.weight": [d_l, 768],
        "language_projection.bias": [d_l],
    }


FILES = {
    "opt-iml-1.3b": ("v1, stage 2", stage2(2048, 1)),
    "bloomz-7b1": ("v1, stage 2", stage2(4096, 5)),
    "llama-7b": ("v1, stage 2", stage2(4096, 5)),
    "llama-13b": ("v1, stage 2", stage2(5120, 5)),
    "vicuna-7b": ("v1, stage 2", stage2(4096, 5)),
    "mpt-7b": ("v1, stage 2", stage2(4096, 5)),
    "blip2-flan-t5-xl": ("v0.1", v0_1(2048)),
    "opt-iml-1.3b, stage 1": ("v1, stage 1", stage1(2048)),
    "bloomz-7b1, stage 1": ("v1, stage 1", stage1(4096)),
    "llama-7b, stage 1": ("v1, stage 1", stage1(4096)),
    "llama-13b, stage 1": ("v1, stage 1", stage1(5120)),
}


@pytest.mark.parametrize("file", FILES)
def test_true_shapes(file):
    """Each release fits the network of its preset, tensor for tensor."""
    expected_layout, shapes = FILES[file]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    layout = layout_of(tensors, file)
    assert layout == expected_layout
    options = {"interaction": "none"} if "stage 1" in file else {"num_dynamic_tokens": 1, "num_request_vectors": 1}
    with torch.device("meta"):
        config = LMEyeConfig.from_preset(file.split(",")[0], num_fine_grained_tokens=1, **options)
        widths = _widths(LMEyeForConditionalGeneration(config))
    k, num_fine_grained_tokens = token_counts(layout, tensors, widths)
    assert expected_shapes(layout, widths, k, num_fine_grained_tokens) == shapes
    assert problems(tensors, shapes) == []
    if layout != "v1, stage 1":
        assert k == (1 if file.startswith("opt") else 5)
        # What the file holds is what the network of the preset trains.
        with torch.device("meta"):
            model = LMEyeForConditionalGeneration(LMEyeConfig.from_preset(file))
        trained = model.freeze_for_stage("pretrain") + model.freeze_for_stage("instruct")
        held = sum(tensor.numel() for name, tensor in tensors.items() if name != "query_tokens")
        # Version 0.1 has no vector of its own for `<img>`; here each of its 32 slots has one.
        assert trained == held + (32 * 2048 if layout == "v0.1" else 0)


def test_token_counts_that_cannot_be_told():
    widths = Widths(input=48, text=40)
    tensors = {"imgdLinear.weight": torch.zeros(49, 24), "promptMlp.weight": torch.tensor(1.0)}
    assert token_counts("v1, stage 2", tensors, widths) == (5, 5)
    assert token_counts("v0.1", {}, widths) == (5, 5)


def test_reading(tmp_path):
    tensors = authors.stage1_tensors()
    for prefix in ("", "module."):
        read = read_released(authors.write(tmp_path / "net.pth", tensors, prefix))
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], value) and not read[name].requires_grad for name, value in tensors.items())
    torch.save({"net": tensors}, tmp_path / "zip.pth")  # torch's present format
    assert read_released(tmp_path / "zip.pth").keys() == tensors.keys()


class Stranger:
    """A class whose pickle would run code."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"imgLinear.weight": torch.zeros(2)}, 'under the key "net"'),
        ([torch.zeros(2)], 'under the key "net"'),
        ({"net": {"imgLinear.weight": [1.0]}}, 'under the key "net"'),
        ({"net": {"llm2clip.bias": torch.zeros(2), "module.llm2clip.bias": torch.zeros(2)}}, "llm2clip.bias twice"),
        ({"net": {}, "other": Stranger()}, "without running code"),
    ],
    ids=["bare tensors", "list", "no tensor", "twice", "code"],
)
def test_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=message):
        read_released(tmp_path / "net.pth")


def test_no_file_of_torch(tmp_path):
    (tmp_path / "net.pth").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_released(tmp_path / "net.pth")
    with pytest.raises(FileNotFoundError):
        read_released(tmp_path / "none.pth")


def test_names_of_no_layout():
    with pytest.raises(ValueError, match=r"none of its tensors \(vit\.weight\) has a name that the authors used"):
        layout_of({"vit.weight": torch.zeros(1)}, "net.pth")
    with pytest.raises(ValueError, match="there are none"):
        layout_of({}, "net.pth")
