"""Which language models LMEye works with: a tiny random model of every type of transformers, checked one by one.

Each type is built small, gets the Interactive Perception Network and a tiny CLIP, and is held against the plain way of
computing LMEye: whole passes over ever longer texts, one row at a time, no cache, no padding, no batch. The table of
results is docs/backbones.md.

    python examples/check_backbones.py --log backbones.jsonl --write docs/backbones.md

    python examples/check_backbones.py --types llama jamba mamba
    python examples/check_backbones.py --kind seq2seq --jobs 4

Types whose line is in the log are not checked again.

| check | what must hold |
| --- | --- |
| words | without images, logits and greedy ids are those of the plain language model, equal |
| requests | what `perceive` says was asked, against the plain computation |
| logits, loss, gradients | of a batch of rows of unlike lengths, turns and images, padded in three ways |
| checkpointing | the gradients again, with gradient checkpointing |
| greedy | ids of each prompt alone, against greedy decoding by whole passes |
| batch | ids of the prompts in a batch, padded left and on both sides, against each alone, greedy and with beams |

Differences count relative to the largest value of the tensor (of all gradients, for a gradient).
"""

import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import GenerationConfig, HfArgumentParser, PreTrainedModel
from transformers.modeling_outputs import ModelOutput


sys.path.insert(0, str(Path(__file__).parent))
from tiny_backbones import MODEL_TYPES, WORDS, randomise, tiny_clip_configs, tiny_language_model

from transformers_lmeye import LMEyeConfig, LMEyeForConditionalGeneration


TOLERANCE = 2e-4
NEW_TOKENS = 5
# Rows of a batch: words, images (`img`), requests (`req`) and target words (`=`).
ROWS = ["9 img 3 req 2 =3", "3 =2", "img 3 req 1 =3 1 img 2 req 1 =2", "img 1 img 4 req =3", "7 =4"]
PROMPTS = ["9 img 3 req 2", "img 2 req 1 3 img 2 req", "6 img 3 req 2", "img 4"]


@dataclass
class CheckArguments:
    """What to check, and where the results go."""

    kind: Literal["causal", "seq2seq", "both"] = field(
        default="both", metadata={"help": "Causal language models, encoder-decoders, or both."}
    )
    types: list[str] | None = field(default=None, metadata={"help": "Model types to check; all by default."})
    log: Path | None = field(default=None, metadata={"help": "JSON lines of finished types; read before, added to."})
    write: Path | None = field(default=None, metadata={"help": "The table to write, docs/backbones.md for one."})
    jobs: int = field(default=2, metadata={"help": "Processes at a time, of one thread each."})
    timeout: float = field(default=240.0, metadata={"help": "Seconds after which a type counts as failed."})


# --- the plain way --------------------------------------------------------------------------------------------------


