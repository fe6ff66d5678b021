"""What the trainer trains, saves, averages and goes on with; losses and updates against plain computations."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from transformers_lmeye import LMEyeForConditionalGeneration
from transformers_lmeye.training import (
    LMEyeTrainer,
    ModelArguments,
    StageTrainingArguments,
    load_model,
    write_learning_curve,
)
from transformers_lmeye.training.collators import pad_right


STATIC = ("ipn.visual_mapping.", "ipn.image_token")


def _samples(config, layouts: list[str]) -> list[dict[str, torch.Tensor]]:
    """One sample per layout (see `tiny.row`), each with its own picture where it shows one."""
    samples = []
    for seed, layout in enumerate(layouts):
        ids, labels = tiny.row(config, layout, seed)
        sample = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        if "img" in layout:
            sample["pixel_values"] = tiny.pixels(layout.split().count("img"), seed)
        samples.append(sample)
    return samples


LAYOUTS = {
    "pretrain": ["img =3", "img =9", "img =1", "img =5", "img =2", "img =7", "img =4", "img =6"],
    "instruct": [
        "img 3 req =2",
        "2 img 4 req 1 =7",
        "img req =1",
        "img 2 req 1 =3 2 req =4",
        "img img 2 req =5",
        "3 img 3 req 2 =2",
        "img 1 req =6",
        "img 5 req =3 1 req =1",
    ],
}


def _arguments(folder: Path, **kwargs: Any) -> StageTrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return StageTrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})


def _trainer(model, folder: Path, samples, callbacks=None, eval_dataset=None, **kwargs: Any) -> LMEyeTrainer:
    return LMEyeTrainer(
        model,
        _arguments(folder, **kwargs),
        data_collator=lambda rows: pad_right(rows, 0),
        train_dataset=samples,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


def _state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _token_losses(model, samples) -> torch.Tensor:
    """Negative log likelihood of every target token, one sample at a time. [targets]"""
    losses = []
    for sample in samples:
        pixel_values = sample.get("pixel_values")
        images = {} if pixel_values is None else {"pixel_values": pixel_values}
        logits = model(input_ids=sample["input_ids"][None], **images).logits[0]
        nll = -logits.log_softmax(-1)
        for column, label in enumerate(sample["labels"].tolist()):
            if label != -100:
                losses.append(nll[column - 1, label])
    return torch.stack(losses)


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention"])
def test_only_the_parameters_of_the_stage_change(build, tmp_path, interaction, stage):
    model = build("llama", interaction)
    before = _state(model)
    model.freeze_for_stage(stage)
    _trainer(model, tmp_path, _samples(model.config, LAYOUTS[stage])).train()
    frozen = {id(p) for backbone in model.backbones() for p in backbone.parameters()}
    trained = {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in frozen and name.startswith(STATIC) == (stage == "pretrain")
    }
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained
    assert all(name.startswith("ipn.") for name in changed) and changed


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_a_checkpoint_is_the_ipn_and_the_state_of_training(build, tmp_path, stage):
    model = build("llama", "clip_text")
    count = model.freeze_for_stage(stage)
    _trainer(model, tmp_path, _samples(model.config, LAYOUTS[stage]), save_strategy="steps", save_steps=1).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    checkpoint = tmp_path / "checkpoint-2"
    files = {path.name for path in checkpoint.iterdir()}
    training_state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    assert training_state | {"model.safetensors", "config.json"} <= files
    tensors = load_file(checkpoint / "model.safetensors")
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("ipn.") and not name.startswith("ipn.interaction.")
    }
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    payload = sum(tensor.numel() * 4 for tensor in expected.values())
    size = (checkpoint / "model.safetensors").stat().st_size
    assert payload < size < payload + 4096
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert sum(state["exp_avg"].numel() for state in moments.values()) == count
    assert (checkpoint / "optimizer.pt").stat().st_size < 2 * 4 * count + 16384


def test_a_checkpoint_is_whole_where_the_backbones_have_no_source(build, tmp_path):
    model = build("llama", "clip_text")
    model.config.backbones = None
    model.freeze_for_stage("pretrain")
    _trainer(model, tmp_path, _samples(model.config, LAYOUTS["pretrain"])).save_model()
    loaded = LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


class _StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(build, tmp_path, stage):
    """Bit for bit, across epochs, with dropout in the interaction; the curve goes on too."""
    model = build("llama", "clip_text")
    start = _state(model)
    samples = _samples(model.config, LAYOUTS[stage])
    model.freeze_for_stage(stage)
    run = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    _trainer(model, tmp_path / "whole", samples, **run).train()
    whole = _state(model)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)

    model.load_state_dict(start)
    _trainer(model, tmp_path / "cut", samples, callbacks=[_StopAt(3)], **run).train()
    assert any(not torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(start)
    torch.manual_seed(123)  # whatever a new process's random numbers are
    _trainer(model, tmp_path / "cut", samples, **run).train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-3"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    curves = [json.loads((tmp_path / run / "learning_curve.json").read_text()) for run in ("whole", "cut")]
    assert curves[0]["loss"] == curves[1]["loss"]
    assert [point["step"] for point in curves[0]["loss"]] == [1, 2, 3, 4, 5]


# PEFT reads a property that the library deprecates.
ignore_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def _with_adapter(model):
    peft = pytest.importorskip("peft")
    model.language_model = peft.get_peft_model(
        model.language_model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    return model


@ignore_peft
def test_a_resumed_run_of_an_adapter_ends_where_an_uninterrupted_one_does(build, tmp_path):
    """Bit for bit, in a new process's model: loaded from the checkpoint, or built as before; and it still trains."""
    model = build("llama", "clip_text")
    model.save_pretrained(tmp_path / "start", save_backbones=False)
    samples = _samples(model.config, LAYOUTS["instruct"])
    model.freeze_for_stage("instruct")
    _with_adapter(model)
    start = _state(model)
    run = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    _trainer(model, tmp_path / "whole", samples, **run).train()
    whole = _state(model)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    again = LMEyeForConditionalGeneration.from_pretrained(checkpoint)
    assert any("lora_B" in name and bool(tensor.any()) for name, tensor in again.state_dict().items())
    moved = [n for n in whole if "lora_" in n and not torch.equal(whole[n], again.state_dict()[n])]
    assert moved, "the adapter trains on after the checkpoint"

    built = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "start")
    built.freeze_for_stage("instruct")
    _with_adapter(built)
    loaded = LMEyeForConditionalGeneration.from_pretrained(checkpoint, is_trainable=True)
    loaded.freeze_for_stage("instruct")
    loaded.language_model.set_requires_grad("default")
    for resumed in (built, loaded):
        torch.manual_seed(123)  # whatever a new process's random numbers are
        _trainer(resumed, tmp_path / "whole", samples, **run).train(resume_from_checkpoint=checkpoint)
        for name, tensor in resumed.state_dict().items():
            assert torch.equal(tensor, whole[name]), name
    assert whole.keys() == start.keys()


