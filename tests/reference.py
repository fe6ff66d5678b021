"""What method.md's formulas say, computed the plain way: whole passes over ever longer sequences, one row at a time.

No cache, no padding, no batch, and no code of the package: CLIP is written out below on the tensors of the vision
folder, BLIP-2's vision tower and Q-Former are transformers' own parts called by themselves, the language model is the
family's own class loaded from the language folder. Only the trained parameters are taken from the model under test, by
name, so that gradients can be compared as well.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2ForConditionalGeneration,
    LogitsProcessorList,
)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Multi-head softmax attention. [Q, D], [K, D], [K, D] -> [Q, D] and weights [heads, Q, K]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key, value))  # [heads, *, D / heads]
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
    weights = scores.softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1), weights


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class PlainCLIP:
    """CLIP's two towers from the tensors of a folder."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}

    def _layers(
        self, x: Tensor, prefix: str, config: dict[str, Any], causal: bool, weights: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Every layer's output [S, D], the input first; its attention [S, S], mean over heads, goes into `weights`."""
        t = self.tensors
        states = [x]
        for index in range(config["num_hidden_layers"]):
            name = f"{prefix}.encoder.layers.{index}"

            def linear(y: Tensor, part: str, name: str = name) -> Tensor:
                return y @ t[f"{name}.{part}.weight"].T + t[f"{name}.{part}.bias"]

            y = self._norm(x, f"{name}.layer_norm1")
            y, seen = attention(
                linear(y, "self_attn.q_proj"),
                linear(y, "self_attn.k_proj"),
                linear(y, "self_attn.v_proj"),
                config["num_attention_heads"],
                causal,
            )
            if weights is not None:
                weights.append(seen.mean(0))
            x = x + linear(y, "self_attn.out_proj")
            y = self._norm(x, f"{name}.layer_norm2")
            x = x + linear(quick_gelu(linear(y, "mlp.fc1")), "mlp.fc2")
            states.append(x)
        return states

    def _norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return normal * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def image(self, pixel_values: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
        """[3, H, W] -> h_I [d_p], projected, not normalised; patch tokens of `hidden_states[layer]` [P, d_v]."""
        t = self.tensors
        kernel = t["vision_model.embeddings.patch_embedding.weight"]  # [D, 3, p, p]
        size = kernel.shape[-1]
        patches = pixel_values.unfold(1, size, size).unfold(2, size, size)  # [3, H / p, W / p, p, p]
        patches = patches.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1) @ kernel.flatten(1).T  # [P, D]
        x = torch.cat([t["vision_model.embeddings.class_embedding"][None], patches])
        x = self._norm(x + t["vision_model.embeddings.position_embedding.weight"], "vision_model.pre_layrnorm")
        states = self._layers(x, "vision_model", self.config["vision_config"], causal=False)
        pooled = self._norm(states[-1][0], "vision_model.post_layernorm")
        return t["visual_projection.weight"] @ pooled, states[layer][1:]

    def soft_text(self, soft: Tensor, bos: int, eos: int) -> Tensor:
        """Variant 1, step 5: the text tower over [bos, soft tokens [n, d_t], eos] -> projected output at eos [d_p]."""
        return self.soft_text_outputs(soft, bos, eos)[0][-1]

    def soft_text_outputs(self, soft: Tensor, bos: int, eos: int) -> tuple[Tensor, Tensor]:
        """The same -> every projected output [n + 2, d_p], attention [layers, n + 2, n + 2], mean over heads."""
        t = self.tensors
        table = t["text_model.embeddings.token_embedding.weight"]
        positions = t["text_model.embeddings.position_embedding.weight"]
        first, last = table[bos] + positions[0], table[eos] + positions[len(soft) + 1]
        x = torch.cat([first[None], soft, last[None]])
        weights: list[Tensor] = []
        x = self._layers(x, "text_model", self.config["text_config"], causal=True, weights=weights)[-1]
        outputs = self._norm(x, "text_model.final_layer_norm") @ t["text_projection.weight"].T
        return outputs, torch.stack(weights)


@dataclass
class Picture:
    """What the frozen encoders say of one picture."""

    pooled: Tensor  # [d_p]
    patches: Tensor | None = None  # [P, d_v], row by row, padding left out
    grid: tuple[int, int] | None = None  # their rows and columns
    queries: Tensor | None = None  # [Q, d_q]


class PlainBLIP2:
    """BLIP-2's vision tower and Q-Former."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        whole = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
        self.vision_model, self.qformer, self.query_tokens = whole.vision_model, whole.qformer, whole.query_tokens

    def image(self, pixel_values: Tensor, layer: int = -2) -> tuple[Tensor, Tensor, Tensor]:
        """[3, H, W] -> pooled [d_v], patches [P, d_v], the Q-Former's outputs [Q, d_q]."""
        seen = self.vision_model(pixel_values[None], output_hidden_states=True)
        read = self.qformer(query_embeds=self.query_tokens, encoder_hidden_states=seen.last_hidden_state)
        return seen.pooler_output[0], seen.hidden_states[layer][0, 1:], read.last_hidden_state[0]


def square(count: int) -> tuple[int, int]:
    """Rows and columns of a picture's patches where nothing says otherwise."""
    side = round(count**0.5)
    return (side, side) if side * side == count else (1, count)


def averaged(features: Tensor, grid: tuple[int, int], count: int, areas: tuple[int, int] | None = None) -> Tensor:
    """Features [rows x columns, d] averaged over areas of as equal a size as whole features allow -> [count, d].

    Area i of n along a side of length s begins at floor(i s / n) and ends before ceil((i + 1) s / n). `areas` are
    rows and columns of them; by default a square.
    """
    areas = (1, count) if grid[0] == 1 else areas or square(count)
    spans = [
        [(i * side // parts, -((i + 1) * side // -parts)) for i in range(parts)]
        for side, parts in zip(grid, areas, strict=True)
    ]
    laid = features.view(*grid, -1)
    return torch.stack(
        [laid[top:bottom, left:right].mean((0, 1)) for top, bottom in spans[0] for left, right in spans[1]]
    )


@dataclass
class Finished:
    """A row with every slot filled."""

    embeds: Tensor  # [S, d_L]
    requests: list[Tensor]  # each [d_h]
    dynamic: list[Tensor]  # each [k, d_L]
    attention: list[
        Tensor
    ]  # each [layers, request vectors, images x patches], mean over heads; empty where there is none


class Reference:
    """Two-full-pass LMEye over the folders of its backbones and the IPN's parameters.

    Args:
        vision (`Path`), language (`Path`): folders the model under test was built from.
        model: the model under test, read only for `model.config` and `model.ipn`'s parameters.
        clip_text (`Path`, *optional*): the CLIP whose text tower is used, where `vision` is none.
    """

    auto_class: Any = AutoModelForCausalLM

    def __init__(
        self,
        vision: Path,
        language: Path,
        model: Any,
        dtype: torch.dtype = torch.float32,
        clip_text: Path | None = None,
    ):
        is_blip2 = _model_type(vision) == "blip-2"
        self.tower = PlainBLIP2(vision, dtype) if is_blip2 else PlainCLIP(vision, dtype)
        self.clip = PlainCLIP(clip_text, dtype) if is_blip2 else self.tower
        if _model_type(language) == "blip-2":
            whole = Blip2ForConditionalGeneration.from_pretrained(language, dtype=dtype)
            self.language_model = whole.language_model
        else:
            self.language_model = self.auto_class.from_pretrained(language, dtype=dtype)
        self.language_model.eval().requires_grad_(False)
        self.config = model.config
        self.p: dict[str, Tensor] = dict(model.ipn.named_parameters())
        text = self.clip.config["text_config"]
        rows = text["vocab_size"]
        self.clip_bos, self.clip_eos = rows - 2, rows - 1  # CLIP's own vocabulary ends in its bos and eos

    def picture(self, pixel_values: Tensor) -> Picture:
        """What the towers say of one picture [3, H, W]."""
        pooled, patches, *queries = self.tower.image(pixel_values, self.config.vision_feature_layer)
        return Picture(pooled, patches, square(len(patches)), *queries)

    def last_hidden_state(self, embeds: Tensor) -> Tensor:
        """One whole pass over [S, d_L]; what the family's own head is given at the last position. [d_L]"""
        seen: list[Tensor] = []
        head = self.language_model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.language_model(inputs_embeds=embeds[None], use_cache=False)
        finally:
            handle.remove()
        return seen[0][0, -1]

    def logits(self, embeds: Tensor) -> Tensor:
        """One whole pass over [S, d_L]. -> [S, V]"""
        return self.language_model(inputs_embeds=embeds[None], use_cache=False).logits[0]

    def words(self, ids: Tensor) -> Tensor:
        return self.language_model.get_input_embeddings()(ids)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return normal * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def static(
        self,
        pooled: Tensor,
        patches: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Step 1: e_img = t_img + W_a h_I + b_a; so of each Q-Former output, of each patch or average of patches; or
        what learned queries read from the patches. -> [n, d_L]"""
        t_img = self.p["image_token"]
        if self.config.visual_mapping == "linear":
            return t_img + self.linear(pooled, "visual_mapping").view_as(t_img)
        if self.config.visual_mapping == "qformer":
            return t_img + self.linear(queries, "visual_mapping")
        if self.config.visual_mapping == "patch":
            count = len(t_img)
            if len(patches) != count:
                # of all rows and columns that make so many, those whose sides differ least, no more rows than columns
                pairs = [(n, count // n) for n in range(1, count + 1) if count % n == 0 and n <= count // n]
                areas = min(pairs, key=lambda pair: pair[1] - pair[0])
                patches = averaged(patches, grid or square(len(patches)), count, areas)
            return t_img + self.linear(patches, "visual_mapping")
        context = self.placed(patches, "visual_mapping.patch_projection", grid)
        states, _ = self.stack(self.p["visual_mapping.stack.queries"], context, "visual_mapping.stack")
        return t_img + self.linear(states, "visual_mapping.output")

    def dynamic(self, request: Tensor, pictures: list[Picture]) -> tuple[Tensor, Tensor | None]:
        """Steps 3 to 6 for one request [d_h] and the pictures before it. -> [k, d_L], attention weights or None"""
        if not self.config.use_request:
            request = torch.zeros_like(request)
        answer, weights = {"clip_text": self.clip_text, "cross_attention": self.cross_attention}[
            self.config.interaction
        ](request, pictures)
        # Step 6: e_d(j) = e_req + (W_d y + b_d), reshaped to [k, d_L]; where `<img-q>` stays, `<img-d>` has a vector
        # of its own in the place of e_req.
        blank = self.p["dynamic_token" if self.config.keep_request_token else "request_token"]
        return blank + self.linear(answer, "dynamic_projection").view(self.config.num_dynamic_tokens, -1), weights

    def clip_text(self, request: Tensor, pictures: list[Picture]) -> tuple[Tensor, Tensor | None]:
        """Variants 1 and 2, steps 3 to 5. -> y [d_p] at eos, or the last k outputs [k, d_p]; attention [layers, m, F]
        of the request vectors over the soft tokens where these are more than the global feature's"""
        h_r = self.linear(request, "request_projection").view(self.config.num_request_vectors, -1)  # [m, d_t]
        h_f = torch.cat([self.soft(picture, h_r.shape[-1]) for picture in pictures])  # [F, d_t]
        outputs, weights = self.clip.soft_text_outputs(torch.cat([h_f, h_r]), self.clip_bos, self.clip_eos)
        last = 1 if self.config.dynamic_readout == "eos" else self.config.num_dynamic_tokens
        seen = weights[:, 1 + len(h_f) : -1, 1 : 1 + len(h_f)]
        return outputs[-last:], None if self.config.fine_grained_source == "global" else seen

    def soft(self, picture: Picture, width: int) -> Tensor:
        """Step 4: h_f of one picture. -> [F, d_t]"""
        source, count = self.config.fine_grained_source, self.config.num_fine_grained_tokens
        if source == "global":
            return self.linear(picture.pooled, "fine_grained_projection").view(-1, width)
        features, grid = picture.patches, picture.grid
        if source == "qformer":
            features, grid = picture.queries, (1, len(picture.queries))
        if count is not None:
            features = averaged(features, grid, count)
        return self.linear(features, "fine_grained_projection")

    def placed(self, features: Tensor, name: str, grid: tuple[int, int] | None = None) -> Tensor:
        """Features [P, d_v] normalised and mapped, plus two-dimensional sinusoids: half of the width for the row, half
        for the column, sines before cosines, wavelengths from 2 pi to 200 pi patches. -> [P, d_i]"""
        x = self.linear(self.norm(features, f"{name}.norm"), f"{name}.linear")
        count, quarter = len(x), x.shape[-1] // 4
        columns = (grid or square(count))[1]
        codes = []
        for patch in range(count):
            code: list[float] = []
            for place in divmod(patch, columns):
                turns = [place * 100 ** (-i / (quarter - 1)) for i in range(quarter)]
                code += [math.sin(turn) for turn in turns] + [math.cos(turn) for turn in turns]
            codes.append(code)
        return x + torch.tensor(codes)

    def stack(self, states: Tensor, context: Tensor, name: str) -> tuple[Tensor, list[Tensor]]:
        """Pre-normalised blocks of self-attention, cross-attention, feed-forward; a last norm. [m, d_i], [K, d_i]"""
        heads, weights = self.config.interaction_num_heads, []
        for index in range(self.config.interaction_num_layers):
            block = f"{name}.blocks.{index}"

            def attend(queries: Tensor, keys: Tensor, part: str, block: str = block) -> tuple[Tensor, Tensor]:
                q = self.linear(queries, f"{block}.{part}.query")
                k, v = self.linear(keys, f"{block}.{part}.key"), self.linear(keys, f"{block}.{part}.value")
                out, seen = attention(q, k, v, heads)
                return self.linear(out, f"{block}.{part}.output"), seen

            x = self.norm(states, f"{block}.self_attention_norm")
            states = states + attend(x, x, "self_attention")[0]
            out, seen = attend(self.norm(states, f"{block}.cross_attention_norm"), context, "cross_attention")
            states = states + out
            weights.append(seen.mean(0))
            x = self.linear(self.norm(states, f"{block}.feed_forward_norm"), f"{block}.feed_forward.0")
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
            states = states + self.linear(x, f"{block}.feed_forward.2")
        return self.norm(states, f"{name}.norm"), weights

    def cross_attention(self, request: Tensor, pictures: list[Picture]) -> tuple[Tensor, Tensor]:
        """Variant 3: request vectors read all pictures. -> last k vectors [k, d_i], attention [layers, m, K]"""
        context = []
        for picture in pictures:
            features, grid = {
                "global": (picture.pooled[None], (1, 1)),
                "patch": (picture.patches, picture.grid),
                "qformer": (picture.queries, None if picture.queries is None else (1, len(picture.queries))),
            }[self.config.fine_grained_source]
            context.append(self.placed(features, "fine_grained_projection", grid))
        x = self.linear(self.norm(request, "request_projection.0"), "request_projection.1")
        queries = self.p["interaction.queries"] + x.view(self.config.num_request_vectors, -1)
        states, weights = self.stack(queries, torch.cat(context), "interaction")
        return states[-self.config.num_dynamic_tokens :], torch.stack(weights)

    def pictures(self, images: Tensor | list[Picture] | None) -> list[Picture]:
        if images is None:
            return []
        return list(images) if isinstance(images, list) else [self.picture(x) for x in images]

    def finish(self, ids: list[int], images: Tensor | list[Picture] | None = None) -> Finished:
        """A row's ids [S] and pictures [n, 3, H, W] -> every slot's embedding; one whole first pass per request.

        Without `<img-q>` the first pass ends in e_req, which the second has not; `<img-q>` stays in both.
        """
        pictures = self.pictures(images)
        config = self.config
        done = Finished(self.words(torch.tensor([], dtype=torch.long)), [], [], [])
        static: list[Tensor] = []
        dynamic: list[Tensor] = []
        seen = 0

        def ask(embeds: Tensor) -> list[Tensor]:
            request = self.last_hidden_state(embeds)
            answer, weights = self.dynamic(request, pictures[:seen])
            done.requests.append(request)
            done.dynamic.append(answer)
            if weights is not None:
                done.attention.append(weights)
            return list(answer)

        for token in ids:
            if token == config.image_token_id:
                if not static:
                    picture = pictures[seen]
                    static = list(self.static(picture.pooled, picture.patches, picture.grid, picture.queries))
                    seen += 1
                new = static.pop(0)
            elif token == config.request_token_id:
                if dynamic:
                    raise AssertionError("the test's row asks before the last request's slots are full")
                new = self.p["request_token"]
                dynamic = ask(torch.cat([done.embeds, new[None]]))
            elif token == config.dynamic_token_id:
                if not dynamic and not config.keep_request_token:
                    dynamic = ask(torch.cat([done.embeds, self.p["request_token"][None]]))
                new = dynamic.pop(0)
            else:
                new = self.words(torch.tensor(token))
            done.embeds = torch.cat([done.embeds, new[None]])
        if static or dynamic or seen != len(pictures):
            raise AssertionError("the test's row has slots left over")
        return done

    def loss(self, rows: list[tuple[list[int], list[int], Tensor | None]]) -> Tensor:
        """Mean next-token loss over every target of every row; rows are (ids, labels, pictures)."""
        total, count = torch.zeros(()), 0
        for ids, labels, images in rows:
            log_p = self.logits(self.finish(ids, images).embeds).float().log_softmax(-1)
            for position in range(1, len(labels)):
                if labels[position] != -100:
                    total = total - log_p[position - 1, labels[position]]
                    count += 1
        return total / count

    def generate(self, ids: list[int], images: Tensor | None = None, **kwargs: Any) -> list[int]:
        """New ids: the plain language model continues the finished sequence."""
        with torch.no_grad():
            embeds = self.finish(ids, images).embeds[None]
            out = self.language_model.generate(
                inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), **kwargs
            )
        return out[0].tolist() if len(out) == 1 else out.tolist()

    def generate_batch(self, rows: list[tuple[list[int], Tensor | None]], **kwargs: Any) -> list[list[int]]:
        """New ids of several finished rows, padded on the left, so that sampling draws as one batch draws."""
        with torch.no_grad():
            finished = [self.finish(ids, images).embeds for ids, images in rows]
            width = max(len(x) for x in finished)
            embeds = torch.stack([F.pad(x, (0, 0, width - len(x), 0)) for x in finished])
            mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in finished])
            return self.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs).tolist()

    def greedy(
        self, ids: list[int], images: Tensor | None, max_new_tokens: int, processors: LogitsProcessorList
    ) -> list[int]:
        """Greedy decoding written out, without a cache; `processors` see the row's words and new ids, and no slot."""
        slots = {self.config.image_token_id, self.config.request_token_id, self.config.dynamic_token_id}
        words = [token for token in ids if token not in slots]
        new: list[int] = []
        with torch.no_grad():
            embeds = self.finish(ids, images).embeds
            for _ in range(max_new_tokens):
                scores = processors(torch.tensor([words + new]), self.logits(embeds)[-1:].float())
                new.append(int(scores.argmax()))
                embeds = torch.cat([embeds, self.words(torch.tensor(new[-1:]))])
        return new


