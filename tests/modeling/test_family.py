"""Promises 1 to 6 for every variant around causal models; `reference.py` is the plain computation of each."""

import itertools

import pytest
import tiny
import torch
from comparison import (
    Meter,
    assert_gradients,
    assert_same,
    assert_same_gradient,
    inputs_of,
    rows_of,
    saved_numbers,
    trained_parameters,
)
from reference import Picture
from transformers import AutoModelForCausalLM

from transformers_lmeye import LMEyeForConditionalGeneration
from transformers_lmeye.modeling.towers import ImageFeatures


# Language model, interaction, vision checkpoint, fields of the configuration. Language models differ in how they count
# positions: rotary, ALiBi, learned, sliding windows.
VARIANTS = {
    "clip_text-patch": ("mpt", "clip_text", "clip", {"fine_grained_source": "patch"}),
    "clip_text-patch-pooled": (
        "llama",
        "clip_text",
        "clip",
        {"fine_grained_source": "patch", "num_fine_grained_tokens": 4},
    ),
    "clip_text-patch-pooled-last": (
        "gemma2",
        "clip_text",
        "clip",
        {
            "fine_grained_source": "patch",
            "num_fine_grained_tokens": 4,
            "dynamic_readout": "last",
            "num_dynamic_tokens": 3,
        },
    ),
    "clip_text-global-last": (
        "opt_projected",
        "clip_text",
        "clip",
        {"dynamic_readout": "last", "num_dynamic_tokens": 4, "num_request_vectors": 6},
    ),
    "clip_text-global-last-fewer-vectors": (
        "llama",
        "clip_text",
        "clip",
        {"dynamic_readout": "last", "num_dynamic_tokens": 4, "num_request_vectors": 3},
    ),
    "clip_text-vectors": ("gpt2", "clip_text", "clip", {"num_request_vectors": 3, "num_dynamic_tokens": 2}),
    "clip_text-qformer": (
        "opt",
        "clip_text",
        "blip2",
        {"visual_mapping": "qformer", "fine_grained_source": "qformer"},
    ),
    "clip_text-qformer-pooled": (
        "bloom",
        "clip_text",
        "blip2",
        {"fine_grained_source": "qformer", "num_fine_grained_tokens": 3, "dynamic_readout": "last"},
    ),
    "clip_text-kept": ("llama", "clip_text", "clip", {"keep_request_token": True, "num_dynamic_tokens": 3}),
    "clip_text-rounds": ("gpt2", "clip_text", "clip", {"num_request_rounds": 2, "num_dynamic_tokens": 3}),
    "clip_text-kept-rounds": (
        "mpt",
        "clip_text",
        "clip",
        {"keep_request_token": True, "num_request_rounds": 3, "num_dynamic_tokens": 2},
    ),
    # What the authors released for a ChatGLM: the layout of their encoder-decoder around a decoder.
    "clip_text-first-edition": (
        "gpt_neox",
        "clip_text",
        "blip2",
        {
            "visual_mapping": "qformer",
            "fine_grained_source": "qformer",
            "keep_request_token": True,
            "dynamic_readout": "last",
        },
    ),
    "cross_attention-global": ("qwen3", "cross_attention", "clip", {"fine_grained_source": "global"}),
    "cross_attention-qformer": ("llama", "cross_attention", "blip2", {"fine_grained_source": "qformer"}),
    "cross_attention-static-qformer": (
        "gemma2",
        "cross_attention",
        "blip2",
        {"visual_mapping": "qformer", "num_dynamic_tokens": 3, "num_request_vectors": 4},
    ),
    "cross_attention-kept": ("gpt2", "cross_attention", "clip", {"keep_request_token": True}),
    "cross_attention-rounds": (
        "gemma2",
        "cross_attention",
        "clip",
        {"num_request_rounds": 3, "num_dynamic_tokens": 2},
    ),
    "cross_attention-kept-rounds": (
        "opt",
        "cross_attention",
        "clip",
        {"keep_request_token": True, "num_request_rounds": 2, "num_dynamic_tokens": 3},
    ),
    "cross_attention-static-patches": (
        "gpt2",
        "cross_attention",
        "clip",
        {"visual_mapping": "patch", "num_static_tokens": 6, "num_dynamic_tokens": 2},
    ),
    "none-patches": ("llama", "none", "clip", {"visual_mapping": "patch"}),
    "none-qformer": ("cohere", "none", "blip2", {"visual_mapping": "qformer"}),
}
ASKING = [name for name in VARIANTS if not name.startswith("none")]
# Rows of unlike lengths, turns and pictures, one of plain words. The first has more pictures than the second, whose
# request must not see the first's.
MIXED = [
    "1 img 1 img 2 req~ 1 =6 3",
    "2 img 6 req 2 =4",
    "4 =3",
    "img 3 req 1 =3 2 req 1 =3 1 img 2 req 1 =2",
    "img 1 =2",
]
PROMPTS = ["1 img 1 img 2 req~ 1", "2 img 6 req 2", "7", "img 3 req 1 3 2 req 1 3 1 img 2 req 1", "img 5 req"]


