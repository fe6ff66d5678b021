"""open_clip models as vision tower and text encoder: one CLIP held in both formats gives equal values everywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, CLIPModel

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.modeling.fingerprints import fingerprint, weight_files
from transformers_lmeye.modeling.open_clip_towers import (
    OpenCLIPTextConfig,
    OpenCLIPTextEncoder,
    OpenCLIPVisionConfig,
    OpenCLIPVisionTower,
    is_open_clip,
    load_open_clip_config,
    load_open_clip_text_encoder,
    load_open_clip_tower,
    open_clip_local_path,
    open_clip_text_problem,
    open_clip_weight_file,
)


open_clip = pytest.importorskip("open_clip")

VISION_CFG = {
    "image_size": tiny.IMAGE_SIZE,
    "layers": 3,
    "width": tiny.VISION_WIDTH,
    "head_width": 8,
    "mlp_ratio": 44 / 32,
    "patch_size": tiny.PATCH_SIZE,
}
TEXT_CFG = {
    "context_length": 24,
    "vocab_size": 60,
    "width": tiny.CLIP_TEXT_WIDTH,
    "heads": 4,
    "layers": 2,
    "mlp_ratio": 56 / 40,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def transformers_clip(quick_gelu: bool = True) -> CLIPModel:
    """A tiny CLIP of transformers, with either activation."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = tiny.clip()
    config = model.config
    for part in (config.text_config, config.vision_config):
        part.hidden_act = "quick_gelu" if quick_gelu else "gelu"
        part._attn_implementation = "eager"
    changed = CLIPModel(config).eval()
    changed.load_state_dict(model.state_dict())
    return changed


