"""What a call leaves behind for the next one: caches of batches, settings of a language model, checkpointing."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import GenerationConfig


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from tiny_backbones import tiny_language_model


def _padded_batch(model, padding):
    rows = [tiny.row(model.config, "3 img 6 req 2", seed=1), tiny.row(model.config, "1 img 2 req 1", seed=2)]
    batch = tiny.batch(rows, padding)
    batch.pop("labels")
    return {**batch, "pixel_values": tiny.pixels(2)}


def _longer(batch, words):
    ids = torch.cat([batch["input_ids"], words], dim=1)
    return {**batch, "input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], words * 0 + 1], dim=1)}


def test_left_padded_rows_go_on_from_their_cache(build):
    model = build("llama", "cross_attention")
    rows = [tiny.row(model.config, "3 img 6 req 2", seed=1), tiny.row(model.config, "1 img 2 req 2", seed=2)]
    batch = tiny.batch(rows, "left")
    batch.pop("labels")
    batch["pixel_values"] = tiny.pixels(2)
    words = torch.tensor([[7, 8], [9, 10]])
    with torch.no_grad():
        cache = model(**batch).past_key_values
        longer = _longer(batch, words)
        expected = model(**longer).logits[:, -2:]
        found = model(input_ids=words, attention_mask=longer["attention_mask"], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_moved_rows_do_not_go_on(build, whole):
    """Right-padded rows lie elsewhere in the cache than in the batch: an error, never other words' keys."""
    model = build("llama", "cross_attention")
    batch = _padded_batch(model, "right")
    words = torch.tensor([[7, 8], [9, 10]])
    with torch.no_grad():
        cache = model(**batch).past_key_values
        longer = _longer(batch, words)
        if not whole:
            longer = {"input_ids": words, "attention_mask": longer["attention_mask"]}
        with pytest.raises(ValueError, match="no longer those of input_ids"):
            model(**longer, past_key_values=cache)


def test_ragged_prompts_decode_behind_a_moved_cache(build):
    """The decoding loop knows the cache's own columns."""
    model = build("llama", "cross_attention")
    together = model.generate(**_padded_batch(model, "right"), max_new_tokens=4, do_sample=False)
    assert together.shape[1] == _padded_batch(model, "right")["input_ids"].shape[1] + 4


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_settings_are_filled_up_from_the_models_own(build, family):
    model = build(family, "cross_attention")
    ids, _ = tiny.row(model.config, "3 img 4", seed=1)
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": tiny.pixels(1)}
    model.generation_config.forced_bos_token_id = 77
    for settings in ({"max_new_tokens": 3}, {"generation_config": GenerationConfig(max_new_tokens=3)}):
        assert model.generate(**inputs, **settings)[0, 1] == 77


def test_reentry_is_never_used(build):
    """Gradients into a prefix that needs none would be lost."""
    model = build("llama", "cross_attention")
    model.freeze_for_stage("instruct")
    model.language_model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)  # as an adapter would
    rows = [tiny.row(model.config, "3 img 6 req =2", seed=1)]
    batch = {**tiny.batch(rows, "left"), "pixel_values": tiny.pixels(1)}

    def gradient():
        model.zero_grad()
        model(**batch).loss.backward()
        return model.language_model.model.layers[0].mlp.down_proj.weight.grad.clone()

    model.train()
    plain = gradient()
    model.activation_checkpointing_enable({"use_reentrant": True})
    torch.testing.assert_close(gradient(), plain, atol=1e-6, rtol=1e-5)


def test_what_the_decoding_loop_asks(build):
    """Strategies that step back are refused for states that cannot."""
    model = build("llama", "cross_attention")
    assert model._is_stateful is False
    model = build("llama", "cross_attention")
    model.language_model._is_stateful = True
    rebuilt = type(model)(model.config, vision_tower=model.vision_tower, language_model=model.language_model)
    assert rebuilt._is_stateful is True
    with pytest.raises(ValueError, match="stateful"):
        rebuilt.generate(torch.tensor([[5, 6, 7]]), prompt_lookup_num_tokens=2, max_new_tokens=3)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_hidden_states_of_models_that_keep_several(folders, tmp_path, padding):
    """Gemma-3n has more than one state for each layer; columns are the last dimension but one everywhere."""
    from transformers_lmeye import LMEyeForConditionalGeneration

    tiny_language_model("gemma3n_text").save_pretrained(tmp_path)
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folders.vision()), str(tmp_path), interaction="cross_attention", **tiny.SMALL_STACK
    )
    batch = _padded_batch(model, padding)
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True).hidden_states
        for row, valid in enumerate(batch["attention_mask"].bool()):
            ids = batch["input_ids"][row : row + 1, valid]
            alone = model(
                input_ids=ids, pixel_values=batch["pixel_values"][row : row + 1], output_hidden_states=True
            ).hidden_states
            assert max(states.dim() for states in alone) == 4 and len(alone) == len(found)
            for states, expected in zip(found, alone, strict=True):
                states = states[..., row : row + 1, :, :][..., valid, :]
                torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
