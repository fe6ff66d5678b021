"""What the eyes cost: time and memory beside the plain language model, the released code's two passes, and LLaVA.

All sides share one language model (random weights: they do not change times), are built in one process and take turns
A B A B .., so that a busy machine slows both. A ratio is the median over the pairs, its interval the order statistics
that hold the true median with at least 95% probability; its upper end is what counts against a target. Peak memory is
that of a fresh process for each side. The vision tower is excluded on every side (its features are computed once,
before the clock starts, a Q-Former's outputs among them); projections and the interaction are counted.

    python examples/benchmark.py
    python examples/benchmark.py --variants all

    python examples/benchmark.py --rows first_token training_step --against two_passes --pairs 60 --threads 1
    python examples/benchmark.py --language_model facebook/opt-1.3b --vision_model openai/clip-vit-large-patch14 \\
        --device cuda --dtype bfloat16 --json opt.json

| row | what is timed |
| --- | --- |
| first_token | generate(max_new_tokens=1) after a prompt of prefix and dynamic tokens |
| decode_step | the steps of generate() after the first token, greedy; the sides take turns at every single step |
| five_beams | generate(max_new_tokens=1, num_beams=5), one sample |
| training_step | loss, gradients and AdamW step of what the side trains; prompt and answer |
| memory | peak of first_token and training_step, weights included (plain holds no vision tower, the others do) |

| side | its sequence | it trains |
| --- | --- | --- |
| plain | as many words as ours has columns; in training with learned vectors in place of the slots | these vectors |
| two_passes | prefix and request token; then anew prefix, dynamic tokens (and answer) | the IPN, stage 2 |
| ours | prefix, its cache kept, and request token; then dynamic tokens (and answer) | the IPN, stage 2 |
| llava_256, llava_576 | 256 or 576 projected patch tokens in place of image and dynamic slots | the projector |

`--variants` measures others of the family than that of `--interaction` against the plain language model, each as ours
is in the rows first_token and training_step: see `VARIANTS`. Plain then has the columns of the variant's own sequence,
and for an encoder-decoder they are the encoder's.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BambaConfig,
    Blip2QFormerConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    HfArgumentParser,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    T5Config,
)

from transformers_lmeye import ImageFeatures, LMEyeConfig, LMEyeForConditionalGeneration


ROWS = ["first_token", "decode_step", "five_beams", "training_step", "memory"]
RIVALS = ["plain", "two_passes", "llava_256", "llava_576"]
VARIANT_ROWS = ["first_token", "training_step"]
NUM_BEAMS = 5

# Fields of LMEyeConfig besides those of `build_lmeye`, and `language`: one of `LANGUAGES`, by default the first.
# A CLIP's 256 patches are pooled to 64 where its text encoder with 77 positions has to read them.
VARIANTS: dict[str, dict[str, Any]] = {
    "clip_text_global": {"interaction": "clip_text", "fine_grained_source": "global"},
    "clip_text_patch": {"interaction": "clip_text", "fine_grained_source": "patch", "num_fine_grained_tokens": 64},
    "clip_text_qformer": {"interaction": "clip_text", "fine_grained_source": "qformer"},
    "cross_attention_global": {"interaction": "cross_attention", "fine_grained_source": "global"},
    "cross_attention_patch": {"interaction": "cross_attention", "fine_grained_source": "patch"},
    "cross_attention_qformer": {"interaction": "cross_attention", "fine_grained_source": "qformer"},
    "static_qformer": {"interaction": "clip_text", "visual_mapping": "qformer"},
    "two_rounds": {"interaction": "clip_text", "num_request_rounds": 2},
    "three_rounds": {"interaction": "clip_text", "num_request_rounds": 3},
    "keep_request_token": {"interaction": "clip_text", "keep_request_token": True},
    "encoder_decoder": {"interaction": "clip_text", "visual_mapping": "qformer", "language": "t5"},
    "state_space": {"interaction": "clip_text", "language": "bamba"},
}

# Upper ends that ours is held to, on two cores with the default sizes: (row, batch, other side) -> largest ratio.
TARGETS = {
    ("first_token", 1, "plain"): 1.55,
    ("first_token", 8, "plain"): 1.15,
    ("decode_step", 1, "plain"): 1.03,
    ("decode_step", 8, "plain"): 1.03,
    ("five_beams", 1, "ours, greedy"): 1.3,
    ("training_step", 8, "two_passes"): 0.55,
}


@dataclass
class BenchmarkArguments:
    language_model: str | None = field(
        default=None,
        metadata={"help": "hub id or folder of a causal language model's config; default: a Llama of 134M parameters"},
    )
    vision_model: str | None = field(
        default=None, metadata={"help": "hub id or folder of a CLIP's config; default: a small one, width 256"}
    )
    interaction: str = field(default="clip_text", metadata={"help": "clip_text or cross_attention"})
    prefix_length: int = field(default=40, metadata={"help": "tokens before the request, the image's slot included"})
    num_dynamic_tokens: int = field(default=5, metadata={"help": "k, the dynamic tokens of a request"})
    answer_length: int = field(default=30, metadata={"help": "tokens of an answer, generated or trained on"})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    rows: list[str] = field(default_factory=lambda: list(ROWS), metadata={"help": "what to measure"})
    variants: list[str] | None = field(
        default=None, metadata={"help": "variants to measure against plain, in place of ours: names of them, or all"}
    )
    against: list[str] = field(default_factory=lambda: list(RIVALS), metadata={"help": "whom to measure against"})
    pairs: int = field(default=30, metadata={"help": "measurements of each side in a comparison, at least"})
    seconds: float = field(
        default=20, metadata={"help": "a comparison that is through sooner goes on with more pairs"}
    )
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = field(default=None, metadata={"help": "threads of torch; default: torch's choice"})
    seed: int = 0
    json: str | None = field(default=None, metadata={"help": "file for all figures, every single time included"})
    memory_of: str | None = field(
        default=None, metadata={"help": "SIDE:ROW:BATCH; print the peak memory of this process doing that, and end"}
    )

    def __post_init__(self) -> None:
        if self.variants is not None:
            self.variants = list(VARIANTS) if "all" in self.variants else self.variants
            self.rows = list(VARIANT_ROWS) if self.rows == ROWS else self.rows
        for name, known in (
            ("rows", ROWS if self.variants is None else VARIANT_ROWS),
            ("against", RIVALS),
            ("variants", list(VARIANTS)),
        ):
            if unknown := set(getattr(self, name) or ()) - set(known):
                raise ValueError(f"--{name} knows {', '.join(known)}, not {', '.join(sorted(unknown))}")


@dataclass
class Side:
    """One side of a comparison at one batch size: what it does, ready to be called."""

    generate: Callable[..., torch.Tensor]  # takes generation keywords
    loss: Callable[[], torch.Tensor]  # of one training batch, with gradients to `trained`
    trained: list[nn.Parameter]

    def training_step(self) -> Callable[[], None]:
        """A function that takes one step of AdamW (without weight decay or a rate: the weights stay put)."""
        optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0)

        def step() -> None:
            self.loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step


@dataclass
class Comparison:
    """Pairs of measurements of two sides: seconds of each, and their ratio side / other."""

    row: str
    batch: int
    side: str
    other: str
    pairs: list[tuple[float, float, float]]
    target: float | None

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Median of the pairs' ratios and the two ends of its 95% interval."""
        return median_with_interval([ratio for _, _, ratio in self.pairs])


