"""The digits world: its handwriting, pictures, captions, questions and shipped backbones."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


pytestmark = pytest.mark.filterwarnings("error")

DIGITS_FOLDER = Path(__file__).parents[2] / "examples" / "digits"
BACKBONES = DIGITS_FOLDER / "backbones"


@pytest.fixture(scope="module")
def scenes():
    """examples/digits/scenes.py as a module; examples are scripts, not a package."""
    spec = importlib.util.spec_from_file_location("scenes", DIGITS_FOLDER / "scenes.py")
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get("scenes")
    sys.modules["scenes"] = module
    spec.loader.exec_module(module)
    yield module
    if previous is None:
        del sys.modules["scenes"]
    else:
        sys.modules["scenes"] = previous


@pytest.fixture(scope="module")
def cells(scenes):
    """Top-left red three, center blue seven, bottom-right red seven."""
    return [scenes.Cell(0, 3, 0), scenes.Cell(4, 7, 2), scenes.Cell(8, 7, 0)]


def test_handwriting_is_shared_by_no_two_splits(scenes):
    splits = [set(scenes.split_scans(name).tolist()) for name in scenes.SPLITS]
    assert [len(split) for split in splits] == [1200, 200, 397]
    assert set.union(*splits) == set(range(1797))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_scenes_show_scans_of_their_split_and_digit(scenes, split):
    sample = scenes.sample_scenes(300, split, seed=3)
    drawn = sample.digits != scenes.EMPTY
    assert set(sample.scans[drawn].tolist()) <= set(scenes.split_scans(split).tolist())
    assert (scenes.load_scans()[1][sample.scans[drawn]] == sample.digits[drawn]).all()
    assert ((sample.colors != scenes.EMPTY) == drawn).all()


def test_unknown_split_and_impossible_counts_are_refused(scenes):
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        scenes.sample_scenes(1, "dev", seed=0)
    with pytest.raises(ValueError, match="min_digits=5, max_digits=4"):
        scenes.sample_scenes(1, "train", seed=0, min_digits=5, max_digits=4)
    with pytest.raises(ValueError, match="Unknown kind 'count'"):
        scenes.ask([scenes.Cell(0, 0, 0)], "count", np.random.default_rng(0))


def test_number_of_digits_is_as_asked(scenes):
    counts = (scenes.sample_scenes(500, "train", seed=0, min_digits=2, max_digits=4).digits != scenes.EMPTY).sum(1)
    assert set(counts.tolist()) == {2, 3, 4}
    assert (scenes.sample_scenes(50, "train", seed=0, min_digits=9).digits != scenes.EMPTY).all()


def test_same_seed_same_world(scenes):
    first, second = (scenes.sample_scenes(40, "test", seed=11) for _ in range(2))
    other = scenes.sample_scenes(40, "test", seed=12)
    assert (first.render() == second.render()).all()
    assert first.captions() == second.captions() != other.captions()
    assert scenes.sample_questions(first, 3, seed=1) == scenes.sample_questions(second, 3, seed=1)


def test_a_picture_does_not_depend_on_its_neighbours(scenes):
    sample = scenes.sample_scenes(600, "train", seed=1)
    chosen = np.array([599, 3, 513])
    assert (sample.render()[chosen] == sample.select(chosen).render()).all()


def test_pictures_are_dark_but_for_the_drawn_cells(scenes):
    sample = scenes.sample_scenes(100, "train", seed=2)
    pixels = sample.render()
    assert pixels.shape == (100, 48, 48, 3)
    assert pixels.dtype == np.uint8
    brightest = pixels.reshape(100, 3, 16, 3, 16, 3).max(axis=(2, 4, 5)).reshape(100, 9)
    assert ((brightest > 100) == (sample.digits != scenes.EMPTY)).all()


def test_caption_by_hand(scenes, cells):
    assert scenes.describe(cells) == "top-left red three, center blue seven, bottom-right red seven"


def test_answers_by_hand(scenes, cells):
    rng = np.random.default_rng(0)
    seen = {kind: {scenes.ask(cells, kind, rng) for _ in range(200)} for kind in (*scenes.KINDS, *scenes.HARD_KINDS)}
    assert seen["digit"] == {
        ("Which digit is at the top-left?", "three"),
        ("Which digit is at the center?", "seven"),
        ("Which digit is at the bottom-right?", "seven"),
    }
    assert seen["color"] == {
        ("What color is at the top-left?", "red"),
        ("What color is at the center?", "blue"),
        ("What color is at the bottom-right?", "red"),
    }
    assert seen["object"] == {
        ("What is at the top-left?", "red three"),
        ("What is at the center?", "blue seven"),
        ("What is at the bottom-right?", "red seven"),
    }
    assert seen["where"] == {
        ("Where is the red three?", "top-left"),
        ("Where is the blue seven?", "center"),
        ("Where is the red seven?", "bottom-right"),
    }
    assert {answer for _, answer in seen["parity"]} == {"odd"}
    assert seen["color_of"] == {("What color is the three?", "red")}
    assert ("Is there a seven at the center?", "yes") in seen["check"]
    assert ("Is there a three at the center?", "no") in seen["check"]
    assert ("Is there a three at the center?", "yes") not in seen["check"]


def test_what_occurs_twice_is_not_asked_for(scenes):
    twins = [scenes.Cell(0, 5, 1), scenes.Cell(1, 5, 1)]
    rng = np.random.default_rng(0)
    assert scenes.ask(twins, "where", rng) is None
    assert scenes.ask(twins, "color_of", rng) is None
    assert scenes.ask([], "digit", rng) is None


def test_kinds_and_yes_and_no_are_balanced(scenes):
    sample = scenes.sample_scenes(1500, "train", seed=0)
    questions = scenes.sample_questions(sample, 4, seed=0)
    assert len(questions) == 6000
    counts = [sum(q.kind == kind for q in questions) for kind in scenes.KINDS]
    assert min(counts) > 1400
    checks = [q.answer for q in scenes.sample_questions(sample, 1, seed=0, kinds=["check"])]
    assert 0.45 < checks.count("yes") / len(checks) < 0.55


def test_scenes_that_allow_none_of_the_kinds_are_passed_over(scenes):
    twins = scenes.sample_scenes(200, "train", seed=0, min_digits=2, max_digits=2)
    same = np.flatnonzero([len({cell.digit for cell in twins.cells(i)}) == 1 for i in range(200)])
    assert len(same) > 0
    assert scenes.sample_questions(twins.select(same), 2, seed=0, kinds=["color_of"]) == []
    assert scenes.sample_questions(scenes.sample_scenes(3, "train", 0, 0, 0), 2, seed=0) == []


def test_written_rows_and_images(scenes, tmp_path):
    sample = scenes.sample_scenes(4, "train", seed=0)
    questions = scenes.sample_questions(sample, 2, seed=0)
    scenes.write_scenes(tmp_path, sample, questions)
    rows = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in tmp_path.glob("*.jsonl")}
    assert [row["caption"] for row in rows["captions"]] == sample.captions()
    assert [row["answer"] for row in rows["questions"]] == [q.answer for q in questions]
    assert len(rows["conversations"]) == 4
    messages = rows["conversations"][0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in messages[2]["content"]] == ["text"]
    assert (np.asarray(Image.open(tmp_path / rows["captions"][2]["image"])) == sample.render()[2]).all()


def test_shipped_language_model_answers_when_told(scenes):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BACKBONES / "language_model")
    model = AutoModelForCausalLM.from_pretrained(BACKBONES / "language_model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    sample = scenes.sample_scenes(20, "test", seed=100, min_digits=9)
    captions = sample.captions()
    questions = scenes.sample_questions(sample, 3, seed=100)
    prompts = [f"Image as evidence: {captions[q.scene]}\n Question: {q.question} \nAnswer:" for q in questions]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    assert tokenizer.unk_token_id not in inputs["input_ids"]
    assert tokenizer.bos_token_id not in inputs["input_ids"]
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert np.mean([answer == q.answer for answer, q in zip(answers, questions, strict=True)]) >= 0.95
    assert (ids == tokenizer.eos_token_id).any(dim=1).all()


def test_shipped_clip_loads_and_its_patches_hold_the_digits(scenes):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = BACKBONES / "clip"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    text_config = model.config.text_config
    input_ids = tokenizer(["center red three", "top-left blue one, center red two"], padding=True)["input_ids"]
    assert [row[0] for row in input_ids] == [text_config.bos_token_id] * 2
    assert [row.count(text_config.eos_token_id) for row in input_ids] == [1, 1]

    def read(split, count):
        sample = scenes.sample_scenes(count, split, seed=100, min_digits=9)
        pixel_values = image_processor(sample.images(), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            patches = model.vision_model(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        cells = patches.unflatten(1, (3, 2, 3, 2)).permute(0, 1, 3, 2, 4, 5).reshape(count * 9, -1)
        return torch.nn.functional.pad(cells, (0, 1), value=1.0), torch.from_numpy(sample.digits).long().flatten()

    features, digits = read("train", 500)
    ridge = features.T @ features + 10.0 * torch.eye(features.shape[1])
    weights = torch.linalg.solve(ridge, features.T @ torch.nn.functional.one_hot(digits).float())
    features, digits = read("test", 40)
    assert ((features @ weights).argmax(1) == digits).float().mean() >= 0.9
