"""Promise 6: whole and IPN-only checkpoints reload equal, and nothing is ever loaded onto other or random weights."""

import json
import re
import shutil

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transformers_lmeye import LMEyeForConditionalGeneration


INTERACTIONS = ["clip_text", "cross_attention", "none"]


def question(config):
    request = "" if config.interaction == "none" else "req "
    ids, _ = tiny.row(config, f"2 img 5 {request}2")
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": tiny.pixels(1),
    }


def answer(model) -> list[int]:
    return model.generate(**question(model.config), max_new_tokens=6)[0].tolist()


def assert_equal_weights(first, second) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def trained_names(model) -> set[str]:
    names = {f"ipn.{name}" for name, _ in model.ipn.named_parameters()}
    if model.config.interaction == "clip_text":
        names = {name for name in names if not name.startswith("ipn.interaction.")}
    return names


@pytest.fixture
def own_folders(folders, tmp_path):
    """Copies of the backbones that a test may spoil."""
    vision, language = tmp_path / "vision", tmp_path / "language"
    shutil.copytree(folders.vision(), vision)
    shutil.copytree(folders.language(), language)
    return vision, language


def attach(vision, language, interaction="cross_attention", **kwargs):
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(vision), str(language), interaction=interaction, **tiny.SMALL_STACK, **kwargs
    )
    tiny.randomise_ipn(model)
    return model


def test_backbones_are_loaded_as_published(folders):
    """The factory's backbones hold the folders' own tensors, and the IPN starts at the scale of word embeddings."""
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folders.vision()), str(folders.language("gpt2"))
    )
    clip = load_file(folders.vision() / "model.safetensors")
    for name, value in model.vision_tower.state_dict().items():
        assert torch.equal(value, clip[name]), name
    for name, value in model.ipn.interaction.state_dict().items():
        assert torch.equal(value, clip[name]), name
    words = tiny.language_model("gpt2").state_dict()
    for name, value in model.language_model.state_dict().items():
        assert torch.equal(value, words[name]), name
    scale = float(model.get_input_embeddings().weight.std())
    assert model.ipn.image_token.std().item() == pytest.approx(scale, rel=0.5)
    assert model.ipn.request_token.std().item() == pytest.approx(scale, rel=0.5)
    assert not model.training


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gpt2", "gemma2"])
def test_whole(build, tmp_path, family, interaction):
    model = build(family, interaction)
    model.save_pretrained(tmp_path)
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    assert not again.training
    assert_equal_weights(model, again)
    assert answer(again) == answer(model)
    assert again.config.to_dict() == {
        **model.config.to_dict(),
        "_name_or_path": again.config.to_dict().get("_name_or_path"),
    }
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    tied = model.language_model.config.tie_word_embeddings
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) is bool(tied)


def test_sharded(build, tmp_path):
    model = build("bloom")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    assert_equal_weights(model, again)
    assert answer(again) == answer(model)


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("family", ["llama", "opt_projected", "mpt"])
def test_interactive_perception_network_alone(build, tmp_path, family, interaction):
    model = build(family, interaction)
    model.save_pretrained(tmp_path, save_backbones=False)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    assert [path.name for path in files] == ["model.safetensors"]
    with safe_open(files[0], "pt") as stored:
        assert set(stored.keys()) == trained_names(model)
    size = files[0].stat().st_size
    header = 8 + int.from_bytes(files[0].read_bytes()[:8], "little")
    trained = sum(p.numel() for name, p in model.named_parameters() if name in trained_names(model))
    assert size - header == 4 * trained, "the IPN's bytes and no more"
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    assert not again.training
    assert_equal_weights(model, again)
    assert answer(again) == answer(model)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


def test_where_the_backbones_came_from(folders, build, tmp_path):
    build().save_pretrained(tmp_path, save_backbones=False)
    backbones = json.loads((tmp_path / "config.json").read_text())["backbones"]
    assert backbones["vision"]["name_or_path"] == str(folders.vision())
    assert backbones["language"]["name_or_path"] == str(folders.language())
    for role in ("vision", "language"):
        assert set(backbones[role]) >= {"name_or_path", "revision", "fingerprint"}


def test_saving_alone_and_whole_again(build, tmp_path):
    """What was loaded from an IPN alone can be saved whole, and the other way round."""
    model = build()
    model.save_pretrained(tmp_path / "alone", save_backbones=False)
    alone = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "alone")
    alone.save_pretrained(tmp_path / "whole")
    whole = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert_equal_weights(model, whole)
    whole.save_pretrained(tmp_path / "alone-again", save_backbones=False)
    assert_equal_weights(model, LMEyeForConditionalGeneration.from_pretrained(tmp_path / "alone-again"))


