"""The model up to its head, as trainers see it that apply the head themselves (TRL's)."""

import copy

import pytest
import tiny
import torch


TURNS = "img 3 req 1 =3 2 req 1 =3 1 img 2 req 1 =2"
LAYOUTS = [TURNS, "2 img 3 req 2 =3", "4 =2"]


def inputs_of(model, layouts, padding="right"):
    rows = [tiny.row(model.config, layout, index) for index, layout in enumerate(layouts)]
    pictures = tiny.pixels(sum(layout.split().count("img") for layout in layouts))
    return {**tiny.batch(rows, padding), **({"pixel_values": pictures} if len(pictures) else {})}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def fused():
    """`fused(model)` -> a twin with TRL's own head, which never builds the logits; its weights are `model`'s."""
    utils = pytest.importorskip("trl.trainer.utils")

    def make(model):
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
        utils.add_fused_lm_head(twin, outputs=("log_probs", "is_top1"))
        return twin

    return make


@pytest.mark.parametrize(
    ("family", "padding"), [*((family, "right") for family in tiny.FAMILIES), ("llama", "ragged"), ("bloom", "left")]
)
def test_trls_head_scores_as_the_models_own(build, fused, family, padding):
    """Log-probabilities, loss and gradients: scaled, soft-capped and projected heads too."""
    model = build(family, "cross_attention")
    model.freeze_for_stage("instruct")
    model.train()
    inputs = inputs_of(model, LAYOUTS, padding)
    labels = inputs.pop("labels")
    out = model(**inputs, labels=labels)
    out.loss.backward()
    expected = gradients(model)
    model.zero_grad()

    own = fused(model)(**inputs, labels=labels, fused_lm_head=True, use_cache=False)
    targets = labels[:, 1:]
    scores = out.logits[:, :-1].detach().log_softmax(-1)
    chosen = scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0)
    torch.testing.assert_close(own.log_probs.detach(), chosen, atol=2e-5, rtol=0)
    torch.testing.assert_close(own.loss.detach(), out.loss.detach(), atol=1e-5, rtol=0)
    own.loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys() and found
    for name, gradient in found.items():
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("layouts", [LAYOUTS, ["4 =2", "3"]], ids=["images", "words"])
def test_the_head_is_left_to_others(build, layouts):
    """The head applied to what it would be given makes the logits, and was itself given nothing."""
    model = build("opt_projected", "cross_attention")
    inputs = inputs_of(model, layouts, "left")
    del inputs["labels"]
    head = model.get_output_embeddings()
    widths = []
    with torch.no_grad():
        expected = model(**inputs).logits
        with head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1])):
            out = model(**inputs, apply_head=False)
        assert widths and set(widths) == {0}
        assert out.logits is None and out.loss is None
        valid = inputs["attention_mask"].bool()
        torch.testing.assert_close(head(out.last_hidden_state)[valid], expected[valid], atol=1e-5, rtol=0)
    assert model(**inputs).last_hidden_state is None


def test_slots_are_never_trls_targets(build, fused):
    """TRL takes every token for a target where nothing else is asked for; slots' ids are no words of the head."""
    model = build("llama", "cross_attention")
    inputs = inputs_of(model, LAYOUTS)
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    words = ids.masked_fill(ids >= tiny.TABLE_ROWS, -100)
    assert (words != ids).any()
    with torch.no_grad():
        found = fused(model)(**{**inputs, "labels": ids}, fused_lm_head=True)
        expected = model(**{**inputs, "labels": words}).loss
    torch.testing.assert_close(found.loss, expected, atol=1e-5, rtol=0)
    assert torch.equal(found.label_mask, words[:, 1:] != -100)


def test_checkpointed_segments(build, fused):
    model = build("llama", "cross_attention")
    model.freeze_for_stage("instruct")
    model.train()
    inputs = inputs_of(model, LAYOUTS)
    twin = fused(model)
    twin(**inputs, fused_lm_head=True).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    twin.activation_checkpointing_enable()
    twin(**inputs, fused_lm_head=True).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=0, msg=name)


def test_words_alone_give_a_gradient_of_zero(build, fused):
    model = build("llama", "cross_attention")
    model.freeze_for_stage("instruct")
    fused(model)(**inputs_of(model, ["4 =2", "=3"]), fused_lm_head=True).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_parts_of_the_base_are_the_models_own(build):
    model = build("llama", "cross_attention")
    assert model.base_model.get_image_features(tiny.pixels(1)).patches is not None
    assert model.get_encoder(modality="image") is model.vision_tower
    assert model.get_decoder() is model.language_model
    assert model.get_encoder() is model
    assert model.base_model._tp_plan is model._tp_plan and model.supports_tp_plan


def test_an_encoder_decoder_keeps_its_head(build):
    model = build("t5", "cross_attention")
    with pytest.raises(ValueError, match=r"apply_head=False is for causal language models.*LMEyeTrainer"):
        model(input_ids=torch.tensor([[5, 6]]), apply_head=False)
