"""The paper's models at true width, on the meta device, against sums worked by hand from the formulas."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from transformers_lmeye import LMEyeConfig
from transformers_lmeye.modeling.presets import PRESETS, preset_fields


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "count_parameters.py"

# Width of the language model, dynamic tokens, and the parameters its own publishers count.
LANGUAGE_MODELS = {
    "opt-iml-1.3b": (2048, 1, 1_315_758_080),
    "bloomz-7b1": (4096, 5, 7_069_016_064),
    # 2,849,757,184 with the head of its own (32,128 x 2,048) that transformers ties to the embeddings until it loads
    # weights.
    "blip2-flan-t5-xl": (2048, 5, 2_849_757_184 - 65_798_144),
    "llama-7b": (4096, 5, 6_738_415_616),
    "llama-13b": (5120, 5, 13_015_864_320),
    "vicuna-7b": (4096, 5, 6_738_415_616),
    "mpt-7b": (4096, 5, 6_649_286_656),
    "chatglm2-6b": (4096, 5, 6_243_584_000),
}
BLIP_2 = ("blip2-flan-t5-xl", "chatglm2-6b")
CLIP_VIT_L_14 = 427_616_513  # both towers, both projections and the temperature
BLIP_2_FLAN_T5_XL = 3_942_446_592  # vision tower, Q-Former, queries, language projection and language model


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("count_parameters", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["count_parameters"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["count_parameters"]


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def stages(name: str, interaction: str) -> tuple[int, int]:
    """Sums of shapes: variant 1 over CLIP ViT-L/14 (all 768 wide), variant 2 over 32 Q-Former outputs 768 wide."""
    d_l, k, _ = LANGUAGE_MODELS[name]
    if name in BLIP_2:
        static = linear(768, d_l) + 32 * d_l
        dynamic = linear(d_l, 5 * 768) + linear(768, 768) + linear(768, d_l) + 2 * d_l
    else:
        static = linear(768, d_l) + d_l
        dynamic = linear(d_l, 768) + linear(768, 5 * 768) + linear(768, k * d_l) + d_l
    return static, dynamic if interaction == "clip_text" else 0


@pytest.mark.parametrize("interaction", ["clip_text", "none"])
@pytest.mark.parametrize("name", PRESETS)
def test_counts(script, name, interaction):
    counts = script.parameter_counts(name, interaction=interaction)
    assert counts["language model"] == LANGUAGE_MODELS[name][2]
    assert (counts["stage 1"], counts["stage 2"]) == stages(name, interaction)
    text = counts["CLIP text encoder"]
    assert text == (123_060_480 + 768 * 768 if interaction == "clip_text" else 0)
    if name in BLIP_2:
        frozen = counts["vision tower"] + counts["Q-Former"]
        assert frozen + linear(768, 2048) + LANGUAGE_MODELS["blip2-flan-t5-xl"][2] + 65_798_144 == BLIP_2_FLAN_T5_XL
    else:
        assert counts["Q-Former"] == 0
        assert counts["vision tower"] + 123_060_480 + 768 * 768 + 1 == CLIP_VIT_L_14
    parts = sum(count for part, count in counts.items() if part.startswith("ipn."))
    assert parts == counts["stage 1"] + counts["stage 2"]


def test_the_papers_25_million(script):
    counts = script.parameter_counts("llama-7b")
    assert counts["stage 1"] == 3_149_824 + 4_096 == 3_153_920
    assert counts["stage 2"] == 3_146_496 + 2_952_960 + 15_749_120 + 4_096 == 21_852_672
    assert counts["stage 1"] + counts["stage 2"] == 25_006_592
    assert counts["ipn.dynamic_projection"] == 15_749_120


def test_variants():
    for name in PRESETS:
        config = LMEyeConfig.from_preset(name)
        assert config.interaction == "clip_text" and config.num_request_rounds == 1
        if name in BLIP_2:
            assert config.visual_mapping == config.fine_grained_source == "qformer"
            assert config.keep_request_token and config.dynamic_readout == "last"
            assert config.num_static_tokens == 32 and config.num_request_vectors == config.num_dynamic_tokens == 5
            assert config.fine_grained_dropout == 0.0
        else:
            assert config.visual_mapping == "linear" and config.fine_grained_source == "global"
            assert not config.keep_request_token and config.dynamic_readout == "eos"
            assert config.num_static_tokens == config.num_request_vectors == 1
            assert config.num_fine_grained_tokens == 5 and config.fine_grained_dropout == 0.5
        assert config.is_encoder_decoder == (name == "blip2-flan-t5-xl")
        # Slots lie behind the table.
        assert config.image_token_id == config.get_text_config().vocab_size


def test_overrides(script):
    config = LMEyeConfig.from_preset("llama-7b", num_dynamic_tokens=3, num_request_rounds=2)
    assert config.num_dynamic_tokens == 3 and config.num_request_rounds == 2
    config = LMEyeConfig.from_preset("chatglm2-6b", interaction="cross_attention")
    assert config.fine_grained_source == "patch" and config.keep_request_token and config.clip_text_config is None
    config = LMEyeConfig.from_preset("chatglm2-6b", interaction="none")
    assert not config.keep_request_token and config.clip_text_config is None and config.num_static_tokens == 32
    counts = script.parameter_counts("blip2-flan-t5-xl", interaction="cross_attention", fine_grained_source="qformer")
    assert counts["CLIP text encoder"] == 0 and counts["ipn.interaction"] > 40_000_000


def test_presets_are_not_shared():
    """Changing what one preset gave leaves it, and others of the same sizes, as they are."""
    LMEyeConfig.from_preset("llama-7b").text_config.hidden_size = 1
    preset_fields("llama-7b")["text_config"]["hidden_size"] = 1
    assert LMEyeConfig.from_preset("llama-7b").text_config.hidden_size == 4096
    assert LMEyeConfig.from_preset("vicuna-7b").text_config.hidden_size == 4096


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"no preset \"gpt-4\": choose one of .*llama-7b"):
        LMEyeConfig.from_preset("gpt-4")


def test_round_trip(tmp_path):
    for name in PRESETS:
        config = LMEyeConfig.from_preset(name)
        config.save_pretrained(tmp_path / name)
        assert LMEyeConfig.from_pretrained(tmp_path / name).to_diff_dict() == config.to_diff_dict()


def printed(script, monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["count_parameters.py", *arguments])
    script.main()
    return capsys.readouterr().out


def test_script_and_documentation(script, monkeypatch, capsys):
    """The table in the documentation is what the script prints."""
    table = printed(script, monkeypatch, capsys).strip()
    assert len(table.splitlines()) == 2 + 2 * len(PRESETS)
    documented = (ROOT / "docs" / "presets.md").read_text()
    assert table in documented
    assert set(re.findall(r"^\| `([a-z0-9.-]+)` \|", documented, re.MULTILINE)) == set(PRESETS)


def test_script_for_one_preset(script, monkeypatch, capsys):
    output = printed(script, monkeypatch, capsys, "--preset", "llama-7b", "--interaction", "clip_text")
    assert "25,006,592" in output and "ipn.dynamic_projection 15,749,120" in output