def test_other_locations(own_folders, tmp_path):
    vision, language = own_folders
    model = attach(vision, language)
    expected = answer(model)
    model.save_pretrained(tmp_path / "ipn", save_backbones=False)
    moved = vision.rename(tmp_path / "elsewhere-vision"), language.rename(tmp_path / "elsewhere-language")
    with pytest.raises(OSError, match=r"vision_model_name_or_path"):
        LMEyeForConditionalGeneration.from_pretrained(tmp_path / "ipn")
    with pytest.raises(OSError, match=r"language_model_name_or_path"):
        LMEyeForConditionalGeneration.from_pretrained(tmp_path / "ipn", vision_model_name_or_path=str(moved[0]))
    again = LMEyeForConditionalGeneration.from_pretrained(
        tmp_path / "ipn", vision_model_name_or_path=str(moved[0]), language_model_name_or_path=str(moved[1])
    )
    assert_equal_weights(model, again)
    assert answer(again) == expected


def retrain(folder, name: str, size: float = 1e-3) -> None:
    tensors = load_file(folder / "model.safetensors")
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    tensors[name] = tensors[name] + size * noise * max(float(tensors[name].abs().mean()), 0.1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("role", ["vision", "language"])
def test_a_retrained_backbone_is_refused(own_folders, tmp_path, role):
    """Whatever tensor of it was trained, and however little."""
    model = attach(*own_folders)
    model.save_pretrained(tmp_path / "ipn", save_backbones=False)
    folder = dict(zip(("vision", "language"), own_folders, strict=True))[role]
    original = (folder / "model.safetensors").read_bytes()
    names = [name for name, value in load_file(folder / "model.safetensors").items() if value.dim()]
    assert len(names) > 15
    for name in names:
        retrain(folder, name)
        with pytest.raises(ValueError, match=rf"{role} model .* is not the one .*{role}_model_name_or_path"):
            LMEyeForConditionalGeneration.from_pretrained(tmp_path / "ipn")
        (folder / "model.safetensors").write_bytes(original)
    assert_equal_weights(model, LMEyeForConditionalGeneration.from_pretrained(tmp_path / "ipn"))


def test_another_model_of_the_same_shape_is_refused(own_folders, folders, tmp_path):
    attach(*own_folders).save_pretrained(tmp_path / "ipn", save_backbones=False)
    with pytest.raises(ValueError, match="is not the one this IPN was trained on"):
        LMEyeForConditionalGeneration.from_pretrained(
            tmp_path / "ipn", language_model_name_or_path=str(folders.language("llama", seed=1))
        )
    with pytest.raises(ValueError, match="is not the one this IPN was trained on"):
        LMEyeForConditionalGeneration.from_pretrained(
            tmp_path / "ipn", vision_model_name_or_path=str(folders.vision(seed=1))
        )


@pytest.mark.parametrize("change", ["sharded", "bfloat16", "pytorch_bin"])
def test_the_same_weights_in_other_files_are_taken(own_folders, tmp_path, change):
    """A fingerprint is of weights, not of files: shards, half precision and format do not change it."""
    vision, language = own_folders
    model = attach(vision, language)
    model.save_pretrained(tmp_path / "ipn", save_backbones=False)
    plain = tiny.language_model("llama")
    shutil.rmtree(language)
    if change == "sharded":
        plain.save_pretrained(language, max_shard_size="30KB")
        assert len(list(language.glob("*.safetensors"))) > 1
    elif change == "bfloat16":
        plain.to(torch.bfloat16).save_pretrained(language)
    else:
        plain.save_pretrained(language)
        (language / "model.safetensors").unlink()
        torch.save(plain.state_dict(), language / "pytorch_model.bin")
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "ipn", dtype=torch.float32)
    if change != "bfloat16":
        assert_equal_weights(model, again)


@pytest.mark.parametrize("damage", ["missing", "left over", "shape"])
def test_incomplete_weights_are_refused(build, tmp_path, damage):
    build().save_pretrained(tmp_path, save_backbones=False)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors["ipn.request_projection.weight"]
    elif damage == "left over":
        tensors["ipn.surplus.weight"] = torch.zeros(2)
    else:
        tensors["ipn.request_projection.weight"] = torch.zeros(3, 4)
    save_file(tensors, path, metadata={"format": "pt"})
    name = "ipn.surplus.weight" if damage == "left over" else "ipn.request_projection.weight"
    with pytest.raises(ValueError, match=re.escape(name)):
        LMEyeForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["ipn.request_token", "language_model.model.layers.0.mlp.up_proj.weight"])
def test_a_whole_that_lacks_weights_is_refused(build, tmp_path, name):
    build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(name)):
        LMEyeForConditionalGeneration.from_pretrained(tmp_path)