@dataclass
class Memory:
    """Peak memory of a fresh process, in MiB, and how much of it came after the models were built."""

    row: str
    batch: int
    side: str
    peak: float
    working: float


def median_with_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of a sample, and order statistics that enclose the distribution's median.

    For n independent values the r-th smallest and the r-th largest enclose it with probability 1 - 2 P(X < r),
    X ~ Binomial(n, 1/2), whatever the distribution. r is the largest for which that is at least `confidence`.

    Args:
        values: the sample, at least one value.
        confidence: least probability of the interval.

    Returns:
        median, lower end, upper end; both ends nan where the sample is too small (below 6 values for 0.95).
    """
    ordered, n = sorted(values), len(values)
    rank, below = 0, 0.0
    while True:
        below += math.comb(n, rank) / 2**n  # P(X < rank + 1)
        if 2 * below > 1 - confidence:
            break
        rank += 1
    ends = (ordered[rank - 1], ordered[n - rank]) if rank else (math.nan, math.nan)
    return statistics.median(ordered), *ends


# The models -----------------------------------------------------------------------------------------------------


def causal_config(arguments: BenchmarkArguments) -> PreTrainedConfig:
    """The causal language model asked for; by default a Llama of 134M parameters."""
    if arguments.language_model is not None:
        return AutoConfig.from_pretrained(arguments.language_model)
    return LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=32000
    )


def t5_config(arguments: BenchmarkArguments) -> PreTrainedConfig:
    """An encoder-decoder of FlanT5's kind, encoder and decoder each with half of the Llama's layers."""
    return T5Config(
        d_model=768,
        d_ff=2048,
        d_kv=64,
        num_layers=6,
        num_heads=12,
        vocab_size=32000,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )


def bamba_config(arguments: BenchmarkArguments) -> PreTrainedConfig:
    """A hybrid of the Llama's width: three state-space layers before each layer of attention, a cache that cannot be
    cropped."""
    return BambaConfig(
        hidden_size=768,
        num_hidden_layers=8,
        attn_layer_indices=[3, 7],
        num_attention_heads=12,
        num_key_value_heads=12,
        intermediate_size=2048,
        vocab_size=32000,
        mamba_n_heads=24,
        mamba_d_head=64,
        mamba_d_state=64,
        mamba_chunk_size=64,
    )


LANGUAGES = {"causal": causal_config, "t5": t5_config, "bamba": bamba_config}


def language_config(arguments: BenchmarkArguments, language: str = "causal") -> PreTrainedConfig:
    """The language model's config, with nothing that would end an answer early."""
    config = LANGUAGES[language](arguments)
    config.bos_token_id = config.eos_token_id = None
    config.pad_token_id = 0
    return config


