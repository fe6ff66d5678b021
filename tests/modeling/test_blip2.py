"""BLIP-2 inside LMEye (variant 2): against transformers' own BLIP-2 and CLIP, run by hand in two full passes."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    CLIPTextModelWithProjection,
)

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.modeling import backbones


FAMILIES = ["t5", "opt"]
K = 5


def attach(folders, family, **kwargs):
    model = LMEyeForConditionalGeneration.from_blip2_pretrained(
        str(folders.blip2(family)), str(folders.vision()), **kwargs
    )
    tiny.randomise_ipn(model)
    if hasattr(model.ipn, "dynamic_token"):
        with torch.no_grad():
            model.ipn.dynamic_token.copy_(0.3 * torch.randn(model.ipn.dynamic_token.shape))
    return model.eval()


def prompt(config, words_before=3, words_after=4) -> torch.Tensor:
    """Words, `<img>` slots, words, `<img-q>`, five `<img-d>`, words. int64 [1, seq]."""
    ids = [*range(10, 10 + words_before), *[config.image_token_id] * config.num_static_tokens, 20, 21]
    if config.interaction != "none":
        ids += [config.request_token_id] * config.keep_request_token + [config.dynamic_token_id] * K
    return torch.tensor([[*ids, *range(30, 30 + words_after)]])


class ByHand:
    """Variant 2 in two full passes over transformers' own models, with `model`'s trained parameters."""

    def __init__(self, folders, family, model):
        self.blip2 = Blip2ForConditionalGeneration.from_pretrained(folders.blip2(family)).eval()
        self.features = Blip2Model.from_pretrained(folders.blip2(family)).eval()
        self.clip = CLIPTextModelWithProjection.from_pretrained(folders.vision()).eval()
        for part in (self.blip2, self.features, self.clip):
            part.requires_grad_(False)
        self.config = model.config
        self.own = {
            name.removeprefix("ipn."): tensor.detach().clone().requires_grad_()
            for name, tensor in model.interactive_perception_state_dict().items()
        }

    def linear(self, x, name):
        return x @ self.own[f"{name}.weight"].T + self.own[f"{name}.bias"]

    def clip_text(self, soft):
        """All outputs of CLIP's text transformer over [bos, soft, eos], projected; `soft` is put in words' place."""
        embeddings, last = self.clip.text_model.embeddings, len(soft) + 1
        ends = embeddings.token_embedding(torch.tensor([58, 59])) + embeddings.position_embedding(
            torch.tensor([0, last])
        )
        states = torch.cat([ends[:1], soft, ends[1:]])[None]
        hook = embeddings.register_forward_hook(lambda module, inputs, output: states)
        outputs = self.clip.text_model(torch.zeros(1, last + 1, dtype=torch.long))
        hook.remove()
        return self.clip.text_projection(outputs.last_hidden_state)[0]

    def read(self, embeds):
        if self.config.is_encoder_decoder:
            return self.blip2.language_model.get_encoder()(inputs_embeds=embeds).last_hidden_state
        return self.blip2.language_model.model(inputs_embeds=embeds).last_hidden_state

    def embed(self, ids, pixels):
        """What the second pass reads, and the request. [1, seq, d_L]"""
        config, own = self.config, self.own
        slots = ids >= config.image_token_id
        embeds = self.blip2.get_input_embeddings()(ids.masked_fill(slots, 0)).clone()
        queries = self.features.get_qformer_features(pixels)[0]
        embeds[ids == config.image_token_id] = own["image_token"] + self.linear(queries, "visual_mapping")
        embeds[ids == config.request_token_id] = own["request_token"]
        embeds[ids == config.dynamic_token_id] = own["dynamic_token"].expand(K, -1)
        column = (ids[0] == config.request_token_id).nonzero().item()
        request = self.read(embeds if config.is_encoder_decoder else embeds[:, : column + 1])[0, column]
        vectors = self.linear(request, "request_projection").unflatten(-1, (K, -1))
        outputs = self.clip_text(torch.cat([self.linear(queries, "fine_grained_projection"), vectors]))[-K:]
        embeds = embeds.clone()
        embeds[ids == config.dynamic_token_id] = own["dynamic_token"] + self.linear(outputs, "dynamic_projection")
        return embeds, request

    def outputs(self, ids, pixels, labels):
        embeds, request = self.embed(ids, pixels)
        return self.blip2.language_model(inputs_embeds=embeds, labels=labels), request

    def generate(self, ids, pixels, **kwargs):
        with torch.no_grad():
            embeds = self.embed(ids, pixels)[0]
            return self.blip2.language_model.generate(inputs_embeds=embeds, **kwargs)[0].tolist()


def labels_of(config, ids):
    if config.is_encoder_decoder:
        return torch.tensor([[33, 12, 40, 2]])
    labels = ids.clone()
    labels[:, :-4] = -100
    return labels


# --- what is built -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_the_checkpoints_own(folders, family):
    """Vision tower, Q-Former, projection and language model hold BLIP-2's tensors, and nothing is said of the rest."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        model = LMEyeForConditionalGeneration.from_blip2_pretrained(str(folders.blip2(family)), str(folders.vision()))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    # transformers remarks that FlanT5's head is not tied, as it does for FlanT5 alone.
    assert [line for line in lines if "we will NOT tie them" not in line] == []
    stored = load_file(folders.blip2(family) / "model.safetensors")
    found = {f"vision_model.{name}": value for name, value in model.vision_tower.state_dict().items()}
    found |= dict(model.qformer.state_dict().items())
    found |= {f"language_model.{name}": value for name, value in model.language_model.state_dict().items()}
    found |= {f"language_projection.{name}": value for name, value in model.ipn.visual_mapping.state_dict().items()}
    for name, value in stored.items():
        assert torch.equal(found[name], value), name
    assert model.generation_config.eos_token_id == 2 and not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_it_sees_what_blip2_saw(folders, family):
    """`<img>` slots: BLIP-2's projected queries and the embedding of id 0; the other slots start near that word."""
    model = LMEyeForConditionalGeneration.from_blip2_pretrained(str(folders.blip2(family)), str(folders.vision()))
    blip2 = Blip2ForConditionalGeneration.from_pretrained(folders.blip2(family)).eval()
    pixels = tiny.pixels(2)
    word = blip2.get_input_embeddings().weight[0]
    with torch.no_grad():
        expected = blip2.get_image_features(pixels).pooler_output + word
        found = model.ipn.static_tokens(model.get_image_features(pixels))
    assert found.shape == (2, tiny.NUM_QUERIES, word.shape[0]) and (found - expected).abs().max() < 1e-6
    for slot in (model.ipn.request_token, model.ipn.dynamic_token):
        noise = slot - word
        assert 0.5 < noise.std() / model.config.slot_init_std < 2
    assert not torch.equal(model.ipn.request_token, model.ipn.dynamic_token)


