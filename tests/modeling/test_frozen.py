"""Promise 4: frozen means frozen, and exactly the parameters of the stage train."""

import logging

import pytest
import tiny
import torch


INTERACTIONS = ["clip_text", "cross_attention", "none"]


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def stage_counts(interaction: str, k: int = 5) -> dict[str, int]:
    """The sums of shapes that method.md's formulas ask for, at the tiny widths."""
    d_l, d_p, d_t, d_v, d_i, d_ff, layers = 48, 24, 40, 32, 28, 52, 2
    static = linear(d_p, d_l) + d_l
    if interaction == "none":
        return {"pretrain": static}
    if interaction == "clip_text":
        instruct = linear(d_l, d_t) + linear(d_p, 5 * d_t) + linear(d_p, k * d_l) + d_l
    else:
        attention = 4 * linear(d_i, d_i)
        block = 2 * attention + 3 * 2 * d_i + linear(d_i, d_ff) + linear(d_ff, d_i)
        instruct = 2 * d_l + linear(d_l, k * d_i)  # request projection behind its norm
        instruct += 2 * d_v + linear(d_v, d_i)  # patches
        instruct += k * d_i + layers * block + 2 * d_i  # learned part of the request vectors, blocks, last norm
        instruct += linear(d_i, d_l) + d_l
    return {"pretrain": static, "instruct": instruct}


def frozen_tensors(model) -> dict[str, torch.Tensor]:
    """Everything that is never trained: all outside the IPN, and CLIP's text encoder inside it."""
    trained = {
        f"ipn.{name}"
        for name, _ in model.ipn.named_parameters()
        if not (model.config.interaction == "clip_text" and name.startswith("interaction."))
    }
    return {name: value.clone() for name, value in model.state_dict().items() if name not in trained}


def training_batch(model):
    request = "" if model.config.interaction == "none" else "req "
    rows = [tiny.row(model.config, f"2 img 3 {request}=4", 0), tiny.row(model.config, f"img 5 {request}1 =2", 1)]
    return tiny.batch(rows, "right"), tiny.pixels(2)


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_only_the_stage_trains(build, caplog, interaction, stage):
    model = build("llama", interaction)
    counts = stage_counts(interaction)
    if stage not in counts:
        with pytest.raises(ValueError, match="nothing to train"):
            model.freeze_for_stage(stage)
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_info()
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO):
            assert model.freeze_for_stage(stage) == counts[stage]
    finally:
        transformers_logging.disable_propagation()
        transformers_logging.set_verbosity_warning()
    assert f"{counts[stage]:,}" in caplog.text and stage in caplog.text
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == counts[stage]
    static = ("ipn.visual_mapping.", "ipn.image_token")
    assert all(name.startswith("ipn.") and name.startswith(static) == (stage == "pretrain") for name in trained)

    before, started = frozen_tensors(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs, pictures = training_batch(model)
    model.train()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, pixel_values=pictures).loss
        optimizer.zero_grad()
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, value in frozen_tensors(model).items():
        assert torch.equal(value, before[name]), f"{name} moved"
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), started[name])}
    assert moved == set(trained)


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_backbones_stay_in_eval_mode(build, family, interaction):
    """These families drop out 10% when they train; frozen ones must not."""
    model = build(family, interaction)
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert model.training is mode
        assert model.ipn.visual_mapping.training is mode
        frozen = [model.vision_tower, model.language_model]
        if interaction == "clip_text":
            frozen.append(model.ipn.interaction)
        assert not any(module.training for part in frozen for module in part.modules())


def test_stages_one_after_the_other(build):
    """Stage 2 leaves what stage 1 trained alone, and either stage can be chosen anew."""
    model = build()
    counts = stage_counts("clip_text")
    for stage in ("pretrain", "instruct", "pretrain"):
        assert model.freeze_for_stage(stage) == counts[stage]
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counts[stage]


def test_unknown_stage(build):
    with pytest.raises(ValueError, match=r"pretrain.*instruct"):
        build().freeze_for_stage("align")


def test_parameters_at_the_papers_widths():
    """LLaMA-7B with CLIP ViT-L/14: 3,153,920 parameters in stage 1 and 21,852,672 in stage 2, 25,006,592 in all."""
    from transformers import CLIPTextConfig, CLIPVisionConfig, LlamaConfig

    from transformers_lmeye import LMEyeConfig, LMEyeForConditionalGeneration

    config = LMEyeConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
            projection_dim=768,
        ).to_dict(),
        text_config=LlamaConfig(vocab_size=32000).to_dict(),  # 4096 wide, 32 layers
        clip_text_config=CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        ).to_dict(),
        interaction="clip_text",
        num_dynamic_tokens=5,
    )
    with torch.device("meta"):
        model = LMEyeForConditionalGeneration(config)
    assert model.freeze_for_stage("pretrain") == 3_153_920
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3_149_824 + 4_096
    assert model.freeze_for_stage("instruct") == 21_852_672
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3_146_496 + 2_952_960 + 15_749_120 + 4_096