@ignore_peft
def test_the_best_checkpoint_of_an_adapter(build, tmp_path):
    model = build("llama", "clip_text")
    samples = _samples(model.config, LAYOUTS["instruct"])
    model.freeze_for_stage("instruct")
    _with_adapter(model)
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = _trainer(
        model,
        tmp_path,
        samples,
        eval_dataset=samples[:3],
        max_steps=4,
        learning_rate=0.5,
        save_total_limit=4,
        load_best_model_at_end=True,
        **evaluation,
    )
    trainer.train()
    curve = json.loads((tmp_path / "learning_curve.json").read_text())
    best = min(curve["eval_loss"], key=lambda point: point["eval_loss"])
    assert best["step"] < 4, "the last checkpoint would not tell"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], abs=1e-5)


@ignore_peft
def test_resuming_with_an_adapter_that_one_side_lacks_is_refused(build, tmp_path):
    run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    plain, adapted = build("llama", "clip_text"), build("llama", "clip_text")
    samples = _samples(plain.config, LAYOUTS["instruct"])
    for model, name in ((plain, "plain"), (adapted, "adapted")):
        model.freeze_for_stage("instruct")
        if name == "adapted":
            _with_adapter(model)
        _trainer(model, tmp_path / name, samples, callbacks=[_StopAt(1)], **run).train()
    with pytest.raises(ValueError, match="holds an adapter of the language model, and the model has none"):
        _trainer(plain, tmp_path, samples, **run).train(resume_from_checkpoint=str(tmp_path / "adapted/checkpoint-1"))
    with pytest.raises(ValueError, match="holds no adapter of the language model, and the model has one"):
        _trainer(adapted, tmp_path, samples, **run).train(resume_from_checkpoint=str(tmp_path / "plain/checkpoint-1"))


