"""What a checkpoint holds, when it counts as one, and what is left of a killed run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.training import LMEyeTrainer, StageTrainingArguments
from transformers_lmeye.training.checkpoints import (
    FILE_LIST_NAME,
    UNFINISHED_FOLDER,
    checkpoint_problem,
    clear_unfinished,
    keep_lines,
    last_checkpoint,
    list_files,
    publish_checkpoint,
    replacing,
    rotate_checkpoints,
)
from transformers_lmeye.training.collators import pad_right


def _trainer(model: Any, folder: Path, **kwargs: Any) -> LMEyeTrainer:
    samples = []
    for seed in range(8):
        ids, labels = tiny.row(model.config, "img 3 req =2", seed)
        pixels = tiny.pixels(1, seed)
        samples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels})
    processing_class = kwargs.pop("processing_class", None)
    eval_dataset = samples[:2] if kwargs.get("eval_strategy") else None
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
    defaults |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1}
    defaults |= {"use_cpu": True, "disable_tqdm": True}
    return LMEyeTrainer(
        model,
        StageTrainingArguments(output_dir=str(folder), **{**defaults, **kwargs}),
        lambda rows: pad_right(rows, 0),
        train_dataset=samples,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
    )


def _checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


# --- what one holds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention"])
def test_a_checkpoint_holds_the_network_and_two_moments_of_what_trains(build, tmp_path, interaction, stage):
    model = build("llama", interaction)
    model.freeze_for_stage(stage)
    trainer = _trainer(model, tmp_path)
    trainer.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimised} == {id(p) for p in trained} and len(optimised) == len(trained)

    checkpoint = tmp_path / "checkpoint-2"
    weights = load_file(checkpoint / "model.safetensors")
    backbones = {id(p) for backbone in model.backbones() for p in backbone.parameters()}
    own = {name for name, p in model.named_parameters() if id(p) not in backbones}
    assert weights.keys() == own and all(name.startswith("ipn.") for name in own)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    moments = [state[index][name] for index in state for name in ("exp_avg", "exp_avg_sq")]
    assert sum(m.numel() for m in moments) == 2 * sum(p.numel() for p in trained)

    tensors = sum(t.numel() * t.element_size() for t in (*weights.values(), *moments))
    files = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    assert (
        sum(files[name] for name in ("model.safetensors", "optimizer.pt")) < tensors + 1000 * len(optimised) + 20_000
    )
    assert files.keys() >= {"scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json", FILE_LIST_NAME}


def test_every_name_but_a_checkpoints_is_left_alone(build, tmp_path):
    """Old checkpoints go, the best one stays; nothing half-written is left."""
    model = build()
    model.freeze_for_stage("pretrain")
    (tmp_path / "checkpoint-notes").mkdir()
    run = {"max_steps": 5, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 1}
    best_is_worst = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    _trainer(model, tmp_path, **run, **best_is_worst).train()
    curve = json.loads((tmp_path / "learning_curve.json").read_text())["eval_loss"]
    best = max(curve, key=lambda point: point["eval_loss"])["step"]
    assert best < 4, "the newest two would not tell"
    assert _checkpoints(tmp_path) == sorted([f"checkpoint-{best}", "checkpoint-5", "checkpoint-notes"])
    for step in (best, 5):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
        assert checkpoint_problem(tmp_path / f"checkpoint-{step}") is None


# --- which one counts ----------------------------------------------------------------------------------------------


@pytest.fixture
def complete(tmp_path) -> Callable[[int], Path]:
    """`complete(step)`: a checkpoint of two files."""

    def make(step: int, folder: Path = tmp_path) -> Path:
        checkpoint = folder / f"checkpoint-{step}"
        (checkpoint / "part").mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        (checkpoint / "part" / "optimizer.pt").write_bytes(b"moments")
        list_files(checkpoint)
        return checkpoint

    return make


def test_what_a_checkpoint_lacks(complete):
    checkpoint = complete(1)
    assert checkpoint_problem(checkpoint) is None
    (checkpoint / "notes.txt").write_text("the user's own")
    assert checkpoint_problem(checkpoint) is None
    (checkpoint / "model.safetensors").write_bytes(b"wei")
    assert "model.safetensors (3 of 7 bytes)" in checkpoint_problem(checkpoint)
    (checkpoint / "part" / "optimizer.pt").unlink()
    assert checkpoint_problem(checkpoint) == "it lacks part/optimizer.pt"
    (checkpoint / FILE_LIST_NAME).unlink()
    assert FILE_LIST_NAME in checkpoint_problem(checkpoint)


def test_the_last_complete_one_is_found(complete, tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None and last_checkpoint(tmp_path) is None
    complete(9)
    (complete(10) / "model.safetensors").unlink()
    (tmp_path / "checkpoint-11").mkdir()
    complete(12, tmp_path / UNFINISHED_FOLDER)
    (tmp_path / "checkpoint-13").write_text("no folder")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_what_a_killed_run_left_is_cleared(complete, tmp_path):
    """Killed before the last rename: the checkpoint gets its name. Killed before: it goes."""
    unfinished = tmp_path / UNFINISHED_FOLDER
    complete(4)
    complete(5, unfinished)
    (complete(6, unfinished) / FILE_LIST_NAME).unlink()
    complete(4, unfinished / "deleted")
    (complete(4, unfinished) / "newer").write_text("")
    clear_unfinished(tmp_path)
    assert _checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    assert not (tmp_path / "checkpoint-4" / "newer").exists()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_a_checkpoint_of_an_earlier_run_gives_way(complete, tmp_path):
    complete(4)
    (complete(4, tmp_path / UNFINISHED_FOLDER) / "newer").write_text("")
    publish_checkpoint(tmp_path / UNFINISHED_FOLDER / "checkpoint-4", tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "newer").exists()


def test_rotation_goes_by_age_and_spares_the_best(complete, tmp_path):
    """A checkpoint of more steps that an earlier run left is older all the same."""
    for age, step in enumerate((30, 10, 20, 40)):
        os.utime(complete(step), (age, age))
    rotate_checkpoints(tmp_path, None, None)
    rotate_checkpoints(tmp_path, 4, None)
    assert len(_checkpoints(tmp_path)) == 4
    rotate_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-10"))
    assert [name for name in _checkpoints(tmp_path) if "-" in name] == ["checkpoint-10", "checkpoint-40"]
    rotate_checkpoints(tmp_path, 1, str(tmp_path / "checkpoint-10"))
    assert len([name for name in _checkpoints(tmp_path) if "-" in name]) == 2


def test_resuming_from_a_damaged_checkpoint_is_refused(build, tmp_path):
    model = build()
    model.freeze_for_stage("pretrain")
    with pytest.raises(ValueError, match=r"There is no checkpoint in .* to resume from"):
        _trainer(model, tmp_path).train(resume_from_checkpoint="last")
    _trainer(model, tmp_path, max_steps=3, save_total_limit=3).train()
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3 is no complete checkpoint: it lacks optimizer\.pt"):
        _trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for choice in ("last", True):
        trainer = _trainer(model, tmp_path)
        trainer.train(resume_from_checkpoint=choice)
        assert trainer.state.global_step == 2 and len(trainer.state.log_history) > 2


def test_weights_alone_are_no_checkpoint_to_go_on_from(build, tmp_path):
    model = build()
    model.freeze_for_stage("pretrain")
    _trainer(model, tmp_path, save_only_model=True).train()
    for choice in ("last", str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match=r"checkpoint-\d holds weights alone \(--save_only_model\)"):
            _trainer(model, tmp_path, save_only_model=True).train(resume_from_checkpoint=choice)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "curve.json"
    file.write_text("old")
    with pytest.raises(RuntimeError), replacing(file) as partial:
        partial.write_text("ne")
        raise RuntimeError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["curve.json"]
    with replacing(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["curve.json"]


def test_lines_that_were_cut_off_go(tmp_path):
    file = tmp_path / "bad_samples.jsonl"
    file.write_text('{"step": 1, "reason": "a\u2028b"}\n{"step": 3}\n{"step": 2}\n{"st')
    keep_lines(file, lambda entry: entry["step"] < 3)
    assert [json.loads(line) for line in file.read_text().split("\n")[:-1]] == [
        {"step": 1, "reason": "a\u2028b"},
        {"step": 2},
    ]
    keep_lines(file, lambda entry: False)
    assert not file.exists()
    keep_lines(file, lambda entry: True)


def test_saving_a_model_replaces_an_earlier_one(build, folders, tmp_path):
    """Weights of another kind and an adapter of the earlier go, the user's own model card stays."""
    model = build()
    processor = LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(folders.language()))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    (tmp_path / "language_adapter").mkdir()
    (tmp_path / "language_adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("# Ours")
    model.freeze_for_stage("pretrain")
    trainer = _trainer(model, tmp_path, processing_class=processor)
    trainer.save_model()
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "README.md").read_text() == "# Ours"
    assert not (tmp_path / "language_adapter").exists() and not (tmp_path / UNFINISHED_FOLDER).exists()
    loaded = LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert LMEyeProcessor.from_pretrained(tmp_path).num_dynamic_tokens == processor.num_dynamic_tokens

    trainer.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    assert not (tmp_path / "elsewhere" / UNFINISHED_FOLDER).exists()