def layouts_for(name, layouts):
    """Sixteen patches of two pictures do not fit the tiny text encoder's positions: one picture a row there."""
    if name != "clip_text-patch":
        return layouts
    parts = [layout.partition("img") for layout in layouts]
    return [before + image + behind.replace("img", "2") for before, image, behind in parts]


@pytest.fixture
def variant(build, reference):
    """`variant(name, family)` -> the model and the plain computation; the variant's own language model by default."""

    def make(name, family=None, **config):
        own, interaction, vision, fields = VARIANTS[name]
        model = build(family or own, interaction, vision, **{**fields, **config})
        return model, reference(model, family or own, vision)

    return make


# --- 1. words untouched --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["clip_text-first-edition", "clip_text-rounds", "cross_attention-static-qformer", "none-qformer"]
)
def test_words_untouched(variant, folders, name):
    model, _ = variant(name)
    plain = AutoModelForCausalLM.from_pretrained(folders.language(VARIANTS[name][0])).eval()
    rows, _ = rows_of(model.config, ["=9", "=13", "=6"])
    inputs = inputs_of(rows, "left")
    words = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert_same(model(**inputs).logits[words], plain(**inputs).logits[words], "logits")
        assert_same(model(**inputs).loss, plain(**inputs).loss, "loss")
    del inputs["labels"]
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20}):
        torch.manual_seed(3)
        expected = plain.generate(**inputs, max_new_tokens=6, **options)
        torch.manual_seed(3)
        assert model.generate(**inputs, max_new_tokens=6, **options).tolist() == expected.tolist()


# --- 2. one meaning ------------------------------------------------------------------------------------------------


def assert_one_meaning(model, plain, layouts, padding):
    rows, pictures = rows_of(model.config, layouts)
    inputs = inputs_of(rows, padding)
    with torch.no_grad():
        out = model(**inputs, pixel_values=pictures)
        for index, (ids, _, images) in enumerate(rows):
            expected = plain.logits(plain.finish(ids, images).embeds)
            assert_same(out.logits[index][inputs["attention_mask"][index].bool()], expected, f"logits of row {index}")
    assert_gradients(model, plain, rows, padding, {"pixel_values": pictures})