def test_a_new_model_with_another_text_encoder(folders):
    """`--clip_text_model_name_or_path` reaches the model where the vision model has no text encoder."""
    arguments = ModelArguments(
        vision_model_name_or_path=str(folders.tower("siglip")),
        language_model_name_or_path=str(folders.language()),
        clip_text_model_name_or_path=str(folders.vision()),
    )
    model, _ = load_model(arguments)
    assert model.config.backbones["clip_text"]["name_or_path"] == str(folders.vision())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "activation checkpointing"])
@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_loss_and_update_are_means_over_target_tokens(build, tmp_path, stage, checkpointing):
    """One plain gradient step over two accumulated batches, against all four samples one at a time."""
    model = build("llama", "cross_attention")
    samples = _samples(model.config, LAYOUTS[stage][:4])
    count = model.freeze_for_stage(stage)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    losses = _token_losses(model, samples)
    assert len(losses) == sum(int((sample["labels"] != -100).sum()) for sample in samples)
    gradients = dict(zip(trained, torch.autograd.grad(losses.mean(), list(trained.values())), strict=True))
    expected = {name: p.detach() - 0.1 * gradients[name] for name, p in trained.items()}

    trainer = _trainer(
        model,
        tmp_path,
        samples,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        activation_checkpointing=checkpointing,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    for name, p in trained.items():
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-5, rtol=1e-5, msg=name)


def test_evaluation_loss_is_a_mean_over_target_tokens(build, tmp_path):
    """Batches of two, two and one sample, with one to nine targets each."""
    model = build("llama", "clip_text")
    samples = _samples(model.config, LAYOUTS["pretrain"][:5])
    model.freeze_for_stage("pretrain")
    trainer = _trainer(model, tmp_path, samples, eval_dataset=samples, per_device_eval_batch_size=2)
    with torch.no_grad():
        expected = _token_losses(model, samples).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert not any(p.grad is not None for p in model.parameters())


def test_evaluation_while_training_and_the_best_checkpoint(build, tmp_path):
    model = build("llama", "clip_text")
    samples = _samples(model.config, LAYOUTS["pretrain"])
    model.freeze_for_stage("pretrain")
    trainer = _trainer(
        model,
        tmp_path,
        samples,
        eval_dataset=samples[:3],
        max_steps=4,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=4,
        load_best_model_at_end=True,
    )
    trainer.train()
    curve = json.loads((tmp_path / "learning_curve.json").read_text())
    assert [point["step"] for point in curve["eval_loss"]] == [1, 2, 3, 4]
    best = min(curve["eval_loss"], key=lambda point: point["eval_loss"])
    tensors = load_file(tmp_path / f"checkpoint-{best['step']}" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], abs=1e-5)


