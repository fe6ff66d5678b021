"""How the trainer reads: streams, bad samples, batches of like lengths, and the counts it keeps."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from transformers import TrainerCallback

from transformers_lmeye import LMEyeProcessor
from transformers_lmeye.data import PairReader, SampleDataset, SampleStream, mix_texts
from transformers_lmeye.training import LMEyeTrainer, PairCollator, StageTrainingArguments
from transformers_lmeye.training.collators import pad_right
from transformers_lmeye.training.progress import Throughput


def _arguments(folder: Path, **kwargs: Any) -> StageTrainingArguments:
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    defaults |= {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return StageTrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})


@pytest.fixture
def processor(folders) -> LMEyeProcessor:
    return LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(folders.language()))


@pytest.fixture
def pretrained(build) -> Any:
    model = build()
    model.freeze_for_stage("pretrain")
    return model


class Opener:
    """Opens row n's picture, and remembers which were opened."""

    def __init__(self):
        self.opened: list[int] = []

    def __call__(self, value: Any) -> Any:
        number = int(value)
        self.opened.append(number)
        if number in (5, 6):
            raise ValueError(f"There is no file {number}.png.")
        return tiny.picture(number)


def _rows(count: int = 12) -> datasets.Dataset:
    words = ["a cat", "the red dog on a house", "who"]
    return datasets.Dataset.from_dict(
        {"image": [str(i) for i in range(count)], "caption": [words[i % 3] for i in range(count)]}
    )


def _stream(opener: Opener, **options: Any) -> SampleStream:
    return SampleStream(_rows().to_iterable_dataset(), PairReader(open_image=opener), **options)


class _StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_read_once_in_a_pass(pretrained, processor, tmp_path, workers):
    """Twelve rows in two batches of two for each of three steps: one pass, whoever reads."""
    seen: list[str] = []

    class Collator(PairCollator):
        def __call__(self, samples: list[Any]) -> dict[str, Any]:
            return {
                **super().__call__(samples),
                "names": [sample.id if hasattr(sample, "id") else sample["id"] for sample in samples],
            }

    class Trainer(LMEyeTrainer):
        def training_step(self, model, inputs, *args):
            seen.extend(inputs.pop("names"))
            return super().training_step(model, inputs, *args)

    trainer = Trainer(
        pretrained,
        _arguments(tmp_path, dataloader_num_workers=workers, max_bad_fraction=0.2),
        Collator(processor, skip_bad_samples=True),
        train_dataset=_stream(Opener(), shuffle_buffer=3),
    )
    metrics = trainer.train().metrics
    assert len(seen) == len(set(seen)) == 12
    assert metrics["train_samples"] == 12 and metrics["bad_samples"] == 2
    assert [entry["epoch"] for entry in trainer.state.log_history[:3]] == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_resumed_stream_opens_nothing_it_has_had(pretrained, processor, tmp_path):
    """And goes on at its place where the batches are of another size, saying so."""
    run = {"save_strategy": "steps", "save_steps": 1, "max_bad_fraction": 0.2}
    collator = PairCollator(processor, skip_bad_samples=True)
    first, second, third = Opener(), Opener(), Opener()
    arguments = _arguments(tmp_path, **run)
    LMEyeTrainer(pretrained, arguments, collator, train_dataset=_stream(first), callbacks=[_StopAt(2)]).train()
    assert set(range(8)) <= set(first.opened) and 11 not in first.opened
    LMEyeTrainer(pretrained, arguments, collator, train_dataset=_stream(second)).train(f"{tmp_path}/checkpoint-2")
    assert second.opened[:4] == [8, 9, 10, 11]
    other = _arguments(tmp_path, **run, per_device_train_batch_size=4)
    LMEyeTrainer(pretrained, other, collator, train_dataset=_stream(third)).train(f"{tmp_path}/checkpoint-2")
    assert third.opened[:4] == [8, 9, 10, 11]
    progress = json.loads((tmp_path / "checkpoint-3" / "progress.json").read_text())
    assert progress["batches"] * 4 == progress["samples"] > 8
    fourth = Opener()
    other.max_steps = 4
    LMEyeTrainer(pretrained, other, collator, train_dataset=_stream(fourth)).train(f"{tmp_path}/checkpoint-3")
    assert fourth.opened[:4] == [(progress["samples"] + place) % 12 for place in range(4)]