def clip_configs(arguments: BenchmarkArguments) -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    """Vision and text side of the CLIP. The default keeps the proportions of CLIP ViT-L/14 beside a 7B model."""
    if arguments.vision_model is not None:
        config = AutoConfig.from_pretrained(arguments.vision_model)
        return config.vision_config, config.text_config
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision_config = CLIPVisionConfig(**sizes, projection_dim=256, image_size=224, patch_size=14)
    return vision_config, CLIPTextConfig(**sizes, projection_dim=256)


def build_language_model(arguments: BenchmarkArguments, language: str = "causal") -> PreTrainedModel:
    config = language_config(arguments, language)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device(arguments.device):
        model = auto_class.from_config(config, dtype=getattr(torch, arguments.dtype))
    return model.eval().requires_grad_(False)


def build_lmeye(
    arguments: BenchmarkArguments, variant: str | None = None, language_model: PreTrainedModel | None = None
) -> LMEyeForConditionalGeneration:
    """LMEye as stage 2 trains it, dropout included; its `language_model` serves the other sides too.

    Args:
        variant: one of `VARIANTS`; `None` is that of `arguments.interaction`.
        language_model: what to build it around, in place of a new one.
    """
    vision_config, text_config = clip_configs(arguments)
    given = dict(VARIANTS[variant]) if variant else {"interaction": arguments.interaction}
    language = given.pop("language", "causal")
    qformer_config = Blip2QFormerConfig(
        hidden_size=vision_config.hidden_size,
        encoder_hidden_size=vision_config.hidden_size,
        num_hidden_layers=vision_config.num_hidden_layers,
        num_attention_heads=vision_config.num_attention_heads,
        intermediate_size=vision_config.intermediate_size,
    )
    sees_queries = "qformer" in (given.get("visual_mapping"), given.get("fine_grained_source"))
    config = LMEyeConfig(
        vision_config=vision_config,
        text_config=language_config(arguments, language),
        clip_text_config=text_config if given["interaction"] == "clip_text" else None,
        qformer_config=qformer_config if sees_queries else None,
        num_dynamic_tokens=arguments.num_dynamic_tokens,
        interaction_hidden_size=vision_config.hidden_size,
        interaction_num_heads=vision_config.num_attention_heads,
        **given,
    )
    vision_tower = CLIPVisionModelWithProjection._from_config(vision_config, dtype=getattr(torch, arguments.dtype))
    with torch.device(arguments.device):
        language_model = language_model or build_language_model(arguments, language)
        model = LMEyeForConditionalGeneration(config, vision_tower, language_model)
    model.to(arguments.device).freeze_for_stage("instruct")
    return model


