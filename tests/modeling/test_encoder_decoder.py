"""Promises 1 to 6 for encoder-decoders: whole encoder passes, the first ones shared by nothing but the vision side.

The prefix cannot be reused, since a bidirectional encoder has none. What holds in the place of promise 5: one encoder
pass for each round and one for the answer, per sample, whatever the beams; vision tower and Q-Former once.
"""

import pytest
import tiny
import torch
from comparison import (
    Meter,
    assert_gradients,
    assert_same,
    assert_same_gradient,
    first_layer_of,
    inputs_of,
    rows_of,
    saved_numbers,
    trained_parameters,
)
from huggingface_hub.errors import StrictDataclassError
from reference import EncoderDecoderReference, Reference
from transformers import AutoModelForSeq2SeqLM, Blip2ForConditionalGeneration, pipeline
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor


# Language model, interaction, vision checkpoint, fields of the configuration.
VARIANTS = {
    "clip_text": ("t5", "clip_text", "clip", {"num_dynamic_tokens": 3}),
    "clip_text-first-edition": ("t5", "clip_text", "blip2", {"visual_mapping": "qformer"}),
    "clip_text-patch-pooled": (
        "bart",
        "clip_text",
        "clip",
        {"fine_grained_source": "patch", "num_fine_grained_tokens": 4, "num_request_vectors": 6},
    ),
    "clip_text-eos": ("t5", "clip_text", "clip", {"dynamic_readout": "eos", "num_dynamic_tokens": 2}),
    "clip_text-rounds": ("bart", "clip_text", "clip", {"num_request_rounds": 3, "num_dynamic_tokens": 2}),
    "clip_text-qformer-rounds": (
        "t5",
        "clip_text",
        "blip2",
        {"visual_mapping": "qformer", "num_request_rounds": 2, "num_dynamic_tokens": 3},
    ),
    "cross_attention": ("bart", "cross_attention", "clip", {}),
    "cross_attention-qformer": (
        "bart",
        "cross_attention",
        "blip2",
        {"fine_grained_source": "qformer", "visual_mapping": "qformer", "num_dynamic_tokens": 3},
    ),
    "cross_attention-rounds": (
        "t5",
        "cross_attention",
        "clip",
        {"num_request_rounds": 2, "num_dynamic_tokens": 2, "num_request_vectors": 4},
    ),
    "none": ("bart", "none", "clip", {"num_static_tokens": 2}),
    "none-qformer": ("t5", "none", "blip2", {"visual_mapping": "qformer"}),
}
ASKING = [name for name in VARIANTS if not name.startswith("none")]
MIXED = [
    "1 img 1 img 2 req~ 1 =6",
    "2 img 6 req 2 =4",
    "4 =3",
    "img 3 req 1 3 2 req 1 3 1 img 2 req 1 =2",
    "img 1 =5",
]


@pytest.fixture
def variant(build, reference):
    """`variant(name, family)` -> the model and the plain computation; the variant's own language model by default."""

    def make(name, family=None, **config):
        own, interaction, vision, fields = VARIANTS[name]
        model = build(family or own, interaction, vision, **{**fields, **config})
        return model, reference(model, family or own, vision)

    return make


def prompt_of(rows, padding="right"):
    inputs = inputs_of(rows, padding)
    del inputs["labels"]
    return inputs


def test_what_an_encoder_decoder_has_by_default(build):
    """Variant 2's layout: `<img-q>` stays, as many request vectors as dynamic tokens, read at the last outputs."""
    config = build("t5", "clip_text", "blip2", visual_mapping="qformer").config
    assert config.is_encoder_decoder and config.keep_request_token
    assert (config.num_dynamic_tokens, config.num_request_vectors, config.dynamic_readout) == (5, 5, "last")
    assert config.num_static_tokens == config.num_query_tokens == tiny.NUM_QUERIES
    assert config.fine_grained_source == "qformer" and config.num_fine_grained_tokens is None
    config = build("bart", "clip_text").config
    assert config.fine_grained_source == "global" and config.num_fine_grained_tokens == 5


