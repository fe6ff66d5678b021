"""Frozen encoders: what a tower's features are is asked of transformers' own models, loaded by themselves."""

import logging

import pytest
import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    Siglip2ImageProcessor,
    Siglip2VisionModel,
    SiglipVisionModel,
    ViTForImageClassification,
    ViTModel,
)

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.modeling import backbones
from transformers_lmeye.modeling.backbones import load_part, load_vision_config, load_vision_tower
from transformers_lmeye.modeling.towers import CLIPTextEncoder, ImageFeatures, QFormer, read_images, vision_widths


LAYER = -2
# Tokens before the patches, by the papers: class token, registers, distillation token.
PREFIX = {
    "siglip": 0,
    "vit": 1,
    "dinov2": 1,
    "beit": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 5,
    "deit": 2,
}
OWN_SIZES = {"dinov3_vit": {"hidden_size": 32, "num_register_tokens": 4}}


@pytest.fixture
def said():
    """What transformers' loggers have said, from warnings on."""

    class Keeping(logging.Handler):
        def __init__(self):
            super().__init__(logging.WARNING)
            self.lines = []

        def emit(self, record):
            self.lines.append(record.getMessage())

    handler, logger = Keeping(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


def tower_of(folder):
    return load_vision_tower(str(folder), load_vision_config(str(folder)).vision).eval()


def siglip2_inputs(sizes=((32, 32), (48, 24), (17, 40))):
    """Pictures of different proportions as SigLIP2's own image processor cuts them."""
    processor = Siglip2ImageProcessor(patch_size=tiny.PATCH_SIZE, max_num_patches=16)
    pictures = [tiny.picture(seed, size) for seed, size in enumerate(sizes)]
    return dict(processor(pictures, return_tensors="pt"))


# --- one tower at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREFIX)
def test_patch_towers(folders, said, kind):
    """Pooled output, patch tokens of the layer asked for, no square told, no word about other weights."""
    folder = folders.tower(kind, **OWN_SIZES.get(kind, {}))
    pixels = tiny.pixels(2)
    said.clear()
    with torch.no_grad():
        features = read_images(tower_of(folder), None, pixels, LAYER, True)
        assert said == []
        alone = SiglipVisionModel.from_pretrained(folder) if kind == "siglip" else AutoModel.from_pretrained(folder)
        expected = alone.eval()(pixels, output_hidden_states=True)
    assert torch.equal(features.pooled, expected.pooler_output)
    states = expected.hidden_states[LAYER]
    assert states.shape[1] == PREFIX[kind] + tiny.NUM_PATCHES
    assert torch.equal(features.patches, states[:, PREFIX[kind] :])
    assert features.patch_mask is None and features.spatial_shapes is None and features.queries is None
    widths = vision_widths(load_vision_config(str(folder)).vision, LAYER)
    assert widths == (features.pooled.shape[-1], features.patches.shape[-1])


def test_clip(folders):
    """CLIP's pooled feature is projected."""
    pixels = tiny.pixels(2)
    with torch.no_grad():
        features = read_images(tower_of(folders.vision()), None, pixels, LAYER, True)
        expected = CLIPModel.from_pretrained(folders.vision()).get_image_features(pixels).pooler_output
    assert torch.equal(features.pooled, expected)
    assert features.patches.shape == (2, tiny.NUM_PATCHES, tiny.VISION_WIDTH)
    assert vision_widths(load_vision_config(str(folders.vision())).vision) == (
        tiny.PROJECTION_WIDTH,
        tiny.VISION_WIDTH,
    )


def test_only_what_is_needed(folders):
    features = read_images(tower_of(folders.vision()), None, tiny.pixels(1), LAYER, False)
    assert features.patches is None and features.queries is None


@pytest.mark.parametrize(
    ("model_type", "sizes", "layer", "width", "grid"),
    [
        ("convnext", {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}, -2, 16, (4, 6)),
        ("convnext", {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}, 2, 12, (8, 12)),
        ("resnet", {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "embedding_size": 8}, -1, 20, (2, 3)),
    ],
)
def test_feature_maps(model_type, sizes, layer, width, grid):
    """Stages of convolutions: their pixels are the patches, row by row."""
    config = AutoConfig.for_model(model_type, **sizes)
    tower = AutoModel.from_config(config).eval()
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = read_images(tower, None, pixels, layer, True)
        expected = tower(pixels, output_hidden_states=True)
    assert torch.equal(features.pooled, expected.pooler_output.flatten(1))
    assert vision_widths(config, layer) == (20, width)
    assert features.spatial_shapes.tolist() == [list(grid)] * 2 and features.patch_mask is None
    state = expected.hidden_states[layer]
    for row in range(grid[0]):
        for column in range(grid[1]):
            assert torch.equal(features.patches[:, row * grid[1] + column], state[:, :, row, column])


def test_windows_that_merge():
    """Swin's patches are merged two by two from stage to stage."""
    config = AutoConfig.for_model(
        "swin", embed_dim=12, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=2, image_size=32, patch_size=2
    )
    tower = AutoModel.from_config(config).eval()
    with torch.no_grad():
        features = read_images(tower, None, tiny.pixels(1), -1, True)
        expected = tower(tiny.pixels(1), output_hidden_states=True)
    assert torch.equal(features.patches, expected.hidden_states[-1]) and features.patches.shape[1] == 16
    assert torch.equal(features.pooled, expected.pooler_output)


def test_siglip2(folders):
    """Patches in each picture's own proportions, with mask and shapes."""
    inputs = siglip2_inputs()
    with torch.no_grad():
        features = read_images(tower_of(folders.tower("siglip2")), None, layer=LAYER, needs_patches=True, **inputs)
        expected = Siglip2VisionModel.from_pretrained(folders.tower("siglip2")).eval()(
            **inputs, output_hidden_states=True
        )
    assert torch.equal(features.pooled, expected.pooler_output)
    assert torch.equal(features.patches, expected.hidden_states[LAYER])
    assert features.patch_mask.dtype == torch.bool
    assert features.patch_mask.sum(dim=1).tolist() == features.spatial_shapes.prod(dim=1).tolist()
    assert len({tuple(shape) for shape in features.spatial_shapes.tolist()}) == 3


def test_features_move_together():
    features = ImageFeatures(
        torch.ones(3, 4),
        torch.ones(3, 2, 5),
        patch_mask=torch.tensor([[True, False]] * 3),
        spatial_shapes=torch.tensor([[1, 1], [1, 2], [2, 1]]),
    )
    half = features.to(torch.float16)
    assert half.pooled.dtype == half.patches.dtype == torch.float16 and half.queries is None
    assert half.patch_mask.dtype == torch.bool and half.spatial_shapes.dtype == torch.long
    chosen = features[torch.tensor([2, 1])]
    assert len(chosen) == 2 and chosen.spatial_shapes.tolist() == [[2, 1], [1, 2]]
    moved = features.to("meta")
    assert moved.patch_mask.device.type == moved.spatial_shapes.device.type == moved.pooled.device.type == "meta"


# --- towers that cannot serve --------------------------------------------------------------------------------------


def refuse(folder, *fragments, layer=LAYER, **inputs):
    with pytest.raises(ValueError) as raised:
        read_images(tower_of(folder), None, layer=layer, needs_patches=True, **inputs)
    for fragment in fragments:
        assert fragment in str(raised.value), str(raised.value)


def test_features_join_in_order():
    """Images of all parts, row by row; shorter lists of patches are padded, and the mask says so."""
    whole = ImageFeatures(torch.randn(3, 4), torch.randn(3, 5, 6), torch.randn(3, 2, 7))
    joined = ImageFeatures.join([whole[:1], whole[1:]])
    assert torch.equal(joined.pooled, whole.pooled)
    assert torch.equal(joined.patches, whole.patches)
    assert torch.equal(joined.queries, whole.queries)
    assert joined.patch_mask is None
    assert joined.spatial_shapes is None
    shapes = torch.tensor([[1, 5]])
    long = ImageFeatures(whole.pooled[:1], whole.patches[:1], spatial_shapes=shapes)
    mask = torch.tensor([[True, True, False]])
    short = ImageFeatures(whole.pooled[1:2], whole.patches[1:2, :3], patch_mask=mask, spatial_shapes=shapes + 1)
    joined = ImageFeatures.join([long, short])
    assert torch.equal(joined.patches[0], whole.patches[0])
    assert torch.equal(joined.patches[1, :3], whole.patches[1, :3])
    assert not joined.patches[1, 3:].any()
    assert joined.patch_mask.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert joined.spatial_shapes.tolist() == [[1, 5], [2, 6]]


def test_no_pooled_output(folders):
    refuse(
        folders.tower("ijepa"), "IJepaModel", "no pooled output", "another vision tower", pixel_values=tiny.pixels(1)
    )


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ijepa", {"interaction": "none"}, "no pooled output"),
        ("dinov2", {"interaction": "cross_attention", "vision_feature_layer": 9}, "vision_feature_layer=9"),
    ],
)
def test_refused_before_anything_is_loaded(folders, monkeypatch, kind, options, message):
    def load(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(backbones, "load_backbones", load)
    with pytest.raises(ValueError, match=message):
        LMEyeForConditionalGeneration.from_vision_language_pretrained(
            str(folders.tower(kind)), str(folders.language()), **tiny.SMALL_STACK, **options
        )


def test_missing_inputs(folders):
    inputs = {"pixel_values": siglip2_inputs()["pixel_values"]}
    refuse(folders.tower("siglip2"), "pixel_attention_mask, spatial_shapes", "everything that the processor", **inputs)


def test_inputs_of_another_tower(folders):
    inputs = {"pixel_values": tiny.pixels(1), "spatial_shapes": torch.tensor([[4, 4]])}
    refuse(folders.tower("dinov2"), "Dinov2Model takes no spatial_shapes", "same vision model", **inputs)


def test_a_layer_that_is_not_there(folders):
    refuse(folders.vision(), "vision_feature_layer=7", "4 hidden states", layer=7, pixel_values=tiny.pixels(1))


def test_only_the_last_layer(folders):
    tower = tower_of(folders.tower("vit"))
    read_all = tower.forward
    tower.forward = lambda pixel_values, output_hidden_states=None: read_all(pixel_values)
    with pytest.raises(ValueError, match=r"last layer alone, not of layer -2: set vision_feature_layer=-1"):
        read_images(tower, None, tiny.pixels(1), LAYER, True)
    with torch.no_grad():
        features = read_images(tower, None, tiny.pixels(1), -1, True)
        assert torch.equal(features.patches, tower(tiny.pixels(1)).last_hidden_state[:, 1:])


def test_no_vision_tower(folders):
    with pytest.raises(ValueError, match=r"holds no vision tower.*llama.*such as CLIP, SigLIP, DINOv2"):
        load_vision_config(str(folders.language()))


def test_a_tower_without_its_pooler(folders, tmp_path):
    """A classifier's checkpoint has no pooling layer: it is refused, not filled with random numbers."""
    config = AutoConfig.from_pretrained(folders.tower("vit"))
    ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of ViTModel.*pooler\.dense\.weight"):
        tower_of(tmp_path)


def test_a_tower_inside_another_model(folders, tmp_path):
    """Older tensor names and a classifier around the tower are both read as transformers reads them."""
    config = AutoConfig.from_pretrained(folders.tower("dinov2"))
    whole = AutoModel.from_config(config)
    from transformers import Dinov2ForImageClassification

    classifier = Dinov2ForImageClassification(config)
    classifier.dinov2.load_state_dict(whole.state_dict())
    classifier.save_pretrained(tmp_path)
    loaded = tower_of(tmp_path)
    assert type(loaded) is type(whole)
    for name, value in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


# --- CLIP's text encoder -------------------------------------------------------------------------------------------


@pytest.fixture
def text_encoder(folders):
    config = load_vision_config(str(folders.vision())).clip_text
    return load_part(CLIPTextEncoder, str(folders.vision()), config).eval()


def test_soft_tokens_are_read_as_words(folders, text_encoder):
    """With the words' own embeddings as soft tokens, and no position embedding between the ends, CLIP's own output."""
    plain = CLIPTextModelWithProjection.from_pretrained(folders.vision(), attn_implementation="eager").eval()
    ids = torch.tensor([[58, 7, 21, 3, 40, 59], [58, 11, 2, 50, 4, 59]])
    embeddings = plain.text_model.embeddings
    words = embeddings.token_embedding(ids[:, 1:-1]).detach()
    with torch.no_grad():
        embeddings.position_embedding.weight[1:5] = 0
        expected = plain(ids, output_attentions=True)
        every = plain.text_projection(expected.last_hidden_state)
        projected, attentions = text_encoder.read_soft_tokens(words, output_attentions=True)
    assert projected.shape == (2, 6, tiny.PROJECTION_WIDTH)
    assert (projected - every).abs().max() < 1e-5 and (projected[:, -1] - expected.text_embeds).abs().max() < 1e-5
    assert len(attentions) == len(expected.attentions) == 2
    for ours, theirs in zip(attentions, expected.attentions, strict=True):
        assert ours.shape == (2, 4, 6, 6) and (ours - theirs).abs().max() < 1e-6
    assert text_encoder.read_soft_tokens(words)[1] is None


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_later_soft_tokens_change_nothing_before(folders, attn_implementation):
    config = load_vision_config(str(folders.vision())).clip_text
    encoder = load_part(CLIPTextEncoder, str(folders.vision()), config, attn_implementation=attn_implementation).eval()
    soft = torch.randn(1, 5, tiny.CLIP_TEXT_WIDTH)
    changed = soft.clone()
    changed[:, 3] += torch.randn(tiny.CLIP_TEXT_WIDTH)
    with torch.no_grad():
        first, second = encoder.read_soft_tokens(soft)[0], encoder.read_soft_tokens(changed)[0]
    assert (first - second)[:, :4].abs().max() < 1e-6 and (first - second)[:, 4:].abs().min(dim=1).values.max() > 1e-3


def test_too_many_soft_tokens(text_encoder):
    text_encoder.read_soft_tokens(torch.zeros(1, 22, tiny.CLIP_TEXT_WIDTH))
    with pytest.raises(ValueError, match=r"23 soft tokens .* need 25 positions .* has 24: show fewer images"):
        text_encoder.read_soft_tokens(torch.zeros(1, 23, tiny.CLIP_TEXT_WIDTH))


# --- LMEye around them ---------------------------------------------------------------------------------------------

VARIANTS = {
    "siglip clip_text": ("siglip", {"interaction": "clip_text"}),
    "siglip patches": ("siglip", {"interaction": "cross_attention"}),
    "siglip2 global": ("siglip2", {"interaction": "cross_attention", "fine_grained_source": "global"}),
    "siglip2 patches": ("siglip2", {"interaction": "cross_attention"}),
    "siglip2 resampler": (
        "siglip2",
        {"interaction": "none", "visual_mapping": "resampler", "num_static_tokens": 3},
    ),
    "siglip2 static patches": (
        "siglip2",
        {"interaction": "none", "visual_mapping": "patch", "num_static_tokens": 4},
    ),
    "dinov2 static patches": ("dinov2", {"interaction": "cross_attention", "visual_mapping": "patch"}),
    "dinov2 clip_text patches": ("dinov2", {"interaction": "clip_text", "fine_grained_source": "patch"}),
    "dinov2_with_registers patches": ("dinov2_with_registers", {"interaction": "cross_attention"}),
    "vit global": ("vit", {"interaction": "cross_attention", "fine_grained_source": "global"}),
    "vit none": ("vit", {"interaction": "none"}),
}


@pytest.fixture
def attach(folders):
    """`attach(kind, **config)` -> LMEye on that tower and a tiny Llama, every IPN parameter drawn anew."""

    def make(kind, **config):
        if config["interaction"] == "clip_text":
            config.setdefault("clip_text_model_name_or_path", str(folders.vision()))
        model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
            str(folders.tower(kind)), str(folders.language()), **tiny.SMALL_STACK, **config
        )
        tiny.randomise_ipn(model)
        return model.eval()

    return make


