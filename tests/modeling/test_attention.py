"""The trained stack runs transformers' attention functions: the one asked for, with the masks it expects."""

import pytest
import tiny
import torch
from comparison import assert_same, assert_same_gradient, inputs_of, rows_of, trained_parameters
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from transformers_lmeye import LMEyeForConditionalGeneration
from transformers_lmeye.modeling import interactive_perception
from transformers_lmeye.modeling.interactive_perception import Attention


HEADS, WIDTH, LAYERS = 2, tiny.SMALL_STACK["interaction_hidden_size"] // 2, 2
PATCHES = tiny.NUM_PATCHES
# The first row's request sees two pictures, the others' one.
UNEVEN = ["1 img 1 img 2 req 1 =2", "2 img 6 req 2 =4", "img 3 req =1"]
EVEN = ["2 img 3 req 2 =4", "img 3 req =1"]


class Recorder:
    """An attention function that keeps what the IPN's stack calls it with, and does what sdpa does."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        if isinstance(module, Attention):
            assert key.shape == value.shape and kwargs["scaling"] == WIDTH**-0.5
            assert kwargs["dropout"] == 0.0 and kwargs["is_causal"] is False and module.is_causal is False
            self.calls.append((tuple(query.shape), tuple(key.shape), attention_mask, query.dtype))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@pytest.fixture
def recorder():
    """Known to transformers as "recording" while the test runs."""
    recorder = Recorder()
    AttentionInterface.register("recording", recorder)
    AttentionMaskInterface.register("recording", sdpa_mask)
    yield recorder
    del AttentionInterface._global_mapping["recording"], AttentionMaskInterface._global_mapping["recording"]


def run(model, layouts=UNEVEN):
    rows, pictures = rows_of(model.config, layouts)
    return model(**inputs_of(rows, "left"), pixel_values=pictures)


# Requests, request vectors, what they look at: one call each for self-attention and cross-attention in every block.
def calls_of(requests, vectors, context):
    own = ((requests, HEADS, vectors, WIDTH), (requests, HEADS, vectors, WIDTH))
    other = ((requests, HEADS, vectors, WIDTH), (requests, HEADS, context, WIDTH))
    return [own, other] * LAYERS


def test_the_function_asked_for_is_called(build, recorder):
    model = build("llama", "cross_attention", attn_implementation="recording", num_request_vectors=6)
    assert model.config._attn_implementation == "recording"
    assert {part.config._attn_implementation for part in model.backbones()} == {"recording"}
    with torch.no_grad():
        got = run(model)
    assert [call[:2] for call in recorder.calls] == calls_of(3, 6, 2 * PATCHES)
    for index, (_, _, mask, _) in enumerate(recorder.calls):
        if index % 2 == 0:
            assert mask is None, "request vectors see each other"
            continue
        shown = mask.expand(3, 1, 6, 2 * PATCHES)
        assert mask.dtype == torch.bool
        assert bool(shown[0].all()) and bool(shown[1:, ..., :PATCHES].all())
        assert not bool(shown[1:, ..., PATCHES:].any()), "a row with one picture sees no second"
    expected = build("llama", "cross_attention", num_request_vectors=6)
    with torch.no_grad():
        assert_same(got.logits, run(expected).logits, "logits")


def test_no_mask_where_nothing_is_hidden(build, recorder):
    model = build("llama", "cross_attention", attn_implementation="recording")
    with torch.no_grad():
        run(model, EVEN)
    assert [call[:2] for call in recorder.calls] == calls_of(2, 5, PATCHES)
    assert all(mask is None for _, _, mask, _ in recorder.calls)


def test_the_resampler_too(build, recorder):
    model = build("llama", "none", visual_mapping="resampler", num_static_tokens=3, attn_implementation="recording")
    with torch.no_grad():
        run(model)
    assert [call[:2] for call in recorder.calls] == calls_of(4, 3, PATCHES)


def test_every_round(build, recorder):
    model = build("gpt2", "cross_attention", attn_implementation="recording", num_request_rounds=3)
    with torch.no_grad():
        run(model, EVEN)
    assert [call[:2] for call in recorder.calls] == 3 * calls_of(2, 5, PATCHES)


def test_chosen_later_or_at_loading(build, recorder, tmp_path):
    """`set_attn_implementation` and `from_pretrained` reach the stack and every backbone."""
    model = build("llama", "cross_attention")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        run(model, EVEN)
        assert not recorder.calls
        model.set_attn_implementation("recording")
        again = LMEyeForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="recording")
        for chosen in (model, again):
            recorder.calls.clear()
            run(chosen, EVEN)
            assert [call[:2] for call in recorder.calls] == calls_of(2, 5, PATCHES)
            assert {part.config._attn_implementation for part in chosen.backbones()} == {"recording"}


@pytest.mark.parametrize(
    ("interaction", "fields"),
    [
        ("cross_attention", {}),
        ("cross_attention", {"visual_mapping": "resampler", "num_static_tokens": 2, "keep_request_token": True}),
        ("clip_text", {"fine_grained_source": "patch", "num_fine_grained_tokens": 4}),
    ],
    ids=["stack", "resampler", "clip_text"],
)
def test_eager_is_sdpa(build, interaction, fields):
    """Logits, loss and gradients, with pictures hidden from some requests."""
    found = []
    for implementation in ("eager", "sdpa"):
        model = build("llama", interaction, attn_implementation=implementation, **fields)
        assert model.config._attn_implementation == implementation
        trained = trained_parameters(model)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        out = run(model)
        found.append((out, dict(zip(trained, torch.autograd.grad(out.loss, list(trained.values())), strict=True))))
    (eager, eager_gradients), (sdpa, sdpa_gradients) = found
    assert_same(eager.logits, sdpa.logits, "logits")
    assert_same(eager.loss, sdpa.loss, "loss")
    for name, gradient in eager_gradients.items():
        assert_same_gradient(gradient, sdpa_gradients[name], name)


def test_perceiving_has_weights_whatever_is_asked_for(build, recorder):
    """Only eager attention gives weights: `perceive` runs it, and finds what the others find."""
    model = build("llama", "cross_attention", attn_implementation="recording")
    rows, pictures = rows_of(model.config, UNEVEN)
    inputs = inputs_of(rows, "left")
    del inputs["labels"]
    got = model.perceive(**inputs, pixel_values=pictures)
    assert not recorder.calls
    assert got.attention_maps.shape == (3, LAYERS, 5, 2, 4, 4)
    assert_same(got.attention_maps.sum((-3, -2, -1)), torch.ones(3, LAYERS, 5), "attention sums to one")
    expected = build("llama", "cross_attention").perceive(**inputs, pixel_values=pictures)
    assert_same(got.dynamic_tokens, expected.dynamic_tokens, "dynamic tokens")


# --- flash attention -----------------------------------------------------------------------------------------------


@pytest.fixture
def flash(monkeypatch):
    """In the place of a flash kernel, which the machine may lack: takes half precision and masks of two dimensions."""

    class Flash(Recorder):
        def __call__(self, module, query, key, value, attention_mask, **kwargs):
            assert query.dtype in (torch.bfloat16, torch.float16) and query.dtype == key.dtype == value.dtype
            assert attention_mask is None or attention_mask.shape == (key.shape[0], key.shape[2])
            kept = attention_mask
            if attention_mask is not None:
                attention_mask = attention_mask[:, None, None, :].bool()
            out = super().__call__(module, query, key, value, attention_mask, **kwargs)
            self.calls[-1] = (*self.calls[-1][:2], kept, self.calls[-1][3])
            return out

    flash = Flash()
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    assert AttentionMaskInterface()["flash_attention_2"] is flash_attention_mask
    assert interactive_perception.ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is flash
    return flash


def ask_for_flash(model):
    """The stack alone: the backbones' own kernels are not at hand."""
    model.config._attn_implementation_internal = "flash_attention_2"
    assert model.config._attn_implementation == "flash_attention_2"


def test_a_float32_stack_does_without_flash(build, flash):
    """Half-precision backbones under flash attention leave the IPN in float32, which flash kernels refuse."""
    model = build("llama", "cross_attention")
    with torch.no_grad():
        expected = run(model).logits
        ask_for_flash(model)
        assert torch.equal(run(model).logits, expected)
    assert not flash.calls


@pytest.mark.parametrize("how", ["autocast", "half"])
def test_a_half_precision_stack_runs_flash(build, flash, how):
    model = build("llama", "cross_attention")
    with torch.no_grad():
        expected = run(model).loss
        ask_for_flash(model)
        if how == "half":
            model.ipn.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = run(model).loss
    assert [call[:2] for call in flash.calls] == calls_of(3, 5, 2 * PATCHES)
    assert {dtype for *_, dtype in flash.calls} == {torch.bfloat16}
    for index, (_, _, mask, _) in enumerate(flash.calls):
        if index % 2 == 0:
            assert mask is None
        else:
            assert mask.bool().tolist() == [[True] * 32, [True] * 16 + [False] * 16, [True] * 16 + [False] * 16]
    assert abs(float(loss) - float(expected)) < 0.1