@pytest.mark.parametrize("family", FAMILIES)
def test_layout(folders, family):
    """The same slots in both editions, for the model and for the processor; each field can be set otherwise."""
    config = attach(folders, family).config
    assert config.visual_mapping == "qformer" and config.num_static_tokens == tiny.NUM_QUERIES
    assert config.keep_request_token and config.dynamic_readout == "last" and config.num_request_vectors == K
    assert config.fine_grained_source == "qformer" and config.num_fine_grained_tokens is None
    assert config.fine_grained_dropout == 0 and config.is_encoder_decoder == (family == "t5")
    processor = LMEyeProcessor.from_blip2_pretrained(str(folders.blip2(family)))
    inputs = processor(images=tiny.picture(), text="who?", return_tensors="pt")
    ids = inputs["input_ids"][0]
    for token_id, count in (
        (config.image_token_id, tiny.NUM_QUERIES),
        (config.request_token_id, 1),
        (config.dynamic_token_id, K),
    ):
        assert int((ids == token_id).sum()) == count
    other = attach(folders, family, num_dynamic_tokens=3, fine_grained_dropout=0.5, num_fine_grained_tokens=4).config
    assert (other.num_dynamic_tokens, other.num_request_vectors, other.fine_grained_dropout) == (3, 3, 0.5)
    assert other.num_fine_grained_tokens == 4