def open_clip_state_dict(clip: CLIPModel) -> dict[str, torch.Tensor]:
    """The same weights under open_clip's names."""
    state = clip.state_dict()
    converted = {
        "logit_scale": state["logit_scale"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
    }
    modules = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    for ours, theirs, layers in (("visual.", "vision_model", 3), ("", "text_model", 2)):
        for layer in range(layers):
            block, source = f"{ours}transformer.resblocks.{layer}", f"{theirs}.encoder.layers.{layer}"
            for kind in ("weight", "bias"):
                converted[f"{block}.attn.in_proj_{kind}"] = torch.cat(
                    [state[f"{source}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
                )
            modules[f"{block}.attn.out_proj"] = f"{source}.self_attn.out_proj"
            modules[f"{block}.ln_1"], modules[f"{block}.ln_2"] = f"{source}.layer_norm1", f"{source}.layer_norm2"
            modules[f"{block}.mlp.c_fc"], modules[f"{block}.mlp.c_proj"] = f"{source}.mlp.fc1", f"{source}.mlp.fc2"
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            converted[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
    return {name: tensor.detach().clone().contiguous() for name, tensor in converted.items()}


def write_config(folder: Path, vision_cfg=VISION_CFG, text_cfg=TEXT_CFG, **model_cfg) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    cfg = {"embed_dim": tiny.PROJECTION_WIDTH, "vision_cfg": vision_cfg, "text_cfg": text_cfg, **model_cfg}
    content = {"model_cfg": cfg, "preprocess_cfg": {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def save_clip(folder: Path, quick_gelu: bool = True) -> Path:
    """A folder with the same tiny CLIP in open_clip's format."""
    write_config(folder, quick_gelu=quick_gelu)
    save_file(open_clip_state_dict(transformers_clip(quick_gelu)), folder / "open_clip_model.safetensors")
    return folder


def save_random(folder: Path, vision_cfg: dict, **kwargs) -> tuple[Path, torch.nn.Module]:
    """A folder with a random open_clip model, and open_clip's own module of it."""
    write_config(folder, vision_cfg, **kwargs)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tiny.randomise(model, seed=5, gain=1.0)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder, model


def hub_cache(folder: Path, repository: str, files: Path, commit: str = COMMIT) -> Path:
    """A hub cache that holds `repository` with the files of a folder."""
    root = folder / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for file in files.iterdir():
        os.symlink(file, snapshot / file.name)
    return folder


@pytest.fixture
def architecture(tmp_path, monkeypatch):
    """open_clip's own register of architectures and tags, with a tiny one: its configuration does not say that its
    weights were trained with the sigmoid approximation of GELU, the tag does."""
    cfg = {"embed_dim": tiny.PROJECTION_WIDTH, "vision_cfg": VISION_CFG, "text_cfg": TEXT_CFG}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-8", cfg)
    tags = {
        "digits": {"hf_hub": "tiny/clip/", "url": "", "quick_gelu": True, "mean": (0.5, 0.5, 0.5)},
        "named": {"hf_hub": "tiny/clip/open_clip_pytorch_model.bin", "url": ""},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-8", tags)
    return hub_cache(tmp_path / "cache", "tiny/clip", save_clip(tmp_path / "files"))


# --- one CLIP in both formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_vision_tower(tmp_path, quick_gelu):
    clip = transformers_clip(quick_gelu)
    tower = load_open_clip_tower(str(save_clip(tmp_path, quick_gelu)))
    pixel_values = tiny.pixels(3)
    with torch.no_grad():
        expected = clip.vision_model(pixel_values, output_hidden_states=True)
        expected_embeds = clip.visual_projection(expected.pooler_output)
        found = tower(pixel_values, output_hidden_states=True)
        without = tower(pixel_values)
        other = load_open_clip_tower(str(write_config(tmp_path, quick_gelu=not quick_gelu)))(pixel_values)
    assert not tower.training
    torch.testing.assert_close(found.image_embeds, expected_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert without.hidden_states is None
    assert torch.equal(without.image_embeds, found.image_embeds)
    assert (other.image_embeds - expected_embeds).abs().max() > 1e-3  # the activation matters


def read_with_transformers(clip: CLIPModel, soft_tokens: torch.Tensor):
    """transformers' own text encoder over [bos, soft tokens, eos]: its embeddings are replaced, nothing else."""
    count, length = soft_tokens.shape[0], soft_tokens.shape[1] + 2
    words = clip.text_model.embeddings.token_embedding.weight
    positions = clip.text_model.embeddings.position_embedding.weight
    bos = (words[58] + positions[0]).expand(count, 1, -1)
    eos = (words[59] + positions[length - 1]).expand(count, 1, -1)
    embedded = torch.cat([bos, soft_tokens, eos], dim=1)
    hook = clip.text_model.embeddings.register_forward_hook(lambda module, inputs, output: embedded)
    ids = torch.tensor([[58] + [5] * (length - 2) + [59]] * count)
    outputs = clip.text_model(ids, output_attentions=True)
    hook.remove()
    return clip.text_projection(outputs.last_hidden_state), outputs.attentions


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_soft_tokens(tmp_path, quick_gelu):
    clip = transformers_clip(quick_gelu)
    encoder = load_open_clip_text_encoder(str(save_clip(tmp_path, quick_gelu))).requires_grad_(False)
    clip.requires_grad_(False)
    config = encoder.config
    assert (config.hidden_size, config.projection_dim) == (tiny.CLIP_TEXT_WIDTH, tiny.PROJECTION_WIDTH)
    assert (config.max_position_embeddings, config.bos_token_id, config.eos_token_id) == (24, 58, 59)
    soft_tokens = torch.randn(3, 6, tiny.CLIP_TEXT_WIDTH)
    theirs, ours = soft_tokens.clone().requires_grad_(), soft_tokens.clone().requires_grad_()
    expected, expected_attentions = read_with_transformers(clip, theirs)
    found, attentions = encoder.read_soft_tokens(ours, output_attentions=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(attentions) == len(expected_attentions) == 2
    for our_weights, their_weights in zip(attentions, expected_attentions, strict=True):
        torch.testing.assert_close(our_weights, their_weights, atol=1e-6, rtol=0)
    without, no_attentions = encoder.read_soft_tokens(soft_tokens)
    assert no_attentions is None
    torch.testing.assert_close(without, found.detach(), atol=1e-6, rtol=0)
    # gradients, of every position
    direction = torch.randn_like(found)
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=0)
    assert ours.grad.abs().max() > 0.01


def test_soft_tokens_are_read_as_open_clip_reads_a_text(tmp_path):
    """Word embeddings with their positions as soft tokens give, at eos, what open_clip gives of the text."""
    folder = save_clip(tmp_path)
    encoder = load_open_clip_text_encoder(str(folder))
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    words = torch.tensor([[7, 3, 12, 30], [4, 4, 9, 50]])
    text = torch.zeros(2, 24, dtype=torch.long)
    text[:, 0], text[:, 1:5], text[:, 5] = 58, words, 59
    with torch.no_grad():
        soft_tokens = model.token_embedding(words) + model.positional_embedding[1:5]
        torch.testing.assert_close(
            encoder.read_soft_tokens(soft_tokens)[0][:, -1], model.encode_text(text), atol=1e-5, rtol=0
        )


def test_attention_of_normalised_queries(tmp_path):
    """The attention returned is the one the block's own kernel uses: with it the block's output is made again."""
    text_cfg = {**TEXT_CFG, "qk_norm": True}
    folder, _ = save_random(tmp_path, VISION_CFG, text_cfg=text_cfg)
    encoder = load_open_clip_text_encoder(str(folder))
    seen = {}
    attention = encoder.text.transformer.resblocks[1].attn
    attention.register_forward_hook(lambda module, inputs, output: seen.update(states=inputs[0], output=output))
    _, attentions = encoder.read_soft_tokens(torch.randn(2, 5, tiny.CLIP_TEXT_WIDTH), output_attentions=True)
    values = torch.nn.functional.linear(seen["states"], attention.in_proj_weight, attention.in_proj_bias)
    values = values.chunk(3, dim=-1)[2].unflatten(-1, (4, -1)).transpose(1, 2)
    expected = attention.out_proj((attentions[1] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["output"], expected, atol=1e-5, rtol=0)


def test_too_many_soft_tokens(tmp_path):
    encoder = load_open_clip_text_encoder(str(save_clip(tmp_path)))
    assert encoder.read_soft_tokens(torch.zeros(1, 22, tiny.CLIP_TEXT_WIDTH))[0].shape == (1, 24, 24)
    with pytest.raises(ValueError, match=r"23 soft tokens .* 25 positions .* has 24: .*num_fine_grained_tokens"):
        encoder.read_soft_tokens(torch.zeros(1, 23, tiny.CLIP_TEXT_WIDTH))


def test_bos_and_eos():
    """The last two words of CLIP's tokenizer, which a longer table does not move."""
    tokenizer = open_clip.SimpleTokenizer()
    for rows in (49408, 49920):
        config = OpenCLIPTextConfig(text_cfg={**TEXT_CFG, "vocab_size": rows})
        assert (config.bos_token_id, config.eos_token_id) == (tokenizer.sot_token_id, tokenizer.eot_token_id)


@pytest.mark.parametrize(
    "options",
    [
        {"interaction": "clip_text"},
        {"interaction": "clip_text", "fine_grained_source": "patch", "num_fine_grained_tokens": 4},
        {"interaction": "cross_attention", **tiny.SMALL_STACK},
        {"interaction": "none", "visual_mapping": "resampler", **tiny.SMALL_STACK},
    ],
    ids=["clip_text", "clip_text-patch", "cross_attention", "resampler"],
)
def test_lmeye_gives_equal_answers(folders, tmp_path, options):
    """Logits and request attention of a whole LMEye do not depend on the format its CLIP is held in."""
    transformers_clip().save_pretrained(tmp_path / "transformers")
    sources = str(tmp_path / "transformers"), str(save_clip(tmp_path / "clip"))
    models = [
        LMEyeForConditionalGeneration.from_vision_language_pretrained(source, str(folders.language()), **options)
        for source in sources
    ]
    tiny.randomise_ipn(models[0])
    trained = models[0].interactive_perception_state_dict()
    missing = models[1].load_state_dict(trained, strict=False)
    assert not missing.unexpected_keys and trained.keys() == models[1].interactive_perception_state_dict().keys()
    config = models[0].config
    layout = "2 img 3 req 2" if config.interaction != "none" else "2 img 3"
    batch = tiny.batch([tiny.row(config, layout, seed) for seed in range(2)], "left")
    batch.pop("labels")
    with torch.no_grad():
        expected, found = (model(**batch, pixel_values=tiny.pixels(2)).logits for model in models)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        different = models[1](**batch, pixel_values=tiny.pixels(2, seed=9)).logits
    assert (different - found).abs().max() > 1e-3


# --- saving and loading --------------------------------------------------------------------------------------------


def test_round_trips(folders, tmp_path):
    """Whole and IPN-only checkpoints reload equal, and the latter refuse other weights."""
    clip = save_clip(tmp_path / "clip")
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(str(clip), str(folders.language()))
    tiny.randomise_ipn(model)
    batch = tiny.batch([tiny.row(model.config, "2 img 3 req 2")], "left")
    batch.pop("labels")
    expected = model(**batch, pixel_values=tiny.pixels(1)).logits
    for whole in (True, False):
        model.save_pretrained(tmp_path / "saved", save_backbones=whole)
        loaded = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "saved")
        found = loaded(**batch, pixel_values=tiny.pixels(1)).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert isinstance(loaded.vision_tower, OpenCLIPVisionTower)
        assert isinstance(loaded.config.clip_text_config, OpenCLIPTextConfig)
    state = load_file(clip / "open_clip_model.safetensors")
    state["visual.proj"] = state["visual.proj"] + 0.01
    save_file(state, clip / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"vision model at .* is not the one this IPN was trained on"):
        LMEyeForConditionalGeneration.from_pretrained(tmp_path / "saved")


def test_publishing_with_a_local_weight_file_is_refused(folders, tmp_path, architecture):
    weights = tmp_path / "files" / "open_clip_model.safetensors"
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        f"open_clip:Tiny-8/{weights}", str(folders.language()), interaction="none"
    )
    with pytest.raises(ValueError, match="vision model's location is the local"):
        model.push_to_hub("nobody/nothing", save_backbones=False)


SCRIPT = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ABSENT = sys.argv[3].split(",")
sys.meta_path.insert(0, Absent())
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)
inputs = processor(images=Image.open(sys.argv[1]), text="what is the man doing?", return_tensors="pt")
found = {"pixel_values": inputs["pixel_values"].flatten().tolist()}
found["code"] = type(processor.image_processor).__module__
try:
    model = AutoModelForImageTextToText.from_pretrained(sys.argv[2], trust_remote_code=True)
    found["ids"] = model.generate(**inputs, max_new_tokens=8).tolist()
except ImportError as error:
    found["error"] = str(error)
assert not any(name.split(".")[0] in ABSENT for name in sys.modules)
print("FOUND" + json.dumps(found))
"""


def test_published_code(folders, tmp_path):
    """A process without this package loads model and processor; one without open_clip too is told what to install."""
    clip, language = str(save_clip(tmp_path / "clip")), str(folders.language())
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(clip, language)
    tiny.randomise_ipn(model)
    processor = LMEyeProcessor.from_vision_language_pretrained(clip, language)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    picture = tiny.picture(3, size=(50, 41))
    picture.save(tmp_path / "picture.png")
    inputs = processor(images=picture, text="what is the man doing?", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8).tolist()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    for absent in ("transformers_lmeye", "transformers_lmeye,open_clip"):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "picture.png"), str(tmp_path / "saved"), absent],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        found = json.loads(run.stdout.split("FOUND")[1])
        assert found["code"].startswith("transformers_modules.")
        assert found["pixel_values"] == inputs["pixel_values"].flatten().tolist()
        if "open_clip" in absent:
            assert "pip install open_clip_torch" in found["error"]
        else:
            assert found["ids"] == expected


def test_configurations(tmp_path):
    """Found by model type, and enough to build the tower from."""
    vision, text = load_open_clip_config(str(save_clip(tmp_path / "clip")))
    for config, model_class in ((vision, OpenCLIPVisionTower), (text, OpenCLIPTextEncoder)):
        config.save_pretrained(tmp_path / config.model_type)
        loaded = AutoConfig.from_pretrained(tmp_path / config.model_type)
        assert type(loaded) is type(config)
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert isinstance(AutoModel.from_config(loaded), model_class)
    assert (vision.hidden_size, vision.projection_dim) == (tiny.VISION_WIDTH, tiny.PROJECTION_WIDTH)
    assert (vision.image_size, vision.patch_size, vision.hidden_sizes) == (tiny.IMAGE_SIZE, tiny.PATCH_SIZE, None)
    defaults = OpenCLIPVisionConfig()
    assert (defaults.hidden_size, defaults.patch_size, defaults.image_size) == (768, 32, 224)
    # a class that is built from its own defaults is ViT-B-32
    shapes = {
        name: tensor.shape
        for name, tensor in open_clip.create_model("ViT-B-32", device="meta").visual.state_dict().items()
    }
    with torch.device("meta"):
        tower = OpenCLIPVisionTower(defaults)
    assert {name: tensor.shape for name, tensor in tower.visual.state_dict().items()} == shapes


def test_dtype_and_ignored_attention(tmp_path):
    folder = str(save_clip(tmp_path))
    exact = load_open_clip_tower(folder)(tiny.pixels(2)).image_embeds
    tower = load_open_clip_tower(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    found = tower(tiny.pixels(2)).image_embeds
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0)


# --- other towers --------------------------------------------------------------------------------------------------

# The published weights of open_clip are of these kinds.
TOWERS = {
    "layer-scale": {**VISION_CFG, "ls_init_value": 0.5},
    "average-pooled": {**VISION_CFG, "pool_type": "avg", "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"},
    "attention-pooled": {**VISION_CFG, "attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4},
    "normalised-queries": {**VISION_CFG, "qk_norm": True, "scale_attn": True},
    "no-first-norm": {**VISION_CFG, "no_ln_pre": True},
    "oblong": {**VISION_CFG, "image_size": [32, 48]},
    "dropped-patches": {**VISION_CFG, "patch_dropout": 0.5},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "timm-vit": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
    "timm-siglip": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
    "timm-relative": {"timm_model_name": "test_vit_relpos", "timm_pool": "avg", "image_size": 160},
    "timm-eva": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "image_size": 224},
    "timm-convnext": {"timm_model_name": "test_convnext", "timm_pool": "avg", "image_size": 160},
}


@pytest.mark.parametrize("kind", TOWERS)
def test_other_towers(kind, tmp_path):
    """Pooled feature and layers are open_clip's own, and survive saving: nothing is left uninitialised."""
    embed_dim = 96 if kind == "timm-siglip" else tiny.PROJECTION_WIDTH
    folder, model = save_random(tmp_path / "clip", TOWERS[kind], embed_dim=embed_dim)
    tower = load_open_clip_tower(str(folder))
    size = TOWERS[kind]["image_size"]
    pixel_values = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    tower.save_pretrained(tmp_path / "saved")
    reloaded = OpenCLIPVisionTower.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        found = tower(pixel_values, output_hidden_states=True)
        expected = model.visual(pixel_values)
        torch.testing.assert_close(found.image_embeds, expected, atol=1e-6, rtol=0)
        assert torch.equal(reloaded(pixel_values).image_embeds, found.image_embeds)
        assert torch.equal(tower(pixel_values).last_hidden_state, found.hidden_states[-1])
        is_map = kind in ("resnet", "timm-convnext")
        layers = model.visual.forward_intermediates(pixel_values, output_fmt="NCHW" if is_map else "NLC")
    layers = layers["image_intermediates"]
    if kind == "dropped-patches":  # a frozen tower drops none
        again = tower.train()(pixel_values).image_embeds
        torch.testing.assert_close(again, found.image_embeds, atol=1e-5, rtol=0)
    config = tower.config
    assert expected.shape[-1] == config.projection_dim == embed_dim
    states = found.hidden_states
    if is_map:
        assert [layer.shape[1] for layer in layers] == config.hidden_sizes and config.patch_size is None
        expected_states = layers
    else:
        assert config.hidden_sizes is None and len(states) == len(layers) + 1
        rows, columns = pixel_values.shape[2] // config.patch_size, pixel_values.shape[3] // config.patch_size
        assert layers[0].shape[1:] == (rows * columns, config.hidden_size)
        expected_states, states = layers, [layer[:, -rows * columns :] for layer in states[1:]]
    for ours, theirs in zip(states, expected_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["timm-eva", "timm-convnext", "resnet"])
def test_lmeye_with_other_towers(kind, folders, tmp_path):
    """Patches of any layer, and whole checkpoints: what these do not hold (rotary positions) is computed anew."""
    folder, _ = save_random(tmp_path / "clip", TOWERS[kind])
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folder),
        str(folders.language()),
        interaction="cross_attention",
        vision_feature_layer=-2,
        **tiny.SMALL_STACK,
    )
    tiny.randomise_ipn(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "saved")
    batch = tiny.batch([tiny.row(model.config, "2 img 3 req 2")], "left")
    batch.pop("labels")
    size = TOWERS[kind]["image_size"]
    batch["pixel_values"] = torch.randn(1, 3, size, size)
    rows, columns = {"timm-eva": (16, 16), "timm-convnext": (10, 10), "resnet": (4, 4)}[kind]
    assert model.perceive(**batch).attention_maps.shape[-2:] == (rows, columns)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_embeddings_of_timm_towers(tmp_path):
    """Layer 0 is what the first block reads."""
    _, model = save_random(tmp_path, TOWERS["timm-eva"])
    tower = load_open_clip_tower(str(tmp_path))
    trunk, pixel_values = model.visual.trunk, torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        states = tower(pixel_values, output_hidden_states=True).hidden_states
        expected = trunk.blocks[0](states[0], rope=trunk.rope.get_embed())
    torch.testing.assert_close(states[1], expected, atol=1e-6, rtol=0)


def test_a_tower_without_layers(tmp_path, monkeypatch):
    """A pooled feature is still a pooled feature."""
    folder, model = save_random(tmp_path, TOWERS["timm-convnext"])
    monkeypatch.delattr(type(model.visual.trunk), "forward_intermediates")
    tower, pixel_values = load_open_clip_tower(str(folder)), torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixel_values).image_embeds, model.visual(pixel_values))
    with pytest.raises(
        ValueError, match=r'test_convnext returns its pooled feature alone.*fine_grained_source="global"'
    ):
        tower(pixel_values, output_hidden_states=True)


def test_a_tower_without_pooled_feature(tmp_path):
    write_config(tmp_path, {**VISION_CFG, "pool_type": "none"})
    with pytest.raises(ValueError, match="has no pooled output of width 24"):
        load_open_clip_config(str(tmp_path))


TEXT_TOWERS = {
    "its text tower is roberta-base": {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"},
    "no causal mask": {**TEXT_CFG, "no_causal_mask": True, "pool_type": "last"},
    "class token behind the text": {**TEXT_CFG, "embed_cls": True},
    "another tokenizer": {**TEXT_CFG, "hf_tokenizer_name": "google/mt5-base", "pool_type": "eos"},
}


@pytest.mark.parametrize("reason", TEXT_TOWERS)
def test_other_text_towers(reason, tmp_path, folders):
    """They leave the vision tower usable; the error names why and what to do."""
    folder = str(write_config(tmp_path, text_cfg=TEXT_TOWERS[reason]))
    state = open_clip_state_dict(transformers_clip())
    save_file(
        {name: value for name, value in state.items() if name.startswith("visual.")}, tmp_path / "model.safetensors"
    )
    vision, text = load_open_clip_config(folder)
    assert text is None and reason in open_clip_text_problem(folder)
    assert load_open_clip_tower(folder, vision)(tiny.pixels(1)).image_embeds.shape == (1, tiny.PROJECTION_WIDTH)
    for build in (
        lambda: load_open_clip_text_encoder(folder),
        lambda: OpenCLIPTextEncoder(OpenCLIPTextConfig(text_cfg=TEXT_TOWERS[reason])),
        lambda: LMEyeForConditionalGeneration.from_vision_language_pretrained(folder, str(folders.language())),
    ):
        with pytest.raises(ValueError, match=rf"{reason}.*clip_text_model_name_or_path"):
            build()


def test_text_tower_of_another_clip(tmp_path, folders):
    """An open_clip model serves as text encoder of any vision tower."""
    clip = str(save_clip(tmp_path))
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folders.vision()), str(folders.language()), clip_text_model_name_or_path=clip
    )
    assert isinstance(model.ipn.interaction, OpenCLIPTextEncoder)
    assert model.config.backbones["clip_text"]["name_or_path"] == clip
    expected = load_open_clip_text_encoder(clip).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.ipn.interaction.state_dict().items())