def questions(folders, kind, model, sizes=((32, 32), (48, 24), (17, 40))):
    """Three pictures and three questions of different lengths, through the processor of these backbones."""
    processor = LMEyeProcessor.from_vision_language_pretrained(
        str(folders.tower(kind)),
        str(folders.language()),
        interaction=model.config.interaction,
        num_static_tokens=model.config.num_static_tokens,
        num_dynamic_tokens=model.config.num_dynamic_tokens,
    )
    pictures = [tiny.picture(seed, size) for seed, size in enumerate(sizes)]
    texts = ["what is the man doing?", "who?", "where is the red house?"]

    def ask(chosen):
        return processor(
            images=[[pictures[i]] for i in chosen], text=[texts[i] for i in chosen], return_tensors="pt", padding=True
        )

    return ask


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_alone(attach, folders, variant):
    """Whatever the tower: every picture changes the answer, and a batched question is answered as it is alone."""
    kind, config = VARIANTS[variant]
    model = attach(kind, **config)
    ask = questions(folders, kind, model)
    inputs = ask([0, 1, 2])
    with torch.no_grad():
        together = model(**inputs).logits
        batched = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
        for i in range(3):
            single = ask([i])
            length = int(inputs["attention_mask"][i].sum())
            columns = inputs["attention_mask"][i].bool()
            alone = model(**single).logits[0]
            assert alone.shape[0] == length
            torch.testing.assert_close(together[i][columns], alone, atol=1e-5, rtol=1e-5)
            answer = model.generate(**single, max_new_tokens=6)[0, length:]
            assert answer.tolist() == batched[i][: len(answer)].tolist()
        flipped = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
        assert (model(**flipped).logits - together)[inputs["attention_mask"].bool()].abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips(attach, folders, variant, tmp_path):
    kind, config = VARIANTS[variant]
    model = attach(kind, **config)
    inputs = questions(folders, kind, model)([1])
    expected = model.generate(**inputs, max_new_tokens=6).tolist()
    for whole in (True, False):
        folder = tmp_path / str(whole)
        model.save_pretrained(folder, save_backbones=whole)
        again = LMEyeForConditionalGeneration.from_pretrained(folder)
        assert type(again.vision_tower) is type(model.vision_tower)
        ours, theirs = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
        assert again.generate(**inputs, max_new_tokens=6).tolist() == expected