# --- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients(folders, family):
    model = attach(folders, family)
    by_hand = ByHand(folders, family, model)
    ids, pixels = prompt(model.config), tiny.pixels(1)
    labels = labels_of(model.config, ids)
    model.ipn.requires_grad_(True)
    model.ipn.interaction.requires_grad_(False)
    ours = model(input_ids=ids, pixel_values=pixels, labels=labels)
    theirs, request = by_hand.outputs(ids, pixels, labels)
    assert (ours.logits - theirs.logits).abs().max() < 1e-5
    assert abs(ours.loss - theirs.loss) < 1e-5
    with torch.no_grad():
        perception = model.perceive(input_ids=ids, pixel_values=pixels)
    assert (perception.requests[0] - request).abs().max() < 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    named = dict(model.ipn.named_parameters())
    for name, expected in by_hand.own.items():
        assert expected.grad.abs().max() > 0, name
        assert (named[name].grad - expected.grad).abs().max() < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}])
def test_generate(folders, family, strategy):
    """The same ids; vision tower, Q-Former and text transformer run once, whatever the beams."""
    model = attach(folders, family)
    ids, pixels = prompt(model.config), tiny.pixels(1)
    counts = dict.fromkeys(("vision_tower", "qformer"), 0)
    for name in counts:
        module = getattr(model, name)
        module.register_forward_pre_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
    found = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=8, **strategy)[0].tolist()
    expected = ByHand(folders, family, model).generate(ids, pixels, max_new_tokens=8, **strategy)
    if family == "opt":
        assert found[: ids.shape[1]] == ids[0].tolist()
        found = found[ids.shape[1] :]
    assert found == expected and len(set(found)) > 2
    assert counts == {"vision_tower": 1, "qformer": 1}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"interaction": "none"},
        {"interaction": "cross_attention", "fine_grained_source": "qformer"},
        {"interaction": "cross_attention"},
        {"visual_mapping": "linear"},
    ],
)
def test_other_variants(folders, family, options, tmp_path):
    """Every interaction, over the Q-Former's outputs or the patches; a Q-Former nobody reads is not loaded."""
    if options.get("interaction", "clip_text") == "clip_text":
        model = attach(folders, family, **options)
    else:
        model = LMEyeForConditionalGeneration.from_blip2_pretrained(
            str(folders.blip2(family)), **tiny.SMALL_STACK, **options
        )
        tiny.randomise_ipn(model)
    reads_queries = "qformer" in (model.config.visual_mapping, model.config.fine_grained_source)
    assert (model.qformer is not None) == reads_queries == (model.config.qformer_config is not None)
    ids, pixels = prompt(model.config), tiny.pixels(2)
    with torch.no_grad():
        first, second = (
            model(input_ids=ids, pixel_values=pixels[i : i + 1], labels=labels_of(model.config, ids)).logits
            for i in range(2)
        )
    assert (first - second).abs().max() > 1e-3
    model.save_pretrained(tmp_path, save_backbones=False)
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        same = again(input_ids=ids, pixel_values=pixels[:1], labels=labels_of(model.config, ids)).logits
    assert (first - same).abs().max() < 1e-5