def image_features(arguments: BenchmarkArguments, model: LMEyeForConditionalGeneration, batch: int) -> ImageFeatures:
    """What the vision tower says of one random picture per row."""
    size = model.config.vision_config.image_size
    pixels = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(arguments.seed))
    with torch.no_grad():
        return model.get_image_features(pixels)


def random_words(arguments: BenchmarkArguments, batch: int, length: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(arguments.seed)
    return torch.randint(1, vocabulary, (batch, length), generator=generator).to(arguments.device)  # [B, length]


def request_slots(config: LMEyeConfig) -> list[int]:
    """The slots of one question: those of each round, a request's own among them where it has one."""
    own = [config.request_token_id] if config.keep_request_token else []
    return config.num_request_rounds * (own + config.num_dynamic_tokens * [config.dynamic_token_id])


def slot_ids(arguments: BenchmarkArguments, model: LMEyeForConditionalGeneration, batch: int) -> torch.Tensor:
    """Prefix (its image slots after three words), the question's slots, answer: [B, prefix + slots + answer]."""
    config = model.config
    slots = torch.tensor(request_slots(config), device=arguments.device)
    length = arguments.prefix_length + len(slots) + arguments.answer_length
    ids = random_words(arguments, batch, length, config.text_config.vocab_size)
    ids[:, 3 : 3 + config.num_static_tokens] = config.image_token_id
    ids[:, arguments.prefix_length :][:, : len(slots)] = slots
    return ids


def labels_of(ids: torch.Tensor, answer_length: int) -> torch.Tensor:
    """The answer's ids under their own columns, -100 elsewhere: [B, S] -> [B, S]."""
    labels = torch.full_like(ids, -100)
    labels[:, -answer_length:] = ids[:, -answer_length:]
    return labels


# The sides ------------------------------------------------------------------------------------------------------


def plain_side(
    arguments: BenchmarkArguments,
    language_model: PreTrainedModel,
    batch: int,
    num_static_tokens: int = 1,
    num_slots: int | None = None,
) -> Side:
    """One pass of the language model over as many columns as ours has in its final sequence.

    Args:
        num_static_tokens, num_slots: columns in place of the image's slots and, behind the prefix, of the question's
            (default: k), which hold learned vectors in training.
    """
    num_slots = arguments.num_dynamic_tokens if num_slots is None else num_slots
    prompt_length = arguments.prefix_length + num_slots
    length = prompt_length + arguments.answer_length
    ids = random_words(arguments, batch, length, language_model.config.get_text_config().vocab_size)
    prompt, answer = ids[:, :prompt_length], ids[:, prompt_length:]
    mask = torch.ones_like(prompt)
    if language_model.config.is_encoder_decoder:
        words, labels = prompt, answer.contiguous()
    else:
        words, labels = ids, labels_of(ids, arguments.answer_length)
    table = language_model.get_input_embeddings()
    learned = nn.Parameter(table.weight[: num_static_tokens + num_slots].detach().clone())  # [slots, d_L]

    def loss() -> torch.Tensor:
        embeds = table(words).clone()
        embeds[:, 3 : 3 + num_static_tokens] = learned[:num_static_tokens]
        embeds[:, arguments.prefix_length : prompt_length] = learned[num_static_tokens:]
        return language_model(inputs_embeds=embeds, labels=labels, use_cache=False).loss

    return Side(lambda **how: language_model.generate(prompt, attention_mask=mask, **how), loss, [learned])


def our_side(arguments: BenchmarkArguments, model: LMEyeForConditionalGeneration, batch: int) -> Side:
    """LMEye through its public forward and generate, vision features given."""
    ids = slot_ids(arguments, model, batch)
    features = image_features(arguments, model, batch)
    prompt_length = ids.shape[1] - arguments.answer_length
    prompt = ids[:, :prompt_length]
    if model.config.is_encoder_decoder:
        words, labels = prompt, ids[:, prompt_length:].contiguous()
    else:
        words, labels = ids, labels_of(ids, arguments.answer_length)
    mask, prompt_mask = torch.ones_like(words), torch.ones_like(prompt)

    def loss() -> torch.Tensor:
        return model(words, attention_mask=mask, labels=labels, image_features=features).loss

    def generate(**how) -> torch.Tensor:
        return model.generate(input_ids=prompt, attention_mask=prompt_mask, image_features=features, **how)

    return Side(generate, loss, [p for p in model.parameters() if p.requires_grad])


def two_pass_side(arguments: BenchmarkArguments, model: LMEyeForConditionalGeneration, batch: int) -> Side:
    """The same numbers as the released code computes them: two full passes of the language model, nothing shared."""
    ids = slot_ids(arguments, model, batch)
    labels = labels_of(ids, arguments.answer_length)
    features = image_features(arguments, model, batch)
    language_model, ipn = model.language_model, model.ipn
    table = language_model.get_input_embeddings()
    prefix, k = arguments.prefix_length, model.config.num_dynamic_tokens
    slots = slice(3, 3 + model.config.num_static_tokens)
    images = torch.arange(batch, device=arguments.device)[:, None]  # each request sees its row's own

    def embed(ids: torch.Tensor) -> torch.Tensor:
        """First pass up to the request token; returns the vectors of the second pass, [B, S, d_L]."""
        words = table(ids.where(ids < table.num_embeddings, 0))
        words[:, slots] = ipn.static_tokens(features).to(words)  # [B, num_static, d_L]
        request = ipn.request_token.to(words).expand(len(ids), 1, -1)
        first = torch.cat([words[:, :prefix], request], dim=1)  # [B, prefix + 1, d_L]
        states = language_model(inputs_embeds=first, output_hidden_states=True, use_cache=False).hidden_states[-1]
        dynamic = ipn(states[:, -1], features, images)[0].to(words)  # [B, k, d_L]
        return torch.cat([words[:, :prefix], dynamic, words[:, prefix + k :]], dim=1)

    def loss() -> torch.Tensor:
        embeds = embed(ids)
        return language_model(inputs_embeds=embeds, labels=labels, use_cache=False).loss

    prompt = ids[:, : prefix + k]
    mask = torch.ones_like(prompt)

    def generate(**how) -> torch.Tensor:
        with torch.no_grad():
            embeds = embed(prompt)
        return language_model.generate(inputs_embeds=embeds, attention_mask=mask, **how)

    return Side(generate, loss, [p for p in model.parameters() if p.requires_grad])


class RememberingTower(nn.Module):
    """Llava's vision tower, which has looked at its pictures before the clock starts."""

    def __init__(self, tower: CLIPVisionModel, pixels: torch.Tensor):
        super().__init__()
        self.tower = tower
        with torch.no_grad():
            self.hidden_states = tower(pixels, output_hidden_states=True).hidden_states  # of [B, 1 + patches, d_v]

    def forward(self, pixel_values: torch.Tensor, **_) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=self.hidden_states)