def test_a_finished_run_on_a_stream_is_not_trained_further(pretrained, processor, tmp_path):
    arguments = _arguments(tmp_path, save_strategy="steps", save_steps=3, max_bad_fraction=0.2)
    collator = PairCollator(processor, skip_bad_samples=True)
    trainer = LMEyeTrainer(pretrained, arguments, collator, train_dataset=_stream(Opener()))
    trainer.train()
    before = {name: tensor.clone() for name, tensor in pretrained.ipn.state_dict().items()}
    trainer = LMEyeTrainer(pretrained, arguments, collator, train_dataset=_stream(Opener()))
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in pretrained.ipn.state_dict().items())


def test_a_stream_needs_a_number_of_steps_and_enough_samples(pretrained, processor, tmp_path):
    collator = PairCollator(processor, skip_bad_samples=True)
    with pytest.raises(ValueError, match="A stream has no length, so the run's has to be given: --max_steps"):
        LMEyeTrainer(pretrained, _arguments(tmp_path, max_steps=-1), collator, train_dataset=_stream(Opener()))
    arguments = _arguments(tmp_path, max_steps=5, max_bad_fraction=0.2)
    stream = _stream(Opener(), num_passes=1)
    with pytest.raises(ValueError, match="The stream ended in step 4 of 5: let it repeat"):
        LMEyeTrainer(pretrained, arguments, collator, train_dataset=stream).train()


# --- bad samples ---------------------------------------------------------------------------------------------------