def test_words_alone_move_nothing_and_harm_nothing(build, tmp_path):
    """A batch without image reaches no trained parameter; one with both counts the words' tokens in its mean."""
    model = build("llama", "clip_text", fine_grained_dropout=0.0)
    plain = _samples(model.config, ["2 =3", "1 =5"])
    model.freeze_for_stage("instruct")
    before = _state(model)
    options = {
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "optim": "sgd",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
    }
    trainer = _trainer(model, tmp_path, plain, **options)
    trainer.train()
    with torch.no_grad():
        expected = F.cross_entropy(
            torch.cat([model.language_model(s["input_ids"][None]).logits[0, :-1] for s in plain]),
            torch.cat([s["labels"][1:] for s in plain]),
        )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    mixed = [plain[0], *_samples(model.config, ["img 3 req =2"])]
    with torch.no_grad():
        expected = _token_losses(model, mixed).mean()
    trainer = _trainer(model, tmp_path, mixed, **options)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert not torch.equal(model.ipn.request_token, before["ipn.request_token"])


def test_resuming_on_other_backbones_or_from_another_ipn_is_refused(build, folders, tmp_path):
    model = build("llama", "clip_text")
    samples = _samples(model.config, LAYOUTS["pretrain"])
    model.freeze_for_stage("pretrain")
    run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    _trainer(model, tmp_path, samples, callbacks=[_StopAt(1)], **run).train()
    checkpoint = str(tmp_path / "checkpoint-1")

    other = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folders.vision()), str(folders.language("llama", seed=1)), interaction="clip_text"
    )
    other.freeze_for_stage("pretrain")
    with pytest.raises(ValueError, match="was trained with another language model"):
        _trainer(other, tmp_path, samples, **run).train(resume_from_checkpoint=checkpoint)

    with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):
        _trainer(model, tmp_path, samples, **run).train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    smaller = build("llama", "none")
    smaller.freeze_for_stage("pretrain")
    _trainer(smaller, tmp_path / "none", samples, callbacks=[_StopAt(1)], **run).train()
    with pytest.raises(
        ValueError, match=r"does not fit the model. It lacks: ipn\.dynamic_projection\.bias, .*nothing"
    ):
        _trainer(model, tmp_path, samples, **run).train(resume_from_checkpoint=str(tmp_path / "none/checkpoint-1"))
    with pytest.raises(ValueError, match=r"It lacks: nothing\. It alone has: ipn\.dynamic_projection\.bias"):
        _trainer(smaller, tmp_path, samples, **run).train(resume_from_checkpoint=checkpoint)


def test_training_leaves_the_saved_configuration_as_it_was(build, tmp_path):
    """The Trainer turns caching off on the model it is given; a checkpoint must not carry that on."""
    model = build("llama", "clip_text")
    model.save_pretrained(tmp_path / "before", save_backbones=False)
    model.freeze_for_stage("pretrain")
    _trainer(model, tmp_path / "after", _samples(model.config, LAYOUTS["pretrain"])).save_model()
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((tmp_path / part / name).read_text()) for part in ("before", "after"))
        assert before == after


def test_learning_curve_files(tmp_path):
    history = [
        {"step": 1, "loss": 3.0, "learning_rate": 1e-4, "epoch": 0.1},
        {"step": 2, "eval_loss": 2.5, "epoch": 0.2},
        {"step": 2, "loss": 2.0, "learning_rate": 5e-5, "epoch": 0.2},
        {"step": 2, "train_loss": 2.5, "train_runtime": 1.0},
    ]
    path = write_learning_curve(history, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "learning_curve.json").read_text()) == {
        "loss": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}],
        "eval_loss": [{"step": 2, "eval_loss": 2.5}],
        "learning_rate": [{"step": 1, "learning_rate": 1e-4}, {"step": 2, "learning_rate": 5e-5}],
    }
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    write_learning_curve([], tmp_path / "empty")  # a run of no logged step still ends
    assert os.listdir(tmp_path / "empty")


def test_default_arguments_are_the_papers_recipe(tmp_path):
    arguments = StageTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.learning_rate == 1e-4
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.optim in ("adamw_torch", "adamw_torch_fused")
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 256
