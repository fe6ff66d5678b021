"""Several processes train as one does: the same losses, norms and weights, whoever reads what, and no process waits.

Processes are set up by the configurations in `examples/accelerate`, on the CPU with gloo. A process that hangs fails
its test when the time given to `run_processes` is over.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import CONFIGS, run_processes
from safetensors.torch import load_file
from transformers import TrainerCallback

import transformers_lmeye.modeling.lockstep as lockstep
from transformers_lmeye import LMEyeForConditionalGeneration
from transformers_lmeye.training import LMEyeTrainer, ModelArguments, StageTrainingArguments, load_model
from transformers_lmeye.training.collators import pad_right
from transformers_lmeye.training.splitting import (
    check_can_be_split,
    gathered_state_dict,
    register_trained_parameters,
)


# One turn beside three, pictures beside words alone, several pictures, and one picture without a question.
MIXED = [
    "img 3 req =2",
    "img 2 req 1 =3 2 req =4 1 req =2",
    "3 =4",
    "img 2 =3",
    "img 2 req 1 =3 2 req =4 1 req =2",
    "2 =3",
    "img img 2 req =5",
    "3 =2",
]
PAIRS = ["img =3", "2 =4", "img =2", "img =5", "3 =2", "img =6"]
WORDS = ["3 =2", "1 =4", "2 =2", "4 =1"]


def _samples(config: Any, layouts: list[str]) -> list[dict[str, torch.Tensor]]:
    samples = []
    for seed, layout in enumerate(layouts):
        ids, labels = tiny.row(config, layout, seed)
        sample = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        if "img" in layout:
            sample["pixel_values"] = tiny.pixels(layout.split().count("img"), seed)
        samples.append(sample)
    return samples


def _collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return pad_right(rows, 0)


def _trainer(model: Any, folder: Path, samples: list, callbacks: list | None = None, **kwargs: Any) -> LMEyeTrainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "linear",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "num_generated_samples": 0,
    }
    eval_dataset = kwargs.pop("eval_dataset", None)
    arguments = StageTrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})
    return LMEyeTrainer(
        model,
        arguments,
        data_collator=_collate,
        train_dataset=samples,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


def _weights(trainer: LMEyeTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gathered_state_dict(trainer.model, keep=True).items()}


def _curve(trainer: LMEyeTrainer) -> dict[str, list[float]]:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [float(entry[name]) for entry in steps] for name in ("loss", "grad_norm")}


@pytest.fixture
def train(build, tmp_path) -> Callable[..., Any]:
    """`train(num_processes, stage, layouts, interaction, model_options, **arguments)` -> curve and weights."""

    def run(
        num_processes: int,
        stage: str,
        layouts: list[str],
        interaction: str = "clip_text",
        model_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
        options = {"fine_grained_dropout": 0.0} if interaction == "clip_text" else {}
        model = build(interaction=interaction, **{**options, **(model_options or {})})
        samples = _samples(model.config, layouts)
        model.freeze_for_stage(stage)
        kwargs.setdefault("gradient_accumulation_steps", 2 // num_processes)
        trainer = _trainer(model, tmp_path / f"{num_processes}", samples, **kwargs)
        trainer.train()
        return _curve(trainer), _weights(trainer)

    return run


def _same(config: str, train: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """One process and those of a configuration have the same losses, norms and weights."""
    curve, weights = train(1, *args, **kwargs)
    assert len(set(curve["loss"])) > 1, "nothing was learned"
    for found_curve, found_weights in run_processes(config, train, 2, *args, **kwargs):
        assert found_curve["loss"] == pytest.approx(curve["loss"], abs=1e-5)
        assert found_curve["grad_norm"] == pytest.approx(curve["grad_norm"], rel=1e-4, abs=1e-5)
        for name, tensor in weights.items():
            # A key's bias moves all scores alike: its gradient is rounding alone, which AdamW makes whole steps of.
            if not name.endswith("key.bias") or kwargs.get("optim") == "sgd":
                torch.testing.assert_close(found_weights[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_ddp_trains_as_one_process_does(train):
    """Gradients are clipped: their norm is above the limit of 1."""
    _same("ddp_2cpu", train, "instruct", MIXED)


def test_fsdp2_trains_as_one_process_does(train):
    _same("fsdp2_2cpu", train, "instruct", MIXED)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "optim"), [("ddp_2cpu", "adamw_torch"), ("fsdp2_2cpu", "sgd")])
@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention"])
@pytest.mark.parametrize(("stage", "layouts"), [("pretrain", PAIRS), ("instruct", MIXED)])
def test_both_stages_and_interactions(train, config, interaction, stage, layouts, optim):
    _same(config, train, stage, layouts, interaction, optim=optim, learning_rate=1e-3, max_steps=6)


# --- unequal batches -----------------------------------------------------------------------------------------------

UNEQUAL = {
    "one turn beside three": ["img 3 req =2", "img 2 req 1 =3 2 req =4 1 req =2"],
    "words beside pictures": ["3 =4", "img 2 req =3"],
    "words beside words": ["3 =4", "2 =2"],
    "unlike pictures": ["img img 2 req =3 1 req =2", "img 1 req =2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "activation checkpointing"])
@pytest.mark.parametrize("layouts", UNEQUAL.values(), ids=UNEQUAL)
def test_processes_that_ask_unequally_stay_in_step(train, layouts, checkpointing):
    if "img" in " ".join(layouts):
        _same("fsdp2_2cpu", train, "instruct", layouts, max_steps=2, activation_checkpointing=checkpointing)
    else:
        found = run_processes("fsdp2_2cpu", train, 2, "instruct", layouts, activation_checkpointing=checkpointing)
        assert all(norm == 0 for curve, _ in found for norm in curve["grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"keep_request_token": True, "num_request_rounds": 2}),
        ("llama", {"interaction": "none"}),
        ("llama", {"interaction": "cross_attention", "visual_mapping": "resampler"}),
        ("bloom", {}),  # a tied table
        ("gemma2", {}),  # sliding windows, logits with a soft cap
    ],
    ids=str,
)
def test_every_way_of_reading_stays_in_step(build, tmp_path, family, options):
    options = {"interaction": "clip_text", **options}
    if options["interaction"] == "clip_text":
        options["fine_grained_dropout"] = 0.0
    layouts = PAIRS if options["interaction"] == "none" else MIXED
    stage = "pretrain" if options["interaction"] == "none" else "instruct"

    def train(num_processes: int) -> Any:
        model = build(family, **options)
        model.freeze_for_stage(stage)
        trainer = _trainer(
            model,
            tmp_path / f"{num_processes}",
            _samples(model.config, layouts),
            gradient_accumulation_steps=2 // num_processes,
        )
        trainer.train()
        return _curve(trainer), _weights(trainer)

    _same("fsdp2_2cpu", train)


class _NothingLeft:
    """Collates every third batch to one pad token that is no target, as where all of its samples are bad."""

    def __init__(self, place: int):
        self.place = place

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.place += 1
        if self.place % 3:
            return _collate(rows)
        nothing = torch.zeros(1, 1, dtype=torch.long)
        return {"input_ids": nothing, "attention_mask": nothing + 1, "labels": nothing - 100}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_2cpu", "fsdp2_2cpu"])
def test_a_batch_of_nothing_neither_hangs_nor_fails(build, tmp_path, config):
    def train(all_of_them: bool) -> Any:
        model = build(fine_grained_dropout=0.0)
        samples = _samples(model.config, MIXED)
        model.freeze_for_stage("instruct")
        arguments = {"max_steps": 6, "gradient_accumulation_steps": 1, "eval_dataset": samples[:4]}
        trainer = _trainer(model, tmp_path, samples, **arguments)
        trainer.data_collator = _NothingLeft(0 if all_of_them else trainer.args.process_index)
        trainer.train()
        return _curve(trainer), trainer.evaluate()["eval_loss"]

    for all_of_them in (True, False):
        (curve, loss), (other, other_loss) = run_processes(config, train, all_of_them)
        assert curve == other and loss == other_loss
        assert all(value == value for values in curve.values() for value in (*values, loss)), "no value is NaN"
        assert (0.0 in curve["loss"]) == all_of_them


@pytest.mark.slow
def test_without_agreement_processes_hang_or_break(train, monkeypatch):
    """What the tests above would show if the processes did not agree."""
    monkeypatch.setattr(lockstep, "_split_calls", lambda model: frozenset())
    with pytest.raises((TimeoutError, RuntimeError)):
        run_processes("fsdp2_2cpu", train, 2, "instruct", UNEQUAL["one turn beside three"], timeout=20)


def test_whole_models_agree_on_nothing(build, tmp_path, monkeypatch):
    """One process asks for no split parts, and calls nothing that communicates."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked other processes, or for split parts")

    monkeypatch.setattr(lockstep, "_split_calls", refuse)
    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    model = build()
    model.freeze_for_stage("instruct")
    _trainer(model, tmp_path, _samples(model.config, MIXED), max_steps=2, max_grad_norm=0.0).train()
    assert model.lockstep is None


