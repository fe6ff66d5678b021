"""Promise 6: whole and IPN-only checkpoints reload equal, and nothing is ever loaded onto other or random weights."""

import json
import re
import shutil
from pathlib import Path

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
    """Keeps what would be uploaded, and how the hub was asked."""

    uploads: list[dict]
    calls: list[dict]

    def __init__(self, **kwargs):
        self.calls.append(kwargs)

    def create_repo(self, repo_id, **kwargs):
        from types import SimpleNamespace

        self.calls.append({"repo_id": repo_id, **kwargs})
        return SimpleNamespace(repo_id=f"someone/{repo_id.split('/')[-1]}")

    def upload_folder(self, repo_id, folder_path, allow_patterns=None, **kwargs):
        from huggingface_hub.utils import filter_repo_objects

        self.calls.append({"repo_id": repo_id, **kwargs})
        paths = [path.relative_to(folder_path) for path in Path(folder_path).rglob("*") if path.is_file()]
        paths = filter_repo_objects(map(str, paths), allow_patterns=allow_patterns)
        self.uploads.append({path: Path(folder_path, path).read_bytes() for path in paths})


def test_publishing(build, monkeypatch):
    """Code, weights, configuration and a model card go up; an IPN whose backbones only this disk has does not."""
    from transformers_lmeye.modeling import backbones

    monkeypatch.setattr(Hub, "uploads", [], raising=False)
    monkeypatch.setattr(Hub, "calls", [], raising=False)
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
    monkeypatch.setattr(Hub, "calls", [], raising=False)
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


def test_saving_and_publishing_at_once(build, monkeypatch, tmp_path):
    """The folder is written as without publishing; what was written goes up, with every argument passed on."""
    from transformers_lmeye.modeling import backbones

    monkeypatch.setattr(Hub, "uploads", [], raising=False)
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    monkeypatch.setattr(backbones, "HfApi", Hub)
    model, folder = build(), tmp_path / "eyes"
    folder.mkdir()
    (folder / "notes.txt").write_text("not the model's")
    with pytest.raises(ValueError, match=r"local folder .*save_backbones=True"):
        model.save_pretrained(folder, save_backbones=False, push_to_hub=True)
    assert Hub.calls == [] and [path.name for path in folder.iterdir()] == ["notes.txt"]
    model.save_pretrained(
        folder,
        push_to_hub=True,
        max_shard_size="20KB",
        private=True,
        token="secret",
        commit_message="Eyes",
        revision="v2",
        create_pr=True,
    )
    login, repository, upload = Hub.calls
    assert login == {"token": "secret"}
    assert repository == {"repo_id": "eyes", "private": True, "exist_ok": True}
    patterns = upload.pop("delete_patterns")
    assert upload == {"repo_id": "someone/eyes", "commit_message": "Eyes", "revision": "v2", "create_pr": True}
    assert "model.safetensors" in patterns, "a file of one kind would be found before the shards of the other"
    here = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert Hub.uploads == [{name: content for name, content in here.items() if name != "notes.txt"}]
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_equal_weights(model, LMEyeForConditionalGeneration.from_pretrained(folder))


@pytest.mark.parametrize("first", ["whole", "sharded", "alone"])
@pytest.mark.parametrize("second", ["whole", "sharded", "alone"])
def test_saving_one_kind_over_another(build, tmp_path, first, second):
    """The folder holds the last save alone, its card included; a card that somebody wrote stays."""
    kinds = {"whole": {}, "sharded": {"max_shard_size": "20KB"}, "alone": {"save_backbones": False}}
    model = build()
    model.save_pretrained(tmp_path / "fresh", **kinds[second])
    model.save_pretrained(tmp_path / "used", **kinds[first])
    tiny.randomise_ipn(model)
    model.save_pretrained(tmp_path / "used", **kinds[second])
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("fresh", "used")]
    assert names[0] == names[1]
    cards = [(tmp_path / name / "README.md").read_text() for name in ("fresh", "used")]
    assert cards[0] == cards[1]
    assert_equal_weights(model, LMEyeForConditionalGeneration.from_pretrained(tmp_path / "used"))
    (tmp_path / "used" / "README.md").write_text(cards[0] + "Mine.\n")
    model.save_pretrained(tmp_path / "used", **kinds[first])
    assert (tmp_path / "used" / "README.md").read_text() == cards[0] + "Mine.\n"