def llava_side(
    arguments: BenchmarkArguments, language_model: PreTrainedModel, batch: int, num_image_tokens: int
) -> Side:
    """Transformers' Llava on the same language model, every patch a token, in the same words."""
    text_config, vision_config = language_model.config, clip_configs(arguments)[0]
    vision_config.image_size = math.isqrt(num_image_tokens) * vision_config.patch_size
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=text_config.vocab_size - 1,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.generation_config = language_model.generation_config
    projector = model.model.multi_modal_projector.to_empty(device=arguments.device).to(language_model.dtype)
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.02)
    tower = CLIPVisionModel._from_config(vision_config, dtype=language_model.dtype).to(arguments.device).eval()
    pixels = torch.rand(batch, 3, vision_config.image_size, vision_config.image_size).to(tower.device, tower.dtype)
    model.model.vision_tower = RememberingTower(tower.requires_grad_(False), pixels)
    model.eval()

    words = arguments.prefix_length - 1 + arguments.answer_length
    ids = random_words(arguments, batch, words, config.image_token_id)
    image = torch.full_like(ids[:, :1], config.image_token_id).expand(-1, num_image_tokens)
    ids = torch.cat([ids[:, :3], image, ids[:, 3:]], dim=1)
    labels = labels_of(ids, arguments.answer_length)
    mask = torch.ones_like(ids)
    prompt_length = ids.shape[1] - arguments.answer_length
    prompt, prompt_mask = ids[:, :prompt_length], mask[:, :prompt_length]

    def loss() -> torch.Tensor:
        return model(ids, attention_mask=mask, pixel_values=pixels, labels=labels, use_cache=False).loss

    def generate(**how) -> torch.Tensor:
        return model.generate(input_ids=prompt, attention_mask=prompt_mask, pixel_values=pixels, **how)

    return Side(generate, loss, list(projector.parameters()))