def test_the_records_of_a_run(build, tmp_path):
    model = build()
    model.freeze_for_stage("pretrain")
    trainer = _trainer(model, tmp_path)
    metrics = trainer.train().metrics
    trainer.save_metrics("train", metrics)
    trainer.save_metrics("eval", {"eval_loss": 1.0})
    trainer.save_state()
    assert json.loads((tmp_path / "train_results.json").read_text()) == metrics
    assert json.loads((tmp_path / "all_results.json").read_text()) == {**metrics, "eval_loss": 1.0}
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2
    assert metrics["train_samples"] == 4 and metrics["bad_samples"] == 0


def test_what_is_said_of_earlier_checkpoints(build, tmp_path, caplog):
    """A run beside another's checkpoints, and one that goes on with steps of another size; else nothing."""
    model = build("llama", "clip_text")
    model.freeze_for_stage("instruct")
    _trainer(model, tmp_path).train()
    assert "checkpoints of an earlier run" not in caplog.text
    _trainer(model, tmp_path, max_steps=1).train()
    assert "checkpoints of an earlier run" in caplog.text
    caplog.clear()
    same = {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    _trainer(model, tmp_path, **same).train(resume_from_checkpoint="last")
    assert "counted in optimizer steps" not in caplog.text
    _trainer(model, tmp_path, max_steps=4, per_device_train_batch_size=4).train(resume_from_checkpoint="last")
    assert "counted in optimizer steps" in caplog.text