def test_bad_samples_are_listed_counted_and_harmless(pretrained, processor, tmp_path, caplog):
    """Rows 4 to 7 are one accumulation window of which two are bad; then a window of bad ones alone."""
    rows = _rows().select([0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 5, 6])
    dataset = SampleDataset(rows, PairReader(open_image=Opener()), skip_bad_samples=True)
    run = {"train_sampling_strategy": "sequential", "max_bad_fraction": 0.5, "save_strategy": "steps"}
    arguments = _arguments(tmp_path, **run, save_steps=1)
    collator = PairCollator(processor, skip_bad_samples=True)
    trainer = LMEyeTrainer(pretrained, arguments, collator, train_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 0 and losses[1] > 0 and losses[2] == 0.0
    assert all(tensor.isfinite().all() for tensor in pretrained.ipn.parameters())
    written = _read(tmp_path / "bad_samples.jsonl")
    assert [(entry["id"], entry["step"]) for entry in written] == [
        ("row 5", 2),
        ("row 6", 2),
        ("row 8", 3),
        ("row 9", 3),
        ("row 10", 3),
        ("row 11", 3),
    ]
    assert written[0].keys() == {"id", "kind", "reason", "step"} and "no file 5.png" in written[0]["reason"]
    assert trainer.state.log_history[-1]["bad_samples"] == 6

    # Gone on from step 2: what step 3 listed is listed once.
    trainer = LMEyeTrainer(pretrained, arguments, collator, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert _read(tmp_path / "bad_samples.jsonl") == written
    assert trainer.state.log_history[-1]["bad_samples"] == 6
    trainer = LMEyeTrainer(pretrained, arguments, collator, train_dataset=dataset, callbacks=[_StopAt(1)])
    trainer.train()  # anew
    assert not (tmp_path / "bad_samples.jsonl").exists()


def test_a_batch_of_nothing_moves_no_encoder_decoder(build, folders, tmp_path):
    """One row of padding without a target: a loss of zero, and numbers that stay numbers."""
    paths = str(folders.vision()), str(folders.language("t5"))
    processor, model = LMEyeProcessor.from_vision_language_pretrained(*paths), build("t5", "clip_text")
    model.freeze_for_stage("pretrain")
    dataset = SampleDataset(_rows().select([5, 6, 5, 6]), PairReader(open_image=Opener()), skip_bad_samples=True)
    collator = PairCollator(processor, skip_bad_samples=True)
    arguments = _arguments(tmp_path, max_steps=1, max_bad_fraction=1.0)
    trainer = LMEyeTrainer(model, arguments, collator, train_dataset=dataset, eval_dataset=dataset)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0.0 and trainer.state.log_history[-1]["bad_samples"] == 4
    moved = {n for n, t in model.state_dict().items() if not torch.allclose(t, before[n], rtol=2e-4, atol=0)}
    assert not moved  # but for weight decay
    assert trainer.evaluate()["eval_loss"] == 0.0


@pytest.mark.parametrize("fraction, step", [(0.0, 2), (0.1, 2), (0.2, 3), (0.4, 3)])
def test_too_many_bad_samples_stop_the_run(pretrained, processor, tmp_path, fraction, step):
    """Of twelve samples a tenth is one: the two of the second step are too many."""
    rows = _rows().select([0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 5, 6])
    dataset = SampleDataset(rows, PairReader(open_image=Opener()), skip_bad_samples=True)
    arguments = _arguments(tmp_path, train_sampling_strategy="sequential", max_bad_fraction=fraction)
    collator = PairCollator(processor, skip_bad_samples=True)
    trainer = LMEyeTrainer(pretrained, arguments, collator, train_dataset=dataset)
    with pytest.raises(ValueError, match=r"samples could not be used, and max_bad_fraction=.*row \d+.*no file"):
        trainer.train()
    assert trainer.state.global_step == step - 1


def test_bad_samples_of_an_evaluation(pretrained, processor, tmp_path):
    """They are counted apart, and leave the mean of the others as it is."""
    collator = PairCollator(processor, skip_bad_samples=True)
    opener = Opener()
    good = SampleDataset(_rows().select([0, 1, 2, 3, 4, 7]), PairReader(open_image=opener))
    mixed = SampleDataset(_rows(8), PairReader(open_image=opener), skip_bad_samples=True)
    arguments = _arguments(tmp_path, per_device_eval_batch_size=3, max_bad_fraction=0.3)
    trainer = LMEyeTrainer(pretrained, arguments, collator)
    expected, found = trainer.evaluate(good), trainer.evaluate(mixed)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert found["eval_bad_samples"] == 2 and "eval_bad_samples" not in expected
    assert not (tmp_path / "bad_samples.jsonl").exists()
    trainer.args.max_bad_fraction = 0.2
    with pytest.raises(ValueError, match="2 of 8 samples could not be used"):
        trainer.evaluate(mixed)


# --- batches of like lengths -----------------------------------------------------------------------------------------


def _captions(count: int) -> datasets.Dataset:
    lengths = torch.randint(1, 40, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_dict(
        {"image": [str(i) for i in range(count)], "caption": [" ".join(["w1"] * n) for n in lengths]}
    )


def _no_picture(value: Any) -> Any:
    raise AssertionError("a picture was opened for its text's length")


@pytest.mark.parametrize("mixed", [False, True])
def test_length_groups_pad_less_and_use_every_sample_once(pretrained, processor, tmp_path, mixed):
    rows = _captions(64)

    def dataset(open_image: Any) -> Any:
        data = SampleDataset(rows, PairReader(open_image=open_image))
        if not mixed:
            return data
        words = datasets.Dataset.from_dict({"text": ["w1", "w1 w1 w1"]})
        return mix_texts(data, SampleDataset(words, PairReader(image_column=None, caption_column="text")), 0.2)

    padding, order = {}, {}
    for strategy in ("random", "group_by_length"):
        arguments = _arguments(tmp_path, per_device_train_batch_size=4, train_sampling_strategy=strategy)
        trainer = LMEyeTrainer(pretrained, arguments, PairCollator(processor), train_dataset=dataset(_no_picture))
        order[strategy] = list(trainer._get_train_sampler())
        opened = dataset(lambda value: tiny.picture(0))
        batches = [
            PairCollator(processor)([opened[i] for i in order[strategy][start : start + 4]])
            for start in range(0, len(opened), 4)
        ]
        padding[strategy] = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
    assert Counter(order["group_by_length"]) == Counter(range(79 if mixed else 64))
    assert padding["group_by_length"] < 0.4 * padding["random"]


def test_length_groups_in_training(pretrained, processor, tmp_path):
    """Every pass has an order and texts of its own; a run resumed in the second goes on with the same samples, to the
    same weights."""
    start = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    seen: list[list[tuple[str, str]]] = []

    class Collator(PairCollator):
        def __call__(self, samples: list[Any]) -> dict[str, Any]:
            seen.append([(sample["id"], sample["caption"]) for sample in samples])
            return super().__call__(samples)

    words = datasets.Dataset.from_dict({"text": ["w1", "w2 w2", "w3", "w4 w4", "w5"]})
    texts = SampleDataset(words, PairReader(image_column=None, caption_column="text"))
    pairs = SampleDataset(_captions(16), PairReader(open_image=lambda value: tiny.picture(int(value))))
    run = {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 1, "max_steps": 20}
    run |= {"save_strategy": "steps", "save_steps": 12, "save_total_limit": 4}

    def trainer() -> LMEyeTrainer:
        arguments, collator, dataset = _arguments(tmp_path, **run), Collator(processor), mix_texts(pairs, texts, 0.2)
        return LMEyeTrainer(pretrained, arguments, collator, train_dataset=dataset, eval_dataset=dataset)

    trainer().train()
    first, second = ([sample for batch in seen[start:stop] for sample in batch] for start, stop in ((0, 10), (10, 20)))
    assert len(first) == len(set(first)) == len(second) == len(set(second)) == 19
    assert first != second and {caption for _, caption in first} != {caption for _, caption in second}
    whole = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    expected = seen[12:20]
    pretrained.load_state_dict(start)
    torch.manual_seed(123)
    seen.clear()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-12")
    assert seen[:8] == expected
    assert all(torch.equal(tensor, whole[name]) for name, tensor in pretrained.state_dict().items())
    seen.clear()
    resumed.evaluate()
    assert len({sample for batch in seen for sample in batch}) == 19


# --- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_samples_and_tokens_are_counted(build, tmp_path, family):
    """Tokens that are not padding; of an encoder-decoder what it reads and what it says. Resumed, the sum goes on."""
    model = build(family, "clip_text")
    model.freeze_for_stage("instruct")
    samples = []
    for seed, layout in enumerate(["img 3 req =2", "img req =7", "img 5 req =1"]):
        ids, labels = tiny.row(model.config, layout, seed)
        pixels = tiny.pixels(1, seed)
        samples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels})
    tokens = sum(len(s["input_ids"]) + (len(s["labels"]) if family == "t5" else 0) for s in samples)
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def trainer(**kwargs: Any) -> LMEyeTrainer:
        return LMEyeTrainer(
            model, _arguments(tmp_path, **run), lambda rows: pad_right(rows, 0), train_dataset=samples, **kwargs
        )

    trainer(callbacks=[_StopAt(2)]).train()  # an epoch is one step
    last = trainer()
    metrics = last.train(resume_from_checkpoint="last").metrics
    assert metrics["train_samples"] == 4 * 3 and metrics["train_tokens"] == 4 * tokens
    ratio = metrics["train_tokens_per_second"] / metrics["train_samples_per_second"]
    assert ratio == pytest.approx(tokens / 3, rel=1e-3)
    seconds = 2 * 3 / metrics["train_samples_per_second"]  # those of this process alone
    assert 0 < seconds < metrics["train_runtime"]
    steps = [entry for entry in last.state.log_history if "loss" in entry]
    assert all(entry["samples_per_second"] > 0 and entry["tokens_per_second"] > 0 for entry in steps)


def test_throughput_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    throughput = Throughput()
    throughput.start()
    now[0] += 2
    throughput.start()  # runs already
    throughput.count(samples=10, tokens=300)
    assert throughput.since_last_log() == {"samples_per_second": 5.0, "tokens_per_second": 150.0}
    with throughput.pause():
        now[0] += 50
    now[0] += 4
    throughput.count(samples=2, tokens=20)
    assert throughput.since_last_log() == {"samples_per_second": 0.5, "tokens_per_second": 5.0}
    assert throughput.since_start() == {
        "samples_per_second": 2.0,
        "tokens_per_second": pytest.approx(320 / 6, abs=1e-3),
    }
    assert throughput.since_last_log() == {}