@pytest.mark.parametrize("padding", ["left", "ragged"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_gradients(variant, name, padding):
    assert_one_meaning(*variant(name), layouts_for(name, MIXED), padding)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["left", "right", "ragged"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_gradients_of_every_pair(variant, name, family, padding):
    if family != VARIANTS[name][0] or padding == "right":
        assert_one_meaning(*variant(name, family), layouts_for(name, MIXED), padding)


@pytest.mark.parametrize("layout", ["img req =2 1 req", "2 img req req 1 =2", "img 9 req =3"])
@pytest.mark.parametrize("name", ["clip_text-kept-rounds", "cross_attention-rounds"])
def test_requests_at_the_ends(variant, name, layout):
    """A request right behind the picture, two in a row, one at the very end."""
    assert_one_meaning(*variant(name), [layout], "left")


@pytest.mark.parametrize("name", ["clip_text-kept", "clip_text-first-edition", "cross_attention-rounds"])
def test_hidden_states_are_the_final_sequences(variant, name):
    model, plain = variant(name)
    rows, pictures = rows_of(model.config, MIXED)
    inputs = inputs_of(rows, "ragged")
    with torch.no_grad():
        out = model(**inputs, pixel_values=pictures, output_hidden_states=True)
        for index, (ids, _, images) in enumerate(rows):
            embeds = plain.finish(ids, images).embeds
            expected = plain.language_model(inputs_embeds=embeds[None], output_hidden_states=True).hidden_states
            shown = inputs["attention_mask"][index].bool()
            for ours, theirs in zip(out.hidden_states, expected, strict=True):
                assert_same(ours[index][shown], theirs[0], f"hidden states of row {index}")


@pytest.mark.parametrize("padding", ["left", "ragged"])
@pytest.mark.parametrize("name", ["clip_text-kept-rounds", "cross_attention-rounds"])
def test_logits_to_keep(variant, name, padding):
    """The last positions, whichever segments they lie in; with gradients the first segment is read in two."""
    model, _ = variant(name)
    model.freeze_for_stage("instruct")
    rows, pictures = rows_of(model.config, ["img 3 req 2 req 3", "1 img 4 req 1 req 2"])
    inputs = inputs_of(rows, padding)
    del inputs["labels"]
    words = inputs["attention_mask"].bool()
    width = words.shape[1]
    whole = model(**inputs, pixel_values=pictures).logits
    for keep in (1, 4, 9, width - 4, width):
        with torch.no_grad():
            got = model(**inputs, pixel_values=pictures, logits_to_keep=keep).logits
        assert got.shape[1] == keep
        assert_same(got[words[:, -keep:]], whole[:, -keep:][words[:, -keep:]], f"the last {keep}")
        with_graph = model(**inputs, pixel_values=pictures, logits_to_keep=keep).logits
        assert_same(with_graph[words[:, -keep:]], got[words[:, -keep:]], f"the last {keep}, with gradients")


@pytest.mark.parametrize("name", ["clip_text-patch-pooled", "clip_text-first-edition"])
def test_gradient_checkpointing(variant, name):
    """The same gradients, and less kept for them, where a request keeps its slot too."""
    model, _ = variant(name, fine_grained_dropout=0.0)
    rows, pictures = rows_of(model.config, MIXED)
    inputs = inputs_of(rows, "right")
    model.train().freeze_for_stage("instruct")
    trained = [parameter for parameter in trained_parameters(model).values() if parameter.requires_grad]
    expected = torch.autograd.grad(model(**inputs, pixel_values=pictures).loss, trained)
    kept = saved_numbers(lambda: model(**inputs, pixel_values=pictures))
    model.activation_checkpointing_enable()
    for ours, theirs in zip(
        torch.autograd.grad(model(**inputs, pixel_values=pictures).loss, trained), expected, strict=True
    ):
        assert_same_gradient(ours, theirs, "gradient")
    assert saved_numbers(lambda: model(**inputs, pixel_values=pictures)) < 0.7 * kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clip_text-first-edition", "cross_attention-kept-rounds"])
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


# --- 2 and 3. generated ids: those of the plain computation, which reads one row at a time --------------------------


@pytest.mark.parametrize(
    ("padding", "options"), [("left", {"num_beams": 3}), ("ragged", {})], ids=["beams-left", "greedy-ragged"]
)
@pytest.mark.parametrize("name", VARIANTS)
def test_generated_ids(variant, name, padding, options):
    model, plain = variant(name)
    rows, pictures = rows_of(model.config, layouts_for(name, PROMPTS))
    inputs = inputs_of(rows, padding)
    del inputs["labels"]
    got = model.generate(**inputs, pixel_values=pictures, max_new_tokens=5, min_new_tokens=5, **options)
    width = inputs["input_ids"].shape[1]
    assert got[:, :width].tolist() == inputs["input_ids"].tolist()
    expected = [plain.generate(ids, images, max_new_tokens=5, min_new_tokens=5, **options) for ids, _, images in rows]
    assert len({tuple(ids) for ids in expected}) > 1, "rows that all say the same would hide a mix-up"
    assert got[:, width:].tolist() == expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["clip_text-kept-rounds", "clip_text-qformer", "cross_attention-rounds"])
def test_order_does_not_matter(variant, name, options):
    model, _ = variant(name)
    rows, _ = rows_of(model.config, PROMPTS[:4])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, **options}

    def generate(chosen, padding="left"):
        inputs = inputs_of(chosen, padding)
        del inputs["labels"]
        pictures = [images for _, _, images in chosen if images is not None]
        got = model.generate(**inputs, pixel_values=torch.cat(pictures) if pictures else None, **options)
        return got[:, inputs["input_ids"].shape[1] :].tolist()

    alone = [generate([row])[0] for row in rows]
    for order in list(itertools.permutations(range(len(rows))))[1::7]:
        assert generate([rows[i] for i in order], "ragged") == [alone[i] for i in order], order


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"repetition_penalty": 1.7}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("name", ["clip_text-first-edition", "cross_attention-kept-rounds"])
def test_kept_slots_influence_no_strategy(variant, name, options):
    """`<img-q>` is a slot: no cache, lookup or penalty counts it as a word."""
    from transformers.generation.logits_process import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    model, plain = variant(name)
    ((ids, _, images),), _ = rows_of(model.config, ["3 img 9 req 2 6 req~ 3"])
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty=options["repetition_penalty"]))
    expected = plain.greedy(ids, images, 6, processors)
    got = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=images,
        max_new_tokens=6,
        min_new_tokens=6,
        **options,
    )
    assert got[0].tolist() == ids + expected