def make_side(arguments: BenchmarkArguments, name: str, batch: int, model: PreTrainedModel | None = None) -> Side:
    """A side at one batch size, around `model` (an LMEye) or, without one, around the least that it needs."""
    if name in ("ours", "two_passes"):
        build = our_side if name == "ours" else two_pass_side
        return build(arguments, model or build_lmeye(arguments), batch)
    language_model = model.language_model if model else build_language_model(arguments)
    if name == "plain":
        return plain_side(arguments, language_model, batch)
    return llava_side(arguments, language_model, batch, int(name.removeprefix("llava_")))


# The clock ------------------------------------------------------------------------------------------------------


class Turnstile(StoppingCriteria):
    """Lets two calls of generate() run one step at a time, in turn, each in a thread of its own.

    One instance goes with each call, `pair()` makes both. `seconds` are the durations of the steps after the first.
    """

    def __init__(self, device: str, mine: threading.Semaphore, others: threading.Semaphore):
        self.device, self.mine, self.others = device, mine, others
        self.seconds: list[float] = []
        self.started: float | None = None

    @classmethod
    def pair(cls, device: str) -> "tuple[Turnstile, Turnstile]":
        first, second = threading.Semaphore(1), threading.Semaphore(0)
        return cls(device, first, second), cls(device, second, first)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        synchronize(self.device)
        if self.started is not None:
            self.seconds.append(time.perf_counter() - self.started)
        self.others.release()
        self.mine.acquire()
        self.started = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def run(self, side: Side, num_steps: int, num_threads: int) -> list[float]:
        """Seconds of `num_steps` decode steps; whatever happens, the other call is not kept waiting."""
        torch.set_num_threads(num_threads)  # OpenMP keeps the number for each thread apart
        self.mine.acquire()
        try:
            side.generate(do_sample=False, max_new_tokens=num_steps + 1, stopping_criteria=[self])
        finally:
            self.others.release(num_steps + 1)
        return self.seconds


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timer(arguments: BenchmarkArguments, side: Side, row: str) -> Callable[[], float]:
    """A function that does a row's work once and returns its seconds."""
    num_beams = NUM_BEAMS if row == "five_beams" else 1
    generate = functools.partial(side.generate, do_sample=False, num_beams=num_beams, max_new_tokens=1)
    work = side.training_step() if row == "training_step" else generate

    def seconds() -> float:
        synchronize(arguments.device)
        start = time.perf_counter()
        work()
        synchronize(arguments.device)
        return time.perf_counter() - start

    return seconds


def pair_of(first: Callable[[], float], second: Callable[[], float]) -> tuple[float, float, float]:
    """One measurement of each side, and their ratio."""
    seconds = first(), second()
    return *seconds, seconds[0] / seconds[1]


def pair_of_answers(arguments: BenchmarkArguments, first: Side, second: Side) -> tuple[float, float, float]:
    """Both sides write an answer, taking turns at every step: median step of each, and the steps' median ratio."""
    turnstiles = Turnstile.pair(arguments.device)
    how = arguments.answer_length - 1, torch.get_num_threads()
    with ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(turnstile.run, side, *how) for turnstile, side in zip(turnstiles, (first, second), strict=True)
        ]
    steps = [answer.result() for answer in answers]
    return *map(statistics.median, steps), statistics.median(a / b for a, b in zip(*steps, strict=True))


def repeat(measure: Callable[[], tuple], arguments: BenchmarkArguments) -> list[tuple[float, float, float]]:
    """Pairs A B A B .., as many as asked for and for as long as asked for, after two that do not count."""
    measure(), measure()
    pairs, start = [], time.perf_counter()
    while len(pairs) < arguments.pairs or time.perf_counter() - start < arguments.seconds:
        pairs.append(measure())
    return pairs