def test_static_token_of_siglip(attach, folders):
    """t_img + W_a h_I + b_a with h_I SigLIP's pooled output."""
    model = attach("siglip", interaction="none")
    pixels = tiny.pixels(2)
    with torch.no_grad():
        pooled = SiglipVisionModel.from_pretrained(folders.tower("siglip")).eval()(pixels).pooler_output
        expected = model.ipn.image_token + pooled @ model.ipn.visual_mapping.weight.T + model.ipn.visual_mapping.bias
        assert (model.ipn.static_tokens(model.get_image_features(pixels))[:, 0] - expected).abs().max() < 1e-5


def test_static_patches_that_are_not_there(attach):
    """A tower may merge patches without a word in its configuration."""
    model = attach("dinov2", interaction="none", visual_mapping="patch")
    features = model.get_image_features(tiny.pixels(2))
    count = model.config.num_static_tokens
    assert features.patches.shape[1] == count
    features.patches = features.patches[:, 1:]
    with pytest.raises(ValueError, match=f"num_static_tokens={count} is more than the {count - 1} patches"):
        model.ipn.static_tokens(features)


@pytest.mark.parametrize("variant", ["siglip2 patches", "siglip2 resampler", "siglip2 static patches"])
def test_padded_patches_are_not_seen(attach, folders, variant):
    """What stands behind a picture's own patches changes nothing; what stands among them does."""
    kind, config = VARIANTS[variant]
    model = attach(kind, **config)
    inputs = questions(folders, kind, model)([0, 1, 2])
    vision = {name: inputs.pop(name) for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        features = model.get_image_features(**vision)
        assert not features.patch_mask.all()
        logits = model(**inputs, image_features=features).logits[mask]
        assert (logits - model(**inputs, **vision).logits[mask]).abs().max() < 1e-5
        seen, padding = features.patches.clone(), features.patches.clone()
        padding[~features.patch_mask] = 100.0
        seen[:, 0] = 0.0
        features.patches = padding
        assert (logits - model(**inputs, image_features=features).logits[mask]).abs().max() < 1e-5
        features.patches = seen
        assert (logits - model(**inputs, image_features=features).logits[mask]).abs().max() > 1e-3


def test_the_text_encoder_is_the_named_clips(attach, folders):
    model = attach("siglip", interaction="clip_text")
    plain = CLIPTextModelWithProjection.from_pretrained(folders.vision()).state_dict()
    for name, value in model.ipn.interaction.state_dict().items():
        assert torch.equal(value, plain[name]), name
    recorded = model.config.backbones
    assert set(recorded) == {"vision", "language", "clip_text"}
    assert recorded["clip_text"]["name_or_path"] == str(folders.vision())
    assert recorded["clip_text"]["fingerprint"] != recorded["vision"]["fingerprint"]


def test_another_clips_text_encoder_beside_a_clip(folders):
    """A named CLIP goes before the vision model's own text encoder."""
    other = str(folders.vision(seed=101))
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folders.vision()), str(folders.language()), clip_text_model_name_or_path=other
    )
    plain = CLIPTextModelWithProjection.from_pretrained(other).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.ipn.interaction.state_dict().items())
    tower = CLIPVisionModelWithProjection.from_pretrained(folders.vision()).state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in model.vision_tower.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "options", "fragments"),
    [
        ("siglip", {}, ["clip_text", "siglip", "clip_text_model_name_or_path", "cross_attention"]),
        ("dinov2", {"clip_text_model_name_or_path": "siglip"}, ["no text encoder of CLIP's", "a whole CLIP"]),
        (
            "vit",
            {"interaction": "none", "clip_text_model_name_or_path": "clip"},
            ['is for interaction="clip_text"', "leave it out"],
        ),
        ("dinov2", {"interaction": "none", "visual_mapping": "qformer"}, ["needs a Q-Former", "dinov2", "BLIP-2"]),
        (
            "vit",
            {"interaction": "cross_attention", "fine_grained_source": "qformer"},
            ['fine_grained_source="qformer" needs a Q-Former', "BLIP-2"],
        ),
    ],
)
def test_parts_that_are_missing(folders, kind, options, fragments):
    sources = {"siglip": folders.tower("siglip"), "clip": folders.vision()}
    if name := options.get("clip_text_model_name_or_path"):
        options = {**options, "clip_text_model_name_or_path": str(sources[name])}
    with pytest.raises(ValueError) as raised:
        LMEyeForConditionalGeneration.from_vision_language_pretrained(
            str(folders.tower(kind)), str(folders.language()), **options
        )
    for fragment in fragments:
        assert fragment in str(raised.value), str(raised.value)


