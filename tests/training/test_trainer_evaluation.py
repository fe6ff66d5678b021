"""What is logged of an evaluation: losses by data set, a few answers, and the loss with label smoothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from processes import run_processes

from transformers_lmeye import LMEyeProcessor
from transformers_lmeye.training import ConversationCollator, LMEyeTrainer, PairCollator, StageTrainingArguments
from transformers_lmeye.training.collators import pad_right
from transformers_lmeye.training.generated_samples import generate_samples


WORDS = ("a cat in a house", "the red dog", "a man on the green house and a cat")


@pytest.fixture
def processor(folders):
    def make(family: str = "llama", **options: Any) -> LMEyeProcessor:
        return LMEyeProcessor.from_vision_language_pretrained(
            str(folders.vision()), str(folders.language(family)), **options
        )

    return make


def _arguments(folder: Path, **kwargs: Any) -> StageTrainingArguments:
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
    defaults |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return StageTrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})


def _pairs() -> list[dict[str, Any]]:
    return [{"id": f"row {index}", "image": tiny.picture(index), "caption": text} for index, text in enumerate(WORDS)]


def _conversations() -> list[dict[str, Any]]:
    def turn(role: str, *parts: Any) -> dict[str, Any]:
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        return {"role": role, "content": content}

    return [
        {
            "id": f"row {index}",
            "messages": [
                turn("user", tiny.picture(index), "what is it"),
                turn("assistant", text),
                turn("user", tiny.picture(index + 10), "and where"),
                turn("assistant", "in the house"),
            ],
        }
        for index, text in enumerate(WORDS)
    ]


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_answers_are_generated_at_each_evaluation(build, processor, tmp_path, capsys, family, stage):
    """The prompt the processor makes, answered greedily by the model as it was at that step."""
    processing = processor(family)
    model = build(family, "clip_text")
    model.freeze_for_stage(stage)
    samples = _pairs() if stage == "pretrain" else _conversations()
    collator = (PairCollator if stage == "pretrain" else ConversationCollator)(processing)
    trainer = LMEyeTrainer(
        model,
        _arguments(tmp_path, eval_strategy="steps", eval_steps=1, num_generated_samples=2),
        collator,
        train_dataset=samples,
        eval_dataset=samples,
        processing_class=processing,
    )
    trainer.train()
    assert f"reference: {WORDS[1]}\n  generated: " in capsys.readouterr().out
    trainer.evaluate()  # the last step once more: its answers are written once
    written = _read(tmp_path / "generated_samples.jsonl")
    assert [(entry["step"], entry["id"]) for entry in written] == [(s, f"row {i}") for s in (1, 2) for i in (0, 1)]

    model.eval()
    for entry, index in zip(written[2:], (0, 1), strict=True):
        assert entry["reference"] == WORDS[index]
        if stage == "pretrain":
            assert entry["prompt"].startswith("<img>")
            inputs = processing(images=tiny.picture(index), text="<img>", return_tensors="pt")
        else:
            assert "what is it" in entry["prompt"] and "where" not in entry["prompt"]
            assert "<img-d> <img-d>" not in entry["prompt"]
            inputs = processing(images=tiny.picture(index), text="what is it", return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0]
        new = output if family == "t5" else output[inputs["input_ids"].shape[1] :]
        assert entry["generated"] == processing.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_answers_reach_tensorboard(build, processor, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    processing, model = processor(), build()
    model.freeze_for_stage("pretrain")
    trainer = LMEyeTrainer(
        model,
        _arguments(tmp_path, eval_strategy="steps", eval_steps=1, report_to="tensorboard", num_generated_samples=1),
        PairCollator(processing),
        train_dataset=_pairs(),
        eval_dataset=_pairs(),
        processing_class=processing,
    )
    trainer.train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    texts = events.Tensors("eval/generated_samples/text_summary")
    assert [event.step for event in texts] == [1, 2]
    assert WORDS[0] in texts[0].tensor_proto.string_val[0].decode()
    scalars = events.Tags()["scalars"]
    assert {"train/loss", "train/samples_per_second", "train/tokens_per_second", "eval/loss"} <= set(scalars)


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_answers_from_cached_features_are_those_from_pictures(build, processor, tmp_path, stage):
    processing, model = processor(), build(interaction="cross_attention")
    collator = (PairCollator if stage == "pretrain" else ConversationCollator)(processing)
    model.freeze_for_stage(stage)

    def cached(picture: Any) -> Any:
        return model.get_image_features(processing.image_processor(picture, return_tensors="pt")["pixel_values"])

    pictures = _pairs() if stage == "pretrain" else _conversations()
    features = _pairs() if stage == "pretrain" else _conversations()
    for sample in features:
        if stage == "pretrain":
            sample["image"] = cached(sample["image"])
            continue
        for part in (part for message in sample["messages"] for part in message["content"]):
            if part["type"] == "image":
                part["image"] = cached(part["image"])
    written, losses = [], []
    for name, samples in (("pictures", pictures), ("features", features)):
        trainer = LMEyeTrainer(
            model, _arguments(tmp_path / name), collator, eval_dataset=samples, processing_class=processing
        )
        losses.append(trainer.evaluate()["eval_loss"])
        written.append(_read(tmp_path / name / "generated_samples.jsonl"))
    assert len(written[0]) == len(WORDS) and written[0] == written[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_2cpu", "fsdp2_2cpu"])
def test_answers_of_two_processes_are_those_of_one(build, processor, tmp_path, config):
    processing, samples = processor(), _conversations()
    model = build()
    model.freeze_for_stage("instruct")

    def evaluate(folder: Path) -> dict[str, float]:
        trainer = LMEyeTrainer(
            model,
            _arguments(folder, eval_strategy="steps", eval_steps=2, learning_rate=0.0, num_generated_samples=3),
            ConversationCollator(processing),
            train_dataset=samples,
            eval_dataset=samples,
            processing_class=processing,
        )
        trainer.train()
        return trainer.evaluate()

    two = run_processes(config, evaluate, tmp_path / "two")
    one = evaluate(tmp_path / "one")
    written = [_read(tmp_path / name / "generated_samples.jsonl") for name in ("one", "two")]
    assert len(written[0]) == 3 and written[0] == written[1]
    assert two[0]["eval_loss"] == two[1]["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)


def test_samples_without_a_picture_or_a_target_are_passed_over(build, processor, tmp_path):
    processing, model = processor(), build()
    samples = _conversations()
    del samples[0]["messages"][0]["content"][0], samples[0]["messages"][2]["content"][0]

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = ConversationCollator(processing)(rows)
        if rows[0]["id"] == "row 1":
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch

    arguments = _arguments(tmp_path, num_generated_samples=3)
    trainer = LMEyeTrainer(model, arguments, collator, eval_dataset=samples, processing_class=processing)
    trainer.evaluate()
    assert [entry["id"] for entry in _read(tmp_path / "generated_samples.jsonl")] == ["row 2"]


def test_no_picture_is_looked_for_in_all_of_a_data_set_of_words_alone(build, processor, tmp_path):
    collator, read = ConversationCollator(processor()), []

    class Words(list):
        def __getitem__(self, index: int) -> dict[str, Any]:
            read.append(index)
            return super().__getitem__(index)

    sample = {
        "id": "a",
        "messages": [{"role": role, "content": [{"type": "text", "text": "who"}]} for role in ("user", "assistant")],
    }
    words = Words([sample] * 1000)
    assert list(generate_samples(build(), processor().tokenizer, collator, words, 2)) == []
    assert read == [*range(16), *range(500, 516)]


def test_each_evaluation_set_has_its_own_loss(build, tmp_path):
    """`{"": ..., "text": ...}`: `eval_loss` and `eval_text_loss`, in the curve as well."""
    model = build()
    model.freeze_for_stage("pretrain")
    samples = {}
    for name, layouts in (("", ["img =3", "img =4"]), ("text", ["2 =3", "1 =5", "=2"])):
        samples[name] = []
        for seed, layout in enumerate(layouts):
            ids, labels = tiny.row(model.config, layout, seed)
            sample = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
            samples[name].append({**sample, **({"pixel_values": tiny.pixels(1, seed)} if "img" in layout else {})})
    trainer = LMEyeTrainer(
        model,
        _arguments(tmp_path, eval_strategy="steps", eval_steps=1),
        lambda rows: pad_right(rows, 0),
        train_dataset=samples[""],
        eval_dataset=samples,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_text_loss", "eval_runtime", "eval_text_runtime"} <= metrics.keys()
    nll = []
    for sample in samples["text"]:  # frozen: the language model's own
        scores = model.language_model(sample["input_ids"][None]).logits[0, :-1].log_softmax(-1)
        targets = sample["labels"][1:]
        nll += [-scores[place, label] for place, label in enumerate(targets.tolist()) if label != -100]
    assert metrics["eval_text_loss"] == pytest.approx(torch.stack(nll).mean().item(), abs=1e-5)
    assert trainer.evaluate(samples["text"], metric_key_prefix="test")["test_loss"] == metrics["eval_text_loss"]
    assert trainer.evaluate({"": samples[""]})["eval_loss"] == metrics["eval_loss"]
    curve = json.loads((tmp_path / "learning_curve.json").read_text())
    assert [point["step"] for point in curve["eval_text_loss"]] == [1, 2]
    assert len({point["eval_text_loss"] for point in curve["eval_text_loss"]}) == 1


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_label_smoothing(build, tmp_path, family):
    """(1 - e) times the loss of the targets plus e times the mean over the vocabulary, token by token."""
    model = build(family, "clip_text", fine_grained_dropout=0.0)
    model.freeze_for_stage("instruct")
    samples = []
    for seed, layout in enumerate(["img 3 req =2", "img req =4"]):
        ids, labels = tiny.row(model.config, layout, seed)
        row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": tiny.pixels(1, seed)}
        samples.append(row)
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            inputs = {name: value if name == "pixel_values" else value[None] for name, value in sample.items()}
            scores = model(**inputs).logits[0].log_softmax(-1)
            shift = 0 if family == "t5" else 1
            for place, label in enumerate(sample["labels"].tolist()):
                if label != -100:
                    row = scores[place - shift]
                    total -= 0.9 * row[label].item() + 0.1 * row.mean().item()
                    count += 1
    trainer = LMEyeTrainer(
        model,
        _arguments(tmp_path, label_smoothing_factor=0.1, max_steps=1),
        lambda rows: pad_right(rows, 0),
        train_dataset=samples,
        eval_dataset=samples,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, abs=1e-5)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(total / count, abs=1e-5)


def test_no_stream_is_evaluated_on(build, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def assign(self, *args: Any) -> None: ...

        def __iter__(self) -> Any: ...

    with pytest.raises(ValueError, match="evaluation data has to be map-style"):
        LMEyeTrainer(build(), _arguments(tmp_path), eval_dataset={"": Dataset.from_list([{"a": 1}]), "b": Stream()})
