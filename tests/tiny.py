"""Tiny random backbones, tokenizers and inputs for the tests. Nothing here touches the network.

Every width differs from every other (vision 32, CLIP text 40, CLIP projection 24, language model 48, interaction 28),
so that a mixed-up width cannot pass unnoticed. Weights are drawn at a gain of about one, so that activations are of
order one and the words of a generated text vary.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTImageProcessor,
)


REFERENCE_DATA = Path(__file__).parents[2] / "shared" / "reference"
"""Data made by others, which a clone elsewhere lacks."""

VISION_WIDTH, CLIP_TEXT_WIDTH, PROJECTION_WIDTH, TEXT_WIDTH = 32, 40, 24, 48
IMAGE_SIZE, PATCH_SIZE = 32, 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
TABLE_ROWS = 99
TOKENIZER_LENGTH = 90  # shorter than the table, as in OPT and BLOOM
FIRST_WORD = 4  # ids below are <pad>, <s>, </s>, <unk>

_COMMON = {"vocab_size": TABLE_ROWS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_OPT_LIKE = {
    "hidden_size": TEXT_WIDTH,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
# The ten families; "opt_projected" is OPT-350M's shape, whose embeddings are narrower than its hidden states.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "opt": ("opt", _OPT_LIKE),
    "opt_projected": ("opt", {**_OPT_LIKE, "word_embed_proj_dim": 36, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"hidden_size": TEXT_WIDTH, "n_layer": 2, "n_head": 4}),
    "mpt": (
        "mpt",
        {
            "d_model": TEXT_WIDTH,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 256,
            "expansion_ratio": 2,
            "use_cache": True,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": TEXT_WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            **_LLAMA_LIKE,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "final_logit_softcapping": 4.0,
            "attn_logit_softcapping": 3.0,
        },
    ),
    "cohere": ("cohere", {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "granite": (
        "granite",
        {
            **_LLAMA_LIKE,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.4,
        },
    ),
}
FAMILIES = tuple(_CONFIGS)
# Draws and scales under which the words a family generates vary: with tied tables a strong embedding repeats itself.
_SEEDS = {"gpt2": 3, "mpt": 2, "opt": 3, "opt_projected": 1, "gpt_neox": 1}
_TABLES = {"gemma2": 0.1, "opt_projected": 0.5}


def randomise(model: torch.nn.Module, seed: int, gain: float = 1.5, table: float = 0.25) -> None:
    """Draw all parameters anew: matrices at `gain` / sqrt(fan-in), embeddings at `table`, vectors near their start."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            elif id(parameter) in tables:
                parameter.copy_(table * noise)
            else:
                parameter.copy_(noise * gain / (parameter[0].numel() ** 0.5))


# Sizes of the cross-attention stack, none of them another part's.
SMALL_STACK = {
    "interaction_hidden_size": 28,
    "interaction_num_layers": 2,
    "interaction_num_heads": 2,
    "interaction_intermediate_size": 52,
}


def randomise_ipn(model: Any, seed: int = 11) -> None:
    """Draw the IPN's own parameters anew (CLIP's text encoder apart), so that no part starts without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.ipn.named_parameters():
            if model.config.interaction == "clip_text" and name.startswith("interaction."):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name in ("image_token", "request_token", "dynamic_token"):
                parameter.copy_(0.3 * noise)
            elif name.endswith("queries"):
                parameter.copy_(noise)
            elif parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                outermost = name.startswith(("visual_mapping.weight", "visual_mapping.output", "dynamic_projection"))
                parameter.copy_(noise * (0.4 if outermost else 1.0) / parameter.shape[1] ** 0.5)


def language_config(family: str, **overrides: Any):
    """The config of a tiny language model of `family`."""
    model_type, values = _CONFIGS[family]
    return AutoConfig.for_model(model_type, **{**_COMMON, **values, **overrides})


def language_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random causal language model of `family`, in eval mode."""
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(language_config(family, **overrides))
    randomise(model, seed + _SEEDS.get(family, 0), table=_TABLES.get(family, 0.25))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if family == "bloom" and "word_embeddings_layernorm" in name:
                parameter.mul_(0.3)
            elif family == "gemma2" and "post_" in name:
                parameter.add_(4.0)
    return model.eval()