# --- names and files -----------------------------------------------------------------------------------------------


def test_is_open_clip(tmp_path, folders):
    assert all(map(is_open_clip, ("open_clip:ViT-B-32/openai", "open_clip:ViT-B-32", "hf-hub:a/b", "local-dir:a")))
    assert not any(map(is_open_clip, ("openai/clip-vit-base-patch32", str(tmp_path), str(folders.vision()))))
    both = write_config(tmp_path / "both")
    assert is_open_clip(str(both)) and is_open_clip(both)
    (both / "config.json").write_text('{"architecture": "vit_base"}')  # timm's
    assert is_open_clip(str(both))
    (both / "config.json").write_text('{"model_type": "clip"}')
    assert not is_open_clip(str(both)) and is_open_clip(f"local-dir:{both}")


@pytest.mark.parametrize(
    "name", ["hf-hub:tiny/clip", "open_clip:hf-hub:tiny/clip", "open_clip:Tiny-8/digits", "open_clip:Tiny-8/named"]
)
def test_hub_names(name, tmp_path, architecture):
    """Found in the hub's cache, whose arguments are handed on; equal to the same CLIP in a folder."""
    hub = {"cache_dir": str(architecture), "local_files_only": True}
    tower = load_open_clip_tower(name, **hub)
    assert tower.config.quick_gelu is (name != "open_clip:Tiny-8/named")  # the tag knows better than the architecture
    if tower.config.quick_gelu:
        expected = load_open_clip_tower(str(tmp_path / "files"))
        assert torch.equal(tower(tiny.pixels(1)).image_embeds, expected(tiny.pixels(1)).image_embeds)
    assert load_open_clip_text_encoder(name, **hub).config.eos_token_id == 59
    commit = COMMIT if "hf-hub" in name else None
    assert load_open_clip_config(name, **hub)[0]._commit_hash == commit
    assert open_clip_weight_file(name, revision=COMMIT, **hub).parent.name == COMMIT
    assert open_clip_local_path(name) is None
    with pytest.raises(OSError):
        load_open_clip_tower(name, cache_dir=str(tmp_path / "empty"), local_files_only=True)
    with pytest.raises(OSError):
        open_clip_weight_file(name, revision="f" * 40, **hub)


