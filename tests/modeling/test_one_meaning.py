"""Promise 2: forward and generate are the plain two full passes of method.md, gradients included."""

import pytest
import tiny
import torch


LAYOUTS = {
    "one_turn": "3 img 4 req 2 =4",
    "three_turns": "img 3 req 1 =3 2 req 1 =3 1 img 2 req 1 =2",
    "several_images": "2 img 1 img 3 req 2 =3",
    "spaced_slots": "2 img 3 req~ 2 =3",
    "request_first_and_last": "img req =2 1 req",
    "requests_in_a_row": "2 img req req 1 =2",
    "no_request": "2 img 4 =3",
}
PROMPTS = {
    "one_turn": "3 img 9 req 2",
    "three_turns": "img 3 req 1 3 2 req 1 3 1 img 2 req 1",
    "ends_in_request": "img 5 req",
}
# Rows of unlike lengths, turns and pictures, one of plain words. The first has more pictures than the second, whose
# request must not see the first's.
MIXED = [
    "1 img 1 img 2 req~ 1 =6 3",
    "2 img 6 req 2 =4",
    "4 =3",
    "img 3 req 1 =3 2 req 1 =3 1 img 2 req 1 =2",
    "img 1 =2",
]
MIXED_PROMPTS = [
    "1 img 1 img 2 req~ 1",
    "2 img 6 req 2",
    "7",
    "img 3 req 1 3 2 req 1 3 1 img 2 req 1",
    "img 3",
]
STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.1, "top_k": 30},
}
INTERACTIONS = ["clip_text", "cross_attention", "none"]


def without_requests(layout: str) -> str:
    return " ".join(part for part in layout.split() if not part.startswith("req"))


def rows_of(model, layouts, seed=0):
    """(ids, labels, pictures) of each layout, and all pictures in order."""
    if model.config.interaction == "none":
        layouts = [without_requests(layout) for layout in layouts]
    counts = [layout.split().count("img") for layout in layouts]
    pictures = tiny.pixels(sum(counts))
    rows = []
    for index, (layout, part) in enumerate(zip(layouts, pictures.split(counts), strict=True)):
        ids, labels = tiny.row(model.config, layout, seed + index)
        rows.append((ids, labels, part if len(part) else None))
    return rows, pictures