# --- evaluation and generation -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_and_generation_of_a_split_model(build, tmp_path):
    """Processes evaluate unequal batches, and answer prompts of unlike kinds until the longest answer is there."""
    prompts = {"one": "img 3 req 2", "three": "img 2 req 1 3 2 req 4 1 req 2", "words": "3 4", "picture": "img 2"}

    def evaluate(names_of_ranks: list[list[str]]) -> Any:
        model = build(fine_grained_dropout=0.0)
        samples = _samples(model.config, MIXED)
        model.freeze_for_stage("instruct")
        trainer = _trainer(
            model,
            tmp_path / f"{len(names_of_ranks)}",
            samples,
            eval_dataset=samples[:7],
            per_device_eval_batch_size=2,
            max_steps=1,
            learning_rate=1e-9,
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        rank, answers = trainer.args.process_index, []
        for name in names_of_ranks[rank]:
            ids, _ = tiny.row(model.config, prompts[name], seed=1)
            inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
            if "img" in prompts[name]:
                inputs["pixel_values"] = tiny.pixels(1)
            for options in ({}, {"num_beams": 2}):
                ids = trainer.model.generate(**inputs, **options, do_sample=False, max_new_tokens=4 + 3 * rank)
                answers.append((name, options, ids[0, : inputs["input_ids"].shape[1] + 4]))
        requests = trainer.model.perceive(torch.tensor([tiny.row(model.config, prompts["one"])[0]]), tiny.pixels(1))
        return loss, answers, requests.requests

    loss, answers, requests = evaluate([list(prompts)])
    expected = {(name, str(options)): ids for name, options, ids in answers if not options}
    found = run_processes("fsdp2_2cpu", evaluate, [["one", "words", "picture"], ["three", "one", "words"]])
    for found_loss, found_answers, found_requests in found:
        assert found_loss == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(found_requests, requests, atol=1e-5, rtol=1e-5)
        for name, options, ids in found_answers:
            if not options:
                assert torch.equal(ids, expected[name, str(options)]), name


# --- checkpoints ---------------------------------------------------------------------------------------------------


class _StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fsdp2_2cpu", None),
        (None, "fsdp2_2cpu"),
        ("fsdp2_2cpu", "fsdp2_2cpu"),
        ("ddp_2cpu", "fsdp2_2cpu"),
        ("fsdp2_2cpu", "ddp_2cpu"),
        ("ddp_2cpu", None),
    ],
)
def test_checkpoints_load_anywhere(build, tmp_path, first, second):
    """A run that is stopped under one configuration and resumed under another ends where one process does."""

    def train(folder: str, num_processes: int, stop: bool = False, resume: bool = False) -> Any:
        model = build(fine_grained_dropout=0.0)
        model.freeze_for_stage("instruct")
        trainer = _trainer(
            model,
            tmp_path / folder,
            _samples(model.config, MIXED),
            [_StopAt()] if stop else None,
            optim="adamw_torch",
            learning_rate=1e-3,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            gradient_accumulation_steps=2 // num_processes,
        )
        trainer.train(resume_from_checkpoint="last" if resume else None)
        return _curve(trainer), _weights(trainer)

    def run(config: str | None, *args: Any, **kwargs: Any) -> Any:
        if config is None:
            return train(*args, 1, **kwargs)
        results = run_processes(config, train, *args, 2, **kwargs)
        return results[0]

    curve, weights = run(None, "whole")
    run(first, "cut", stop=True)
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= files
    assert not any("fsdp" in name for name in files)
    stored = load_file(checkpoint / "model.safetensors")
    assert stored.keys() == weights.keys() - {name for name in weights if name.startswith("ipn.interaction.")}
    loaded = LMEyeForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())

    found_curve, found_weights = run(second, "cut", resume=True)
    assert found_curve["loss"] == pytest.approx(curve["loss"], abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(found_weights[name], tensor, atol=2e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["IPN", "whole"])
def test_what_a_split_model_saves_and_goes_on_from(build, tmp_path, whole):
    """The files of one process, byte for byte but for the weights; the best checkpoint is loaded at the end."""

    def train(folder: str, num_processes: int) -> Any:
        model = build(fine_grained_dropout=0.0)
        if whole:
            model.config.backbones = None
        model.freeze_for_stage("instruct")
        samples = _samples(model.config, MIXED)
        trainer = _trainer(
            model,
            tmp_path / folder,
            samples,
            eval_dataset=samples,
            learning_rate=1.0,
            gradient_accumulation_steps=2 // num_processes,
            **{"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
            load_best_model_at_end=True,
            greater_is_better=True,  # the best is to be another than the last
            save_total_limit=5,
        )
        trainer.train()
        trainer.save_model()
        evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        return evaluations, trainer.evaluate()["eval_loss"]

    evaluations, best = train("one", 1)
    assert evaluations.index(max(evaluations)) < 3, "the last checkpoint would not tell"
    for found, found_best in run_processes("fsdp2_2cpu", train, "two", 2):
        assert found == pytest.approx(evaluations, rel=1e-4)
        assert found_best == pytest.approx(best, rel=1e-4) == pytest.approx(max(evaluations), rel=1e-4)
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("config.json", "generation_config.json"):
        assert (one / name).read_text() == (two / name).read_text()
    assert {path.name for path in one.glob("*.py")} == {path.name for path in two.glob("*.py")}
    weights, expected = (LMEyeForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (two, one))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-3, rtol=1e-3, msg=name)


# --- adapters, precision, memory ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT reads it, the library warns
@pytest.mark.parametrize("config", ["ddp_2cpu", "fsdp2_2cpu"])
def test_an_adapter_of_a_split_language_model(build, tmp_path, config):
    """Trains as in one process, and goes on from its checkpoint in one process."""
    peft = pytest.importorskip("peft")

    def train(folder: str, num_processes: int, stop: bool = False, resume: bool = False) -> Any:
        torch.manual_seed(0)
        model = build(fine_grained_dropout=0.0)
        model.freeze_for_stage("instruct")
        model.language_model = peft.get_peft_model(
            model.language_model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        trainer = _trainer(
            model,
            tmp_path / folder,
            _samples(model.config, MIXED),
            [_StopAt()] if stop else None,
            save_strategy="steps",
            save_steps=3,
            max_steps=6,
            gradient_accumulation_steps=2 // num_processes,
        )
        trainer.train(resume_from_checkpoint="last" if resume else None)
        return _curve(trainer), _weights(trainer)

    curve, _ = train("whole", 1)
    assert any("lora_A" in name for name in run_processes(config, train, "cut", 2, stop=True)[0][1])
    for found_curve, _ in [*run_processes(config, train, "cut", 2, resume=True), train("cut", 1, resume=True)]:
        assert found_curve["loss"] == pytest.approx(curve["loss"], abs=1e-5)


@pytest.mark.slow
def test_frozen_parts_in_half_precision(build, tmp_path):
    """The IPN trains in float32 beside a bfloat16 language model, which FSDP2 gathers as it is."""

    def train(num_processes: int) -> Any:
        model = build(fine_grained_dropout=0.0, dtype=torch.bfloat16)
        model.freeze_for_stage("instruct")
        samples = _samples(model.config, MIXED)
        trainer = _trainer(
            model, tmp_path / f"{num_processes}", samples, gradient_accumulation_steps=2 // num_processes
        )
        trainer.train()
        assert {part.dtype for part in trainer.model.language_model.parameters()} == {torch.bfloat16}
        return _curve(trainer), _weights(trainer)

    curve, weights = train(1)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    for found, found_weights in run_processes("fsdp2_2cpu", train, 2):
        assert found["loss"] == pytest.approx(curve["loss"], rel=1e-3)
        assert all(tensor.dtype == torch.float32 for tensor in found_weights.values())


@pytest.mark.slow
def test_only_one_process_loads_the_backbones(train, tmp_path):
    """With `fsdp_cpu_ram_efficient_loading` the others get their parts from the first."""
    curve, weights = train(1, "instruct", MIXED)

    def run() -> Any:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
        StageTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True
        )  # processes meet before they load, as in scripts
        return train(2, "instruct", MIXED)

    for found, found_weights in run_processes("fsdp2_2cpu", run):
        assert found["loss"] == pytest.approx(curve["loss"], abs=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(found_weights[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_what_fsdp2_cannot_split_is_refused(build):
    check_can_be_split(build())
    with pytest.raises(ValueError, match="the word embeddings are also those of language_model"):
        check_can_be_split(build("t5", keep_request_token=True))


@pytest.mark.slow
def test_an_encoder_decoder_stays_in_step(build):
    """Split by hand, layer by layer, since accelerate cannot: the same gradients as one process has."""
    from torch.distributed.fsdp import fully_shard

    def gradients(num_processes: int) -> Any:
        model = build("t5", fine_grained_dropout=0.0, keep_request_token=True)
        samples = _samples(model.config, UNEQUAL["one turn beside three"])
        model.freeze_for_stage("instruct")
        model.train()
        batches = [_collate([sample]) for sample in samples]
        if num_processes == 2:
            StageTrainingArguments(output_dir="unused", use_cpu=True)  # processes meet
            rank = torch.distributed.get_rank()
            for block in [*model.language_model.encoder.block, *model.language_model.decoder.block]:
                fully_shard(block)
            fully_shard(model)
            batches = batches[rank : rank + 1]
        count = sum(int((sample["labels"] != -100).sum()) for sample in samples)
        for batch in batches:
            model(**batch, num_items_in_batch=count).loss.backward()
        # Gradients of processes are averaged.
        return {
            name: num_processes * (part.grad.full_tensor() if num_processes == 2 else part.grad)
            for name, part in model.named_parameters()
            if part.requires_grad
        }

    expected = gradients(1)
    for found in run_processes("ddp_2cpu", gradients, 2):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_zero3_trains_as_one_process_does(build, monkeypatch):
    """With DeepSpeed itself, since accelerate does not start it on CPUs."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)  # gloo will do
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
    }

    def train(num_processes: int) -> Any:
        model = build(fine_grained_dropout=0.0)
        batches = [_collate([sample]) for sample in _samples(model.config, MIXED)]
        model.freeze_for_stage("instruct")
        model.train()
        trained = {name: part for name, part in model.ipn.named_parameters() if part.requires_grad}
        optimizer, losses = torch.optim.SGD(trained.values(), lr=1e-2), []
        if num_processes == 2:
            deepspeed.init_distributed("gloo")
            register_trained_parameters(model)
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        for step in range(len(batches) // 2):
            pair = batches[2 * step : 2 * step + 2]
            count = sum(int((batch["labels"] != -100).sum()) for batch in pair)
            if num_processes == 1:
                parts = [model(**batch, num_items_in_batch=count).loss for batch in pair]
                losses.append(float(sum(parts).detach()))
                sum(parts).backward()
                optimizer.step()
                optimizer.zero_grad()
                continue
            loss = engine(**pair[torch.distributed.get_rank()], num_items_in_batch=count).loss
            engine.backward(2 * loss)  # averaged over processes
            engine.step()
            torch.distributed.all_reduce(total := loss.detach().clone())
            losses.append(float(total))
        if num_processes == 1:
            return losses, {name: part.detach() for name, part in trained.items()}
        weights = {}
        for name, part in trained.items():
            with deepspeed.zero.GatheredParameters([part]):
                weights[name] = part.detach().clone()
        return losses, weights

    losses, weights = train(1)
    for found_losses, found_weights in run_processes("ddp_2cpu", train, 2):
        assert found_losses == pytest.approx(losses, abs=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(found_weights[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


# --- quantised, and as users start it -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_language_model(folders, tmp_path, bits):
    """Loss and gradients are near those of the whole one; all but the language model stays as it was."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    language = folders.language("llama", hidden_size=64, intermediate_size=128)
    quantization = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    losses, gradients = {}, {}
    for text in (None, json.dumps(quantization)):
        model, _ = load_model(
            ModelArguments(
                vision_model_name_or_path=str(folders.vision()),
                language_model_name_or_path=str(language),
                config_overrides='{"fine_grained_dropout": 0.0}',
                quantization_config=text,
            )
        )
        kinds = {type(part) for part in model.language_model.modules()}
        others = {type(part) for whole in (model.ipn, model.vision_tower) for part in whole.modules()}
        quantised = {bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit}
        assert bool(kinds & quantised) == (text is not None) and not others & quantised
        tiny.randomise_ipn(model)
        model.freeze_for_stage("instruct")
        model.train()
        batch = _collate(_samples(model.config, MIXED[:2]))
        with torch.no_grad():
            model(**batch)  # what is read without gradients first must not keep them out later
        loss = model(**batch).loss
        loss.backward()
        losses[text] = loss.item()
        gradients[text] = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    (loss, quantised_loss), (gradient, quantised_gradient) = losses.values(), gradients.values()
    assert quantised_loss == pytest.approx(loss, rel=0.1)
    assert torch.isfinite(quantised_gradient).all()
    assert torch.cosine_similarity(gradient, quantised_gradient, dim=0) > 0.8


def test_a_quantised_whole_checkpoint_leaves_out_what_trains(build, tmp_path):
    pytest.importorskip("bitsandbytes")
    build("llama", "clip_text").save_pretrained(tmp_path)
    loaded = LMEyeForConditionalGeneration.from_pretrained(tmp_path, quantization_config={"load_in_8bit": True})
    kinds = {name: type(part).__name__ for name, part in loaded.named_modules() if "Linear" in type(part).__name__}
    in_layers = {kind for name, kind in kinds.items() if name.startswith("language_model.model.layers")}
    assert in_layers == {"Linear8bitLt"} and kinds["language_model.lm_head"] == "Linear"
    assert {kind for name, kind in kinds.items() if not name.startswith("language_model.")} == {"Linear"}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_2cpu", "fsdp2_2cpu"])
def test_scripts_as_they_are_launched(folders, tmp_path, config):
    """`accelerate launch` of both stages: the curves of one process at the same batch."""
    (tmp_path / "images").mkdir()
    with open(tmp_path / "pairs.jsonl", "w") as pairs, open(tmp_path / "talks.jsonl", "w") as talks:
        for index in range(8):
            name = f"images/{index}.png"
            tiny.picture(index).save(tmp_path / name)
            pairs.write(json.dumps({"image": name, "caption": "a cat in a house" + " and a dog" * (index % 3)}) + "\n")
            turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
            for turn in range(1 + index % 3):
                turns.append({"role": "assistant", "content": [{"type": "text", "text": "a dog" * (turn + 1)}]})
                turns.append({"role": "user", "content": [{"type": "text", "text": "where?"}]})
            talks.write(json.dumps({"image": name, "messages": turns[:-1]}) + "\n")

    def launch(num_processes: int) -> list[list[float]]:
        start = [sys.executable]
        if num_processes == 2:
            start += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
            start += ["--config_file", str(CONFIGS / f"{config}.yaml")]
        curves, model = [], ["--vision_model_name_or_path", str(folders.vision())]
        model += ["--language_model_name_or_path", str(folders.language())]
        model += ["--config_overrides", '{"fine_grained_dropout": 0.0}']
        for script, data in (("run_pretrain.py", "pairs.jsonl"), ("run_instruct.py", "talks.jsonl")):
            output = tmp_path / f"{num_processes}-{script}"
            command = [*start, str(CONFIGS.parent / script), *model, "--dataset_name_or_path", str(tmp_path / data)]
            command += ["--output_dir", str(output), "--use_cpu", "--max_steps", "2", "--logging_steps", "1"]
            command += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", str(2 // num_processes)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
            subprocess.run(command, check=True, timeout=240, env=environment, cwd=tmp_path)
            curve = json.loads((output / "learning_curve.json").read_text())["loss"]
            curves.append([point["loss"] for point in curve])
            assert "ipn.image_token" in load_file(output / "model.safetensors")
            model = ["--model_name_or_path", str(output)]
        return curves

    for found, expected in zip(launch(2), launch(1), strict=True):
        assert len(found) == 2 and found == pytest.approx(expected, abs=1e-4)