def test_weight_files(tmp_path, architecture):
    """An architecture with a file, in each format open_clip writes; a training checkpoint counts like its tensors."""
    state = open_clip_state_dict(transformers_clip())
    plain, training, named = (tmp_path / name for name in ("plain.bin", "epoch_3.pt", "text.pt"))
    torch.save(state, plain)
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, training)
    moved = {name if name.startswith(("visual.", "logit")) else f"text.{name}": value for name, value in state.items()}
    torch.save(moved, named)
    expected = load_open_clip_tower(f"open_clip:Tiny-8/{tmp_path / 'files' / 'open_clip_model.safetensors'}")
    expected_text = load_open_clip_text_encoder(str(tmp_path / "files")).state_dict()
    for file in (plain, training, named):
        name = f"open_clip:Tiny-8/{file}"
        assert is_open_clip(name) and open_clip_local_path(name) == file
        assert weight_files(name) == [file]
        found = load_open_clip_tower(name).state_dict()
        assert found.keys() == expected.state_dict().keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.state_dict().items())
        found = load_open_clip_text_encoder(name).state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected_text.items())
    same = {fingerprint(f"open_clip:Tiny-8/{file}")["sampled"] for file in (plain, training)}
    assert same == {fingerprint(str(tmp_path / "files"))["sampled"]}
    state["visual.proj"] = state["visual.proj"] * 1.01
    torch.save(state, plain)
    assert fingerprint(f"open_clip:Tiny-8/{plain}")["sampled"] not in same