@pytest.mark.parametrize("save_backbones", [True, False])
def test_given_tensors_and_other_processes(build, tmp_path, save_backbones):
    """Training split over processes saves the tensors it gathered, from one process."""
    model = build()
    model.save_pretrained(tmp_path, is_main_process=False, save_backbones=save_backbones)
    assert not list(tmp_path.iterdir())
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gathered["ipn.request_token"] += 1.0
    model.save_pretrained(tmp_path, state_dict=dict(gathered), save_backbones=save_backbones)
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.ipn.request_token, model.ipn.request_token + 1.0)
    if not save_backbones:
        model.save_pretrained(
            tmp_path, state_dict={"ipn.request_token": gathered["ipn.request_token"]}, save_backbones=False
        )
        assert load_file(tmp_path / "model.safetensors").keys() == {"ipn.request_token"}
        with pytest.raises(TypeError, match="variant"):
            model.save_pretrained(tmp_path, save_backbones=False, variant="fp16")


@pytest.mark.parametrize("save_backbones", [True, False])
def test_arguments_of_loading(build, tmp_path, save_backbones):
    """Both kinds take configuration fields and `output_loading_info`, and neither takes what it does not know."""
    model = build("llama", "clip_text")
    model.save_pretrained(tmp_path, save_backbones=save_backbones)
    load = LMEyeForConditionalGeneration.from_pretrained
    again = load(tmp_path, fine_grained_dropout=0.2, num_request_rounds=2)
    assert (again.config.fine_grained_dropout, again.config.num_request_rounds) == (0.2, 2)
    assert again.train().ipn.training and 0.2 in {m.p for m in again.modules() if isinstance(m, torch.nn.Dropout)}
    again, info = load(tmp_path, output_loading_info=True)
    assert_equal_weights(model, again)
    assert info.keys() >= {"missing_keys", "unexpected_keys", "mismatched_keys"} and not any(info.values())
    with pytest.raises(TypeError, match="num_request_rouns"):
        load(tmp_path, num_request_rouns=2)
    with pytest.raises(ValueError, match="holds no adapter"):
        load(tmp_path, is_trainable=True)
    if save_backbones:
        with pytest.raises(TypeError, match=r"vision_dtype: .* holds its backbones"):
            load(tmp_path, vision_dtype=torch.bfloat16)
    else:
        assert load(tmp_path, vision_dtype=torch.bfloat16).vision_tower.dtype == torch.bfloat16


# PEFT reads a property that the library deprecates.
ignore_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def with_adapter(model, targets=("q_proj", "v_proj"), **kwargs):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=list(targets))
    model.language_model = peft.get_peft_model(model.language_model, config, **kwargs)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**question(model.config)).logits


def adapter_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if "lora_" in name and parameter.requires_grad}