# --- 1. words untouched --------------------------------------------------------------------------------------------


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention", "none"])
@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_words_untouched(build, folders, family, interaction):
    model = build(family, interaction)
    plain = AutoModelForSeq2SeqLM.from_pretrained(folders.language(family)).eval()
    rows, _ = rows_of(model.config, ["9 =4", "13 =2", "6 =5"])
    inputs = inputs_of(rows, "right")
    with torch.no_grad():
        ours, theirs = model(**inputs), plain(**inputs)
    assert_same(ours.logits, theirs.logits, "logits")
    assert_same(ours.loss, theirs.loss, "loss")
    del inputs["labels"]
    for options in (
        {},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ):
        torch.manual_seed(3)
        expected = plain.generate(**inputs, max_new_tokens=8, **options)
        torch.manual_seed(3)
        assert model.generate(**inputs, max_new_tokens=8, **options).tolist() == expected.tolist(), options
    one = {name: value[:1] for name, value in inputs.items()}
    ours, theirs = Recorder(), Recorder()
    plain.generate(**one, max_new_tokens=6, streamer=theirs)
    model.generate(**one, max_new_tokens=6, streamer=ours)
    assert ours.tokens == theirs.tokens and ours.ended


# --- 2. one meaning ------------------------------------------------------------------------------------------------


def assert_one_meaning(model, plain, padding):
    rows, pictures = rows_of(model.config, MIXED)
    inputs = inputs_of(rows, padding)
    with torch.no_grad():
        out = model(**inputs, pixel_values=pictures)
        for index, (ids, labels, images) in enumerate(rows):
            expected = plain.answer_logits(plain.finish(ids, images).embeds, labels[:-1])
            assert_same(out.logits[index, : len(labels)], expected, f"logits of row {index}")
    assert_gradients(model, plain, rows, padding, {"pixel_values": pictures})


@pytest.mark.parametrize("padding", ["left", "ragged"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_gradients(variant, name, padding):
    assert_one_meaning(*variant(name), padding)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["left", "right", "ragged"])
@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_gradients_of_every_pair(variant, name, family, padding):
    if family != VARIANTS[name][0] or padding == "right":
        assert_one_meaning(*variant(name, family), padding)


def test_loss_over_an_accumulated_batch(variant):
    """`num_items_in_batch` replaces the number of targets, as the Trainer's gradient accumulation asks."""
    model, plain = variant("clip_text")
    rows, pictures = rows_of(model.config, MIXED)
    targets = sum(len(labels) for _, labels, _ in rows)
    with torch.no_grad():
        loss = model(**inputs_of(rows, "right"), pixel_values=pictures, num_items_in_batch=50).loss
        assert_same(loss, plain.loss(rows) * targets / 50, "loss")


def test_ignored_targets(variant):
    """Targets of -100 inside an answer count for nothing, and the decoder reads padding in their place."""
    model, plain = variant("cross_attention")
    ((ids, labels, images),), _ = rows_of(model.config, ["2 img 3 req 1 =6"])
    masked = [-100 if index == 2 else label for index, label in enumerate(labels)]
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([masked]), pixel_values=images).loss
        shown = [label if label != -100 else 0 for label in masked]
        log_p = plain.answer_logits(plain.finish(ids, images).embeds, shown[:-1]).log_softmax(-1)
        expected = -sum(log_p[place, label] for place, label in enumerate(masked) if label != -100) / 5
    assert_same(loss, expected, "loss")


def test_the_decoders_own_words(variant):
    """Logits of given decoder words, and what an encoding made before is good for."""
    model, plain = variant("clip_text-rounds")
    rows, pictures = rows_of(model.config, MIXED)
    inputs = prompt_of(rows, "ragged")
    words = torch.tensor([[2, 17, 33, 5]]).expand(len(rows), -1)
    with torch.no_grad():
        out = model(**inputs, pixel_values=pictures, decoder_input_ids=words)
        for index, (ids, _, images) in enumerate(rows):
            expected = plain.answer_logits(plain.finish(ids, images).embeds, [17, 33, 5])
            assert_same(out.logits[index], expected, f"logits of row {index}")
        meter = Meter(model, first_layer_of(model.language_model.get_encoder()))
        again = model(
            encoder_outputs=(out.encoder_last_hidden_state,),
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=words,
        )
    assert_same(again.logits, out.logits, "logits")
    assert not meter.reads and not meter.pictures and not meter.requests


