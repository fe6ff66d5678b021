"""Training, evaluation and the study of the digits world: what is computed in bulk is what one by one gives."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


pytestmark = pytest.mark.filterwarnings("error")

DIGITS_FOLDER = Path(__file__).parents[2] / "examples" / "digits"
CHECKPOINTS = DIGITS_FOLDER / "checkpoints"
MODULES = ("scenes", "training", "study")


@pytest.fixture(scope="module")
def digits():
    """The scripts of examples/digits as modules, by name."""
    previous = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(DIGITS_FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(DIGITS_FOLDER))
        for name, module in previous.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="module")
def scenes(digits):
    return digits["scenes"]


@pytest.fixture(scope="module")
def training(digits):
    return digits["training"]


@pytest.fixture(scope="module")
def study(digits):
    return digits["study"]


@pytest.fixture(scope="module")
def ipn(training):
    return training.build("ipn")


def test_features_of_pictures_are_those_of_the_processor(scenes, training, ipn):
    model, processor = ipn
    sample = scenes.sample_scenes(7, "test", seed=0)
    features = training.encode_pictures(model, processor, sample, batch_size=3)
    for i, image in enumerate(sample.images()):
        pixel_values = processor(images=image, text="Which digit?", return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = model.get_image_features(pixel_values)
        torch.testing.assert_close(features[[i]].pooled, expected.pooled, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features[[i]].patches, expected.patches, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arm", ["ipn", "static_resampled", "none"])
def test_prompts_are_those_of_the_processor(scenes, training, arm):
    _, processor = training.build(arm)
    sample = scenes.sample_scenes(5, "train", seed=0, min_digits=9)
    questions = scenes.sample_questions(sample, 8, seed=0)
    samples = training.question_samples(processor, questions)
    images = sample.images()
    inputs = processor(images=[images[q.scene] for q in questions], text=[q.question for q in questions])
    assert samples.prompts()["input_ids"].tolist() == inputs["input_ids"]
    assert samples.prompts()["attention_mask"].tolist() == inputs["attention_mask"]
    assert samples.scenes.tolist() == [q.scene for q in questions]
    for question, ids, labels, mask in zip(
        questions, samples.input_ids, samples.labels, samples.attention_mask, strict=True
    ):
        targets = labels[labels != -100]
        assert processor.tokenizer.decode(targets) == f"{question.answer} </s>"
        assert (labels[: samples.prompt_length] == -100).all()
        assert (ids[labels != -100] == targets).all() and mask[labels != -100].all()
        assert not mask[samples.prompt_length + len(targets) :].any()


def test_captions_follow_the_image_at_column_0(scenes, training, ipn):
    _, processor = ipn
    sample = scenes.sample_scenes(4, "train", seed=3)
    samples = training.caption_samples(processor, sample)
    assert (samples.input_ids[:, 0] == processor.image_token_id).all() and samples.prompt_length == 1
    for caption, labels in zip(sample.captions(), samples.labels, strict=True):
        words = processor.tokenizer.decode(labels[labels != -100])
        assert words.replace(" ,", ",") == f"{caption} </s>"


def test_lessons_come_in_order_and_ask_nothing_twice(training):
    limits = (((1, 1),), ((1, 3),), ((1, 9), (9, 9)))
    lessons = tuple(training.Lesson(end, limit, 20) for end, limit in zip((2, 5, None), limits, strict=True))
    sample = training.training_scenes(seed=1, lessons=lessons)
    assert len(sample) == 60
    counts = (sample.digits >= 0).sum(1)
    assert set(counts[:20]) == {1} and counts[20:40].max() == 3 and (counts[50:] == 9).all()
    questions = training.training_questions(sample, steps=8, batch_size=4, seed=1, lessons=lessons)
    lesson_of = [q.scene // 20 for q in questions]
    assert lesson_of == [0] * 8 + [1] * 12 + [2] * 12
    for question in questions:
        places = [cell.place for cell in sample.cells(question.scene)]
        assert any(question.question.rstrip("?").split().count(name) for name in _places(places))


def _places(places):
    from scenes import PLACES

    return [PLACES[place] for place in places]


@pytest.mark.parametrize("arm", ["ipn", "clip_text"])
def test_requests_start_standardised(scenes, training, arm):
    model, processor = training.build(arm)
    sample = scenes.sample_scenes(16, "train", seed=0, min_digits=9)
    features = training.encode_pictures(model, processor, sample)
    samples = training.question_samples(processor, scenes.sample_questions(sample, 4, seed=0))
    training.start_requests(model, processor, samples, features)
    requests = model.perceive(**samples.prompts(), image_features=features[samples.scenes]).requests
    projection = model.ipn.request_projection
    if arm == "ipn":
        seen = projection[0](requests)
        torch.testing.assert_close(seen.mean(0), torch.zeros(192), rtol=0, atol=1e-3)
        torch.testing.assert_close(seen.std(0), torch.ones(192), rtol=1e-2, atol=1e-2)
    else:
        torch.testing.assert_close(projection(requests).mean(0), torch.zeros(128), rtol=0, atol=1e-3)


def test_what_stage_2_trains(training):
    static, _ = training.build("static_resampled")
    training.choose_parameters(static, "instruct")
    names = {name.split(".")[1] for name, p in static.named_parameters() if p.requires_grad}
    assert names == {"image_token", "visual_mapping"}
    interactive, _ = training.build("ipn")
    training.choose_parameters(interactive, "instruct")
    names = {name.split(".")[1] for name, p in interactive.named_parameters() if p.requires_grad}
    assert names == {
        "request_token",
        "request_projection",
        "fine_grained_projection",
        "interaction",
        "dynamic_projection",
    }


def test_training_lowers_the_loss_and_leaves_the_backbones(scenes, training):
    model, processor = training.build("ipn")
    before = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("ipn.")}
    sample = scenes.sample_scenes(8, "train", seed=0, max_digits=1)
    features = training.encode_pictures(model, processor, sample)
    questions = scenes.sample_questions(sample, 1, seed=0, kinds=["color"]) * 60
    training.choose_parameters(model, "instruct")
    samples = training.question_samples(processor, questions)
    losses = training.train(model, samples, features, 8, 3e-3, "few", progress=False)
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert not model.training


def test_language_model_that_is_told_the_scene_knows_and_blind_does_not(scenes, training, ipn):
    model, processor = ipn
    sample = scenes.sample_scenes(20, "test", seed=5, min_digits=9)
    questions = scenes.sample_questions(sample, 3, seed=5)
    told = training.exact_matches_of_texts(model, processor, questions, training.told_prompts(questions, sample))
    blind = training.exact_matches_of_texts(model, processor, questions, training.blind_prompts(questions))
    assert told.all() and blind.mean() < 0.5


def test_an_answer_is_right_with_its_end_only(training):
    samples = training.build_samples([[7], [7], [7]], [[1, 3], [1, 2, 3], [1, 3]], [0, 1, 2], pad_token_id=0)
    sequences = torch.tensor([[7, 1, 3, 0], [7, 1, 2, 3], [7, 1, 1, 3]])
    assert training.matches(sequences, samples).tolist() == [True, True, False]
    assert training.matches(sequences[:, :3], samples).tolist() == [True, False, False]


def test_kinds_weigh_alike(scenes, training):
    kinds = ["digit"] * 3 + ["color", "parity", "object"]
    questions = [scenes.Question(0, kind, "?", "!") for kind in kinds]
    figures = training.per_kind(np.array([1, 1, 1, 0, 0, 1], dtype=bool), questions)
    assert figures == {"digit": 100.0, "color": 0.0, "parity": 0.0, "object": 100.0, "all": 50.0}


def test_intervals(study):
    rng = np.random.default_rng(0)
    better, worse = rng.random((3, 2000)) < 0.9, rng.random((3, 2000)) < 0.5
    difference, low, high = study.bootstrap_interval(better, worse, samples=500)
    assert low < difference < high and 38 < difference < 42 and high - low < 6
    assert study.bootstrap_interval(better[:1], better[:1], samples=50) == (0.0, 0.0, 0.0)


def test_questions_of_the_study_are_the_same_each_time_and_of_their_split(study, scenes):
    first, second = (study.evaluation_questions("test", 40) for _ in range(2))
    assert {name: questions for name, (_, questions) in first.items()} == {
        name: questions for name, (_, questions) in second.items()
    }
    assert (first["full"][0].digits >= 0).all() and (first["sparse"][0].digits >= 0).sum(1).max() <= 4
    used = first["full"][0].scans
    assert set(used.flatten().tolist()) <= set(scenes.split_scans("test").tolist())


@pytest.mark.parametrize("folder", sorted(CHECKPOINTS.glob("*")), ids=lambda folder: folder.name)
def test_shipped_networks_fit_the_shipped_backbones(training, scenes, folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_500_000
    model, processor = training.load(folder)
    for source in model.config.backbones.values():
        assert source["name_or_path"].startswith("examples/digits/backbones/")
    sample = scenes.sample_scenes(5, "test", seed=0, min_digits=9)
    questions = scenes.sample_questions(sample, 4, seed=0)
    features = training.encode_pictures(model, processor, sample)
    assert training.exact_matches(model, processor, questions, features).shape == (20,)
