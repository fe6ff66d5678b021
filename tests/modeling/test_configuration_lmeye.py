"""The configuration: any language model inside, nothing lost over a round trip."""

import pytest
import tiny
from huggingface_hub.errors import StrictDataclassError
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


CAUSAL, ENCODER_DECODER = {"model_type": "llama"}, {"model_type": "t5"}
# What is given, and what follows from it (of the fields in the order of `DEFAULTS`).
DEFAULTS = (
    "num_static_tokens",
    "keep_request_token",
    "fine_grained_source",
    "num_fine_grained_tokens",
    "dynamic_readout",
    "num_request_vectors",
)
CASES = {
    "clip_text": ({}, (1, False, "global", 5, "eos", 1)),
    "clip_text, last outputs": (
        {"dynamic_readout": "last", "num_dynamic_tokens": 4},
        (1, False, "global", 5, "last", 4),
    ),
    "clip_text, patches": (
        {"fine_grained_source": "patch", "vision_config": VISION},
        (1, False, "patch", None, "eos", 1),
    ),
    "clip_text, pooled patches": (
        {"fine_grained_source": "patch", "num_fine_grained_tokens": 16},
        (1, False, "patch", 16, "eos", 1),
    ),
    "clip_text, static Q-Former": ({"visual_mapping": "qformer"}, (32, False, "global", 5, "eos", 1)),
    "clip_text, Q-Former throughout": (
        {"visual_mapping": "qformer", "fine_grained_source": "qformer", "num_query_tokens": 9},
        (9, False, "qformer", None, "eos", 1),
    ),
    "clip_text, request kept": ({"keep_request_token": True}, (1, True, "global", 5, "eos", 1)),
    "clip_text, encoder-decoder": ({"text_config": ENCODER_DECODER}, (1, True, "global", 5, "last", 5)),
    "variant 2": (
        {"text_config": ENCODER_DECODER, "visual_mapping": "qformer"},
        (32, True, "qformer", None, "last", 5),
    ),
    "cross_attention": (
        {"interaction": "cross_attention", "num_dynamic_tokens": 3},
        (1, False, "patch", None, "last", 3),
    ),
    "cross_attention, Q-Former": (
        {"interaction": "cross_attention", "fine_grained_source": "qformer"},
        (1, False, "qformer", None, "last", 5),
    ),
    "cross_attention, encoder-decoder": (
        {"interaction": "cross_attention", "text_config": ENCODER_DECODER, "visual_mapping": "qformer"},
        (32, True, "patch", None, "last", 5),
    ),
    "static patches": (
        {"interaction": "cross_attention", "visual_mapping": "patch", "vision_config": VISION},
        (16, False, "patch", None, "last", 5),
    ),
    "fewer static patches": (
        {"visual_mapping": "patch", "num_static_tokens": 6, "vision_config": VISION},
        (6, False, "global", 5, "eos", 1),
    ),
    "static patches of a tower that does not say how many": (
        {"visual_mapping": "patch", "num_static_tokens": 9, "vision_config": {"model_type": "siglip2_vision_model"}},
        (9, False, "global", 5, "eos", 1),
    ),
    "resampler": ({"interaction": "none", "visual_mapping": "resampler", "num_static_tokens": 6}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_defaults_of_each_variant(name, tmp_path):
    fields, expected = CASES[name]
    config = LMEyeConfig(**{"text_config": CAUSAL, **fields})
    assert config.is_encoder_decoder == (fields.get("text_config") == ENCODER_DECODER)
    assert config.num_request_rounds == 1
    if expected is not None:
        assert tuple(getattr(config, field) for field in DEFAULTS) == expected
    uses_qformer = "qformer" in (config.visual_mapping, config.fine_grained_source)
    assert (config.qformer_config is not None) == uses_qformer
    if uses_qformer:
        assert config.qformer_config.model_type == "blip_2_qformer"
    for field, value in fields.items():
        if not field.endswith("_config"):
            assert getattr(config, field) == value, field
    config.save_pretrained(tmp_path)
    again = LMEyeConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.is_encoder_decoder == config.is_encoder_decoder


WRONG = {
    "no rounds": ({"num_request_rounds": 0}, "num_request_rounds must be at least 1, not 0"),
    "no request vectors": ({"num_request_vectors": 0}, "num_request_vectors must be at least 1, not 0"),
    "no soft tokens": ({"num_fine_grained_tokens": 0}, "num_fine_grained_tokens must be at least 1, not 0"),
    "static tokens that are not the queries": (
        {"visual_mapping": "qformer", "num_static_tokens": 5},
        "32 outputs of the Q-Former.*leave num_static_tokens=5 out",
    ),
    "more static patches than there are": (
        {"visual_mapping": "patch", "num_static_tokens": 17, "vision_config": VISION},
        "num_static_tokens=17 is more than the 16 patches.*leave it out",
    ),
    "static patches of an unknown number": (
        {"visual_mapping": "patch", "vision_config": {"model_type": "siglip2_vision_model"}},
        '"siglip2_vision_model" does not say how many.*give num_static_tokens',
    ),
    "an encoder-decoder that drops the request": (
        {"text_config": ENCODER_DECODER, "keep_request_token": False},
        "`<img-q>`, which stays.*leave keep_request_token=False out",
    ),
    "the same, cross-attention": (
        {"text_config": ENCODER_DECODER, "keep_request_token": False, "interaction": "cross_attention"},
        "leave keep_request_token=False out",
    ),
    "a stack read at eos": (
        {"interaction": "cross_attention", "dynamic_readout": "eos"},
        'dynamic_readout="eos" is for interaction="clip_text"',
    ),
    "more last outputs than there are": (
        {"dynamic_readout": "last", "num_request_vectors": 3, "num_dynamic_tokens": 5},
        "num_request_vectors=3 is too small for num_dynamic_tokens=5",
    ),
    "fewer vectors than tokens": (
        {"interaction": "cross_attention", "num_request_vectors": 4},
        "num_request_vectors=4 is smaller than num_dynamic_tokens=5",
    ),
    # ViT-L/14 at 224 has 256 patches; CLIP's text encoder has 77 positions, three of which are bos, eos and a request.
    "patches that do not fit": (
        {"fine_grained_source": "patch", "vision_config": {**VISION, "image_size": 224, "patch_size": 14}},
        r"256 soft tokens.*need 259 positions.*has 77.*num_fine_grained_tokens=64",
    ),
    "queries that do not fit": (
        {"fine_grained_source": "qformer", "num_query_tokens": 73, "dynamic_readout": "last"},
        r"73 soft tokens.*5 request vectors.*need 80 positions.*has 77",
    ),
    "soft tokens that do not fit": ({"num_fine_grained_tokens": 75}, "need 78 positions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_fields_that_do_not_go_together(name):
    fields, message = WRONG[name]
    with pytest.raises(StrictDataclassError, match=message):
        LMEyeConfig(**fields)


def test_what_just_fits():
    LMEyeConfig(num_fine_grained_tokens=74)
    LMEyeConfig(dynamic_readout="last", num_request_vectors=4, num_dynamic_tokens=5)
    LMEyeConfig(fine_grained_source="qformer", num_query_tokens=70, dynamic_readout="last")


@pytest.mark.parametrize(
    "fields", [{"num_request_vectors": 1}, {"dynamic_readout": "eos"}, {"keep_request_token": False}]
)
@pytest.mark.parametrize("text_config", [CAUSAL, ENCODER_DECODER], ids=["causal", "encoder-decoder"])
def test_without_interaction_its_fields_do_not_matter(fields, text_config):
    """The ablation is one word away from any variant."""
    assert LMEyeConfig(interaction="none", text_config=text_config, **fields).interaction == "none"


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
        "num_request_rounds": 3,
        "keep_request_token": True,
        "dynamic_readout": "last",
        "num_query_tokens": 9,
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