def measure_memory(arguments: BenchmarkArguments, name: str, row: str, batch: int) -> Memory:
    """Peak memory of this process doing a row's work twice (a second training step has the optimizer's state)."""
    on_gpu = torch.device(arguments.device).type == "cuda"
    side = make_side(arguments, name, batch)
    work = timer(arguments, side, row)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: what building took at its peak is forgotten
        before = resident_bytes("VmRSS")
    work(), work()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
    return Memory(row, batch, name, peak / 2**20, (peak - before) / 2**20)


def resident_bytes(entry: str) -> int:
    """Resident memory of this process now ("VmRSS") or at its peak ("VmHWM"); outside Linux always the peak."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(entry))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_in_fresh_process(arguments: BenchmarkArguments, name: str, row: str, batch: int) -> Memory:
    given = dataclasses.asdict(arguments) | {"memory_of": f"{name}:{row}:{batch}"}
    command = [sys.executable, __file__]
    for key, value in given.items():
        if value is not None:
            command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Memory(**json.loads(output.splitlines()[-1]))


# The table ------------------------------------------------------------------------------------------------------


def compare(arguments: BenchmarkArguments, model: LMEyeForConditionalGeneration) -> list[Comparison]:
    """All comparisons asked for, ours first in each pair; two full passes beside the plain pass for context."""
    comparisons = []

    def add(row: str, batch: int, side: str, other: str, measure: Callable[[], tuple]) -> None:
        target = TARGETS.get((row, batch, other)) if side == "ours" else None
        comparisons.append(Comparison(row, batch, side, other, repeat(measure, arguments), target))
        print(comparison_line(comparisons[-1]), file=sys.stderr, flush=True)

    for row in (row for row in ROWS if row in arguments.rows and row != "memory"):
        model.train(row == "training_step")
        for batch in batches(arguments, row):
            sides = {name: make_side(arguments, name, batch, model) for name in ("ours", *arguments.against)}
            if row == "decode_step":
                ours = sides.pop("ours")
                sides.pop("two_passes", None)  # from the second token on it is the plain model
                for name, side in sides.items():
                    add(row, batch, "ours", name, functools.partial(pair_of_answers, arguments, ours, side))
                continue
            timers = {name: timer(arguments, side, row) for name, side in sides.items()}
            others = [("ours", name) for name in arguments.against]
            if {"plain", "two_passes"} <= sides.keys():
                others.append(("two_passes", "plain"))
            if row == "five_beams":
                timers["ours, greedy"] = timer(arguments, sides["ours"], "first_token")
                others.insert(0, ("ours", "ours, greedy"))
            for side, other in others:
                add(row, batch, side, other, functools.partial(pair_of, timers[side], timers[other]))
    return comparisons


def compare_variants(arguments: BenchmarkArguments, language_models: dict[str, PreTrainedModel]) -> list[Comparison]:
    """Every variant asked for against the plain language model that it is built around."""
    comparisons = []
    for variant in arguments.variants:
        language = VARIANTS[variant].get("language", "causal")
        language_model = language_models[language]
        model = build_lmeye(arguments, variant, language_model)
        columns = model.config.num_static_tokens, len(request_slots(model.config))
        other = "plain" if language == "causal" else f"plain_{language}"
        for row in arguments.rows:
            model.train(row == "training_step")
            for batch in batches(arguments, row):
                sides = our_side(arguments, model, batch), plain_side(arguments, language_model, batch, *columns)
                measure = functools.partial(pair_of, *(timer(arguments, side, row) for side in sides))
                comparisons.append(Comparison(row, batch, variant, other, repeat(measure, arguments), None))
                print(comparison_line(comparisons[-1]), file=sys.stderr, flush=True)
    return comparisons


def batches(arguments: BenchmarkArguments, row: str) -> list[int]:
    """Beams are measured on the smallest batch, training steps on the largest, the others on every one."""
    chosen = {"five_beams": min, "training_step": max}.get(row)
    return [chosen(arguments.batch_sizes)] if chosen else arguments.batch_sizes


def measure_all_memory(arguments: BenchmarkArguments) -> list[Memory]:
    sides = ["ours", *arguments.against]
    tasks = [(row, batch) for row in ("first_token", "training_step") for batch in batches(arguments, row)]
    memories = []
    for row, batch in tasks:
        for side in sides:
            memories.append(memory_in_fresh_process(arguments, side, row, batch))
            print(
                f"memory of {side} at {row}, batch {batch}: {memories[-1].peak:.0f} MiB", file=sys.stderr, flush=True
            )
    return memories


def comparison_line(comparison: Comparison) -> str:
    median, low, high = comparison.ratio
    times = [1e3 * statistics.median(seconds) for seconds in zip(*comparison.pairs, strict=True)]
    target = ""
    if comparison.target is not None:
        target = f"{comparison.target:g}: {'met' if high <= comparison.target else 'missed'}"
    return (
        f"| {comparison.row} | {comparison.batch} | {comparison.side} / {comparison.other} | {len(comparison.pairs)} "
        f"| {times[0]:.1f} | {times[1]:.1f} | {median:.3f} | {low:.3f} .. {high:.3f} | {target} |"
    )


def comparison_table(comparisons: list[Comparison]) -> str:
    head = "| row | batch | sides | pairs | first, ms | second, ms | median ratio | 95% interval | at most |"
    return "\n".join([head, "|" + " --- |" * 9, *map(comparison_line, comparisons)])


def memory_table(memories: list[Memory]) -> str:
    """Peaks, and ours over each other side."""
    ours = {(m.row, m.batch): m.peak for m in memories if m.side == "ours"}
    lines = ["| row | batch | side | peak, MiB | of it while working, MiB | ours / side |", "|" + " --- |" * 6]
    for m in memories:
        ratio = f"{ours[m.row, m.batch] / m.peak:.3f}"
        lines.append(f"| {m.row} | {m.batch} | {m.side} | {m.peak:.0f} | {m.working:.0f} | {ratio} |")
    return "\n".join(lines)


def description(arguments: BenchmarkArguments, models: dict[str, nn.Module]) -> str:
    """Machine, versions and sizes of `models`, as a Markdown list."""
    counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in models.items()}
    on_gpu = torch.device(arguments.device).type == "cuda"
    interaction = f", interaction {arguments.interaction}" if arguments.variants is None else ""
    machine = torch.cuda.get_device_name() if on_gpu else f"{processor_name()}, {os.cpu_count()} cores"
    return "\n".join(
        [
            f"- Machine: {machine}; load average {os.getloadavg()[0]:.1f} when started.",
            f"- Python {platform.python_version()}, torch {torch.__version__} on {torch.get_num_threads()} threads, "
            f"transformers {transformers.__version__}, {arguments.dtype}.",
            "- Parameters in millions: " + ", ".join(f"{name} {count:.1f}" for name, count in counts.items()) + ".",
            f"- Prefix {arguments.prefix_length}, dynamic tokens {arguments.num_dynamic_tokens}, answer "
            f"{arguments.answer_length}{interaction}; the vision tower is excluded on every side.",
            f"- Command: `{' '.join(['python examples/benchmark.py', *sys.argv[1:]])}`",
        ]
    )


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: BenchmarkArguments) -> tuple[list[Comparison], list[Memory]]:
    torch.manual_seed(arguments.seed)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        name, row, batch = arguments.memory_of.split(":")
        print(json.dumps(dataclasses.asdict(measure_memory(arguments, name, row, int(batch)))))
        return [], []

    memories = measure_all_memory(arguments) if "memory" in arguments.rows else []
    if arguments.variants is None:
        model = build_lmeye(arguments)
        parts = dict(model.named_children())
    else:
        used = {VARIANTS[variant].get("language", "causal") for variant in arguments.variants}
        parts = {language: build_language_model(arguments, language) for language in LANGUAGES if language in used}
    about = description(arguments, parts)
    print(about, file=sys.stderr, flush=True)
    comparisons = compare(arguments, model) if arguments.variants is None else compare_variants(arguments, parts)
    print(about)
    if comparisons:
        print("\n" + comparison_table(comparisons))
    if memories:
        print("\n" + memory_table(memories))
    if arguments.json is not None:
        figures = {
            "arguments": dataclasses.asdict(arguments),
            "about": about,
            "comparisons": [dataclasses.asdict(c) | {"ratio": c.ratio} for c in comparisons],
            "memory": [dataclasses.asdict(m) for m in memories],
        }
        Path(arguments.json).write_text(json.dumps(figures, indent=1))
    return comparisons, memories


if __name__ == "__main__":
    main(HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()[0])