@pytest.mark.parametrize("name", ["clip_text-kept", "clip_text-rounds", "cross_attention-kept-rounds"])
def test_a_conversation_goes_on(variant, name):
    """A second turn behind the first one's cache answers as if everything were read anew."""
    model, plain = variant(name)
    (row, more), pictures = rows_of(model.config, ["2 img 3 req 2", "3 req 2".replace("3 req", "img 3 req")])
    first = torch.tensor([row[0]])
    out = model.generate(
        input_ids=first,
        attention_mask=torch.ones_like(first),
        pixel_values=pictures[:1],
        max_new_tokens=4,
        min_new_tokens=4,
        return_dict_in_generate=True,
    )
    whole = torch.cat([out.sequences, torch.tensor([more[0]])], dim=1)
    got = model.generate(
        input_ids=whole,
        attention_mask=torch.ones_like(whole),
        pixel_values=pictures,
        past_key_values=out.past_key_values,
        max_new_tokens=4,
        min_new_tokens=4,
    )
    expected = plain.generate(whole[0].tolist(), pictures, max_new_tokens=4, min_new_tokens=4)
    assert got[0].tolist() == whole[0].tolist() + expected


# --- perceive ------------------------------------------------------------------------------------------------------


def grid_of(config):
    """Rows and columns in which attention is shown, by the variant's sizes; `None` where there is none."""
    if config.fine_grained_source == "global":
        return (1, 1) if config.interaction == "cross_attention" else None
    if config.fine_grained_source == "qformer":
        pooled = config.num_fine_grained_tokens if config.interaction == "clip_text" else None
        return 1, pooled or tiny.NUM_QUERIES
    return (2, 2) if config.num_fine_grained_tokens == 4 else (4, 4)


@pytest.mark.parametrize("name", ASKING)
def test_perceive(variant, name):
    model, plain = variant(name)
    config = model.config
    rows, pictures = rows_of(config, layouts_for(name, MIXED))
    inputs = inputs_of(rows, "ragged")
    del inputs["labels"]
    with torch.no_grad():
        perception = model.perceive(**inputs, pixel_values=pictures)
        finished = [plain.finish(ids, images) for ids, _, images in rows]
    expected = [seen for row in finished for seen in row.attention]
    requests = [request for row in finished for request in row.requests]
    assert len(requests) == 5 * config.num_request_rounds
    assert_same(perception.requests, torch.stack(requests), "requests")
    dynamic = torch.stack([tokens for row in finished for tokens in row.dynamic])
    assert_same(perception.dynamic_tokens, dynamic, "dynamic tokens")
    assert perception.request_rows.tolist() == [i for i, row in enumerate(finished) for _ in row.requests]
    grid = grid_of(config)
    if grid is None:
        assert not expected and perception.attention_maps is None
        return
    most = perception.request_images.shape[1]
    layers = config.clip_text_config.num_hidden_layers if "clip_text" in name else config.interaction_num_layers
    assert perception.attention_maps.shape == (len(requests), layers, config.num_request_vectors, most, *grid)
    assert len(expected) == len(requests)
    for index, theirs in enumerate(expected):  # [layers, request vectors, images x features]
        count = theirs.shape[-1] // (grid[0] * grid[1])
        ours = perception.attention_maps[index].flatten(3)  # [layers, request vectors, images at most, features]
        assert_same(ours[:, :, :count].flatten(2), theirs, f"attention of request {index}")
        assert float(ours[:, :, count:].abs().sum()) == 0.0