class EncoderDecoderReference(Reference):
    """The same around an encoder-decoder (variant 2): a whole encoder pass for every round, and one for the answer."""

    auto_class = AutoModelForSeq2SeqLM

    def encoded(self, embeds: Tensor) -> Tensor:
        """One whole encoder pass over [S, d_L]. -> [S, d_h]"""
        mask = torch.ones(1, len(embeds), dtype=torch.long)
        return self.language_model.get_encoder()(inputs_embeds=embeds[None], attention_mask=mask).last_hidden_state[0]

    def finish(self, ids: list[int], images: Tensor | list[Picture] | None = None) -> Finished:
        """A row's ids [S] and pictures -> every slot's embedding.

        `<img-q>` and `<img-d>` hold their learned vectors while the encoder first reads the row. All questions of the
        row ask in one pass; each further round takes another pass, in which the earlier rounds' slots are full.
        """
        config, pictures = self.config, self.pictures(images)
        embeds, requests, static, seen = [], [], [], 0
        for place, token in enumerate(ids):
            if token == config.image_token_id:
                if not static:
                    picture = pictures[seen]
                    static = list(self.static(picture.pooled, picture.patches, picture.grid, picture.queries))
                    seen += 1
                embeds.append(static.pop(0))
            elif token == config.request_token_id:
                embeds.append(self.p["request_token"])
                requests.append((place, seen, []))
            elif token == config.dynamic_token_id:
                embeds.append(self.p["dynamic_token"])
                requests[-1][2].append(place)
            else:
                embeds.append(self.words(torch.tensor(token)))
        found: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        for number in range(config.num_request_rounds if requests else 0):
            states = self.encoded(torch.stack(embeds))
            for place, before, slots in requests[number :: config.num_request_rounds]:
                answer, weights = self.dynamic(states[place], pictures[:before])
                found[place] = (states[place], answer, weights)
                for slot, vector in zip(slots, answer, strict=True):
                    embeds[slot] = vector
        if static or seen != len(pictures) or len(found) != len(requests):
            raise AssertionError("the test's row has slots left over")
        of_requests = [found[place] for place in sorted(found)]
        return Finished(
            torch.stack(embeds),
            [request for request, _, _ in of_requests],
            [answer for _, answer, _ in of_requests],
            [weights for _, _, weights in of_requests if weights is not None],
        )

    def answer_logits(self, embeds: Tensor, answer: list[int]) -> Tensor:
        """The decoder's logits for each word of `answer` [T] and behind it, without a cache. -> [T + 1, V]"""
        start = self.language_model.config.decoder_start_token_id
        outputs = self.language_model(
            inputs_embeds=embeds[None], decoder_input_ids=torch.tensor([[start, *answer]]), use_cache=False
        )
        return outputs.logits[0]

    def loss(self, rows: list[tuple[list[int], list[int], Tensor | None]]) -> Tensor:
        """Mean loss over every target of every row; rows are (ids, the decoder's targets, pictures)."""
        total, count = torch.zeros(()), 0
        for ids, labels, images in rows:
            log_p = self.answer_logits(self.finish(ids, images).embeds, labels[:-1]).float().log_softmax(-1)
            for position, label in enumerate(labels):
                total = total - log_p[position, label]
                count += 1
        return total / count

    def generate(self, ids: list[int], images: Tensor | None = None, **kwargs: Any) -> list[int]:
        """Ids of the decoder, its start token first: the plain language model, given the finished sequence."""
        with torch.no_grad():
            embeds = self.finish(ids, images).embeds[None]
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
            out = self.language_model.generate(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **kwargs)
        return out[0].tolist() if len(out) == 1 else out.tolist()


def _model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]