@pytest.mark.parametrize("padding", ["left", "right", "ragged"])
@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_states_stand_in_their_columns(build, reference, family, padding):
    """The encoder's states and attention come back in the columns of input_ids, wherever padding is."""
    model = build(family, "cross_attention", attn_implementation="eager")
    plain = reference(model, family)
    rows, pictures = rows_of(model.config, MIXED)
    inputs = inputs_of(rows, padding)
    with torch.no_grad():
        out = model(**inputs, pixel_values=pictures, output_hidden_states=True, output_attentions=True)
        for index, (ids, _, images) in enumerate(rows):
            shown = inputs["attention_mask"][index].bool()
            embeds = plain.finish(ids, images).embeds
            expected = plain.language_model.get_encoder()(inputs_embeds=embeds[None], output_hidden_states=True)
            assert_same(out.encoder_last_hidden_state[index][shown], expected.last_hidden_state[0], "last state")
            for ours, theirs in zip(out.encoder_hidden_states, expected.hidden_states, strict=True):
                assert_same(ours[index][shown], theirs[0], "hidden states")
            for weights in out.encoder_attentions:
                assert_same(weights[index][:, shown].sum(-1), torch.ones(4, len(ids)), "attention")
                assert float(weights[index][:, shown][:, :, ~shown].abs().max()) < 1e-6 if not shown.all() else True
    assert len(out.decoder_hidden_states) == len(out.cross_attentions) + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clip_text-first-edition", "clip_text-rounds"])
def test_half_precision(variant, name, dtype):
    """Backbones in half precision, IPN and Q-Former in float32: about the same loss, and gradients that train."""
    whole, _ = variant(name)
    model, _ = variant(name, dtype=dtype)
    assert model.language_model.dtype == model.vision_tower.dtype == dtype and model.ipn.dtype == torch.float32
    rows, pictures = rows_of(model.config, MIXED)
    inputs = inputs_of(rows, "right")
    model.freeze_for_stage("instruct")
    loss = model(**inputs, pixel_values=pictures).loss
    assert abs(float(loss.detach()) - float(whole(**inputs, pixel_values=pictures).loss.detach())) < 0.05
    loss.backward()
    assert float(model.ipn.request_token.grad.abs().max()) > 0
    del inputs["labels"]
    model.generate(**inputs, pixel_values=pictures, max_new_tokens=2)


# --- 2 and 3. generated ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "options"), [("left", {"num_beams": 3}), ("ragged", {})], ids=["beams-left", "greedy-ragged"]
)
@pytest.mark.parametrize("name", VARIANTS)
def test_generated_ids(variant, name, padding, options):
    """In a batch each row gives what it gives alone in the plain computation."""
    model, plain = variant(name)
    rows, pictures = rows_of(model.config, MIXED)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, **options}
    got = model.generate(**prompt_of(rows, padding), pixel_values=pictures, **options)
    expected = [plain.generate(ids, images, **options) for ids, _, images in rows]
    assert len({tuple(ids) for ids in expected}) > 1, "rows that all say the same would hide a mix-up"
    assert got.tolist() == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_order_does_not_matter(variant, options):
    model, _ = variant("clip_text-rounds")
    rows, _ = rows_of(model.config, MIXED)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, **options}

    def generate(chosen, padding="right"):
        pictures = [images for _, _, images in chosen if images is not None]
        pictures = torch.cat(pictures) if pictures else None
        return model.generate(**prompt_of(chosen, padding), pixel_values=pictures, **options).tolist()

    alone = [generate([row])[0] for row in rows]
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3], [1, 2]):
        assert generate([rows[i] for i in order], "ragged") == [alone[i] for i in order], order


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_greedy_written_out(build, reference, family):
    """Without any generate() at all: the likeliest word, again and again, over whole passes."""
    model = build(family, "clip_text")
    plain = reference(model, family)
    ((ids, _, images),), _ = rows_of(model.config, ["2 img 6 req 2"])
    answer = []
    with torch.no_grad():
        embeds = plain.finish(ids, images).embeds
        for _ in range(6):
            logits = plain.answer_logits(embeds, answer)[-1]
            logits[2] = float("-inf")  # no end before the sixth word
            answer.append(int(logits.argmax()))
    # BART's last word is eos, by its own generation settings.
    got = model.generate(input_ids=torch.tensor([ids]), pixel_values=images, max_new_tokens=7, min_new_tokens=7)
    assert got[0, 1:7].tolist() == answer