@pytest.mark.parametrize(
    ("interaction", "fields"),
    [
        ("cross_attention", {}),
        ("clip_text", {"num_dynamic_tokens": 2}),
        ("clip_text", {"num_fine_grained_tokens": 2, "dynamic_readout": "last", "num_dynamic_tokens": 3}),
    ],
    ids=["cross_attention", "clip_text", "pooled"],
)
def test_queries_are_a_sequence(build, reference, interaction, fields):
    """The Q-Former's outputs are no grid, even where their number is a square."""
    model = build("llama", interaction, "blip2-square", fine_grained_source="qformer", **fields)
    plain = reference(model, "llama", "blip2-square")
    rows, pictures = rows_of(model.config, MIXED)
    assert_gradients(model, plain, rows, "left", {"pixel_values": pictures})
    inputs = inputs_of(rows, "left")
    del inputs["labels"]
    maps = model.perceive(**inputs, pixel_values=pictures).attention_maps
    assert maps.shape[-2:] == (1, fields.get("num_fine_grained_tokens", 4))
    with torch.no_grad():
        expected = plain.finish(rows[1][0], rows[1][2]).attention[0]
    assert_same(maps[1, :, :, 0, 0], expected, "attention")


# --- pictures of different proportions -----------------------------------------------------------------------------

SHAPES = [(3, 4), (2, 3), (4, 2), (1, 6)]


def features_of_shapes(seed=5):
    """Features as SigLIP2's tower has them: each picture's grid is its own, and what lies behind it is padding."""
    draw = torch.Generator().manual_seed(seed)
    pooled = torch.randn(len(SHAPES), tiny.PROJECTION_WIDTH, generator=draw)
    patches = torch.randn(len(SHAPES), 12, tiny.VISION_WIDTH, generator=draw)
    counts = torch.tensor([rows * columns for rows, columns in SHAPES])
    mask = torch.arange(12) < counts[:, None]
    pictures = [
        Picture(pooled[i], patches[i, :count], shape)
        for i, (count, shape) in enumerate(zip(counts.tolist(), SHAPES, strict=True))
    ]
    padded = patches.masked_fill(~mask[..., None], 9.0)
    return ImageFeatures(pooled, padded, None, mask, torch.tensor(SHAPES)), pictures