def assert_same(got: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal to 1e-5 of the largest expected value."""
    scale = max(1.0, float(expected.abs().max()))
    worst = float((got - expected).abs().max())
    assert got.shape == expected.shape and worst <= 1e-5 * scale, f"{what}: {worst:.1e} apart at scale {scale:.1f}"


def assert_logits(model, plain, rows, pictures, padding):
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], padding)
    with torch.no_grad():
        out = model(**inputs, pixel_values=pictures)
        for index, (ids, _, images) in enumerate(rows):
            expected = plain.logits(plain.finish(ids, images).embeds)
            assert_same(out.logits[index][inputs["attention_mask"][index].bool()], expected, f"row {index}")
        assert_same(out.loss, plain.loss(rows), "loss")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_of_one_row(build, reference, family, interaction, layout):
    model = build(family, interaction)
    rows, pictures = rows_of(model, [LAYOUTS[layout]])
    assert_logits(model, reference(model, family), rows, pictures, "left")


@pytest.mark.parametrize("padding", ["left", "right", "ragged"])
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_gradients_of_a_mixed_batch(build, reference, family, interaction, padding):
    model = build(family, interaction)
    plain = reference(model, family)
    rows, pictures = rows_of(model, MIXED)
    assert_logits(model, plain, rows, pictures, padding)

    trained = {
        name: parameter
        for name, parameter in model.ipn.named_parameters()
        if not (interaction == "clip_text" and name.startswith("interaction."))
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    expected = torch.autograd.grad(plain.loss(rows), list(trained.values()))
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], padding)
    got = torch.autograd.grad(model(**inputs, pixel_values=pictures).loss, list(trained.values()))
    for name, ours, theirs in zip(trained, got, expected, strict=True):
        assert float(theirs.abs().max()) > 0, f"{name} has no part in the loss: the test would pass on anything"
        assert_same(ours, theirs, name)
    # Each stage takes a way of its own: in stage 2 nothing before the first request has a gradient.
    for stage in ("pretrain",) if interaction == "none" else ("pretrain", "instruct"):
        model.freeze_for_stage(stage)
        chosen = [index for index, parameter in enumerate(trained.values()) if parameter.requires_grad]
        loss = model(**inputs, pixel_values=pictures).loss
        parameters, names = list(trained.values()), list(trained)
        got = torch.autograd.grad(loss, [parameters[index] for index in chosen])
        for index, ours in zip(chosen, got, strict=True):
            assert_same(ours, expected[index], f"{names[index]} in stage {stage}")


@pytest.mark.parametrize(
    "layouts", [["img 3 =2", "2 img 1 img =3"], ["img 2 req =3", "img 9 req =1"]], ids=["images", "requests"]
)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mpt", "gpt2"])
def test_batches_of_one_kind(build, reference, family, padding, layouts):
    """Every row with images and no request; every row with one request, last or far behind."""
    model = build(family, "cross_attention")
    rows, pictures = rows_of(model, layouts)
    assert_logits(model, reference(model, family), rows, pictures, padding)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generated_ids_of_one_row(build, reference, family, prompt, strategy):
    interaction = "cross_attention" if prompt == "ends_in_request" else "clip_text"
    model = build(family, interaction)
    ((ids, _, images),), _ = rows_of(model, [PROMPTS[prompt]])
    options = dict(STRATEGIES[strategy], max_new_tokens=8)
    torch.manual_seed(1)
    expected = reference(model, family).generate(ids, images, **options)
    torch.manual_seed(1)
    got = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=images,
        **options,
    )
    assert got[0].tolist() == ids + expected


@pytest.mark.parametrize("padding", ["left", "right", "ragged"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generated_ids_of_a_mixed_batch(build, reference, family, strategy, padding):
    model = build(family, "cross_attention" if padding == "ragged" else "clip_text")
    rows, pictures = rows_of(model, MIXED_PROMPTS)
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], padding)
    del inputs["labels"]
    options = dict(STRATEGIES[strategy], max_new_tokens=6)
    torch.manual_seed(1)
    expected = reference(model, family).generate_batch([(ids, images) for ids, _, images in rows], **options)
    torch.manual_seed(1)
    got = model.generate(**inputs, pixel_values=pictures, **options)
    width = inputs["input_ids"].shape[1]
    assert got[:, :width].tolist() == inputs["input_ids"].tolist()
    assert got[:, width:].tolist() == expected


@pytest.mark.parametrize(
    ("interaction", "config"),
    [
        ("clip_text", {"num_dynamic_tokens": 1}),
        ("clip_text", {"num_dynamic_tokens": 3, "num_static_tokens": 2}),
        ("clip_text", {"num_fine_grained_tokens": 3}),
        ("clip_text", {"use_request": False}),
        ("clip_text", {"visual_mapping": "resampler", "num_static_tokens": 4}),
        ("cross_attention", {"fine_grained_source": "global"}),
        ("cross_attention", {"num_request_vectors": 7, "num_dynamic_tokens": 3}),
        ("cross_attention", {"use_request": False}),
        ("cross_attention", {"vision_feature_layer": -1}),
        ("cross_attention", {"interaction_num_heads": 4, "interaction_num_layers": 1, "num_static_tokens": 3}),
        ("none", {"num_static_tokens": 6}),
        ("none", {"visual_mapping": "resampler", "num_static_tokens": 6}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value,
)
def test_every_option(build, reference, interaction, config):
    model = build("llama", interaction, **config)
    for name, value in config.items():
        assert getattr(model.config, name) == value
    plain = reference(model)
    rows, pictures = rows_of(model, MIXED)
    assert_logits(model, plain, rows, pictures, "right")
    trained = {
        name: parameter
        for name, parameter in model.ipn.named_parameters()
        if not (interaction == "clip_text" and name.startswith("interaction."))
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    expected = torch.autograd.grad(plain.loss(rows), list(trained.values()), allow_unused=True)
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], "right")
    loss = model(**inputs, pixel_values=pictures).loss
    got = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for name, ours, theirs in zip(trained, got, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert_same(ours, theirs, name)


@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention"])
def test_perceive(build, reference, interaction):
    """Requests, dynamic tokens and where the requests looked."""
    model = build("llama", interaction)
    plain = reference(model)
    rows, pictures = rows_of(model, MIXED)
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], "left")
    del inputs["labels"]
    with torch.no_grad():
        perception = model.perceive(**inputs, pixel_values=pictures)
        finished = [plain.finish(ids, images) for ids, _, images in rows]
    requests = torch.stack([request for row in finished for request in row.requests])
    dynamic = torch.stack([tokens for row in finished for tokens in row.dynamic])
    assert_same(perception.requests, requests, "requests")
    assert_same(perception.dynamic_tokens, dynamic, "dynamic tokens")
    assert perception.request_rows.tolist() == [i for i, row in enumerate(finished) for _ in row.requests]
    assert [sum(image >= 0 for image in images) for images in perception.request_images.tolist()] == [2, 1, 1, 1, 2]
    expected = [seen for row in finished for seen in row.attention]
    if interaction == "clip_text":
        assert not expected and perception.attention_maps is None
        return
    for index, theirs in enumerate(expected):  # [layers, request vectors, images x patches]
        images = theirs.shape[-1] // tiny.NUM_PATCHES
        assert perception.attention_maps.shape[-2:] == (4, 4)
        ours = perception.attention_maps[index].flatten(3)  # [layers, request vectors, images at most, patches]
        assert_same(ours[:, :, :images].flatten(2), theirs, f"attention of request {index}")
        assert float(ours[:, :, images:].abs().sum()) == 0.0


def test_features_computed_beforehand(build, reference):
    """Frozen features can be kept from an earlier pass instead of the pictures."""
    model = build("opt", "cross_attention")
    plain = reference(model, "opt")
    rows, pictures = rows_of(model, MIXED)
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], "right")
    with torch.no_grad():
        features = model.get_image_features(pictures)
        out = model(**inputs, image_features=features)
        assert_same(out.loss, plain.loss(rows), "loss")


def test_slots_are_no_targets(build, reference):
    """Labels that copy the prompt, slots included, count its words alone."""
    model = build()
    rows, pictures = rows_of(model, MIXED)
    slots = (model.config.image_token_id, model.config.dynamic_token_id)
    words = [(ids, [-100 if token in slots else token for token in ids], images) for ids, _, images in rows]
    inputs = tiny.batch([(ids, ids) for ids, _, _ in rows], "right")
    inputs["labels"][inputs["attention_mask"] == 0] = -100
    with torch.no_grad():
        assert_same(model(**inputs, pixel_values=pictures).loss, reference(model).loss(words), "loss")


def test_loss_over_an_accumulated_batch(build, reference):
    """`num_items_in_batch` replaces the number of targets, as the Trainer's gradient accumulation asks."""
    model = build()
    rows, pictures = rows_of(model, MIXED)
    targets = sum(label != -100 for _, labels, _ in rows for label in labels)
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], "left")
    with torch.no_grad():
        loss = model(**inputs, pixel_values=pictures, num_items_in_batch=50).loss
        assert_same(loss, reference(model).loss(rows) * targets / 50, "loss")


