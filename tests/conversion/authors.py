"""The authors' side of the conversion tests: files as they were released, with random values, and their formulas.

Nothing here uses the package. The language model is transformers' own, its table cut or enlarged as the authors did;
CLIP is written out in `reference.py`. All is computed in float64, so that what a comparison leaves is the rounding of
converted tensors, which are float32.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from pathlib import Path

import tiny
import torch
from reference import PlainCLIP
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    BlipImageProcessor,
    CLIPImageProcessor,
)


D_L, D_T, D_P = tiny.TEXT_WIDTH, tiny.CLIP_TEXT_WIDTH, tiny.PROJECTION_WIDTH
D_Q, QUERIES, D_T5 = tiny.QFORMER_WIDTH, tiny.NUM_QUERIES, 52  # of tiny.blip2
CLIP_BOS, CLIP_EOS = 58, 59  # of tiny.clip


def draw(shapes: dict[str, list[int]], seed: int = 5) -> dict[str, Tensor]:
    """Random tensors: vectors at 0.3, biases at 0.1, matrices at 1 / sqrt(inputs), or 0.4 of it into the model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            noise *= 0.1
        elif name.endswith(".weight"):
            into_model = name.startswith(("imgLinear", "imageLinear", "imgdLinear", "language_", "instruction_imgd"))
            noise *= (0.4 if into_model else 1.0) / shape[1] ** 0.5
        else:
            noise *= 0.3
        tensors[name] = noise
    return tensors