@pytest.mark.parametrize(
    ("interaction", "fields"),
    [
        ("cross_attention", {}),
        ("cross_attention", {"num_request_rounds": 2, "keep_request_token": True}),
        ("clip_text", {"fine_grained_source": "patch", "num_dynamic_tokens": 2}),
        ("clip_text", {"fine_grained_source": "patch", "num_fine_grained_tokens": 4}),
        ("clip_text", {"fine_grained_source": "patch", "num_fine_grained_tokens": 1, "dynamic_readout": "last"}),
        ("none", {"visual_mapping": "resampler", "num_static_tokens": 3}),
        ("none", {"visual_mapping": "patch", "num_static_tokens": 6}),
    ],
    ids=["cross_attention", "kept-rounds", "clip_text", "pooled", "pooled-to-one", "resampler", "patches"],
)
def test_pictures_of_different_proportions(build, reference, interaction, fields):
    """Positions and averages follow each picture's own rows and columns, and padding is never seen."""
    model = build("llama", interaction, **fields)
    plain = reference(model)
    features, pictures = features_of_shapes()
    layouts = ["1 img 1 img 2 req 1 =3", "2 img 3 req 2 =4", "img 1 req~ =2"]
    rows, _ = rows_of(model.config, layouts)
    shown = [pictures[:2], pictures[2:3], pictures[3:]]
    rows = [(ids, labels, part) for (ids, labels, _), part in zip(rows, shown, strict=True)]
    assert_gradients(model, plain, rows, "ragged", {"image_features": features})
    if interaction == "none":
        return
    inputs = inputs_of(rows, "left")
    del inputs["labels"]
    perception = model.perceive(**inputs, image_features=features)
    with torch.no_grad():
        finished = [plain.finish(ids, part) for ids, _, part in rows]
    assert_same(perception.requests, torch.stack([r for row in finished for r in row.requests]), "requests")
    pooled = model.config.num_fine_grained_tokens
    attention = [seen for row in finished for seen in row.attention]
    of_row = [part for row, part in zip(finished, shown, strict=True) for _ in row.requests]
    for index, (theirs, part) in enumerate(zip(attention, of_row, strict=True)):
        counts = [pooled or len(picture.patches) for picture in part]
        ours = perception.attention_maps[index].flatten(3)
        for place, expected in enumerate(theirs.split(counts, dim=-1)):
            assert_same(ours[:, :, place, : counts[place]], expected, f"request {index}, picture {place}")
            assert float(ours[:, :, place, counts[place] :].abs().sum()) == 0.0


def test_as_many_averages_as_there_are_padded_patches(build, reference):
    """Averages are all real, even where they are as many as the patches with their padding."""
    model = build("llama", "clip_text", fine_grained_source="patch", num_fine_grained_tokens=9, num_dynamic_tokens=2)
    features, pictures = features_of_shapes()
    features = features[torch.tensor([1, 2])]
    features = ImageFeatures(
        features.pooled, features.patches[:, :9], None, features.patch_mask[:, :9], features.spatial_shapes
    )
    rows, _ = rows_of(model.config, ["2 img 3 req 2 =4", "img 1 req =2"])
    rows = [(ids, labels, [part]) for (ids, labels, _), part in zip(rows, pictures[1:3], strict=True)]
    assert_gradients(model, reference(model), rows, "left", {"image_features": features})


# --- 4. frozen means frozen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_frozen(variant, name):
    """A step of training leaves every backbone as it was, to the bit, in eval mode; each stage counts its own."""
    model, _ = variant(name)
    model.train()
    for backbone in model.backbones():
        assert not any(module.training for module in backbone.modules())
    assert (model.qformer is not None) == (VARIANTS[name][2] == "blip2")
    trained = trained_parameters(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows, pictures = rows_of(model.config, layouts_for(name, MIXED))
    stages = ("pretrain",) if "none" in name else ("pretrain", "instruct")
    static = ("visual_mapping.", "image_token")
    for stage in stages:
        total = model.freeze_for_stage(stage)
        chosen = {key for key in trained if key.startswith(static) == (stage == "pretrain")}
        assert total == sum(trained[key].numel() for key in chosen)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**inputs_of(rows, "right"), pixel_values=pictures).loss.backward()
        assert {key for key, value in model.named_parameters() if value.grad is not None} == {
            f"ipn.{key}" for key in chosen
        }
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    # Whatever is added to all keys alike leaves a softmax as it was.
    still = {key for key in trained if key.endswith("attention.key.bias")}
    assert moved | {f"ipn.{key}" for key in still} == {f"ipn.{key}" for key in trained}


# --- 5. what it costs ----------------------------------------------------------------------------------------------