def test_published_clip_configurations(folders, reference):
    """OpenAI's configs say bos 0 and eos 2; the tokens meant are the last two of the table."""
    from transformers_lmeye import LMEyeForConditionalGeneration

    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folders.vision(legacy_token_ids=True)), str(folders.language()), interaction="clip_text"
    ).eval()
    tiny.randomise_ipn(model)
    rows, pictures = rows_of(model, [LAYOUTS["one_turn"]])
    assert_logits(model, reference(model), rows, pictures, "left")


def test_dropout_on_fine_grained_tokens_alone(build, reference):
    """While training, h_f is dropped out at 0.5 and nothing else is: without it, training and evaluation agree."""
    rows, pictures = rows_of(build(), MIXED)
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], "left")
    losses = set()
    model = build("opt").train()  # OPT has dropout of its own, which must stay off
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            losses.add(float(model(**inputs, pixel_values=pictures).loss))
        assert len(losses) == 3
        model = build("opt", fine_grained_dropout=0.0).train()
        assert_same(model(**inputs, pixel_values=pictures).loss, reference(model, "opt").loss(rows), "loss")


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}], ids=lambda x: next(iter(x))
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_slots_influence_no_processor(build, reference, family, options):
    """Penalties see the row's words and what was generated, and no slot."""
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    model = build(family)
    ((ids, _, images),), _ = rows_of(model, ["3 img 9 req 2 6 req~ 3"])
    (value,) = options.values()
    kind = RepetitionPenaltyLogitsProcessor if "repetition_penalty" in options else NoRepeatNGramLogitsProcessor
    plain = reference(model, family)
    expected = plain.greedy(ids, images, 20, LogitsProcessorList([kind(value)]))
    assert expected != plain.greedy(ids, images, 20, LogitsProcessorList()), "the processor has to matter here"
    got = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=images,
        max_new_tokens=20,
        eos_token_id=-1,
        **options,
    )
    assert got[0].tolist() == ids + expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_processors_and_criteria_see_words_alone(build, options):
    from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

    seen: list[list[list[int]]] = []

    class Listener(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.tolist())
            return scores

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids.tolist())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = build()
    rows, pictures = rows_of(model, ["2 img 6 req 2", "img 3 req 1 3 2 req 1"])
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], "left")
    del inputs["labels"]
    out = model.generate(
        **inputs,
        pixel_values=pictures,
        max_new_tokens=5,
        min_new_tokens=5,
        logits_processor=LogitsProcessorList([Listener()]),
        stopping_criteria=StoppingCriteriaList([Criterion()]),
        **options,
    )
    slots = {model.config.image_token_id, model.config.dynamic_token_id}
    words = [[token for token in ids if token not in slots] for ids, _, _ in rows]
    width = max(map(len, words))
    beams = options.get("num_beams", 1)
    padded = [[0] * (width - len(row)) + row for row in words]
    assert len(seen) >= 2 * 5 - 1
    for ids in seen:  # beam search shows criteria its candidates, which are more than the beams
        each = len(ids) // len(padded)
        assert [row[:width] for row in ids] == [row for row in padded for _ in range(each)]
        assert all(token < tiny.TABLE_ROWS for row in ids for token in row)
    if beams == 1:
        assert [row[width:] for row in seen[-1]] == out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "limit", [{"max_length": 20}, {"max_new_tokens": 4}, {"min_length": 22, "max_length": 24}], ids=str
)
def test_lengths_count_slots(build, reference, limit):
    """max_length and min_length are lengths of what is returned, as everywhere in Transformers."""
    model = build()
    ((ids, _, images),), _ = rows_of(model, ["2 img 6 req 2"])
    eos = reference(model).generate(ids, images, max_new_tokens=3)[2] if "min_length" in limit else -1
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=images,
        eos_token_id=eos,
        pad_token_id=0,
        **limit,
    )
    longest = limit.get("max_length", len(ids) + limit.get("max_new_tokens", 0))
    assert limit.get("min_length", longest) <= out.shape[1] <= longest
    assert eos not in out[0, len(ids) : limit.get("min_length", 0)].tolist()