def test_the_parts_of_a_whole_cannot_be_replaced(build, folders, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds its backbones"):
        LMEyeForConditionalGeneration.from_pretrained(
            tmp_path, language_model_name_or_path=str(folders.language("opt"))
        )


@pytest.mark.parametrize("save_backbones", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(build, tmp_path, dtype, save_backbones):
    """Backbones in half precision, the IPN in float32, before and after a round trip."""
    model = build("llama", "cross_attention", dtype=dtype)
    model.save_pretrained(tmp_path, save_backbones=save_backbones)
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    for loaded in (model, again):
        assert {p.dtype for p in loaded.language_model.parameters()} == {dtype}
        assert {p.dtype for p in loaded.vision_tower.parameters()} == {dtype}
        assert {p.dtype for p in loaded.ipn.parameters()} == {torch.float32}
    assert_equal_weights(model, again)
    assert answer(again) == answer(model)


@pytest.mark.parametrize("save_backbones", [True, False])
def test_attention_and_devices_reach_both_backbones(build, tmp_path, save_backbones):
    model = build("llama", "clip_text", attn_implementation="eager", device_map="cpu")

    def kinds(loaded):
        return [part.config._attn_implementation for part in loaded.backbones()]

    assert kinds(model) == ["eager"] * 3
    assert kinds(build("llama", "clip_text", attn_implementation="sdpa")) == ["sdpa"] * 3
    model.save_pretrained(tmp_path, save_backbones=save_backbones)
    again = LMEyeForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", device_map={"": "cpu"}
    )
    assert kinds(again) == ["eager"] * 3
    assert answer(again) == answer(model)


def test_backbones_options_by_prefix(folders):
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(folders.vision()),
        str(folders.language()),
        vision_dtype=torch.bfloat16,
        language_attn_implementation="eager",
        fine_grained_dropout=0.25,
    )
    assert model.vision_tower.dtype == torch.bfloat16 and model.language_model.dtype == torch.float32
    assert model.language_model.config._attn_implementation == "eager"
    assert model.config.fine_grained_dropout == 0.25


def test_generation_config_of_the_language_model(folders, tmp_path):
    """A chat model's list of eos ids and its sampling settings come along, and stay over a round trip."""
    chat = {"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True, "max_length": 77}
    model = attach(folders.vision(), folders.language("llama", generation=chat))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "ipn", save_backbones=False)
    for loaded in (
        model,
        LMEyeForConditionalGeneration.from_pretrained(tmp_path / "whole"),
        LMEyeForConditionalGeneration.from_pretrained(tmp_path / "ipn"),
    ):
        for name, value in chat.items():
            assert getattr(loaded.generation_config, name) == value


class Hub:
    """Keeps what would be uploaded."""

    uploads: list[dict]

    def __init__(self, **kwargs):
        pass

    def create_repo(self, repo_id, **kwargs):
        from types import SimpleNamespace

        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id, folder_path, **kwargs):
        from pathlib import Path

        self.uploads.append({path.name: path.read_bytes() for path in Path(folder_path).rglob("*") if path.is_file()})


def test_publishing(build, monkeypatch):
    """Code, weights, configuration and a model card go up; an IPN whose backbones only this disk has does not."""
    from transformers_lmeye.modeling import backbones

    monkeypatch.setattr(Hub, "uploads", [], raising=False)
    monkeypatch.setattr(backbones, "HfApi", Hub)
    model = build()
    with pytest.raises(ValueError, match=r"local folder .*save_backbones=True"):
        model.push_to_hub("someone/eyes", save_backbones=False)
    assert Hub.uploads == []
    model.push_to_hub("someone/eyes")
    (files,) = Hub.uploads
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= files.keys()
    assert {"configuration_lmeye.py", "modeling_lmeye.py"} <= files.keys()
    assert not any(b"transformers_lmeye" in code for name, code in files.items() if name.endswith(".py"))


def test_publishing_an_ipn_of_published_backbones(build, monkeypatch):
    from transformers_lmeye.modeling import backbones

    monkeypatch.setattr(Hub, "uploads", [], raising=False)
    monkeypatch.setattr(backbones, "HfApi", Hub)
    model = build()
    model.config.backbones["vision"]["name_or_path"] = "openai/clip-vit-large-patch14"
    model.config.backbones["language"]["name_or_path"] = "facebook/opt-iml-1.3b"
    model.push_to_hub("someone/eyes", save_backbones=False)
    card = Hub.uploads[0]["README.md"].decode()
    _, front_matter, text = card.split("---\n", 2)
    for base in ("openai/clip-vit-large-patch14", "facebook/opt-iml-1.3b"):
        assert f"- {base}" in front_matter and base in text
    assert "base_model:" in front_matter and "license:" in front_matter and "image-text-to-text" in front_matter
    for word in ("bias", "toxic", "made up", "icence"):
        assert word in " ".join(text.split())


def test_weights_without_a_source_cannot_be_saved_alone(build, tmp_path):
    model = build()
    bare = LMEyeForConditionalGeneration(model.config)
    bare.config.backbones = None
    with pytest.raises(ValueError, match="from_vision_language_pretrained"):
        bare.save_pretrained(tmp_path, save_backbones=False)
    assert not list(tmp_path.iterdir())