class PlainLMEye:
    """LMEye by whole passes of the language model over ever longer texts, one row at a time.

    Only the IPN's own modules are taken from the model under test.

    Args:
        model ([`LMEyeForConditionalGeneration`]): around a causal language model.
    """

    def __init__(self, model: LMEyeForConditionalGeneration):
        self.language_model, self.ipn, self.config = model.language_model, model.ipn, model.config
        self.words = model.get_input_embeddings()

    def read(self, embeds: torch.Tensor, words: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One whole pass over `embeds` [S, d_L]: what the head is given, `[S, d_h]`, and logits `[S, vocab]`.

        Models that give single layers inputs of their own look them up by `words`, 0 in slots.
        """
        inputs: dict[str, torch.Tensor] = {}
        for module in self.language_model.modules():
            if hasattr(module, "get_per_layer_inputs") and module.hidden_size_per_layer_input:
                inputs["per_layer_inputs"] = module.get_per_layer_inputs(torch.tensor([words]))
        seen: list[torch.Tensor] = []
        head = self.language_model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            logits = self.language_model(inputs_embeds=embeds[None].clone(), use_cache=False, **inputs).logits
        finally:
            handle.remove()
        return seen[0][0], logits[0]

    def finish(self, ids: list[int], features: Any) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
        """Embeddings of a row with every slot filled, `[S, d_L]`, its words (0 in slots) and its requests `[d_h]`."""
        words = [0 if token >= self.config.image_token_id else token for token in ids]
        embeds = self.words.weight.new_zeros(0, self.words.weight.shape[-1])
        static: list[torch.Tensor] = []
        dynamic: list[torch.Tensor] = []
        requests: list[torch.Tensor] = []
        seen = 0
        for token in ids:
            if token == self.config.image_token_id:
                if not static:
                    static = list(self.ipn.static_tokens(features[seen : seen + 1])[0])
                    seen += 1
                new = static.pop(0)
            elif token == self.config.dynamic_token_id:
                if not dynamic:
                    asked = torch.cat([embeds, self.ipn.request_token[None]])
                    requests.append(self.read(asked, [*words[: len(embeds)], 0])[0][-1])
                    dynamic = list(self.ipn(requests[-1][None], features, torch.arange(seen)[None])[0][0])
                new = dynamic.pop(0)
            else:
                new = self.words(torch.tensor([[token]]))[0, 0]
            embeds = torch.cat([embeds, new[None]])
        return embeds, words, requests

    def loss(self, rows: list[tuple[list[int], list[int], Any]]) -> torch.Tensor:
        """Mean next-token loss over the targets of all rows."""
        losses = []
        for ids, labels, features in rows:
            log_p = self.read(*self.finish(ids, features)[:2])[1].log_softmax(dim=-1)
            losses += [-log_p[place - 1, label] for place, label in enumerate(labels) if label != -100]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def greedy(self, ids: list[int], features: Any) -> list[int]:
        """The words most probable behind a row, one by one."""
        embeds, words, _ = self.finish(ids, features)
        new: list[int] = []
        for _ in range(NEW_TOKENS):
            new.append(int(self.read(embeds, words + new)[1][-1].argmax()))
            embeds = torch.cat([embeds, self.words(torch.tensor(new[-1:]))])
        return new


class PlainEncoderDecoder:
    """LMEye by whole passes of an encoder-decoder, one row at a time: the requests, the finished text, the answer.

    Args:
        model ([`LMEyeForConditionalGeneration`]): around an encoder-decoder.
    """

    def __init__(self, model: LMEyeForConditionalGeneration):
        self.language_model, self.ipn, self.config = model.language_model, model.ipn, model.config
        self.words = model.get_input_embeddings()

    def encode(self, embeds: list[torch.Tensor]) -> ModelOutput:
        """The encoder's outputs for one row, `[S, d_L]`."""
        return self.language_model.get_encoder()(None, inputs_embeds=torch.stack(embeds)[None])

    def finish(self, ids: list[int], features: Any) -> tuple[ModelOutput, list[torch.Tensor]]:
        """The encoder's outputs for a row with every slot filled, and its requests `[d_h]`."""
        config, static = self.config, list(self.ipn.static_tokens(features).flatten(0, 1)) if len(features) else []
        embeds: list[torch.Tensor] = []
        asked: list[tuple[int, int]] = []  # the column of each request, and how many images it sees
        for column, token in enumerate(ids):
            if token == config.image_token_id:
                embeds.append(static.pop(0))
            elif token == config.request_token_id:
                asked.append((column, ids[:column].count(config.image_token_id) // config.num_static_tokens))
                embeds.append(self.ipn.request_token)
            elif token == config.dynamic_token_id:
                embeds.append(self.ipn.dynamic_token)
            else:
                embeds.append(self.words(torch.tensor([[token]]))[0, 0])
        states = self.encode(embeds).last_hidden_state
        requests = [states[0, column] for column, _ in asked]
        for (column, seen), request in zip(asked, requests, strict=True):
            tokens = self.ipn(request[None], features, torch.arange(seen)[None])[0][0]
            embeds[column + 1 : column + 1 + len(tokens)] = list(tokens)
        return self.encode(embeds), requests

    def decode(self, encoder_outputs: ModelOutput, ids: list[int]) -> torch.Tensor:
        """Logits `[T, vocab]` of a whole pass of the decoder over `ids`."""
        given = {"encoder_outputs": encoder_outputs, "decoder_input_ids": torch.tensor([ids])}
        return self.language_model(**given, use_cache=False).logits[0]

    @torch.no_grad()
    def greedy(self, ids: list[int], features: Any) -> list[int]:
        """The decoder's start and the words most probable behind it, in the language model's own loop."""
        outputs, _ = self.finish(ids, features)
        mask = torch.ones(1, len(ids), dtype=torch.long)
        given = {"encoder_outputs": outputs, "attention_mask": mask, "max_new_tokens": NEW_TOKENS}
        return self.language_model.generate(**given)[0].tolist()


# --- building and comparing -----------------------------------------------------------------------------------------


def build(language_model: PreTrainedModel, interaction: str, **changes: Any) -> LMEyeForConditionalGeneration:
    """LMEye around a language model and a tiny CLIP, the IPN drawn so that every part has its effect."""
    vision_config, clip_text_config = tiny_clip_configs()
    config = LMEyeConfig(
        text_config=language_model.config,
        vision_config=vision_config,
        clip_text_config=clip_text_config if interaction == "clip_text" else None,
        interaction=interaction,
        interaction_hidden_size=28,
        interaction_num_layers=2,
        interaction_num_heads=2,
        num_dynamic_tokens=3,
        fine_grained_dropout=0.0,
        image_token_id=1000,
        request_token_id=1001,
        dynamic_token_id=1002,
        **changes,
    )
    with torch.random.fork_rng():
        model = LMEyeForConditionalGeneration(config, language_model=language_model)
    randomise(model.vision_tower, seed=100, gain=1.0)
    if interaction == "clip_text":
        randomise(model.ipn.interaction, seed=101, gain=1.0)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.ipn.named_parameters():
            if interaction == "clip_text" and name.startswith("interaction."):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2 and "token" not in name:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * (0.5 if "token" in name else parameter.shape[-1] ** -0.5))
            parameter.requires_grad_(True)
    return model.eval()


def row_of(config: LMEyeConfig, layout: str, seed: int) -> tuple[list[int], list[int]]:
    """Ids and labels of a layout such as `"2 img 3 req 2 =4"`."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    labels: list[int] = []
    for part in layout.split():
        if part == "img":
            new = [config.image_token_id] * config.num_static_tokens
        elif part == "req":
            kept = [config.request_token_id] if config.keep_request_token else []
            new = kept + [config.dynamic_token_id] * config.num_dynamic_tokens
        else:
            new = torch.randint(WORDS.start, WORDS.stop, (int(part.lstrip("=")),), generator=generator).tolist()
        ids += new
        labels += new if part.startswith("=") else [-100] * len(new)
    return ids, labels


def batch_of(rows: list[tuple[list[int], list[int]]], padding: str) -> dict[str, torch.Tensor]:
    """Rows padded on the left, on the right, or (ragged) some of them on both sides."""
    width = max(len(ids) for ids, _ in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for index, (ids, labels) in enumerate(rows):
        missing = width - len(ids)
        before = {"left": missing, "right": 0, "ragged": (missing * (index % 3)) // 2}[padding]
        columns["input_ids"].append([0] * before + ids + [0] * (missing - before))
        columns["attention_mask"].append([0] * before + [1] * len(ids) + [0] * (missing - before))
        columns["labels"].append([-100] * before + labels + [-100] * (missing - before))
    return {name: torch.tensor(values) for name, values in columns.items()}


class DifferenceError(AssertionError):
    """Two values that should be alike are not."""


class Checks:
    """The checks of one type; `worst` holds the largest relative difference of each."""

    def __init__(self, model: LMEyeForConditionalGeneration):
        self.model = model
        self.plain = (PlainEncoderDecoder if model.config.is_encoder_decoder else PlainLMEye)(model)
        self.worst: dict[str, float] = {}
        generator = torch.Generator().manual_seed(7)
        self.pixels = torch.randn(8, 3, 32, 32, generator=generator)
        with torch.no_grad():
            self.features = model.get_image_features(self.pixels)

    def same(self, check: str, got: torch.Tensor, expected: torch.Tensor, scale: float | None = None) -> None:
        scale = max(float(expected.abs().max()), 1e-6) if scale is None else scale
        apart = float((got - expected).abs().max()) / scale
        self.worst[check] = max(self.worst.get(check, 0.0), apart)
        if not apart <= TOLERANCE:
            raise DifferenceError(f"{check}: {apart:.1e} apart")

    def same_ids(self, check: str, got: list, expected: list) -> None:
        if got != expected:
            raise DifferenceError(f"{check}: {got} instead of {expected}")
        self.worst.setdefault(check, 0.0)

    def rows(self, layouts: list[str]) -> tuple[list[tuple[list[int], list[int], Any]], Any]:
        """Ids, labels and image features of each row; the features of all."""
        rows, used = [], 0
        for index, layout in enumerate(layouts):
            ids, labels = row_of(self.model.config, layout, seed=index)
            count = layout.split().count("img")
            rows.append((ids, labels, self.features[used : used + count]))
            used += count
        return rows, self.features[:used]

    @torch.no_grad()
    def words(self) -> None:
        model, plain = self.model, self.model.language_model
        ids = torch.randint(WORDS.start, WORDS.stop, (2, 13), generator=torch.Generator().manual_seed(5))
        mask = torch.ones_like(ids)
        expected = plain(input_ids=ids, attention_mask=mask).logits
        got = model(input_ids=ids, attention_mask=mask).logits
        if not torch.equal(got, expected):
            raise DifferenceError("words: logits differ")
        mask[1, :3] = 0
        expected = plain.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS).tolist()
        got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS).tolist()
        self.same_ids("words", got, expected)

    def meaning(self) -> None:
        model, (rows, features) = self.model, self.rows(ROWS)
        trained = {name: part for name, part in model.ipn.named_parameters() if part.requires_grad}
        loss = self.plain.loss(rows)
        expected = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        with torch.no_grad():
            finished = [self.plain.finish(ids, pictures) for ids, _, pictures in rows]
            logits = [self.plain.read(embeds, words)[1] for embeds, words, _ in finished]
        requests = torch.stack([request for _, _, found in finished for request in found])
        pairs = [(ids, labels) for ids, labels, _ in rows]
        got = model.perceive(**batch_of(pairs, "ragged"), image_features=features)
        self.same("requests", got.requests, requests)
        for padding in ("left", "right", "ragged"):
            inputs = batch_of(pairs, padding)
            with torch.no_grad():
                out = model(**inputs, image_features=features)
            for index, row in enumerate(logits):
                self.same("logits", out.logits[index][inputs["attention_mask"][index].bool()], row)
            self.same("loss", out.loss, loss.detach())
            self.gradients("gradients", inputs, features, trained, expected)
        model.train()
        model.gradient_checkpointing_enable()
        self.gradients("checkpointing", batch_of(pairs, "left"), features, trained, expected)
        model.gradient_checkpointing_disable()
        model.eval()
        # In stage 2 nothing before the first request has a gradient, and takes a way of its own.
        model.freeze_for_stage("instruct")
        chosen = {name: part for name, part in trained.items() if part.requires_grad}
        theirs = [part for name, part in zip(trained, expected, strict=True) if name in chosen]
        self.gradients("gradients", batch_of(pairs, "left"), features, chosen, theirs)
        for part in trained.values():
            part.requires_grad_(True)

    def gradients(self, check: str, inputs, features, trained: dict, expected) -> None:
        loss = self.model(**inputs, image_features=features).loss
        got = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        scale = max(float(theirs.abs().max()) for theirs in expected if theirs is not None)
        for name, ours, theirs in zip(trained, got, expected, strict=True):
            if theirs is None or not float(theirs.abs().max()):
                raise DifferenceError(f"gradients: {name} has no part in the loss")
            self.same(check, ours, theirs, scale)

    def generation(self) -> None:
        model, (rows, features) = self.model, self.rows(PROMPTS)
        options = {"max_new_tokens": NEW_TOKENS}
        for beams in ({}, {"num_beams": 2}):
            alone = []
            for ids, _, pictures in rows:
                mask = torch.ones(1, len(ids), dtype=torch.long)
                inputs = {"input_ids": torch.tensor([ids]), "attention_mask": mask}
                new = model.generate(**inputs, image_features=pictures, **options, **beams)[0].tolist()
                if not beams:
                    self.same_ids("greedy", new, ids + self.plain.greedy(ids, pictures))
                alone.append(new[len(ids) :])
            for padding in ("left", "ragged"):
                inputs = batch_of([(ids, labels) for ids, labels, _ in rows], padding)
                del inputs["labels"]
                width = inputs["input_ids"].shape[1]
                got = model.generate(**inputs, image_features=features, **options, **beams)[:, width:].tolist()
                self.same_ids("batch", got, alone)


class EncoderDecoderChecks(Checks):
    """The same checks of an encoder-decoder, whose answers stand in the decoder."""

    def words(self) -> None:
        model, plain = self.model, self.model.language_model
        ids = torch.randint(WORDS.start, WORDS.stop, (2, 13), generator=torch.Generator().manual_seed(5))
        mask = torch.ones_like(ids)
        mask[1, 10:] = 0
        with torch.no_grad():
            expected = plain(input_ids=ids, attention_mask=mask, labels=ids).logits
            got = model(input_ids=ids, attention_mask=mask, labels=ids).logits
        if not torch.equal(got, expected):
            raise DifferenceError("words: logits differ")
        expected = plain.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS).tolist()
        got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS).tolist()
        self.same_ids("words", got, expected)

    def meaning(self) -> None:
        model, (rows, features) = self.model, self.rows([layout.replace("=", "") for layout in ROWS])
        trained = {name: part for name, part in model.ipn.named_parameters() if part.requires_grad}
        generator = torch.Generator().manual_seed(3)
        answers = torch.randint(WORDS.start, WORDS.stop, (len(rows), 4), generator=generator)
        start = torch.full((len(rows), 1), model.language_model.generation_config.decoder_start_token_id)
        given = {"decoder_input_ids": torch.cat([start, answers[:, :-1]], dim=1), "labels": answers.clone()}
        given["labels"][1, 0] = given["labels"][2, 2:] = -100
        finished = [self.plain.finish(ids, pictures) for ids, _, pictures in rows]
        logits = [
            self.plain.decode(outputs, ids)
            for (outputs, _), ids in zip(finished, given["decoder_input_ids"].tolist(), strict=True)
        ]
        loss = torch.nn.functional.cross_entropy(torch.cat(logits), given["labels"].flatten())
        expected = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        requests = torch.stack([request for _, found in finished for request in found]).detach()
        pairs = [(ids, labels) for ids, labels, _ in rows]
        got = model.perceive(**batch_of(pairs, "ragged"), image_features=features)
        self.same("requests", got.requests, requests)
        for padding in ("left", "right", "ragged"):
            inputs = {**batch_of(pairs, padding), **given}
            with torch.no_grad():
                out = model(**inputs, image_features=features)
            for index, row in enumerate(logits):
                self.same("logits", out.logits[index], row.detach())
            self.same("loss", out.loss, loss.detach())
            self.gradients("gradients", inputs, features, trained, expected)
        model.train()
        model.gradient_checkpointing_enable()
        self.gradients("checkpointing", inputs, features, trained, expected)
        model.gradient_checkpointing_disable()
        model.eval()

    def generation(self) -> None:
        model, (rows, features) = self.model, self.rows(PROMPTS)
        options = {"max_new_tokens": NEW_TOKENS}
        for beams in ({}, {"num_beams": 2}):
            alone = []
            for ids, _, pictures in rows:
                mask = torch.ones(1, len(ids), dtype=torch.long)
                inputs = {"input_ids": torch.tensor([ids]), "attention_mask": mask}
                alone.append(model.generate(**inputs, image_features=pictures, **options, **beams)[0].tolist())
                if not beams:
                    self.same_ids("greedy", alone[-1], self.plain.greedy(ids, pictures))
            for padding in ("left", "ragged"):
                inputs = batch_of([(ids, labels) for ids, labels, _ in rows], padding)
                del inputs["labels"]
                got = model.generate(**inputs, image_features=features, **options, **beams).tolist()
                self.same_ids("batch", got, alone)


def check_type(kind: str, model_type: str) -> dict[str, Any]:
    """All checks of one type; what was found, for the log."""
    language_model = tiny_language_model(model_type, kind)
    found: dict[str, Any] = {"class": type(language_model).__name__, "worst": {}}
    settings = {"pad_token_id": 0}
    if language_model.config.is_encoder_decoder:
        settings["decoder_start_token_id"] = language_model.config.decoder_start_token_id
    language_model.generation_config = GenerationConfig(**settings)
    for interaction in ("cross_attention", "clip_text"):
        model = build(language_model, interaction)
        checks = (EncoderDecoderChecks if model.config.is_encoder_decoder else Checks)(model)
        found["reads"] = "again" if model.config.is_encoder_decoder else model.way_of_reading
        found["rows_apart"] = not model.config.is_encoder_decoder and not model.joins_rows
        checks.meaning()
        checks.words()
        if interaction == "cross_attention":
            checks.generation()
        for name, apart in checks.worst.items():
            found["worst"][name] = max(found["worst"].get(name, 0.0), apart)
    return found


def check(kind: str, model_type: str) -> dict[str, Any]:
    """A line of the log."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    begin = time.time()
    line: dict[str, Any] = {"kind": kind, "type": model_type, "status": "cannot"}
    try:
        line.update(check_type(kind, model_type))
        line["status"] = {"crop": "works", "copy": "copy", "again": "again"}[line["reads"]]
    except Exception as error:  # whatever a model raises is its entry in the table
        place = traceback.extract_tb(error.__traceback__)[-1]
        line["error"] = f"{type(error).__name__}: {str(error).strip()}"[:400]
        line["place"] = f"{Path(place.filename).name}:{place.lineno}"
    line["seconds"] = round(time.time() - begin, 1)
    return line


def _worker(connection, kind: str, model_type: str) -> None:
    connection.send(check(kind, model_type))


def check_all(pairs: list[tuple[str, str]], jobs: int, timeout: float):
    """Checks each pair in a process of its own and yields its line as it is done."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(pairs), []
    while waiting or running:
        while waiting and len(running) < jobs:
            kind, model_type = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(sender, kind, model_type))
            process.start()
            sender.close()
            running.append((process, receiver, kind, model_type, time.time()))
        for job in list(running):
            process, receiver, kind, model_type, begin = job
            line = None
            if receiver.poll(0.02):
                try:
                    line = receiver.recv()
                except EOFError:
                    line = {"error": "the process died"}
            elif time.time() - begin > timeout:
                process.kill()
                line = {"error": f"not done after {timeout:.0f} s"}
            if line is not None:
                process.join()
                running.remove(job)
                yield {"kind": kind, "type": model_type, "status": "cannot", **line}


# --- the table ------------------------------------------------------------------------------------------------------

STATUSES = {
    "works": "works",
    "copy": "works with a copy of the cache",
    "again": "works reading the prompt again",
    "cannot": "cannot",
}
TITLES = {"causal": "Causal language models", "seq2seq": "The mapping of encoder-decoders"}
HEAD = """# Which language models work

Every type of transformers {version} that `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` knows, as a tiny random
model with the Interactive Perception Network (`cross_attention` and `clip_text`) around it, held against the plain
computation: whole passes over ever longer texts, one row at a time, without cache, padding or batch. Words alone give
the very logits and ids of the language model; requests, logits, loss, gradients (with gradient checkpointing too),
greedy ids, and batches padded on the left and on both sides, greedy and with two beams, agree. This file is written by

```
python examples/check_backbones.py --log backbones.jsonl --write docs/backbones.md
```

| | {columns} | of |
| --- | {rules} | ---: |
{counts}

- **works**: the model keeps keys and values, from which single columns can be dropped. Prefix and request are one
  forward.
- **works with a copy of the cache**: it keeps recurrent or convolution states as well, from which nothing can be
  dropped. The request is read behind a copy of the cache, a third forward.
- **works reading the prompt again**: nothing longer than a word can be read behind its cache, or it has none; or it is
  an encoder-decoder, whose encoder sees the whole text at once. The text is read once for each request and once more
  with the answers in it. Dearer, and as exact.
- *rows apart*: it cannot tell padding from words, or keeps a cache that rows cannot be joined in. Rows of unlike
  lengths are generated one at a time; the forward takes any batch and reads rows of equal lengths together.

How a model is read follows from what its class and its cache say of themselves, and where they do not say, from trying
it once on a few words (`modeling/reading.py`). There is no list of names. Types of pictures and sounds that are in
these mappings are read by their words alone.

The last column is the largest difference found, relative to the largest value of the tensor (of all gradients, for a
gradient). Up to {tolerance:.0e} counts as equal: rounding of float32 in random models with sharp attention or long
products of decays. {below} of {passed} stay below 1e-5.
"""


def table(lines: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The results as Markdown."""
    kinds = [kind for kind in TITLES if any(line["kind"] == kind for line in lines.values())]
    found = {kind: [lines[kind, name] for name in MODEL_TYPES[kind] if (kind, name) in lines] for kind in kinds}
    counts = []
    for kind in kinds:
        numbers = Counter(line["status"] for line in found[kind])
        row = " | ".join(str(numbers[status]) for status in STATUSES)
        counts.append(f"| {TITLES[kind]} | {row} | {len(found[kind])} |")
    worst = [max(line["worst"].values()) for line in lines.values() if line["status"] != "cannot"]
    text = HEAD.format(
        version=transformers.__version__,
        columns=" | ".join(STATUSES.values()),
        rules=" | ".join("---:" for _ in STATUSES),
        counts="\n".join(counts),
        tolerance=TOLERANCE,
        below=sum(apart < 1e-5 for apart in worst),
        passed=len(worst),
    )
    for kind in kinds:
        text += f"\n## {TITLES[kind]}\n\n| type | class | | largest difference |\n| --- | --- | --- | ---: |\n"
        for line in found[kind]:
            if line["status"] == "cannot":
                continue
            status = STATUSES[line["status"]] + (", rows apart" if line["rows_apart"] else "")
            text += f"| `{line['type']}` | {line['class']} | {status} | {max(line['worst'].values()):.0e} |\n"
        reasons: dict[str, list[str]] = {}
        for line in found[kind]:
            if line["status"] == "cannot":
                error = " ".join(line["error"].split()).replace("|", "/")
                reasons.setdefault(error, []).append(f"`{line['type']}`")
        if reasons:
            text += "\n| type | why | | |\n| --- | --- | --- | --- |\n"
            for error, names in reasons.items():
                text += f"| {', '.join(names)} | {error} | cannot | |\n"
    return text


def main(arguments: CheckArguments) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    done: dict[tuple[str, str], dict[str, Any]] = {}
    if arguments.log is not None and arguments.log.exists():
        for text in arguments.log.read_text().splitlines():
            line = json.loads(text)
            done[line["kind"], line["type"]] = line
    kinds = ["causal", "seq2seq"] if arguments.kind == "both" else [arguments.kind]
    pairs = [
        (kind, name)
        for kind in kinds
        for name in arguments.types or MODEL_TYPES[kind]
        if name in MODEL_TYPES[kind] and (kind, name) not in done
    ]
    for number, line in enumerate(check_all(pairs, arguments.jobs, arguments.timeout), start=1):
        done[line["kind"], line["type"]] = line
        said = f"{line['kind']} {line['type']}: {line['status']} {line.get('error', '')}"
        print(f"{number}/{len(pairs)} {said}", flush=True)
        if arguments.log is not None:
            with arguments.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
    print(Counter((line["kind"], line["status"]) for line in done.values()))
    if arguments.write is not None:
        arguments.write.write_text(table(done))


if __name__ == "__main__":
    main(HfArgumentParser(CheckArguments).parse_args_into_dataclasses()[0])