def speculative(family: str) -> dict:
    return {
        "assistant": {"assistant_model": tiny.language_model(family, seed=5)},
        "same_assistant": {"assistant_model": tiny.language_model(family)},
        "prompt_lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    }


@pytest.mark.parametrize("strategy", ["assistant", "same_assistant", "prompt_lookup"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_speculation_gives_the_greedy_ids(build, reference, family, strategy):
    model = build(family, "cross_attention")
    ((ids, _, images),), _ = rows_of(model, ["img 3 req 1 3 2 req 8 1 img 2 req~ 6"])
    got = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=images,
        max_new_tokens=12,
        **speculative(family)[strategy],
    )
    assert got[0].tolist() == ids + reference(model, family).generate(ids, images, max_new_tokens=12)


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"use_cache": False},
        {"min_new_tokens": 8},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize("family", ["llama", "mpt", "gemma2", "gpt2"])
def test_every_strategy(build, reference, family, options):
    model = build(family)
    rows, pictures = rows_of(model, MIXED_PROMPTS)
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], "left")
    del inputs["labels"]
    torch.manual_seed(1)
    expected = reference(model, family).generate_batch(
        [(ids, images) for ids, _, images in rows], max_new_tokens=8, **options
    )
    torch.manual_seed(1)
    got = model.generate(**inputs, pixel_values=pictures, max_new_tokens=8, **options)
    assert got[:, inputs["input_ids"].shape[1] :].tolist() == expected
    assert int(got[:, inputs["input_ids"].shape[1] :].max()) < tiny.TABLE_ROWS


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_ways_to_call_generate(build, reference):
    """A GenerationConfig, positional ids, no mask, no limit: all that plain models take."""
    from transformers import GenerationConfig

    model = build()
    ((ids, _, images),), _ = rows_of(model, ["2 img 6 req 2"])
    plain, prompt = reference(model), torch.tensor([ids])
    expected = plain.generate(ids, images, num_beams=3, max_new_tokens=6)
    config = GenerationConfig(num_beams=3, max_new_tokens=6, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    before = config.to_dict()
    assert model.generate(prompt, generation_config=config, pixel_values=images)[0].tolist() == ids + expected
    assert config.to_dict() == before, "the caller's configuration was changed"
    assert model.generate(prompt, config, pixel_values=images)[0].tolist() == ids + expected
    config = GenerationConfig(max_new_tokens=6, num_beams=1, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    got = model.generate(inputs=prompt, pixel_values=images, generation_config=config, num_beams=3)
    assert got[0].tolist() == ids + expected
    with torch.inference_mode():
        got = model.generate(input_ids=prompt, pixel_values=images, num_beams=3, max_new_tokens=6)
    assert got[0].tolist() == ids + expected
    text = torch.randint(tiny.FIRST_WORD, tiny.TABLE_ROWS, (1, len(ids)))
    default = model.generate(input_ids=text, attention_mask=torch.ones_like(text), eos_token_id=-1).shape
    got = model.generate(
        input_ids=prompt, pixel_values=images, attention_mask=torch.ones_like(prompt), eos_token_id=-1
    )
    assert got.shape == default, "the default limit is another with images than without"


def test_tuples(build):
    model = build()
    rows, pictures = rows_of(model, MIXED)
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], "left")
    with torch.no_grad():
        named = model(**inputs, pixel_values=pictures)
        loss, logits, *_ = model(**inputs, pixel_values=pictures, return_dict=False)
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits)


def test_slots_are_never_generated(build):
    model = build()
    rows, pictures = rows_of(model, MIXED_PROMPTS)
    inputs = tiny.batch([(ids, labels) for ids, labels, _ in rows], "left")
    config = model.config
    assert min(config.image_token_id, config.request_token_id, config.dynamic_token_id) >= tiny.TABLE_ROWS
    assert len({config.image_token_id, config.request_token_id, config.dynamic_token_id}) == 3
    with torch.no_grad():
        assert model(**inputs, pixel_values=pictures).logits.shape[-1] == tiny.TABLE_ROWS
    assert model.get_input_embeddings().weight.shape[0] == tiny.TABLE_ROWS
    assert model.get_output_embeddings().weight.shape[0] == tiny.TABLE_ROWS
