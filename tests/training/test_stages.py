"""Which model and processor the scripts train with."""

from unittest.mock import Mock

import pytest
import torch

from transformers_lmeye import LMEyeForConditionalGeneration
from transformers_lmeye.training import ModelArguments, load_model, train_and_save


@pytest.fixture
def arguments(folders):
    def make(**fields):
        backbones = {
            "vision_model_name_or_path": str(folders.vision()),
            "language_model_name_or_path": str(folders.language("llama")),
        }
        return ModelArguments(**({} if "model_name_or_path" in fields else backbones), **fields)

    return make


def test_a_checkpoint_without_a_processor_gets_that_of_its_backbones(arguments, tmp_path):
    model, processor = load_model(arguments(num_static_tokens=2, num_dynamic_tokens=3, add_bos=True))
    model.save_pretrained(tmp_path, save_backbones=False)
    again, built = load_model(arguments(model_name_or_path=str(tmp_path), add_bos=True))
    assert built.to_dict() == processor.to_dict()
    text = "<img> what? <img-d>"
    features = model.get_image_features(torch.zeros(1, 3, 32, 32))
    expected = processor(image_features=features, text=text)["input_ids"]
    assert built(image_features=features, text=text)["input_ids"] == expected
    assert torch.equal(again.ipn.image_token, model.ipn.image_token)
    processor.num_dynamic_tokens = 6  # what was saved beside the model rules
    processor.save_pretrained(tmp_path)
    assert load_model(arguments(model_name_or_path=str(tmp_path)))[1].num_dynamic_tokens == 6


def test_a_checkpoint_of_unknown_backbones_needs_its_processor(arguments, tmp_path):
    model, _ = load_model(arguments())
    model.config.backbones = None
    LMEyeForConditionalGeneration.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="holds no processor"):
        load_model(arguments(model_name_or_path=str(tmp_path)))


def test_a_new_network_depends_on_the_seed_alone(arguments):
    tokens = [load_model(arguments(), seed)[0].ipn.image_token for seed in (0, 0, 1)]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize("given, passed", [("last", True), ("runs/checkpoint-3", "runs/checkpoint-3"), (None, None)])
def test_the_last_checkpoint_is_one_that_any_trainer_finds(given, passed):
    """`True` is the word for it of the library's Trainer and TRL's, which raise where there is none."""
    trainer = Mock(eval_dataset=None, args=Mock(resume_from_checkpoint=given))
    trainer.train.return_value.metrics = {}
    train_and_save(trainer)
    trainer.train.assert_called_once_with(resume_from_checkpoint=passed)