def test_frozen_and_in_half_precision(attach):
    model = attach("siglip", interaction="clip_text", dtype=torch.bfloat16)
    assert model.vision_tower.dtype == torch.bfloat16
    assert {p.dtype for p in model.ipn.parameters()} == {torch.float32}
    assert not any(p.requires_grad for part in model.backbones() for p in part.parameters())
    features = model.get_image_features(tiny.pixels(1))
    assert features.pooled.dtype == torch.bfloat16


@pytest.mark.parametrize("asked", ["flash_attention_2", "sdpa", "eager"])
def test_flash_attention_is_not_for_float32(folders, asked):
    """Parts that stay in float32 run on sdpa where flash attention is asked for."""
    clip_text = load_vision_config(str(folders.vision())).clip_text
    qformer = load_vision_config(str(folders.blip2())).qformer
    found = []
    for part_class, config in ((CLIPTextEncoder, clip_text), (QFormer, qformer)):
        config._attn_implementation = asked
        part = part_class(config)
        inner = part.text_model if part_class is CLIPTextEncoder else part.qformer
        found += [part.config._attn_implementation, inner.config._attn_implementation]
    assert found == ["sdpa" if asked == "flash_attention_2" else asked] * 4


def test_a_tower_keeps_its_own_class(folders):
    """Loading part of a checkpoint leaves an object of transformers' class, not of a class made for loading."""
    assert type(tower_of(folders.tower("siglip"))) is SiglipVisionModel
    assert type(tower_of(folders.tower("vit"))) is ViTModel