def test_strategies_with_images(variant):
    """Sampling, sequences returned, static cache, a dictionary and a streamer."""
    model, plain = variant("clip_text")
    ((ids, _, images),), _ = rows_of(model.config, ["2 img 6 req 2"])
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    for options in (
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.7},
    ):
        torch.manual_seed(4)
        expected = plain.generate(ids, images, max_new_tokens=6, **options)
        torch.manual_seed(4)
        got = model.generate(**inputs, pixel_values=images, max_new_tokens=6, **options).tolist()
        assert (got if len(got) > 1 else got[0]) == expected, options
    greedy = plain.generate(ids, images, max_new_tokens=6)
    static = model.generate(**inputs, pixel_values=images, max_new_tokens=6, cache_implementation="static")
    assert static[0].tolist() == greedy
    streamer = Recorder()
    out = model.generate(
        **inputs,
        pixel_values=images,
        max_new_tokens=6,
        streamer=streamer,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert out.sequences[0].tolist() == streamer.tokens == greedy and streamer.ended
    assert len(out.scores) == len(greedy) - 1


@pytest.mark.parametrize(
    "options", [{"encoder_repetition_penalty": 1.8}, {"encoder_no_repeat_ngram_size": 1}], ids=lambda x: next(iter(x))
)
@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_slots_influence_no_processor(variant, family, options):
    """Processors that look at what the encoder has read see the row's words, and nothing for its slots."""
    model, plain = variant("clip_text", family)
    ((ids, _, images),), _ = rows_of(model.config, ["3 img 9 req 2"])
    words = torch.tensor([[token for token in ids if token < tiny.TABLE_ROWS]])
    (value,) = options.values()
    if "encoder_repetition_penalty" in options:
        processor = EncoderRepetitionPenaltyLogitsProcessor(value, words)
    else:
        processor = EncoderNoRepeatNGramLogitsProcessor(value, words)
    out = model.generate(
        input_ids=torch.tensor([ids]),
        pixel_values=images,
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    said = out.sequences[0, 1:].tolist()
    with torch.no_grad():
        logits = plain.answer_logits(plain.finish(ids, images).embeds, said)
    for step, scores in enumerate(out.scores[:-1]):  # BART's last word is eos, whatever the scores
        expected = processor(out.sequences[:, : step + 1], logits[step : step + 1])
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


def test_an_assistant(variant):
    """Another encoder-decoder drafts from the words alone; the answer is the model's."""
    model, plain = variant("clip_text")
    ((ids, _, images),), _ = rows_of(model.config, ["2 img 6 req 2"])
    expected = plain.generate(ids, images, max_new_tokens=6)
    for options in ({"assistant_model": tiny.encoder_decoder("t5", seed=5)}, {"prompt_lookup_num_tokens": 3}):
        got = model.generate(input_ids=torch.tensor([ids]), pixel_values=images, max_new_tokens=6, **options)
        assert got[0].tolist() == expected


def test_pipeline(build, folders):
    """Returns the answer alone, as the decoder says nothing else."""
    model = build("t5", "clip_text", num_dynamic_tokens=2)
    processor = LMEyeProcessor.from_vision_language_pretrained(
        str(folders.vision()), str(folders.language("t5")), num_dynamic_tokens=2
    )
    content = [{"type": "image", "image": tiny.picture(1)}, {"type": "text", "text": "what is it?"}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 6, "min_new_tokens": 4}
    (out,) = pipe(text=[{"role": "user", "content": content}], generate_kwargs=options, return_full_text=False)
    inputs = processor(images=tiny.picture(1), text="what is it?", return_tensors="pt")
    (expected,) = processor.post_process_image_text_to_text(model.generate(**inputs, **options))
    assert out["generated_text"] == expected != ""


# --- perceive ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKING)
def test_perceive(variant, name):
    model, plain = variant(name)
    config = model.config
    rows, pictures = rows_of(config, MIXED)
    with torch.no_grad():
        perception = model.perceive(**prompt_of(rows, "ragged"), pixel_values=pictures)
        finished = [plain.finish(ids, images) for ids, _, images in rows]
    requests = [request for row in finished for request in row.requests]
    assert len(requests) == 5 * config.num_request_rounds
    assert_same(perception.requests, torch.stack(requests), "requests")
    dynamic = torch.stack([tokens for row in finished for tokens in row.dynamic])
    assert_same(perception.dynamic_tokens, dynamic, "dynamic tokens")
    assert perception.request_rows.tolist() == [i for i, row in enumerate(finished) for _ in row.requests]
    attention = [seen for row in finished for seen in row.attention]
    if config.fine_grained_source == "global":
        assert not attention and perception.attention_maps is None
        return
    assert len(attention) == len(requests)
    for index, theirs in enumerate(attention):
        ours = perception.attention_maps[index].flatten(3)
        count = theirs.shape[-1] // ours.shape[-1]
        assert_same(ours[:, :, :count].flatten(2), theirs, f"attention of request {index}")
        assert float(ours[:, :, count:].abs().sum()) == 0.0


# --- 4. frozen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip_text-first-edition", "cross_attention-rounds"])
def test_frozen(variant, name):
    """Two steps of training, with the backbones' own dropout off, move the IPN alone."""
    model, plain = variant(name, fine_grained_dropout=0.0)
    model.train()
    rows, pictures = rows_of(model.config, MIXED)
    inputs = inputs_of(rows, "right")
    with torch.no_grad():
        assert_same(model(**inputs, pixel_values=pictures).loss, plain.loss(rows), "loss while training")
    trained = trained_parameters(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for stage in ("pretrain", "instruct"):
        total = model.freeze_for_stage(stage)
        chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert total == sum(parameter.numel() for parameter in chosen)
        optimizer = torch.optim.SGD(chosen, lr=0.1)
        model(**inputs, pixel_values=pictures).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    still = {f"ipn.{key}" for key in trained if key.endswith("attention.key.bias")}
    assert moved | still == {f"ipn.{key}" for key in trained}


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_gradient_checkpointing(build, family):
    """The same gradients, and less kept for them."""
    model = build(family, "clip_text", fine_grained_dropout=0.0)
    rows, pictures = rows_of(model.config, MIXED)
    inputs = inputs_of(rows, "ragged")
    model.train().freeze_for_stage("instruct")
    trained = [parameter for parameter in trained_parameters(model).values() if parameter.requires_grad]
    expected = torch.autograd.grad(model(**inputs, pixel_values=pictures).loss, trained)
    kept = saved_numbers(lambda: model(**inputs, pixel_values=pictures))
    model.activation_checkpointing_enable()
    got = torch.autograd.grad(model(**inputs, pixel_values=pictures).loss, trained)
    for ours, theirs in zip(got, expected, strict=True):
        assert_same_gradient(ours, theirs, "gradient")
    assert saved_numbers(lambda: model(**inputs, pixel_values=pictures)) < 0.7 * kept


# --- 5. what it costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}], ids=["greedy", "beams", "many"]
)
@pytest.mark.parametrize("name", ["clip_text-first-edition", "clip_text-rounds", "cross_attention-rounds", "none"])
def test_generating_costs(variant, name, options):
    """An encoder pass for each round and one for the answer, once per sample; pictures once."""
    model, _ = variant(name)
    rows, pictures = rows_of(model.config, ["2 img 5 req 3"] * 3)
    meter = Meter(model, first_layer_of(model.language_model.get_encoder()))
    decoder = []
    first_layer_of(model.language_model.get_decoder()).register_forward_pre_hook(
        lambda module, args, kwargs: decoder.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    inputs = prompt_of(rows)
    model.generate(**inputs, pixel_values=pictures, max_new_tokens=4, min_new_tokens=4, **options)
    rounds = 0 if name == "none" else model.config.num_request_rounds
    expanded = 3 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    assert meter.pictures == [3]
    assert meter.queried == ([3] if model.qformer is not None else [])
    assert meter.requests == [3] * rounds
    assert meter.reads == [(3, inputs["input_ids"].shape[1])] * (rounds + 1)
    assert decoder == [(expanded, 1)] * 4


@pytest.mark.parametrize("name", ["clip_text-first-edition", "clip_text-rounds", "none"])
def test_training_costs(variant, name):
    """Turns of one row share a pass; perceiving spares the last one."""
    model, _ = variant(name)
    rows, pictures = rows_of(model.config, ["img 3 req 1 3 2 req 1 =2", "2 img 4 req 1 =3"])
    meter = Meter(model, first_layer_of(model.language_model.get_encoder()))
    model(**inputs_of(rows, "right"), pixel_values=pictures)
    rounds = 0 if name == "none" else model.config.num_request_rounds
    assert len(meter.reads) == rounds + 1 and meter.pictures == [2]
    assert meter.requests == [3] * rounds
    meter.reads.clear()
    model.perceive(**prompt_of(rows), pixel_values=pictures)
    assert len(meter.reads) == rounds


# --- 6. round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_backbones", [True, False], ids=["whole", "ipn"])
@pytest.mark.parametrize("name", ["clip_text-first-edition", "clip_text-rounds"])
def test_round_trip(variant, tmp_path, name, save_backbones):
    model, _ = variant(name)
    model.save_pretrained(tmp_path, save_backbones=save_backbones)
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    rows, pictures = rows_of(model.config, MIXED)
    inputs = inputs_of(rows, "right")
    with torch.no_grad():
        assert torch.equal(
            again(**inputs, pixel_values=pictures).logits, model(**inputs, pixel_values=pictures).logits
        )
    options = {"max_new_tokens": 5, "num_beams": 2}
    expected = model.generate(**prompt_of(rows), pixel_values=pictures, **options)
    assert again.generate(**prompt_of(rows), pixel_values=pictures, **options).tolist() == expected.tolist()


# --- BLIP-2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention"])
@pytest.mark.parametrize("family", ["t5", "opt"])
def test_from_blip2(folders, family, interaction):
    """Variant 2 over either edition: its language model, its Q-Former, its projection as the static mapping."""
    folder, clip = folders.blip2(family), folders.vision()
    fields = {"clip_text_model_name_or_path": str(clip)} if interaction == "clip_text" else tiny.SMALL_STACK
    model = LMEyeForConditionalGeneration.from_blip2_pretrained(str(folder), interaction=interaction, **fields).eval()
    blip2 = Blip2ForConditionalGeneration.from_pretrained(folder)
    table = blip2.get_input_embeddings().weight
    assert torch.equal(model.ipn.visual_mapping.weight, blip2.language_projection.weight)
    assert torch.equal(model.ipn.visual_mapping.bias, blip2.language_projection.bias)
    # `<img>` slots hold the embedding of id 0 and the projection; `<img-q>` and `<img-d>` that and what is learned.
    assert_same(model.ipn.image_token, table[0].expand(tiny.NUM_QUERIES, -1), "image_token")
    assert model.config.keep_request_token == (family == "t5" or interaction == "clip_text")
    std = model.config.slot_init_std
    for name in ("request_token", "dynamic_token"):
        if hasattr(model.ipn, name):
            assert 0.5 * std < float((getattr(model.ipn, name) - table[0]).detach().std()) < 1.5 * std
    if interaction == "clip_text":
        assert (model.config.dynamic_readout, model.config.num_request_vectors) == ("last", 5)
        assert model.config.fine_grained_source == "qformer" and model.config.fine_grained_dropout == 0.0

    tiny.randomise_ipn(model)
    kind = EncoderDecoderReference if family == "t5" else Reference
    plain = kind(folder, folder, model, clip_text=clip)
    rows, pictures = rows_of(model.config, MIXED)
    assert_gradients(model, plain, rows, "ragged", {"pixel_values": pictures})
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3}
    got = model.generate(**prompt_of(rows, "left"), pixel_values=pictures, **options)[:, -5:]
    expected = [plain.generate(ids, images, **options)[-5:] for ids, _, images in rows]
    assert got.tolist() == expected


# --- errors --------------------------------------------------------------------------------------------------------


def test_slots_that_do_not_fit(build):
    """Each `<img-q>` is followed by its `<img-d>`; the sample is named."""
    model = build("t5", "clip_text", num_dynamic_tokens=2)
    image, asks, fills = model.config.image_token_id, model.config.request_token_id, model.config.dynamic_token_id
    good = [image, 5, asks, fills, fills]
    for bad in (
        [image, 5, fills, fills, 7],
        [image, 5, asks, 7, 8],
        [image, fills, fills, asks, 8],
        [image, asks, asks, fills, fills],
        [image, asks, fills, 7, 8],
    ):
        with pytest.raises(ValueError, match=r"Sample 1 has .*slots"):
            model(input_ids=torch.tensor([good, bad]), pixel_values=tiny.pixels(2), labels=torch.tensor([[5], [6]]))
    with pytest.raises(ValueError, match="Sample 0 asks a request where no image stands before it"):
        model(
            input_ids=torch.tensor([[asks, fills, fills, image]]),
            pixel_values=tiny.pixels(1),
            labels=torch.tensor([[5]]),
        )


def test_a_request_token_that_cannot_be_dropped(folders):
    with pytest.raises(StrictDataclassError, match=r"reads its request at `<img-q>`.*keep_request_token=False"):
        LMEyeForConditionalGeneration.from_vision_language_pretrained(
            str(folders.vision()), str(folders.language("t5")), keep_request_token=False
        )