def clip(seed: int = 100, legacy_token_ids: bool = False) -> CLIPModel:
    """A tiny random CLIP with both towers.

    With `legacy_token_ids` the text config holds bos 0 and eos 2, as the published OpenAI checkpoints do; the real
    ones are the last two rows of the table.
    """
    config = CLIPConfig(
        text_config={
            "vocab_size": 60,
            "hidden_size": CLIP_TEXT_WIDTH,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 24,
            "projection_dim": PROJECTION_WIDTH,
            "bos_token_id": 0 if legacy_token_ids else 58,
            "eos_token_id": 2 if legacy_token_ids else 59,
        },
        vision_config={
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 44,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": PROJECTION_WIDTH,
        },
        projection_dim=PROJECTION_WIDTH,
    )
    with torch.random.fork_rng():
        model = CLIPModel(config)
    randomise(model, seed, gain=1.0)
    return model.eval()


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + '</s>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)

_WORDS = (
    "<pad> <s> </s> <unk> . , ? : < > / - [ ] ! img d q "
    "Image as evidence is Question Answer Human Assistant user assistant system "
    "what the man doing where who it a cat dog on red blue green house in of and see yes no how many"
).split()


def tokenizer(chat_template: str | None = None, keep_spaces: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `TOKENIZER_LENGTH` entries.

    Spaces and line breaks are tokens with `keep_spaces` (as in byte-level vocabularies after a special token) and
    nothing without (as in T5's). `<img>` and `<img-d>` are ordinary words in several pieces.
    """
    vocabulary = [*_WORDS, " ", "\n"]
    vocabulary += [f"w{i}" for i in range(TOKENIZER_LENGTH - len(vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    pieces = r"[A-Za-z0-9]+|[^A-Za-z0-9\s]|\n| " if keep_spaces else r"[A-Za-z0-9]+|[^A-Za-z0-9\s]"
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex(pieces), behavior="removed" if not keep_spaces else "isolated", invert=not keep_spaces
    )
    backend.decoder = decoders.Fuse() if keep_spaces else None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def save_vision(path: Path, **kwargs: Any) -> Path:
    """A CLIP and its image processor, in the hub's format."""
    path.mkdir(parents=True, exist_ok=True)
    clip(**kwargs).save_pretrained(path)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(path)
    return path


def save_language(
    path: Path,
    family: str = "llama",
    seed: int = 0,
    chat_template: str | None = None,
    keep_spaces: bool = True,
    generation: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """A language model and its tokenizer, in the hub's format. `generation` goes into its generation_config."""
    path.mkdir(parents=True, exist_ok=True)
    model = language_model(family, seed, **overrides)
    for name, value in (generation or {}).items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(path)
    tokenizer(chat_template, keep_spaces).save_pretrained(path)
    return path


def pixels(count: int, seed: int = 7) -> torch.Tensor:
    """Pixel values of `count` different pictures. float32 [count, 3, IMAGE_SIZE, IMAGE_SIZE]."""
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 0, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> Image.Image:
    """A picture of noise."""
    noise = torch.randint(
        0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(noise.numpy())


def row(config, layout: str, seed: int = 0) -> tuple[list[int], list[int]]:
    """One row's ids and labels from a layout such as `"2 img 3 req 2 =4"`.

    `n`: n random words; `=n`: n random words that are targets; `img`: an image's slots; `req`: a question's requests,
    one for each round; `req~`: these with a word between one slot and the next, as where a tokenizer gives spaces
    tokens. An encoder-decoder's targets are the decoder's, and stand in the labels alone.
    """
    asking = [config.request_token_id] if config.keep_request_token else []
    request = (asking + [config.dynamic_token_id] * config.num_dynamic_tokens) * config.num_request_rounds
    draw = random.Random(seed)
    ids: list[int] = []
    labels: list[int] = []
    for part in layout.split():
        if part == "img":
            new = [config.image_token_id] * config.num_static_tokens
        elif part == "req":
            new = request
        elif part == "req~":
            new = request[:1]
            for slot in request[1:]:
                new = [*new, FIRST_WORD, slot]
        else:
            new = [draw.randrange(FIRST_WORD, TABLE_ROWS) for _ in range(int(part.lstrip("=")))]
        if config.is_encoder_decoder:
            ids += [] if part.startswith("=") else new
            labels += new if part.startswith("=") else []
            continue
        ids += new
        labels += new if part.startswith("=") else [-100] * len(new)
    return ids, labels


def batch(rows: list[tuple[list[int], list[int]]], padding: str, pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """Rows as input_ids, attention_mask, labels int64 [batch, seq], padded left, right or ragged (some each way).

    Labels of a length of their own are a decoder's, and padded on the right.
    """
    width = max(len(ids) for ids, _ in rows)
    longest = max(len(labels) for _, labels in rows)
    own_lengths = any(len(ids) != len(labels) for ids, labels in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for index, (ids, labels) in enumerate(rows):
        missing = width - len(ids)
        before = {"left": missing, "right": 0, "ragged": (missing * (index % 3)) // 2}[padding]
        after = missing - before
        columns["input_ids"].append([pad_token_id] * before + ids + [pad_token_id] * after)
        columns["attention_mask"].append([0] * before + [1] * len(ids) + [0] * after)
        around = (0, longest - len(labels)) if own_lengths else (before, after)
        columns["labels"].append([-100] * around[0] + labels + [-100] * around[1])
    return {name: torch.tensor(values) for name, values in columns.items()}


# --- other vision towers, and BLIP-2 -------------------------------------------------------------------------------

# The sizes of towers other than CLIP's; a width may be overridden.
_TOWER = {
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
_SIGLIP_TEXT = {
    "vocab_size": 60,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "projection_size": 40,
    "bos_token_id": 58,
    "eos_token_id": 59,
}
_SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def _save_tower(path: Path, model: PreTrainedModel, image_processor: Any, seed: int) -> Path:
    randomise(model, seed, gain=1.0)
    path.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(path)
    image_processor.save_pretrained(path)
    return path


def save_siglip(path: Path, seed: int = 200) -> Path:
    """A whole SigLIP: vision tower and text encoder (which is not CLIP's)."""
    config = SiglipConfig(text_config=_SIGLIP_TEXT, vision_config=_TOWER)
    with torch.random.fork_rng():
        model = SiglipModel(config)
    return _save_tower(path, model, SiglipImageProcessor(size=_SIZE), seed)


def save_siglip2(path: Path, seed: int = 300, max_num_patches: int = 16) -> Path:
    """A whole SigLIP2 with patches in the picture's own proportions."""
    tower = {name: value for name, value in _TOWER.items() if name != "image_size"}
    vision = {**tower, "hidden_size": 44, "intermediate_size": 56, "num_patches": 16}
    config = Siglip2Config(text_config=_SIGLIP_TEXT, vision_config=vision)
    with torch.random.fork_rng():
        model = Siglip2Model(config)
    image_processor = Siglip2ImageProcessor(patch_size=PATCH_SIZE, max_num_patches=max_num_patches)
    return _save_tower(path, model, image_processor, seed)


def save_tower(path: Path, model_type: str, seed: int = 400, **overrides: Any) -> Path:
    """A vision tower alone, such as "dinov2" or "vit", with ViT's image processor."""
    config = AutoConfig.for_model(model_type, **{**_TOWER, **overrides})
    with torch.random.fork_rng():
        model = AutoModel.from_config(config)
    return _save_tower(path, model, ViTImageProcessor(size=_SIZE), seed)


# BLIP-2's widths, none of them another part's.
BLIP2_VISION_WIDTH, QFORMER_WIDTH, NUM_QUERIES = 28, 20, 7
_T5_LIKE = {
    "d_model": 52,
    "d_ff": 64,
    "d_kv": 12,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


def blip2(family: str = "t5", seed: int = 500, num_queries: int = NUM_QUERIES) -> Blip2ForConditionalGeneration:
    """A tiny random BLIP-2 in eval mode, around an OPT or a T5 whose head is not tied, as FlanT5's is not."""
    if family == "t5":
        values = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "decoder_start_token_id": 0}
        text_config = AutoConfig.for_model("t5", vocab_size=TABLE_ROWS, **values, **_T5_LIKE)
    else:
        text_config = language_config(family)
    config = Blip2Config(
        vision_config={**_TOWER, "hidden_size": BLIP2_VISION_WIDTH},
        qformer_config={
            "vocab_size": 30,
            "hidden_size": QFORMER_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 44,
            "max_position_embeddings": 16,
            "encoder_hidden_size": BLIP2_VISION_WIDTH,
        },
        text_config=text_config,
        num_query_tokens=num_queries,
    )
    with torch.random.fork_rng():
        model = Blip2ForConditionalGeneration(config)
    words = model.language_model
    if family == "t5":
        words.lm_head.weight = torch.nn.Parameter(torch.empty_like(words.lm_head.weight))
        for part, name in ((model, "language_model.lm_head.weight"), (words, "lm_head.weight")):
            part.all_tied_weights_keys.pop(name)
    randomise(model, seed, gain=1.0)
    if family != "t5":
        randomise(words, seed + _SEEDS.get(family, 0), table=_TABLES.get(family, 0.25))
    with torch.no_grad():
        model.query_tokens.copy_(torch.randn(model.query_tokens.shape, generator=torch.Generator().manual_seed(seed)))
    model.generation_config.eos_token_id = 2
    return model.eval()


def save_blip2(path: Path, family: str = "t5", seed: int = 500, num_queries: int = NUM_QUERIES) -> Path:
    """A BLIP-2 with its image processor and its language model's tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    blip2(family, seed, num_queries).save_pretrained(path)
    BlipImageProcessor(size=_SIZE).save_pretrained(path)
    tokenizer(keep_spaces=family != "t5").save_pretrained(path)
    return path


# --- encoder-decoders ----------------------------------------------------------------------------------------------

# T5's head is tied and its attention wider than its states; BART scales its embeddings and counts columns.
_ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "t5",
        {
            "d_model": 60,
            "d_ff": 68,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": 4,
            "bos_token_id": None,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "bart",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 72,
            "decoder_ffn_dim": 76,
            "max_position_embeddings": 256,
            "scale_embedding": True,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
    ),
}
ENCODER_DECODERS = tuple(_ENCODER_DECODERS)


def encoder_decoder(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random encoder-decoder of `family`, in eval mode."""
    model_type, values = _ENCODER_DECODERS[family]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **values, **overrides})
    with torch.random.fork_rng():
        model = AutoModelForSeq2SeqLM.from_config(config)
    gain, table = {"t5": (2.0, 0.5), "bart": (1.5, 0.1)}[family]
    randomise(model, seed + 2, gain, table)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if family == "t5" and name.endswith("Attention.q.weight"):
                parameter.mul_(model.config.d_kv**-0.5)  # T5 does not scale its attention
    if family == "bart":
        noise = torch.randn(model.final_logits_bias.shape, generator=torch.Generator().manual_seed(seed))
        model.final_logits_bias.copy_(0.3 * noise)
    return model.eval()


def encoder_decoder_tokenizer(family: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """T5's puts `</s>` behind a text, and drops spaces; BART's puts `<s>` before it as well, and keeps them."""
    made = tokenizer(chat_template, keep_spaces=family != "t5")
    single = {"t5": "$A </s>", "bart": "<s> $A </s>"}[family]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def save_encoder_decoder(
    path: Path, family: str, seed: int = 0, chat_template: str | None = None, **overrides: Any
) -> Path:
    """An encoder-decoder and its tokenizer, in the hub's format."""
    path.mkdir(parents=True, exist_ok=True)
    encoder_decoder(family, seed, **overrides).save_pretrained(path)
    encoder_decoder_tokenizer(family, chat_template).save_pretrained(path)
    return path
