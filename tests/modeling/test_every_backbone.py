"""Every language model of transformers: the checks of examples/check_backbones.py, and what docs/backbones.md says."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig


ROOT = Path(__file__).parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("lmeye_check_backbones", ROOT / "examples" / "check_backbones.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


check_backbones = load_script()
from tiny_backbones import MODEL_TYPES, tiny_language_model  # noqa: E402, beside the script


# Models warn of their own configurations, kernels and masks.
pytestmark = pytest.mark.filterwarnings("ignore")

EVERY_TYPE = [(kind, name) for kind, names in MODEL_TYPES.items() for name in names]
REPRESENTATIVES = {
    "llama": "works",
    "mistral": "works",  # sliding window
    "gemma2": "works",  # soft-capped, every other layer slides
    "bloom": "works",  # ALiBi, no positions to be told
    "mixtral": "works",  # mixture of experts
    "gpt_bigcode": "works",  # one key and value for all heads
    "gemma3n_text": "works",  # layers given words of their own, shared keys and values
    "roberta": "works",  # positions behind the padding's; a head with a layer of its own
    "deepseek_v32": "works",  # index keys
    "bart": "works",  # an encoder-decoder's decoder, which cannot tell padding
    "jamba": "again",  # recurrent layers that take single words alone behind a cache
    "qwen3_next": "copy",  # linear and full attention
    "lfm2_moe": "copy",  # convolutions
    "mamba2": "copy",  # recurrent layers alone
    "openai-gpt": "again",  # no cache
    "xlnet": "again",  # looks both ways
}


def documented() -> dict[tuple[str, str], str]:
    """The status of each type in docs/backbones.md, by kind and type."""
    statuses = {text: name for name, text in check_backbones.STATUSES.items()}
    titles = {title: kind for kind, title in check_backbones.TITLES.items()}
    found, kind = {}, None
    for line in (ROOT / "docs" / "backbones.md").read_text().splitlines():
        if line.startswith("## "):
            kind = titles[line[3:]]
        if line.startswith("| `"):
            cells = line.split(" | ")
            names = re.findall("`(.+?)`", cells[0])
            found.update({(kind, name): statuses[cells[-2].removesuffix(", rows apart")] for name in names})
    return found


@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_representatives(model_type):
    found = check_backbones.check_type("causal", model_type)
    assert {"crop": "works"}.get(found["reads"], found["reads"]) == REPRESENTATIVES[model_type]
    assert documented()["causal", model_type] == REPRESENTATIVES[model_type]


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoders(model_type):
    assert check_backbones.check_type("seq2seq", model_type)["reads"] == "again"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model_type"), EVERY_TYPE)
def test_every_type(kind, model_type):
    expected = documented()[kind, model_type]
    if expected == "cannot":
        with pytest.raises(Exception):  # noqa: B017, each in its own way
            check_backbones.check_type(kind, model_type)
        return
    found = check_backbones.check_type(kind, model_type)
    assert {"crop": "works"}.get(found["reads"], found["reads"]) == expected


def test_the_document_has_every_type():
    assert set(documented()) == set(EVERY_TYPE)


def build(model_type: str):
    """LMEye around a tiny model, with one prompt and its image features."""
    language_model = tiny_language_model(model_type)
    language_model.generation_config = GenerationConfig(pad_token_id=0)
    model = check_backbones.build(language_model, "cross_attention")
    with torch.no_grad():
        features = model.get_image_features(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    ids, _ = check_backbones.row_of(model.config, "3 img 4 req 2", seed=0)
    return model, torch.tensor([ids]), features


PREFIX, WHOLE = 8, 13  # columns before the request; with 3 dynamic tokens and 2 words


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", [PREFIX + 1, WHOLE - PREFIX]),
        ("deepseek_v32", [PREFIX + 1, WHOLE - PREFIX]),
        ("qwen3_next", [PREFIX, 2, WHOLE - PREFIX]),
        ("mamba2", [PREFIX, 2, WHOLE - PREFIX]),
        ("jamba", [PREFIX + 1, WHOLE]),
    ],
)
def test_what_a_prompt_costs(model_type, expected):
    """Columns of each forward until the first new word; with a cache every further word is one."""
    model, ids, features = build(model_type)
    model.generate(input_ids=ids, image_features=features, max_new_tokens=1)  # what has to be tried is tried once
    widths = []
    layers = next(part for part in model.language_model.modules() if isinstance(part, torch.nn.ModuleList))

    def count(module, args, kwargs):
        widths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    layers[0].register_forward_pre_hook(count, with_kwargs=True)
    model.generate(input_ids=ids, image_features=features, max_new_tokens=3)
    assert widths == [*expected, 1, 1]


def test_no_cache_means_reading_everything():
    model, ids, features = build("openai-gpt")
    widths = []
    model.language_model.transformer.h[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    model.generate(input_ids=ids, image_features=features, max_new_tokens=3)
    assert widths == [PREFIX + 1, WHOLE, WHOLE + 1, WHOLE + 2]


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2", "jamba"])
def test_other_kinds_of_cache_are_refused(model_type):
    model, ids, features = build(model_type)
    with pytest.raises(ValueError, match="leave cache_implementation out"):
        model.generate(input_ids=ids, image_features=features, max_new_tokens=2, cache_implementation="static")


def test_a_chat_goes_on_behind_recurrent_states():
    """The second turn behind the cache of the first, left-padded rows included, as if all had been read at once."""
    model, first, features = build("qwen3_next")
    config = model.config
    shorter, _ = check_backbones.row_of(config, "1 img 2 req 2", seed=1)
    second, _ = check_backbones.row_of(config, "3 req 4", seed=2)
    rows = [(first[0].tolist(), first[0].tolist()), (shorter, shorter)]
    begin = check_backbones.batch_of(rows, "left")
    rows = [(ids + second, ids + second) for ids, _ in rows]
    whole = check_backbones.batch_of(rows, "left")
    features = features[torch.tensor([0, 0])]
    with torch.no_grad():
        past = model(begin["input_ids"], attention_mask=begin["attention_mask"], image_features=features)
        got = model(
            whole["input_ids"],
            attention_mask=whole["attention_mask"],
            image_features=features,
            past_key_values=past.past_key_values,
        ).logits
        expected = model(whole["input_ids"], attention_mask=whole["attention_mask"], image_features=features).logits
    expected = expected[:, -len(second) :]
    assert float((got[:, -len(second) :] - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_cache_that_is_of_no_use_is_refused():
    model, ids, features = build("jamba")
    with torch.no_grad():
        past = model(ids, image_features=features).past_key_values
    longer = torch.cat([ids, ids[:, :2]], dim=1)
    with pytest.raises(ValueError, match="leave past_key_values out"):
        model(longer, image_features=features, past_key_values=past)
    model, ids, features = build("mamba2")
    with torch.no_grad():
        past = model(ids, image_features=features).past_key_values
    with pytest.raises(ValueError, match="leave past_key_values out"):
        model(longer, image_features=features, past_key_values=past)


def test_outputs_of_rows_read_apart_do_not_fit_into_one():
    model, ids, features = build("bart")
    inputs = {"input_ids": torch.cat([ids, ids]), "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.long)}
    inputs["attention_mask"][1, :2] = 0
    features = features[torch.tensor([0, 0])]
    with pytest.raises(ValueError, match="one at a time"):
        model.generate(**inputs, image_features=features, max_new_tokens=2, return_dict_in_generate=True)