@ignore_peft
@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_of_the_language_model(build, tmp_path, name):
    """It lies beside the IPN, under the same fingerprints, and comes back attached: frozen, or trainable if asked."""
    model = build()
    plain = logits(model)
    model.save_pretrained(tmp_path / "plain", save_backbones=False)
    with_adapter(model, adapter_name=name)
    expected = logits(model)
    assert (expected - plain).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "ipn", save_backbones=False)
    assert {path.name for path in (tmp_path / "ipn" / "language_adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("plain", "ipn")]
    assert configs[0] == configs[1]
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "ipn")
    assert torch.equal(logits(again), expected) and not again.training
    assert not adapter_names(again)
    trainable = LMEyeForConditionalGeneration.from_pretrained(tmp_path / "ipn", is_trainable=True)
    assert torch.equal(logits(trainable), expected)
    assert adapter_names(trainable) == {n for n, _ in trainable.named_parameters() if "lora_" in n} != set()
    assert not any(p.requires_grad for n, p in trainable.language_model.named_parameters() if "lora_" not in n)
    model.language_model = model.language_model.unload()
    model.save_pretrained(tmp_path / "ipn", save_backbones=False)
    assert not (tmp_path / "ipn" / "language_adapter").exists()
    assert torch.equal(logits(LMEyeForConditionalGeneration.from_pretrained(tmp_path / "ipn")), plain)


@ignore_peft
def test_an_adapter_from_the_hub(build, tmp_path):
    """Out of the hub's cache, where files are links and a revision is a folder."""
    model = with_adapter(build())
    repository, commit = tmp_path / "models--someone--eyes", "0" * 40
    model.save_pretrained(repository / "snapshots" / commit, save_backbones=False)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    again = LMEyeForConditionalGeneration.from_pretrained(
        "someone/eyes", revision="v2", cache_dir=tmp_path, local_files_only=True
    )
    assert torch.equal(logits(again), logits(model))


@ignore_peft
def test_an_adapter_that_the_library_attached(build, tmp_path):
    """`add_adapter` of transformers is PEFT without its wrapper; its files come back the same way."""
    peft = pytest.importorskip("peft")
    from transformers_lmeye.modeling.backbones import restore_adapter

    model = build()
    model.language_model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model)
    with pytest.raises(ValueError, match="save_backbones=False"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, save_backbones=False)
    assert torch.equal(logits(LMEyeForConditionalGeneration.from_pretrained(tmp_path)), expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(2.0 if "lora_" in name else 1.0)
    assert not torch.equal(logits(model), expected)
    restore_adapter(model.language_model, tmp_path / "language_adapter")
    assert torch.equal(logits(model), expected)


@ignore_peft
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_an_adapter_of_the_embeddings(build, tmp_path):
    """PEFT saves the embeddings themselves along with it."""
    model = with_adapter(build(), targets=["embed_tokens", "v_proj"])
    model.save_pretrained(tmp_path, save_backbones=False)
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


@ignore_peft
def test_an_adapter_given_as_tensors(build, tmp_path):
    model = with_adapter(build())
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in gathered:
        gathered[name] += 1.0 if "lora_B" in name else 0.0
    model.save_pretrained(tmp_path, state_dict=gathered, save_backbones=False)
    again = LMEyeForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, gathered[name]) for name, tensor in again.items())


@ignore_peft
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("damage", ["missing", "left over"])
def test_an_incomplete_adapter_is_refused(build, tmp_path, damage):
    with_adapter(build()).save_pretrained(tmp_path, save_backbones=False)
    path = tmp_path / "language_adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    value = tensors.pop(name) if damage == "missing" else tensors[name]
    if damage == "left over":
        name = name.replace("q_proj", "o_proj")
        tensors[name] = value.clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{damage}: {re.escape(name)}"):
        LMEyeForConditionalGeneration.from_pretrained(tmp_path)


@ignore_peft
def test_a_whole_with_an_unmerged_adapter_is_refused(build, monkeypatch, tmp_path):
    from transformers_lmeye.modeling import backbones

    monkeypatch.setattr(Hub, "uploads", [], raising=False)
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    monkeypatch.setattr(backbones, "HfApi", Hub)
    model = with_adapter(build())
    expected = logits(model)
    remedies = r"merge_and_unload\(\).*save_backbones=False"
    with pytest.raises(ValueError, match=remedies):
        model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=remedies):
        model.push_to_hub("someone/eyes")
    assert not (tmp_path / "whole").exists() and Hub.calls == []
    model.language_model.add_adapter("second", model.language_model.peft_config["default"])
    with pytest.raises(ValueError, match=r"default, second, .*delete_adapter"):
        model.save_pretrained(tmp_path / "ipn", save_backbones=False)
    assert not (tmp_path / "ipn").exists()
    model.language_model = model.language_model.merge_and_unload()
    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(LMEyeForConditionalGeneration.from_pretrained(tmp_path / "whole")), expected)


@ignore_peft
def test_an_adapter_needs_peft(build, monkeypatch, tmp_path):
    import sys

    with_adapter(build()).save_pretrained(tmp_path, save_backbones=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"language_adapter holds a PEFT adapter .*: pip install peft"):
        LMEyeForConditionalGeneration.from_pretrained(tmp_path)