def test_positions_of_another_resolution(tmp_path, architecture, monkeypatch):
    """Resized as open_clip resizes them."""
    wider = {**VISION_CFG, "image_size": 48}
    cfg = {"embed_dim": tiny.PROJECTION_WIDTH, "vision_cfg": wider, "text_cfg": {**TEXT_CFG, "context_length": 30}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-8-48", cfg)
    file = tmp_path / "files" / "open_clip_model.safetensors"
    tower = load_open_clip_tower(f"open_clip:Tiny-8-48/{file}")
    encoder = load_open_clip_text_encoder(f"open_clip:Tiny-8-48/{file}")
    model = open_clip.create_model("Tiny-8-48", pretrained=str(file))
    assert torch.equal(tower.visual.positional_embedding, model.visual.positional_embedding)
    assert torch.equal(encoder.text.positional_embedding, model.positional_embedding)


def test_files_of_a_folder(tmp_path):
    """Those open_clip prefers, else the only one."""
    folder = save_clip(tmp_path)
    first = folder / "open_clip_model.safetensors"
    others = [folder / name for name in ("open_clip_pytorch_model.bin", "pytorch_model.bin")]
    for file in others:
        file.write_bytes(b"")
    assert open_clip_weight_file(str(folder)) == first
    first.unlink()
    assert open_clip_weight_file(f"local-dir:{folder}") == others[0]
    others[0].unlink()
    assert open_clip_weight_file(str(folder)) == others[1]
    (folder / "second.pt").write_bytes(b"")
    with pytest.raises(OSError, match=r"holds no weights .*pytorch_model.bin \(one of 2\), second.pt \(one of 2\)"):
        open_clip_weight_file(str(folder))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("open_clip:Tiny-8", ValueError, "open_clip:Tiny-8 names no weights: .*Tags: digits, named"),
        ("open_clip:Tiny-8/digitz", ValueError, '"digitz" is neither a pretrained tag of Tiny-8 nor a weight file'),
        ("open_clip:Tiny-8//nowhere/weights.pt", ValueError, '"/nowhere/weights.pt" is neither'),
        ("open_clip:ViT-B/32", ValueError, 'no architecture "ViT-B"; similar ones: .*ViT-B-32'),
        ("local-dir:/nowhere", OSError, "open_clip_config.json"),
        ("hf-hub:tiny/other", OSError, "No open_clip_config.json of tiny/other .*named without hf-hub:"),
    ],
)
def test_wrong_names(name, error, message, architecture):
    hub = {"cache_dir": str(architecture), "local_files_only": True}
    for load in (load_open_clip_config, load_open_clip_tower, load_open_clip_text_encoder):
        with pytest.raises(error, match=message):
            load(name, **hub)


