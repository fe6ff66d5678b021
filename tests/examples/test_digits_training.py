"""Training, evaluation and the study of the digits world: what is computed in bulk is what one by one gives."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


pytestmark = pytest.mark.filterwarnings("error")

DIGITS_FOLDER = Path(__file__).parents[2] / "examples" / "digits"
CHECKPOINTS = DIGITS_FOLDER / "checkpoints"
MODULES = ("scenes", "curves", "training", "study")


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


@pytest.mark.parametrize("arm", ["ipn", "static_resampled", "none", "llava_style", "clip_text_patch_two_rounds"])
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


@pytest.mark.parametrize(
    "arm", ["ipn", "ipn_two_rounds", "cross_attention_global", "clip_text", "clip_text_two_rounds"]
)
def test_requests_start_standardised(scenes, training, arm):
    model, processor = training.build(arm)
    sample = scenes.sample_scenes(16, "train", seed=0, min_digits=9)
    features = training.encode_pictures(model, processor, sample)
    samples = training.question_samples(processor, scenes.sample_questions(sample, 4, seed=0))
    training.start_requests(model, processor, samples, features)
    requests = model.perceive(**samples.prompts(), image_features=features[samples.scenes]).requests
    assert len(requests) == 64 * model.config.num_request_rounds
    # what a second round reads has changed with the first round's requests
    near = {"rtol": 0, "atol": 1e-3} if model.config.num_request_rounds == 1 else {"rtol": 0, "atol": 0.3}
    projection = model.ipn.request_projection
    if model.config.interaction == "cross_attention":
        seen = projection[0](requests)
        torch.testing.assert_close(seen.mean(0), torch.zeros(192), **near)
        torch.testing.assert_close(seen.std(0), torch.ones(192), **(near | {"rtol": 1e-2}))
    else:
        torch.testing.assert_close(projection(requests).mean(0), torch.zeros(128), **near)


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


@pytest.mark.parametrize("arm", ["clip_text", "clip_text_patch", "cross_attention_global", "ipn"])
def test_a_second_round_adds_tokens_and_no_parameters(training, arm):
    (one, processor), (two, processor_of_two) = (training.build(name) for name in (arm, f"{arm}_two_rounds"))
    shapes = [{name: p.shape for name, p in model.ipn.named_parameters()} for model in (one, two)]
    assert shapes[0] == shapes[1]
    source = {"clip_text": "global", "cross_attention_global": "global"}.get(arm, "patch")
    for model, asking, rounds in ((one, processor, 1), (two, processor_of_two, 2)):
        assert model.config.fine_grained_source == source
        blank = training.Image.new("RGB", (48, 48))
        ids = asking(images=blank, text="What color is at the left?")["input_ids"]
        assert ids.count(asking.image_token_id) == 1
        assert ids.count(asking.dynamic_token_id) == 2 * rounds == model.config.num_dynamic_tokens * rounds


def test_family_is_trained_once_and_asked_in_one_and_two_rounds(study, training, tmp_path, monkeypatch, capsys):
    trained, asked = [], []

    def train_arm(arm, seed, work_dir, learning_rate):
        trained.append((arm, seed, learning_rate))
        return training.build(arm, seed)[0]

    def evaluate(model, processor, split, num_questions):
        # two rounds answer all, one round half; no test handwriting is read
        assert split == "test" and processor.num_request_rounds == model.config.num_request_rounds
        asked.append(model.config.num_request_rounds)
        half = np.arange(num_questions) % 8 < 4
        return dict.fromkeys(("full", "sparse"), half | (model.config.num_request_rounds == 2))

    monkeypatch.setattr(study, "train_arm", train_arm)
    monkeypatch.setattr(study, "evaluate", evaluate)
    monkeypatch.setattr(study, "NUM_TEST_QUESTIONS", 40)
    monkeypatch.setattr(study, "FAMILY_STUDY", tmp_path / "family.json")
    arms = ["static_tuned", "cross_attention_global", "ipn", "ipn_two_rounds"]
    args = study.Arguments(do="family", arms=arms, seeds=[0, 1])
    study.compare_family(args, tmp_path)
    several = {"static_tuned", "ipn", "ipn_two_rounds"}
    rates = {"static_tuned": 2e-3}  # study.json has tuned it; the others take that of the IPN
    expected = [(arm, seed, rates.get(arm, 1e-3)) for seed in (0, 1) for arm in arms if seed == 0 or arm in several]
    assert trained == expected
    assert len(asked) == 2 + 2 + 4 + 4
    figures = json.loads((tmp_path / "family.json").read_text())["full"]
    assert {arm: (f["rounds"], f["visual_tokens"]) for arm, f in figures.items()} == {
        "static_tuned": (0, 3),
        "cross_attention_global": (1, 3),
        "ipn": (1, 3),
        "ipn_two_rounds": (2, 5),
    }
    study.compare_family(args, tmp_path)
    assert len(trained) == len(expected) and len(asked) == 12  # nothing is done twice
    assert figures["ipn_two_rounds"]["all"] == figures["ipn"]["in_the_other_number_of_rounds"] == 100
    one_round = figures["ipn"]["all"]
    assert one_round == figures["ipn_two_rounds"]["in_the_other_number_of_rounds"] < 100
    assert figures["ipn_two_rounds"]["minus_one_round"][0] > 0 and "minus_one_round" not in figures["ipn"]
    assert f"{one_round:.1f} / 100.0" in capsys.readouterr().out


def test_arms_of_the_curve(study, training):
    """As many visual tokens in a prompt as the curve says, by the same network otherwise."""
    assert {kind: list(names) for kind, names in training.CURVE.items()} == {
        "static_resampled": [1, 2, 3, 6, 12, 36],
        "llava_style": [1, 2, 3, 6, 12, 36],
        "ipn": [2, 3, 6, 12, 36],
    }
    assert training.CURVE["static_resampled"][3] == "static_resampled" and training.CURVE["ipn"][3] == "ipn"
    assert training.CURVE["llava_style"][36] == "llava_style"
    assert training.with_visual_tokens("ipn", 3) == {**training.ARMS["ipn"], "num_dynamic_tokens": 2}
    assert training.with_visual_tokens("static_resampled", 3) == training.ARMS["static_resampled"]
    for names in training.CURVE.values():
        for count in (2, 12):
            _, processor = training.build(names[count])
            blank = training.Image.new("RGB", (48, 48))
            ids = processor(images=blank, text="What color is at the left?")["input_ids"]
            assert ids.count(processor.image_token_id) + ids.count(processor.dynamic_token_id) == count
            assert study.costs(names[count], {})["visual_tokens"] == count


def test_costs(study, training):
    """What both stages train, counted by hand: widths 128 (pooled and patches), 192 (embeddings), 36 patches."""
    timing = {"llava_style": {"seconds_per_step": 0.25, "ratio": 2.0}}
    assert study.costs("none", {}) == {"visual_tokens": 1, "trained_parameters": 128 * 192 + 192 + 192}
    assert study.costs("llava_style", timing) == {
        "visual_tokens": 36,
        "trained_parameters": 128 * 192 + 192 + 36 * 192,
        "seconds_per_step": 0.25,
        "ratio": 2.0,
    }
    with_text_encoder = study.costs("clip_text", {})
    assert with_text_encoder["visual_tokens"] == 3
    trained = 128 * 192 + 192 + 192  # static
    trained += 192 + (192 * 128 + 128) + (128 * 5 * 128 + 5 * 128) + (128 * 2 * 192 + 2 * 192)
    assert with_text_encoder["trained_parameters"] == trained
    assert study.costs("clip_text_no_request", {}) == with_text_encoder


def test_learning_rates(study, tmp_path, monkeypatch):
    """The best of the tuning; of its own kind for other numbers of tokens and rounds; else that of the IPN."""
    monkeypatch.setattr(study, "STUDY", tmp_path / "study.json")
    stored = {"ipn": {"0.001": 40.0, "0.002": 30.0}, "clip_text": {"0.001": 40.0, "0.002": 41.0}}
    study.STUDY.write_text(json.dumps({"learning_rates": stored}))
    (tmp_path / "tune_llava_style.json").write_text(json.dumps({"0.001": 50.0, "0.004": 51.0}))
    expected = {"ipn": 1e-3, "ipn_36_tokens": 1e-3, "clip_text": 2e-3, "clip_text_two_rounds": 2e-3}
    expected |= {"llava_style": 4e-3, "llava_style_6_tokens": 4e-3, "static_resampled_1_token": 1e-3}
    assert {arm: study.best_rate(arm, tmp_path) for arm in expected} == expected


def test_tuning_tries_what_was_not_tried(study, training, tmp_path, monkeypatch):
    tried = []

    def train_arm(arm, seed, work_dir, learning_rate, steps):
        tried.append((arm, learning_rate, steps))
        return training.build(arm)[0]

    monkeypatch.setattr(study, "train_arm", train_arm)
    monkeypatch.setattr(study, "evaluate", lambda *_: {"full": np.ones(4, bool), "sparse": np.arange(4) < 2})
    (tmp_path / "tune_llava_style.json").write_text('{"0.0005": 50.0}')
    args = study.Arguments(do="tune", arms=["none", "llava_style"], learning_rates=[5e-4, 4e-3])
    study.tune(args, tmp_path)
    assert tried == [("llava_style", 4e-3, study.TUNING_STEPS)]
    assert json.loads((tmp_path / "tune_llava_style.json").read_text()) == {"0.0005": 50.0, "0.004": 75.0}


def test_what_is_not_trained_is_not_in_the_table(study, training, tmp_path, monkeypatch, capsys):
    """Three seeds of one arm, one of another, and a curve of two points."""

    def evaluate(model, processor, split, num_questions):
        right = np.arange(num_questions) % 8 < {3: 8, 6: 2, 36: 4}[study.visual_tokens(model.config)]
        return dict.fromkeys(("full", "sparse"), right)

    monkeypatch.setattr(study, "evaluate", evaluate)
    monkeypatch.setattr(study, "NUM_TEST_QUESTIONS", 40)
    monkeypatch.setattr(study, "STUDY", tmp_path / "study.json")
    monkeypatch.setattr(study, "PLOT", tmp_path / "plot.png")
    (tmp_path / "timing.json").write_text(json.dumps({"ipn": {"seconds_per_step": 0.125, "ratio": 1.0}}))
    (tmp_path / "tune_ipn.json").write_text('{"0.001": 44.0}')
    trained = [("ipn", 0), ("ipn", 1), ("ipn", 2), ("llava_style", 0), ("static_resampled_6_tokens", 0)]
    for arm, seed in trained:
        training.build(arm, seed)[0].save_pretrained(tmp_path / f"{arm}_{seed}", save_backbones=False)
    arms = list(study.DEFAULT_ARMS["evaluate"])
    study.evaluate_all(study.Arguments(do="evaluate", arms=arms), tmp_path)
    result = json.loads((tmp_path / "study.json").read_text())
    assert result["learning_rates"] == {"ipn": {"0.001": 44.0}}
    assert set(result["costs"]) == {"ipn", "llava_style", "static_resampled_6_tokens"}
    full = result["exact_match"]["full"]
    assert full["ipn"]["per_seed"] == [100.0] * 3 and full["ipn"]["spread"]["all"] == 0
    assert full["llava_style"]["per_seed"] == [full["llava_style"]["all"]] and "spread" not in full["llava_style"]
    assert 0 < full["static_resampled_6_tokens"]["all"] < full["llava_style"]["all"] < 100
    assert full["told"]["all"] == 100 and full["no_image"]["all"] < 60
    assert list(result["ipn_minus"]["full"]) == ["llava_style"]
    printed = capsys.readouterr().out
    assert "| `ipn` | 3 | 1,536,640 | 0.125 (1.00) | 100.0 ± 0.0 |" in printed
    assert f"| 36 | - | {full['llava_style']['all']:.1f} (1) | - |" in printed
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_seconds_are_measured_in_turns(study, training, scenes, tmp_path, monkeypatch, capsys):
    sample = scenes.sample_scenes(4, "train", seed=0, min_digits=9)
    model, processor = training.build("ipn")
    features = training.encode_pictures(model, processor, sample)
    questions = scenes.sample_questions(sample, 4, seed=0)
    turns = []
    monkeypatch.setattr(study, "training_data", lambda *_: (sample, features))
    monkeypatch.setattr(study, "training_questions", lambda *_: questions)
    monkeypatch.setattr(study, "INSTRUCT_BATCH", 8)
    train = study.train
    monkeypatch.setattr(study, "train", lambda *given, **more: turns.append(given[-1]) or train(*given, **more))
    arms = ["none", "ipn", "llava_style"]
    study.measure_seconds(study.Arguments(do="time", arms=arms), tmp_path, rounds=2, steps=2)
    assert turns == ["ipn", "llava_style"] * 3
    figures = json.loads((tmp_path / "timing.json").read_text())
    assert figures["ipn"]["ratio"] == 1 and figures["llava_style"]["seconds_per_step"] > 0
    assert "llava_style" in capsys.readouterr().out


def test_reference_is_made_of_the_losses_of_every_seed(study, training, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "REFERENCE_CURVE", tmp_path / "reference_curve.json")
    monkeypatch.setattr(study, "training_data", lambda seed, _: (None, None))
    monkeypatch.setattr(study, "pretrain", lambda m, p, s, f, seed, progress: [1.0 + seed] * 30)
    monkeypatch.setattr(study, "instruct", lambda m, p, s, f, seed, progress: [3.0 + seed] * 20)
    args = study.Arguments(do="reference", seeds=[0, 2])
    study.make_reference(args, tmp_path)
    expected = {
        "stage 1: captions": {"step": [20, 30], "mean": [2.0, 2.0], "spread": [1.41421, 1.41421]},
        "stage 2: questions": {"step": [20], "mean": [4.0], "spread": [1.41421]},
    }
    assert json.loads((tmp_path / "reference_curve.json").read_text()) == {"seeds": [0, 2], "stages": expected}
    monkeypatch.setattr(study, "build", None)
    study.make_reference(args, tmp_path)  # nothing is trained twice


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
