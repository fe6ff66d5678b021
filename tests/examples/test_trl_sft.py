"""Stage 2 with TRL's SFTTrainer: what our trainer does, step by step, and what its script writes and goes on with."""

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from safetensors.torch import load_file

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.data import ConversationReader, SampleDataset, load_rows
from transformers_lmeye.training import ConversationCollator, LMEyeTrainer, StageTrainingArguments
from transformers_lmeye.training.ipn_checkpoints import IPNCheckpointMixin
from transformers_lmeye.training.trl import as_trl_dataset, check_trl_head


trl = pytest.importorskip("trl")

EXAMPLES = Path(__file__).parents[2] / "examples"
TEMPLATES = [None, tiny.CHAT_TEMPLATE]

# PEFT reads a property that Transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data(tmp_path) -> Path:
    """Conversations of one turn and of two, with a picture, with two and with none."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    words = ("cat", "dog", "house")
    with open(folder / "conversations.jsonl", "w") as file:
        for index in range(12):
            names = [f"images/{index}-{place}.png" for place in range((1, 2, 1, 0)[index % 4])]
            for name in names:
                tiny.picture(index).save(folder / name)
            messages = [
                {
                    "role": "user",
                    "content": [{"type": "image"} for _ in names] + [{"type": "text", "text": "what?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": f"a {words[index % 3]}"}]},
            ]
            if index % 3 == 0:
                messages += [
                    {"role": "user", "content": [{"type": "text", "text": "where is it?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "in a house and on a cat"}]},
                ]
            file.write(json.dumps({"image": names, "messages": messages}) + "\n")
    return folder / "conversations.jsonl"


@pytest.fixture
def processor(folders) -> Callable[..., LMEyeProcessor]:
    def make(template: str | None = None) -> LMEyeProcessor:
        language = folders.language(chat_template=template)
        return LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(language))

    return make


def _samples(data: Path) -> SampleDataset:
    return SampleDataset(load_rows(data), ConversationReader(image_folder=data.parent))


def _run(**kwargs) -> dict:
    return {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "adam_epsilon": 1e-3,  # gradients that are zero but for rounding, as of keys' biases, make no steps
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **kwargs,
    }


def _state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _sft(model, processor, folder, rows, **kwargs) -> "trl.SFTTrainer":
    args = trl.SFTConfig(
        str(folder),
        gradient_checkpointing=None,  # the old name, by which TRL's default is on
        **{"bf16": False, "assistant_only_loss": True, "remove_unused_columns": False, **_run(**kwargs)},
    )
    return trl.SFTTrainer(model, args, train_dataset=rows, processing_class=processor)


@pytest.mark.parametrize("template", TEMPLATES, ids=["released", "chat"])
def test_trls_collator_makes_our_batches(processor, data, template):
    """Token by token and target by target: out of the box, from rows a user of TRL would have."""
    p = processor(template)
    samples = _samples(data)
    rows = as_trl_dataset(samples)
    collator = trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(p, assistant_only_loss=True)
    for places in ([0, 1, 2, 3], [3, 7], [11]):
        found = collator([rows[place] for place in places])
        expected = ConversationCollator(p)([samples[place] for place in places])
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_prompts_and_completions_make_our_batches_too(processor):
    """TRL tokenizes the two apart: all the same where no word spans both and no template goes on behind the end."""
    p = processor()
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    rows = [{"images": [tiny.picture(place)], "prompt": [question], "completion": [answer]} for place in range(2)]
    samples = [
        {
            "id": str(place),
            "messages": [
                {**question, "content": [{"type": "image", "image": tiny.picture(place)}, question["content"][1]]},
                answer,
            ],
        }
        for place in range(2)
    ]
    collator = trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(p, completion_only_loss=True)
    found, expected = collator(rows), ConversationCollator(p)(samples)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("interaction", "template", "checkpointing"),
    [("clip_text", None, False), ("cross_attention", tiny.CHAT_TEMPLATE, True)],
    ids=["clip_text", "cross_attention, checkpointed"],
)
def test_the_same_losses_and_weights_as_our_trainer(
    build, processor, data, tmp_path, interaction, template, checkpointing
):
    """Six optimizer steps over two epochs, dropout and all: same data, seed and order."""
    model = build("llama", interaction)
    start = _state(model)
    p = processor(template)
    samples = _samples(data)
    model.freeze_for_stage("instruct")
    args = StageTrainingArguments(str(tmp_path / "ours"), **_run())
    ours = LMEyeTrainer(model, args, data_collator=ConversationCollator(p), train_dataset=samples, processing_class=p)
    ours.train()
    expected = _state(model)
    assert any(not torch.equal(expected[name], start[name]) for name in start)

    model.load_state_dict(start)
    theirs = _sft(model, p, tmp_path / "theirs", as_trl_dataset(samples), activation_checkpointing=checkpointing)
    check_trl_head(model)
    theirs.train()
    assert len(_losses(theirs)) == len(_losses(ours)) == 6
    assert _losses(theirs) == pytest.approx(_losses(ours), abs=1e-5)
    moved = 0.0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=5e-6, rtol=0, msg=name)
        moved = max(moved, float((tensor - start[name]).abs().max()))
    assert moved > 1e-2
    theirs.save_model()  # whole, by a trainer that knows nothing of the IPN
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    prompt = LMEyeProcessor.from_pretrained(tmp_path / "theirs")(tiny.picture(), "what?", return_tensors="pt")
    assert torch.equal(again.generate(**prompt, max_new_tokens=5), model.eval().generate(**prompt, max_new_tokens=5))


# --- adapters, heads, rows -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_adapter_of_the_language_model_trains_along(build, processor, data, tmp_path):
    """LoRA below TRL's trainer, segments checkpointed: it and the IPN train, nothing else; twice the same."""
    peft = pytest.importorskip("peft")
    model = build("llama", "cross_attention")
    model.freeze_for_stage("instruct")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    torch.manual_seed(0)
    model.language_model = peft.get_peft_model(model.language_model, adapter)
    start = _state(model)
    ends = []
    for run in ("one", "two"):
        model.load_state_dict(start)
        rows = as_trl_dataset(_samples(data))
        args = trl.SFTConfig(
            str(tmp_path / run),
            gradient_checkpointing=None,
            **{"bf16": False, "assistant_only_loss": True, "remove_unused_columns": False},
            **{**_run(num_train_epochs=4, activation_checkpointing=True, save_strategy="epoch")},
        )
        trainer = IPNSFTTrainer(model, args, train_dataset=rows, processing_class=processor())
        trainer.train()
        losses = _losses(trainer)
        assert losses[-1] < losses[0] - 0.5, losses
        ends.append(_state(model))
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    changed = {name for name in start if not torch.equal(start[name], ends[0][name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_B" in name for name in changed) and any(name.startswith("ipn.") for name in changed)

    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "two" / "checkpoint-12")
    weights = load_file(tmp_path / "two" / "checkpoint-12" / "model.safetensors")
    assert weights and all(name.startswith("ipn.") for name in weights)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in again.state_dict().items())


class IPNSFTTrainer(IPNCheckpointMixin, trl.SFTTrainer):
    pass


def test_a_head_that_trl_does_not_know_is_refused(build, processor, data, tmp_path):
    model = build("llama", "cross_attention")
    model.freeze_for_stage("instruct")
    model.config.text_config.logit_scale = 0.5  # which TRL applies, and this family's head does not
    _sft(model, processor(), tmp_path, as_trl_dataset(_samples(data)))
    with pytest.raises(ValueError, match=r"TRL scores the words of LlamaForCausalLM otherwise .*run_instruct\.py"):
        check_trl_head(model)


def test_a_bad_sample_stops_trl(data):
    samples = SampleDataset(load_rows(data), ConversationReader(image_folder=data.parent), skip_bad_samples=True)
    (data.parent / "images" / "4-0.png").write_bytes(b"no picture")
    rows = as_trl_dataset(samples)
    assert len(rows) == len(samples) and len(rows[1]["images"]) == 2 and rows[3]["images"] == []
    with pytest.raises(ValueError, match="row 4"):
        rows[4]


# --- the script ----------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch) -> Callable[..., None]:
    """`script("--flag", value, ...)` runs run_sft_trl.py in this process."""

    def run(*arguments: object) -> None:
        quick = "--use_cpu --disable_tqdm true --report_to none --logging_steps 1 --per_device_train_batch_size 4"
        monkeypatch.setattr(sys, "argv", ["run_sft_trl.py", *quick.split(), *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / "run_sft_trl.py"), run_name="__main__")

    return run


def test_the_script(script, folders, data, tmp_path, capsys):
    """What it trains, writes and goes on with, as run_instruct.py does."""
    flags = ["--vision_model_name_or_path", folders.vision(), "--language_model_name_or_path", folders.language()]
    flags += ["--dataset_name_or_path", data, "--train_split", "train[:8]", "--learning_rate", "1e-2"]
    flags += ["--gradient_accumulation_steps", 1, "--num_train_epochs", 4, "--save_steps", 4]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script(*flags, "--standardize_requests", 6, "--eval_split", "train[8:]", "--output_dir", whole)
    assert "Stage 2 trains" in capsys.readouterr().out
    curve = json.loads((whole / "learning_curve.json").read_text())["loss"]
    assert [point["step"] for point in curve] == list(range(1, 9))
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert json.loads((whole / "eval_results.json").read_text())["eval_loss"] > 0
    assert "use_cache" not in json.loads((whole / "config.json").read_text())
    weights = load_file(whole / "model.safetensors")
    assert weights and all(name.startswith("ipn.") for name in weights)
    model = LMEyeForConditionalGeneration.from_pretrained(whole)
    inputs = LMEyeProcessor.from_pretrained(whole)(images=tiny.picture(), text="what?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]

    script(*flags, "--standardize_requests", 6, "--output_dir", cut)
    for name in ("model.safetensors", "trainer_state.json"):
        (cut / name).unlink()
    (cut / "checkpoint-8" / "model.safetensors").unlink()
    script(*flags, "--resume_from_checkpoint", cut / "checkpoint-4", "--output_dir", cut)
    resumed = load_file(cut / "model.safetensors")
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_what_the_script_refuses(script, folders, data, tmp_path):
    flags = ["--vision_model_name_or_path", folders.vision(), "--language_model_name_or_path", folders.language()]
    flags += ["--dataset_name_or_path", data, "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match=r"neither --streaming nor --feature_cache here: use run_instruct"):
        script(*flags, "--streaming", "--max_steps", 2)


def test_defaults_are_those_of_our_trainer(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    arguments = runpy.run_path(str(EXAMPLES / "run_sft_trl.py"))["SFTArguments"]
    ours = {part.name: part.default for part in dataclasses.fields(StageTrainingArguments)}
    theirs = {part.name: part.default for part in dataclasses.fields(arguments)}
    own = {"gradient_checkpointing", "logging_steps", "remove_unused_columns", "torch_empty_cache_steps"}
    assert {n for n in ours.keys() & theirs.keys() - own if ours[n] != theirs[n]} == set()