def test_wrong_files(tmp_path, architecture):
    clip = tmp_path / "files"
    with pytest.raises(ValueError, match="on this machine and has no revision"):
        load_open_clip_tower(str(clip), revision="main")
    state = open_clip_state_dict(transformers_clip())
    state["visual.extra"] = state.pop("visual.proj")
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"do not fit their architecture:\nleft over: visual.extra\nmissing: visual.proj"
    ):
        load_open_clip_tower(f"open_clip:Tiny-8/{tmp_path / 'other.pt'}")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(OSError, match=r"broken.safetensors is no weight file that open_clip reads"):
        load_open_clip_tower(f"open_clip:Tiny-8/{tmp_path / 'broken.safetensors'}")


def test_without_open_clip(tmp_path, monkeypatch):
    folder = str(save_clip(tmp_path))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for load in (load_open_clip_config, load_open_clip_tower, load_open_clip_text_encoder):
        for name in (folder, "open_clip:ViT-B-32/openai"):
            with pytest.raises(ImportError, match="pip install open_clip_torch"):
                load(name)
    for build in (
        lambda: OpenCLIPVisionTower(OpenCLIPVisionConfig()),
        lambda: OpenCLIPTextEncoder(OpenCLIPTextConfig()),
    ):
        with pytest.raises(ImportError, match="pip install open_clip_torch"):
            build()