COSTS = [
    "clip_text-patch-pooled",
    "clip_text-qformer",
    "clip_text-kept",
    "clip_text-rounds",
    "clip_text-kept-rounds",
    "clip_text-first-edition",
    "cross_attention-rounds",
    "cross_attention-kept-rounds",
]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 4}, pytest.param({"do_sample": True, "num_return_sequences": 3}, marks=pytest.mark.slow)],
    ids=["greedy", "beams", "many"],
)
@pytest.mark.parametrize("name", COSTS)
def test_generating_costs(variant, name, options):
    """Prefix once, pictures once; a round costs its own request token and dynamic tokens."""
    model, _ = variant(name)
    config, new = model.config, 4
    rows, pictures = rows_of(config, ["2 img 5 req 3"] * 3)
    inputs = inputs_of(rows, "left")
    del inputs["labels"]
    meter = Meter(model)
    model.generate(**inputs, pixel_values=pictures, max_new_tokens=new, min_new_tokens=new, **options)
    prefix, k, rounds = 2 + config.num_static_tokens + 5, config.num_dynamic_tokens, config.num_request_rounds
    expanded = 3 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    assert meter.pictures == [3]
    assert meter.queried == ([3] if model.qformer is not None else [])
    assert meter.requests == [3] * rounds
    assert meter.reads == [
        (3, prefix + 1),
        *[(3, k + 1)] * (rounds - 1),
        (3, k + 3),
        *[(expanded, 1)] * (new - 1),
    ]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", COSTS)
def test_forward_reads_each_column_once(variant, name, grad):
    """Request tokens that do not stay are read besides."""
    model, _ = variant(name)
    model.freeze_for_stage("instruct")
    rows, pictures = rows_of(model.config, ["img 3 req 1 =3 2 req 1 =3 2 req 1 =2"] * 2)
    inputs = inputs_of(rows, "left")
    meter = Meter(model)
    with torch.set_grad_enabled(grad):
        model(**inputs, pixel_values=pictures)
    requests = 3 * model.config.num_request_rounds
    assert meter.pictures == [2] and meter.requests == [2] * requests
    assert {rows for rows, _ in meter.reads} == {2}
    besides = 0 if model.config.keep_request_token else requests
    assert sum(columns for _, columns in meter.reads) == inputs["input_ids"].shape[1] + besides
    # Prefix and first request token are read apart only where that leaves the prefix without a graph.
    prefix = model.config.num_static_tokens + 3
    assert meter.reads[0] == (2, prefix) if grad else (2, prefix + 1)


@pytest.mark.parametrize("name", ["clip_text-rounds", "clip_text-kept", "clip_text-first-edition"])
def test_prefix_leaves_no_graph(variant, name):
    """In stage 2 nothing of the words before the first request is kept but their keys and values."""
    model, _ = variant(name, "llama")
    model.train()

    def saved(words, stage):
        model.freeze_for_stage(stage)
        rows, pictures = rows_of(model.config, [f"1 img {words} req 1 =4"])
        inputs = inputs_of(rows, "left")
        return saved_numbers(lambda: model(**inputs, pixel_values=pictures))

    growth = saved(60, "instruct") - saved(20, "instruct")
    assert 0 < growth < 0.4 * (saved(60, "pretrain") - saved(20, "pretrain"))


@pytest.mark.parametrize("name", ["clip_text-first-edition", "cross_attention-qformer"])
def test_features_beforehand_spare_the_towers(variant, name):
    model, _ = variant(name)
    rows, pictures = rows_of(model.config, ["2 img 5 req 2 =3"])
    inputs = inputs_of(rows, "left")
    features = model.get_image_features(pictures)
    with torch.no_grad():
        expected = model(**inputs, pixel_values=pictures).logits
        meter = Meter(model)
        assert torch.equal(model(**inputs, image_features=features).logits, expected)
        del inputs["labels"]
        model.generate(**inputs, image_features=features, max_new_tokens=2)
    assert meter.pictures == [] and meter.queried == []


# --- 6. round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_backbones", [True, False], ids=["whole", "ipn"])
@pytest.mark.parametrize(
    "name",
    ["clip_text-patch-pooled", "clip_text-first-edition", "clip_text-qformer-pooled", "cross_attention-kept-rounds"],
)
def test_round_trip(variant, tmp_path, name, save_backbones):
    model, _ = variant(name)
    model.save_pretrained(tmp_path, save_backbones=save_backbones)
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    fields = set(VARIANTS[name][3]) | {"keep_request_token", "dynamic_readout", "num_query_tokens"}
    for field in fields:
        assert getattr(again.config, field) == getattr(model.config, field), field
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    rows, pictures = rows_of(model.config, MIXED)
    inputs = inputs_of(rows, "right")
    with torch.no_grad():
        assert torch.equal(again(**inputs, pixel_values=pictures).loss, model(**inputs, pixel_values=pictures).loss)