def linear_shapes(name: str, inputs: int, outputs: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def stage1_tensors(d_l: int = D_L) -> dict[str, Tensor]:
    return draw(linear_shapes("imageLinear", D_P, d_l) | {"new_embedding": [1, d_l]}, seed=3)


def stage2_tensors(k: int = 5, d_l: int = D_L, d_h: int = D_L, vector: tuple[int, ...] = (1,)) -> dict[str, Tensor]:
    """`vector`: the dimensions that stand before a vector's own in the file."""
    return draw(
        linear_shapes("imgdLinear", D_P, k * d_l)
        | linear_shapes("imgLinear", D_P, d_l)
        | linear_shapes("promptMlp", D_P, 5 * D_T)
        | {"embedding_img": [*vector, d_l], "embedding_imgd": [*vector, d_l]}
        | linear_shapes("llm2clip", d_h, D_T)
    )


def v0_1_tensors(blip2: Path, k: int = 5) -> dict[str, Tensor]:
    """With the BLIP-2's own queries, which were frozen."""
    tensors = draw(
        {"instruction_embedding_imgd": [1, D_T5], "instruction_embedding_imgq": [1, D_T5]}
        | linear_shapes("instruction_blip22clip", D_T5, k * D_T)
        | linear_shapes("instruction_linear", D_Q, D_T)
        | linear_shapes("instruction_imgdLinear", D_P, D_T5)
        | linear_shapes("language_projection", D_Q, D_T5)
    )
    return tensors | {"query_tokens": Blip2ForConditionalGeneration.from_pretrained(blip2).query_tokens.detach()}


def write(path: Path, tensors: dict[str, Tensor], prefix: str = "") -> Path:
    """Saves as the authors do: parameters under `net`, the optimizer's state beside, in torch's format before zip."""
    net = OrderedDict((prefix + name, nn.Parameter(value)) for name, value in tensors.items())
    optimizer = torch.optim.AdamW(net.values(), lr=1e-4)
    optimizer.state = defaultdict(dict)
    content = {"net": dict(net), "optimizer": optimizer.state_dict(), "epoch": 4}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


class ReleasedV1:
    """The released model of version 1: the language model read twice, whole."""

    def __init__(self, vision: Path, language: Path, net: dict[str, Tensor], num_slots: int = 2):
        self.net = {name: value.double() for name, value in net.items()}
        self.clip = PlainCLIP(vision, torch.float64)
        self.image_processor = CLIPImageProcessor.from_pretrained(vision)
        self.tokenizer = AutoTokenizer.from_pretrained(language)
        self.language_model = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float64).eval()
        rows = self.language_model.get_input_embeddings().weight.shape[0]
        self.num_words = len(self.tokenizer)
        self.tokenizer.add_tokens(["<img>", "<img-d>"][:num_slots], special_tokens=True)
        self.image_id = self.tokenizer.vocab_size  # the number of words without the added ones
        self.dynamic_id = self.image_id + 1
        self.language_model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        with torch.no_grad():
            self.language_model.get_input_embeddings().weight[rows:] = 0  # new rows, drawn at random and never stored

    def linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.net[f"{name}.weight"], self.net[f"{name}.bias"])

    def run(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """A whole pass: last hidden states [S, d_h] and logits [S, V] of [S, d_L]."""
        seen = []
        handle = self.language_model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0][0])
        )
        logits = self.language_model(inputs_embeds=embeds[None], use_cache=False).logits[0]
        handle.remove()
        return seen[0], logits

    @torch.no_grad()
    def stage1(self, caption: str, picture) -> Tensor:
        """Logits over the words behind `<img>` and a caption. [S, words]"""
        ids = torch.tensor([self.image_id, *self.tokenizer(caption, add_special_tokens=False)["input_ids"]])
        embeds = self.language_model.get_input_embeddings()(ids)
        feature, _ = self.clip.image(self.image_processor(picture, return_tensors="pt")["pixel_values"][0].double())
        embeds[0] += self.linear(feature, "imageLinear") + self.net["new_embedding"].flatten()
        return self.run(embeds)[1][:, : self.num_words]

    @torch.no_grad()
    def stage2(self, prompt: str, picture) -> Tensor:
        """Logits over the words behind every position of a prompt. [S, words]"""
        ids = torch.tensor(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        feature, _ = self.clip.image(self.image_processor(picture, return_tensors="pt")["pixel_values"][0].double())
        table = self.language_model.get_input_embeddings()
        blank = self.net["embedding_imgd"].flatten()

        embeds = table(ids)
        embeds[ids == self.image_id] += self.linear(feature, "imgLinear") + self.net["embedding_img"].flatten()
        second = embeds.clone()
        embeds[ids == self.dynamic_id] += blank
        request = self.run(embeds)[0][ids == self.dynamic_id][0]

        soft = self.linear(feature, "promptMlp").view(-1, D_T)
        soft = torch.cat([soft, self.linear(request, "llm2clip")[None]])
        answer = self.clip.soft_text(soft, CLIP_BOS, CLIP_EOS)
        second[ids == self.dynamic_id] += blank + self.linear(answer, "imgdLinear").view(-1, blank.shape[0])
        return self.run(second)[1][:, : self.num_words]


class ReleasedV01:
    """The released model of version 0.1: the encoder read twice, whole, over slots built on the embedding of id 0."""

    def __init__(self, blip2: Path, clip: Path, net: dict[str, Tensor]):
        self.net = {name: value.double() for name, value in net.items()}
        self.blip2 = Blip2ForConditionalGeneration.from_pretrained(blip2, dtype=torch.float64).eval()
        self.clip = PlainCLIP(clip, torch.float64)
        self.image_processor = BlipImageProcessor.from_pretrained(blip2)
        self.tokenizer = AutoTokenizer.from_pretrained(blip2)
        self.tokenizer.add_tokens(["<img>", "<img-q>", "<img-d>"], special_tokens=True)
        self.slots = self.tokenizer.convert_tokens_to_ids(["<img>", "<img-q>", "<img-d>"])

    def linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.net[f"{name}.weight"], self.net[f"{name}.bias"])

    def interaction(self, queries: Tensor, request: Tensor, k: int) -> Tensor:
        """CLIP's text transformer over [bos, queries, request vectors, eos]: its last k outputs. [k, d_L]"""
        t = self.clip.tensors
        words = t["text_model.embeddings.token_embedding.weight"]
        positions = t["text_model.embeddings.position_embedding.weight"]
        soft = torch.cat(
            [self.linear(queries, "instruction_linear"), self.linear(request, "instruction_blip22clip").view(-1, D_T)]
        )
        first, last = words[CLIP_BOS] + positions[0], words[CLIP_EOS] + positions[len(soft) + 1]
        states = torch.cat([first[None], soft, last[None]])
        states = self.clip._layers(states, "text_model", self.clip.config["text_config"], causal=True)[-1]
        states = self.clip._norm(states, "text_model.final_layer_norm")[-k:]
        return self.linear(states @ t["text_projection.weight"].T, "instruction_imgdLinear")

    @torch.no_grad()
    def embeds(self, prompt: str, picture) -> Tensor:
        """What the encoder reads in its second pass. [S, d_L]"""
        ids = torch.tensor(self.tokenizer(prompt)["input_ids"])
        image, request_slot, dynamic = (ids == slot for slot in self.slots)
        pixels = self.image_processor(picture, return_tensors="pt")["pixel_values"].double()
        seen = self.blip2.vision_model(pixels).last_hidden_state
        queries = self.blip2.qformer(
            query_embeds=self.net["query_tokens"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
        ).last_hidden_state[0]

        embeds = self.blip2.get_input_embeddings()(ids.masked_fill(image | request_slot | dynamic, 0))
        embeds[image] += self.linear(queries, "language_projection")
        embeds[request_slot] += self.net["instruction_embedding_imgq"].flatten()
        embeds[dynamic] += self.net["instruction_embedding_imgd"].flatten()
        encoder = self.blip2.language_model.get_encoder()
        request = encoder(inputs_embeds=embeds[None]).last_hidden_state[0][request_slot][0]
        embeds[dynamic] += self.interaction(queries, request, int(dynamic.sum()))
        return embeds

    @torch.no_grad()
    def logits(self, prompt: str, picture, answer: list[int]) -> Tensor:
        """Logits behind each of the decoder's tokens. [len(answer), V]"""
        embeds = self.embeds(prompt, picture)[None]
        return self.blip2.language_model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([answer])).logits[0]

    @torch.no_grad()
    def generate(self, prompt: str, picture, **kwargs) -> list[int]:
        embeds = self.embeds(prompt, picture)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return self.blip2.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)[0].tolist()
