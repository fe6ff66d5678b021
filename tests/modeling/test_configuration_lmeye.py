"""The configuration: any language model inside, nothing lost over a round trip."""

import pytest
import tiny
from transformers import AutoConfig

from transformers_lmeye import LMEyeConfig


VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_any_language_model(family, tmp_path):
    text = tiny.language_config(family)
    config = LMEyeConfig(vision_config=VISION, text_config=text.to_dict(), interaction="cross_attention")
    assert type(config.text_config) is type(text)
    assert config.get_text_config() is config.text_config
    assert config.tie_word_embeddings == text.tie_word_embeddings
    config.save_pretrained(tmp_path)
    for again in (LMEyeConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is LMEyeConfig and type(again.text_config) is type(text)
        assert again.text_config.to_dict() == config.text_config.to_dict()
        assert again.to_diff_dict() == config.to_diff_dict()


def test_defaults_are_the_papers():
    config = LMEyeConfig()
    assert config.interaction == "clip_text" and config.visual_mapping == "linear"
    assert config.num_static_tokens == 1 and config.num_dynamic_tokens == 5
    assert config.num_fine_grained_tokens == 5 and config.fine_grained_dropout == 0.5
    assert config.fine_grained_source == "global" and config.use_request
    assert config.clip_text_config.model_type == "clip_text_model"
    config = LMEyeConfig(interaction="cross_attention", num_dynamic_tokens=3)
    assert config.interaction_num_layers == 5 and config.fine_grained_source == "patch"
    assert config.num_request_vectors == 3 and config.clip_text_config is None
    assert config.interaction_intermediate_size == 4 * config.interaction_hidden_size


def test_slots_lie_behind_the_table():
    text = tiny.language_config("llama")
    config = LMEyeConfig(text_config=text.to_dict(), interaction="none")
    assert (config.image_token_id, config.request_token_id, config.dynamic_token_id) == (99, 100, 101)


def test_every_field_survives(tmp_path):
    fields = {
        "interaction": "cross_attention",
        "visual_mapping": "resampler",
        "num_static_tokens": 3,
        "num_dynamic_tokens": 4,
        "fine_grained_source": "global",
        "vision_feature_layer": -1,
        "fine_grained_dropout": 0.1,
        "use_request": False,
        "interaction_hidden_size": 28,
        "interaction_intermediate_size": 30,
        "interaction_num_layers": 2,
        "interaction_num_heads": 7,
        "num_request_vectors": 6,
        "slot_init_std": 0.5,
        "image_token_id": 200,
        "request_token_id": 201,
        "dynamic_token_id": 202,
    }
    LMEyeConfig(vision_config=VISION, text_config=tiny.language_config("opt").to_dict(), **fields).save_pretrained(
        tmp_path
    )
    again = LMEyeConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        assert getattr(again, name) == value, name
