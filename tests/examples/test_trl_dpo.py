"""Preference training with TRL's DPOTrainer: its reference, its loss, its pairs, and the digits world under it."""

import json
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import tiny
import torch

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.data import load_rows
from transformers_lmeye.training.ipn_checkpoints import IPNCheckpointMixin
from transformers_lmeye.training.trl import as_trl_preferences, check_trl_head, reference_model


trl = pytest.importorskip("trl")

EXAMPLES = Path(__file__).parents[2] / "examples"
PHOTOS = Path(__file__).parents[2] / "../shared/reference/photos"

# PEFT and TRL know checkpointing by names that Transformers deprecates.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:`{name}` is deprecated:FutureWarning")
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_disable", "gradient_checkpointing_enable")
]


class IPNDPOTrainer(IPNCheckpointMixin, trl.DPOTrainer):
    pass


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def pairs(tmp_path) -> datasets.Dataset:
    """Eight pairs as messages, with one picture or two."""
    rows = []
    for index in range(8):
        images = [tiny.picture(index + 8 * place) for place in range(1 + index % 2)]
        names = [str(tmp_path / f"{index}-{place}.png") for place in range(len(images))]
        for image, name in zip(images, names, strict=True):
            image.save(name)
        content = [{"type": "image"} for _ in names] + [{"type": "text", "text": "what is it?"}]
        answers = ["a cat", "a dog in a house"][:: 1 if index % 3 else -1]
        rows.append(
            {
                "image": names,
                "prompt": [{"role": "user", "content": content}],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": answers[0]}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": answers[1]}]}],
            }
        )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return as_trl_preferences(load_rows(tmp_path / "pairs.jsonl"))


def _trainer(model, folders, pairs, folder, **kwargs) -> IPNDPOTrainer:
    run = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": None,
        "remove_unused_columns": False,
        "gradient_checkpointing": None,
    }
    processor = LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(folders.language()))
    args = trl.DPOConfig(str(folder), **{**run, **kwargs})
    return IPNDPOTrainer(model, reference_model(model), args, train_dataset=pairs, processing_class=processor)


def _score(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of each row's completion by the model's own logits. `[rows]`"""
    with torch.no_grad():
        given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        logits = LMEyeForConditionalGeneration.forward(model, **given).logits[:, :-1]
    ids = inputs["input_ids"][:, 1:, None].clamp(max=logits.shape[-1] - 1)  # slots count nothing
    return (logits.log_softmax(-1).gather(-1, ids)[..., 0] * inputs["completion_mask"][:, 1:]).sum(dim=1)


def test_the_reference_costs_no_memory_and_stays(build):
    """Every frozen tensor is the model's own; what trains is a copy that stays as it was, whoever had the model."""
    model = build("llama", "clip_text")
    model.freeze_for_stage("instruct")
    trl.trainer.utils.add_fused_lm_head(model)
    reference = reference_model(model)
    own = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        assert (parameter is own[name]) != own[name].requires_grad, name
        assert not parameter.requires_grad
    assert any(parameter.requires_grad for parameter in own.values())
    assert {id(b) for b in reference.buffers()} == {id(b) for b in model.buffers()}
    ids, _ = tiny.row(model.config, "img 3 req 4")
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": tiny.pixels(1)}
    with torch.no_grad():
        before = model(**inputs).logits
        for parameter in own.values():
            if parameter.requires_grad:
                parameter.add_(0.1)
        assert torch.equal(reference(**inputs).logits, before)
        assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_loss_is_dpos(build, folders, pairs, tmp_path, checkpointing):
    """Against the formula, on the logits of the models' own heads."""
    model = build("gemma2", "cross_attention")
    model.freeze_for_stage("instruct")
    trainer = _trainer(model, folders, pairs, tmp_path, beta=0.3, activation_checkpointing=checkpointing)
    check_trl_head(model)
    batch = trainer.data_collator([pairs[index] for index in range(4)])
    assert len(batch["input_ids"]) == 8 and len(batch["pixel_values"]) == 12
    start = _score(model, batch)
    torch.testing.assert_close(torch.cat(trainer.compute_ref_log_probs(model, batch)), start, atol=1e-4, rtol=0)
    with torch.no_grad():
        for parameter in model.ipn.dynamic_projection.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.train()
    loss = trainer.compute_loss(model, batch)
    gains = _score(model.eval(), batch) - start
    expected = -torch.nn.functional.logsigmoid(0.3 * (gains[:4] - gains[4:])).mean()
    assert abs(float(expected) - float(torch.tensor(2.0).log())) > 1e-2
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=0)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_training_is_deterministic_and_leaves_the_backbones(build, folders, pairs, tmp_path):
    model = build("llama", "cross_attention")
    model.freeze_for_stage("instruct")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ends = []
    for run in ("one", "two"):
        model.load_state_dict(start)
        trainer = _trainer(model, folders, pairs, tmp_path / run, num_train_epochs=4, beta=1.0)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.3
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name])
        assert torch.equal(tensor, start[name]) or name.startswith("ipn.")


def test_an_adapter_has_a_reference_of_its_own(build, folders, pairs, tmp_path):
    peft = pytest.importorskip("peft")
    model = build("llama", "cross_attention")
    model.freeze_for_stage("instruct")
    model.language_model = peft.get_peft_model(
        model.language_model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = _trainer(model, folders, pairs, tmp_path, num_train_epochs=2, activation_checkpointing=True)
    batch = trainer.data_collator([pairs[0], pairs[1]])
    before = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch))
    assert torch.equal(before, torch.cat(trainer.compute_ref_log_probs(model.eval(), batch)))
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert any("lora_" in name for name in changed) and any(name.startswith("ipn.") for name in changed)
    assert torch.equal(torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch)), before)


def test_pairs_may_be_texts(tmp_path):
    tiny.picture().save(tmp_path / "0.png")
    rows = [{"images": str(tmp_path / "0.png"), "prompt": "what?", "chosen": "a cat", "rejected": "a dog"}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]) + "\n")
    rows = load_rows(tmp_path / "pairs.jsonl")
    (pair,) = as_trl_preferences(rows, "images")
    assert pair["images"][0].size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert pair["prompt"] == [{"role": "user", "content": "what?"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "a dog"}]
    with pytest.raises(ValueError, match=r"no column 'image'; it has images, .*\(--image_column\)"):
        as_trl_preferences(rows)


def test_pairs_of_photographs(monkeypatch, tmp_path, capsys):
    if not PHOTOS.exists():
        pytest.skip("the photographs lie beside the repository only where it is developed")

    def build(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["build_preferences.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / "build_preferences.py"), run_name="__main__")

    flags = ["--dataset_name_or_path", PHOTOS / "photos.jsonl", "--image_column", "file"]
    flags += ["--caption_column", "captions", "--output_file", tmp_path / "pairs.jsonl"]
    build(*flags, "--objects_column", "instances", "--num_swaps", 2)
    assert "71 objects, 150 pictures" in capsys.readouterr().out
    (pair,) = as_trl_preferences(load_rows(tmp_path / "pairs.jsonl", split="train[7:8]"), open_image=lambda path: path)
    assert pair["images"][0].startswith("images/") and pair["prompt"][0]["content"][0] == {"type": "image"}
    (tmp_path / "objects.txt").write_text("person, man, woman\n\nbear\ndog, puppy\n")
    build(*flags, "--vocabulary_file", tmp_path / "objects.txt")
    assert "3 objects, 150 pictures" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--vocabulary_file, from --objects_column, or from both"):
        build(*flags)
    with pytest.raises(ValueError, match="no column 'boxes'"):
        build(*flags, "--objects_column", "boxes")