def test_its_vision_with_another_language_model(folders):
    """BLIP-2's tower and Q-Former before a plain Llama."""
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folders.blip2()),
        str(folders.language()),
        visual_mapping="qformer",
        clip_text_model_name_or_path=str(folders.vision()),
    )
    assert model.config.num_static_tokens == model.config.num_query_tokens == tiny.NUM_QUERIES
    assert model.config.fine_grained_source == "global" and not model.config.keep_request_token
    pixels = tiny.pixels(1)
    with torch.no_grad():
        queries = Blip2Model.from_pretrained(folders.blip2()).eval().get_qformer_features(pixels)
        features = model.get_image_features(pixels)
        mapped = queries @ model.ipn.visual_mapping.weight.T + model.ipn.visual_mapping.bias
        assert torch.equal(features.queries, queries)
        assert (model.ipn.static_tokens(features) - mapped - model.ipn.image_token).abs().max() < 1e-6


def test_its_language_model_with_another_tower(folders):
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folders.vision()), str(folders.blip2("opt")), interaction="none"
    )
    stored = load_file(folders.blip2("opt") / "model.safetensors")
    for name, value in model.language_model.state_dict().items():
        if f"language_model.{name}" in stored:
            assert torch.equal(value, stored[f"language_model.{name}"]), name


# --- frozen, precision ---------------------------------------------------------------------------------------------


def test_frozen(folders):
    model = attach(folders, "t5")
    assert model.qformer in model.backbones()
    model.train()
    assert not model.qformer.training
    for stage in ("pretrain", "instruct"):
        model.freeze_for_stage(stage)
        trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"ipn"}
        assert not any(p.requires_grad for p in model.qformer.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole", [True, False])
def test_half_precision(folders, tmp_path, whole, family):
    """The Q-Former stays in float32, as in BLIP-2, and the IPN with it."""
    model = attach(folders, family, dtype=torch.float16)
    model.save_pretrained(tmp_path, save_backbones=whole)
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    assert_equal_weights(model, again)
    reference = Blip2Model.from_pretrained(folders.blip2(family), dtype=torch.float16).eval()
    pixels = tiny.pixels(1)
    for loaded in (model, again):
        assert {p.dtype for p in loaded.qformer.parameters()} == {torch.float32}
        assert {p.dtype for p in loaded.ipn.parameters()} == {torch.float32}
        assert loaded.vision_tower.dtype == loaded.language_model.dtype == torch.float16
        with torch.no_grad():
            expected = reference.get_qformer_features(pixels.to(torch.float16))
            assert torch.equal(loaded.get_image_features(pixels).queries, expected)


@pytest.mark.parametrize(
    "device_map",
    ["cpu", {"": "cpu"}, {"vision_tower": "cpu", "qformer": "cpu", "language_model": "cpu", "ipn": "cpu"}],
)
def test_devices_and_attention_reach_every_part(folders, tmp_path, device_map):
    model = attach(folders, "t5", device_map=device_map, attn_implementation="eager")
    model.save_pretrained(tmp_path, save_backbones=False)
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map, attn_implementation="eager")
    for loaded in (model, again):
        assert len(loaded.backbones()) == 4
        assert [part.config._attn_implementation for part in loaded.backbones()] == ["eager"] * 4
        assert loaded.config._attn_implementation == "eager"
    assert_equal_weights(model, again)


def test_options_by_prefix(folders):
    model = attach(folders, "opt", vision_dtype=torch.bfloat16, clip_text_attn_implementation="eager")
    assert model.vision_tower.dtype == torch.bfloat16 and model.language_model.dtype == torch.float32
    assert model.ipn.interaction.config._attn_implementation == "eager"
    assert model.vision_tower.config._attn_implementation == "sdpa"


def test_generation_settings(folders, tmp_path):
    """Special tokens that the whole's settings leave out are the language model's own."""
    shutil.copytree(folders.blip2(), tmp_path / "blip2")
    (tmp_path / "blip2" / "generation_config.json").write_text(json.dumps({"max_new_tokens": 4}))
    model = LMEyeForConditionalGeneration.from_blip2_pretrained(str(tmp_path / "blip2"), interaction="none")
    found = model.generation_config
    assert (found.decoder_start_token_id, found.eos_token_id, found.pad_token_id) == (0, 2, 0)
    assert found.max_new_tokens == 4


# --- checkpoints ---------------------------------------------------------------------------------------------------


def assert_equal_weights(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


@pytest.fixture
def own_folders(folders, tmp_path):
    """Copies of BLIP-2 and CLIP that a test may spoil."""
    copies = tmp_path / "blip2", tmp_path / "clip"
    shutil.copytree(folders.blip2(), copies[0])
    shutil.copytree(folders.vision(), copies[1])
    return copies


def attach_own(own_folders):
    model = LMEyeForConditionalGeneration.from_blip2_pretrained(*map(str, own_folders))
    tiny.randomise_ipn(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips(folders, family, tmp_path):
    model = attach(folders, family)
    inputs = {"input_ids": prompt(model.config), "pixel_values": tiny.pixels(1), "max_new_tokens": 6}
    expected = model.generate(**inputs).tolist()
    model.save_pretrained(tmp_path / "whole", max_shard_size="60KB")
    model.save_pretrained(tmp_path / "ipn", save_backbones=False)
    stored = load_file(tmp_path / "ipn" / "model.safetensors")
    assert {name.split(".")[1] for name in stored} == {
        "image_token",
        "request_token",
        "dynamic_token",
        "visual_mapping",
        "request_projection",
        "fine_grained_projection",
        "dynamic_projection",
    }
    for name in ("whole", "ipn"):
        again = LMEyeForConditionalGeneration.from_pretrained(tmp_path / name)
        assert_equal_weights(model, again)
        assert again.generate(**inputs).tolist() == expected


def test_where_the_parts_came_from(folders, tmp_path, monkeypatch):
    """Vision tower and language model name the one checkpoint, whose fingerprint is computed once."""
    seen = []
    compute = backbones.fingerprint
    monkeypatch.setattr(backbones, "fingerprint", lambda name, **kwargs: seen.append(name) or compute(name, **kwargs))
    model = attach(folders, "t5")
    assert seen == [str(folders.blip2()), str(folders.vision())]
    model.save_pretrained(tmp_path, save_backbones=False)
    recorded = json.loads((tmp_path / "config.json").read_text())["backbones"]
    assert recorded["vision"] == recorded["language"] != recorded["clip_text"]
    assert recorded["vision"]["name_or_path"] == str(folders.blip2())
    assert recorded["clip_text"]["name_or_path"] == str(folders.vision())
    checked = []
    check = backbones.check_fingerprint
    monkeypatch.setattr(
        backbones,
        "check_fingerprint",
        lambda role, *rest, **kwargs: checked.append(role) or check(role, *rest, **kwargs),
    )
    LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    assert checked == ["vision", "clip_text"]


def test_other_locations(own_folders, tmp_path):
    """One location serves both parts of a BLIP-2; the text encoder has its own."""
    model = attach_own(own_folders)
    model.save_pretrained(tmp_path / "ipn", save_backbones=False)
    blip2, clip = (folder.rename(tmp_path / f"elsewhere-{folder.name}") for folder in own_folders)
    load = LMEyeForConditionalGeneration.from_pretrained
    with pytest.raises(OSError, match=r"vision model .*vision_model_name_or_path"):
        load(tmp_path / "ipn")
    with pytest.raises(OSError, match=r"clip_text model .*clip_text_model_name_or_path"):
        load(tmp_path / "ipn", vision_model_name_or_path=str(blip2))
    again = load(tmp_path / "ipn", vision_model_name_or_path=str(blip2), clip_text_model_name_or_path=str(clip))
    assert_equal_weights(model, again)
    again = load(
        tmp_path / "ipn",
        vision_model_name_or_path=str(blip2),
        language_model_name_or_path=str(blip2),
        clip_text_model_name_or_path=str(clip),
    )
    assert_equal_weights(model, again)


@pytest.mark.parametrize(
    ("part", "name", "role"),
    [
        ("blip2", "vision_model.post_layernorm.weight", "vision"),
        ("blip2", "query_tokens", "vision"),
        ("blip2", "qformer.layernorm.weight", "vision"),
        ("blip2", "language_model.shared.weight", "vision"),
        ("clip", "text_projection.weight", "clip_text"),
    ],
)
def test_a_retrained_part_is_refused(own_folders, tmp_path, part, name, role):
    model = attach_own(own_folders)
    model.save_pretrained(tmp_path / "ipn", save_backbones=False)
    path = dict(zip(("blip2", "clip"), own_folders, strict=True))[part] / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{role} model .* is not the one .*{role}_model_name_or_path"):
        LMEyeForConditionalGeneration.from_pretrained(tmp_path / "ipn")


def test_a_location_for_no_part(build, folders, tmp_path):
    """A CLIP that brings its own text encoder has no third part."""
    build().save_pretrained(tmp_path, save_backbones=False)
    with pytest.raises(ValueError, match=r"takes no clip_text model of its own"):
        LMEyeForConditionalGeneration.from_pretrained(tmp_path, clip_text_model_name_or_path=str(folders.vision()))


def test_a_pickled_checkpoint(folders, tmp_path):
    """Older checkpoints are .bin files; everything is read from them too."""
    shutil.copytree(folders.blip2("opt"), tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    load = LMEyeForConditionalGeneration.from_blip2_pretrained
    torch.manual_seed(0)
    new = load(str(folders.blip2("opt")), str(folders.vision()))
    torch.manual_seed(0)
    old = load(str(tmp_path / "old"), str(folders.vision()))
    assert_equal_weights(new, old)


def test_publishing(folders, monkeypatch):
    """Three roles from two repositories: a card that names each once, and a refusal that names the local one."""
    uploads = []

    class Hub:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **kwargs):
            uploads.append((Path(folder_path) / "README.md").read_text())

    monkeypatch.setattr(backbones, "HfApi", Hub)
    model = attach(folders, "t5")
    recorded = model.config.backbones
    for role in ("vision", "language"):
        recorded[role]["name_or_path"] = "Salesforce/blip2-flan-t5-xl"
    with pytest.raises(ValueError, match=r"clip_text model's location is the local folder"):
        model.push_to_hub("someone/eyes", save_backbones=False)
    recorded["clip_text"]["name_or_path"] = "openai/clip-vit-large-patch14"
    model.push_to_hub("someone/eyes", save_backbones=False)
    _, front_matter, text = uploads[0].split("---\n", 2)
    assert front_matter.count("- Salesforce/blip2-flan-t5-xl") == 1
    assert front_matter.count("- openai/clip-vit-large-patch14") == 1
    assert "text encoder" in text and "`openai/clip-vit-large-patch14`" in text


# --- refusals ------------------------------------------------------------------------------------------------------


def test_no_text_encoder(folders):
    with pytest.raises(
        ValueError, match=r"CLIP's text encoder, and .*blip2.* has none .*clip_text_model_name_or_path"
    ):
        LMEyeForConditionalGeneration.from_blip2_pretrained(str(folders.blip2()))


def test_no_blip2(folders):
    with pytest.raises(ValueError, match=r'is of type "clip", no BLIP-2.*from_vision_language_pretrained'):
        LMEyeForConditionalGeneration.from_blip2_pretrained(str(folders.vision()), str(folders.vision()))


def test_a_blip2_without_its_language_model(folders, tmp_path):
    """The retrieval edition of BLIP-2 has none."""
    config = Blip2ForConditionalGeneration.from_pretrained(folders.blip2("opt")).config
    Blip2ForImageTextRetrieval(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no language_projection.*a whole BLIP-2"):
        LMEyeForConditionalGeneration.from_blip2_pretrained(str(tmp_path), str(folders.vision()))
    with pytest.raises(ValueError, match=r"lacks weights of OPTForCausalLM"):
        LMEyeForConditionalGeneration.from_vision_language_pretrained(
            str(folders.vision()), str(tmp_path), interaction="none"
        )
