"""Reading a batch with a causal language model: segment by segment over one cache, each request on the way.

How a request is read follows from what the model keeps of the words before it:

- keys and values: prefix and request token are read in one forward, and the token is dropped from the cache;
- recurrent states, which nothing can be dropped from: the request is read behind a copy of the cache; so it is where
  a cache is given that drops columns itself or has them at fixed places;
- nothing that a longer text could be read behind: the whole text is read again for every request.

Rows of unlike lengths share a batch where the model ignores padding, else rows of equal lengths are read together.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import maybe_autocast

from .interactive_perception import ImageFeatures
from .lockstep import Call
from .segments import (
    Segment,
    SegmentPlan,
    cache_from_tensors,
    cache_length,
    cache_tensors,
    empty_cache,
    is_foreign,
    is_recurrent,
    join_rows,
    map_cache,
    padded_left_only,
    roll_padding_left,
    select_rows,
)


# PyTorch numbers hooks without a lock: two threads could get the same number, and lose one of two hooks.
_HOOKS_CHANGE = threading.Lock()


@dataclass
class LaidOutBatch:
    """A batch in the making: embeddings of all columns, and which images each row holds where."""

    embeds: torch.Tensor  # [B, S, d_L and layer inputs]; dynamic slots are filled as requests are answered
    attention_mask: torch.Tensor  # [B, S]
    start: int  # columns that are in the cache already
    features: ImageFeatures | None
    static_tokens: torch.Tensor | None
    image_rows: torch.Tensor  # [N], the row of each image
    image_columns: torch.Tensor  # [N], the column of each image's first slot


@dataclass
class Reading:
    """What a sweep over a [`LaidOutBatch`] has gathered so far."""

    cache: Cache | None
    mask: torch.Tensor  # bool [B, C], the columns read that hold words or slots
    embeds: torch.Tensor  # [B, S, d_L], as in the batch, with the slots answered so far
    logits: list[torch.Tensor]
    hidden_states: list[tuple[torch.Tensor, ...]]
    perceptions: list[dict[str, torch.Tensor]]
    apply_head: bool = True  # else `logits` holds what the head would be given, [B, W, d_h]


@dataclass
class WantedOutputs:
    """What a sweep is to gather besides requests."""

    num_logits: list[int] | None  # of each segment, how many of its last columns; `None` stops at the last request
    hidden_states: bool
    weights: bool


def accepted_arguments(language_model: PreTrainedModel) -> frozenset[str]:
    """Which of the arguments that not every language model has this one takes."""
    parameters = inspect.signature(language_model.forward).parameters
    names = ("position_ids", "past_key_values", "cache_params", "logits_to_keep")
    accepted = {name for name in names if name in parameters}
    if "use_cache" in parameters or any(part.kind is part.VAR_KEYWORD for part in parameters.values()):
        accepted.add("use_cache")
    return frozenset(accepted)


def take_columns(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns int `[B, W]` of states `[.., B, S, D]`: `[.., B, W, D]`."""
    return states.gather(-2, columns[..., None].expand(*states.shape[:-2], -1, states.shape[-1]))


def last_place(valid: torch.Tensor) -> torch.Tensor:
    """The last valid place of every row of bool `[B, W]`, 0 where there is none: `[B, 1]`."""
    places = torch.arange(valid.shape[1], device=valid.device)
    return places.where(valid, 0).amax(dim=1, keepdim=True)


def _first_position(decoder: nn.Module) -> int:
    """The position of a text's first word: tables of positions that have a row for padding start behind it."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


class _FoundByTrying(cached_property):
    """A cached property that runs the language model, whose errors must not pass for a missing attribute.

    What it finds holds for every later call, so it runs in the model's own precision and without a graph, whatever
    the first call is wrapped in.
    """

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        device = instance.ipn.image_token.device
        try:
            with torch.no_grad(), maybe_autocast(device.type, enabled=False):
                return super().__get__(instance, owner)
        except AttributeError as error:
            raise RuntimeError(f"{type(instance.language_model).__name__} cannot be read with: {error}") from error


class SegmentReadingMixin:
    """How [`LMEyeForConditionalGeneration`] reads with a causal language model."""

    # --- what the language model can do ------------------------------------------------------------------------

    @property
    def _cache_name(self) -> str:
        """The name by which the language model takes and returns a cache."""
        return "cache_params" if "cache_params" in self._accepted else "past_key_values"

    @cached_property
    def _takes_cache(self) -> bool:
        """Whether the language model reads behind a cache of Transformers' own classes, and says what it keeps."""
        if self._cache_name not in self._accepted or not self.language_model._supports_default_dynamic_cache():
            return False
        config = self.language_model.config.get_text_config(decoder=True)
        return hasattr(config, "num_hidden_layers") and not is_foreign(self._empty_cache())

    @property
    def joins_rows(self) -> bool:
        """Whether rows of unlike lengths can be decoded in one batch."""
        return self._takes_cache and (self.way_of_reading != "crop" or self.reads_padding)

    @_FoundByTrying
    def way_of_reading(self) -> Literal["crop", "copy", "again"]:
        """How the language model reads a request: see the head of this file."""
        if not self._takes_cache:
            return "again"
        cache = self._empty_cache()
        if not is_recurrent(cache):
            return "crop"
        return "copy" if self._goes_on_behind_a_cache() else "again"

    @_FoundByTrying
    def reads_padding(self) -> bool:
        """Whether a row on the right of padding is read as it would be alone."""
        if self.way_of_reading != "crop":
            return False
        # Models that say they can be compiled whole go by masks and positions alone.
        trusted = "position_ids" in self._accepted and self.language_model._can_compile_fullgraph
        return trusted or self._ignores_padding()

    @cached_property
    def _position_of_first_word(self) -> int:
        return _first_position(self.language_model)

    def _empty_cache(self) -> Cache:
        return empty_cache(self.language_model.config)

    def _goes_on_behind_a_cache(self) -> bool:
        """Tries whether several words behind a cache are read as if they had been read with what is in it.

        Some recurrent models take single words alone, and forget their states where they are given more.
        """
        words = self._words_to_try()
        valid = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        whole = self._read(self._nothing_read(words), words, valid, 0)[0]
        reading = self._nothing_read(words, self._empty_cache())
        self._read(reading, words[:, :6], valid[:, :6], 0)
        return _alike(self._read(reading, words[:, 6:], valid[:, 6:], 0)[0], whole[:, 6:])

    def _ignores_padding(self) -> bool:
        """Tries whether a row in a batch, rolled past its padding, is read as it is alone."""
        words = self._words_to_try()
        lengths = [words.shape[1], 5]
        begin = words.expand(2, -1, -1)
        valid = torch.tensor([[place < length for place in range(lengths[0])] for length in lengths])
        valid = valid.to(words.device)
        together = self._nothing_read(begin, self._empty_cache())
        self._read(together, begin, valid, 0)
        together.mask = roll_padding_left(together.cache, together.mask)
        got = self._read(together, begin, torch.ones_like(valid), 0)[0]
        for row, length in enumerate(lengths):
            alone = torch.cat([words[:, :length], words], dim=1)
            mask = torch.ones(alone.shape[:2], dtype=torch.bool, device=words.device)
            expected = self._read(self._nothing_read(alone), alone, mask, 0)[0]
            if not _alike(got[row], expected[0, length:]):
                return False
        return True

    def _words_to_try(self) -> torch.Tensor:
        """Embeddings `[1, 12, d_L]` of words all over the vocabulary."""
        embeddings = self.get_input_embeddings()
        # Where weights are loaded as they are used, the table itself is on no device.
        ids = torch.linspace(0, embeddings.weight.shape[0] - 1, 12, device=self.ipn.image_token.device).long()[None]
        return self._with_layer_inputs(embeddings(ids), ids)

    @cached_property
    def _layer_inputs_table(self) -> nn.Module | None:
        """The part of the language model that looks up inputs of single layers by word, where there is one."""
        for module in self.language_model.modules():
            if hasattr(module, "get_per_layer_inputs") and getattr(module, "hidden_size_per_layer_input", 0):
                return module
        return None

    def _with_layer_inputs(self, embeds: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[..., S, d_L]` of words and, behind them in the last dimension, what single layers are given."""
        if self._layer_inputs_table is None:
            return embeds
        layer_inputs = self._layer_inputs_table.get_per_layer_inputs(input_ids)  # [..., S, layers, width]
        return torch.cat([embeds, layer_inputs.flatten(-2).to(embeds)], dim=-1)

    def _in_slot(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors `[..., d_L]` as they stand in a slot, where single layers are given what belongs to id 0."""
        if self._layer_inputs_table is None:
            return vectors
        ids = torch.zeros(vectors.shape[:-1], dtype=torch.long, device=vectors.device)
        return self._with_layer_inputs(vectors, ids)

    @staticmethod
    def _nothing_read(embeds: torch.Tensor, cache: Cache | None = None) -> Reading:
        mask = torch.zeros(embeds.shape[0], 0, dtype=torch.bool, device=embeds.device)
        return Reading(cache, mask, embeds, [], [], [])

    def find_out_how_to_read(self) -> None:
        """Finds now what would be found by trying when a batch first needs it."""
        if not self.config.is_encoder_decoder:
            _ = self.reads_padding  # which asks for the way of reading

    def _wait_to_read(self, call: Call, states: torch.Tensor) -> torch.Tensor:
        """Waits for this process's turn to run the language model over `states`; see `lockstep.py`."""
        if self.lockstep is None:
            return states
        trains = any(parameter.requires_grad for parameter in self.language_model.parameters())
        records = torch.is_grad_enabled() and (trains or states.requires_grad)
        if self.lockstep.wait(call, records) and not states.requires_grad:
            states = states + torch.zeros((), dtype=states.dtype, device=states.device, requires_grad=True)
        return states

    # --- one forward -------------------------------------------------------------------------------------------

    def _read(
        self,
        reading: Reading,
        embeds: torch.Tensor,
        valid: torch.Tensor,
        num_logits: int,
        output_hidden_states: bool = False,
        keep_cache: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...] | None]:
        """
        Runs the language model over `embeds` [B, W, d_L] behind the cache, which grows by W columns.

        Args:
            keep_cache (`bool`): whether to keep a cache that the model makes itself.

        Returns:
            the hidden states its head is given, `[B, W, d_h]`; logits of the last `num_logits` positions (`None` for
            0), or those hidden states without `reading.apply_head`; hidden states.
        """
        lengths = reading.mask.sum(dim=1, keepdim=True)
        positions = (lengths + valid.long().cumsum(dim=1) - 1).clamp(min=0)
        reading.mask = torch.cat([reading.mask, valid], dim=1)
        inputs: dict[str, Any] = {"attention_mask": None if bool(reading.mask.all()) else reading.mask.long()}
        if "position_ids" in self._accepted:
            inputs["position_ids"] = positions + self._position_of_first_word
        if "use_cache" in self._accepted:
            inputs["use_cache"] = keep_cache or reading.cache is not None
        if output_hidden_states:
            inputs["output_hidden_states"] = True
        embeds = self._wait_to_read(Call.DECODE, embeds)
        # A head that the backward pass reaches in one process's call has to be reached in all of them.
        through_head = self.lockstep is not None and (not num_logits or not reading.apply_head)

        def run(embeds: torch.Tensor, cache: Cache | None):
            arguments = inputs if cache is None else {**inputs, self._cache_name: cache}
            if self._layer_inputs_table is not None:
                width = self.ipn.image_token.shape[-1]
                layer_inputs = embeds[..., width:]
                width_in_layer = self._layer_inputs_table.hidden_size_per_layer_input
                arguments = {**arguments, "per_layer_inputs": layer_inputs.unflatten(-1, (-1, width_in_layer))}
                embeds = embeds[..., :width]
            with self._head_inputs(num_logits if reading.apply_head else 0) as head_inputs:
                # Some models scale what they are given in place.
                outputs = self.language_model(inputs_embeds=embeds.clone(), return_dict=True, **arguments)
            if keep_cache and isinstance(made := outputs.get(self._cache_name), Cache):
                reading.cache = made
            hidden = head_inputs[0]
            if through_head:
                hidden = hidden + outputs.logits.sum().to(hidden)  # a sum over no columns
            scores = outputs.logits if reading.apply_head else hidden
            logits = scores[:, scores.shape[1] - num_logits :] if num_logits else None
            return hidden, logits, outputs.hidden_states if output_hidden_states else None

        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and not output_hidden_states:
            return self._checkpointed(run, reading, embeds)
        return run(embeds, reading.cache)

    @contextmanager
    def _head_inputs(self, num_columns: int) -> Iterator[list[torch.Tensor]]:
        """Collects what the language model's head is given, and leaves it the last `num_columns` columns.

        The head is shared by all threads: what others give it meanwhile is left as it is.
        """
        seen: list[torch.Tensor] = []
        own_thread = threading.get_ident()

        def cut(module: nn.Module, args: tuple) -> tuple | None:
            if threading.get_ident() != own_thread:
                return None
            states = args[0]
            # A head that looks several words ahead is given one stream for each, the next word's first.
            seen.append(states if states.dim() == 3 else states[:, 0])
            return (states[..., states.shape[-2] - num_columns :, :], *args[1:])

        head = self.language_model.get_output_embeddings()
        with _HOOKS_CHANGE:
            handle = head.register_forward_pre_hook(cut)
        try:
            yield seen
        finally:
            with _HOOKS_CHANGE:
                handle.remove()

    def _checkpointed(self, run, reading: Reading, embeds: torch.Tensor):
        """Keeps a segment's inputs in place of its activations; caches go in and out as tensors, so it can rerun."""
        before, after = reading.cache, []

        def function(embeds: torch.Tensor, *tensors: torch.Tensor):
            cache = cache_from_tensors(before, tensors)
            hidden, logits, _ = run(embeds, cache)
            after.append(cache)
            return (hidden, logits, *cache_tensors(cache))

        hidden, logits, *tensors = self._gradient_checkpointing_func(function, embeds, *cache_tensors(before))
        reading.cache = cache_from_tensors(after[0], tensors)
        return hidden, logits, None

    # --- the sweep ---------------------------------------------------------------------------------------------

    def _sweep(
        self,
        laid_out: LaidOutBatch,
        plan: SegmentPlan,
        past_key_values: Cache | None = None,
        num_logits: list[int] | None = None,
        output_hidden_states: bool = False,
        return_weights: bool = False,
        apply_head: bool = True,
    ) -> Reading:
        """
        Reads a batch segment by segment: prefix, request, interaction, and on to the next.

        Args:
            laid_out (`LaidOutBatch`): the batch; its dynamic slots are filled on the way.
            plan ([`SegmentPlan`]): its segments.
            past_key_values (`Cache`, *optional*): columns `[0, laid_out.start)`, read before.
            num_logits (list of `int`, *optional*): for each segment, how many of its last columns need logits; without
                it the sweep stops at the last request.
            apply_head (`bool`): `False` gathers what the head is given in place of logits.

        Raises:
            ValueError: `past_key_values` is of no use to this language model, or to rows of unlike lengths.
        """
        wanted = WantedOutputs(num_logits, output_hidden_states, return_weights)
        cache = past_key_values
        if self.way_of_reading == "again":
            if cache is not None and cache_length(cache):
                raise ValueError(
                    f"{type(self.language_model).__name__} reads a text anew for every request, nothing can be read "
                    "behind its cache: leave past_key_values out and pass the whole conversation with all of its "
                    "images."
                )
            cache = None
        elif cache is None:
            cache = self._empty_cache()
        mask = laid_out.attention_mask[:, : laid_out.start].bool()
        reading = Reading(cache, mask, laid_out.embeds, [], [], [], apply_head)
        padded = not (plan.contiguous and bool(laid_out.attention_mask.all()))
        apart = padded and not self.reads_padding
        if cache is not None and is_foreign(cache):
            if apart or not all(segment.right_aligned for segment in plan.segments):
                raise ValueError(
                    f"past_key_values is a {type(cache).__name__} with layers of {_layer_names(cache)}, in which "
                    "columns cannot be moved, as rows of unlike lengths need it: leave past_key_values out and pass "
                    "the whole conversation with all of its images, or go on with one row at a time."
                )
        if apart:
            self._sweep_groups(reading, laid_out, plan, wanted)
        else:
            self._sweep_rows(reading, laid_out, plan, wanted)
        return reading

    def _sweep_rows(self, reading: Reading, laid_out: LaidOutBatch, plan: SegmentPlan, wanted: WantedOutputs) -> None:
        """Reads rows together."""
        if self.way_of_reading == "again" or self._loses_gradients(reading, plan):
            self._sweep_again(reading, laid_out, plan, wanted)
            return
        for step, segment in enumerate(plan.segments):
            num_logits = wanted.num_logits[step] if wanted.num_logits is not None else 0
            if segment.slots is None:
                if wanted.num_logits is not None or segment is not plan.segments[-1]:
                    columns = take_columns(reading.embeds, segment.columns)
                    self._read_words(reading, columns, segment, num_logits, wanted.hidden_states)
                continue
            if self.config.keep_request_token:
                self._place_request_token(reading, segment)
                read_request = self._read_kept_request
            elif self.way_of_reading == "copy" or is_foreign(reading.cache):
                read_request = self._read_request_aside
            else:
                read_request = self._read_request
            columns = take_columns(reading.embeds, segment.columns)
            requests = read_request(reading, columns, segment, num_logits, wanted.hidden_states)
            self._answer(reading, laid_out, segment, requests, wanted)

    def _loses_gradients(self, reading: Reading, plan: SegmentPlan) -> bool:
        """Whether a single token would be read behind recurrent states, by kernels that cannot be trained through."""
        if self.way_of_reading != "copy" or not torch.is_grad_enabled() or reading.mask.shape[1]:
            return False
        return any(segment.columns.shape[1] == 1 for segment in plan.segments[1:])

    def _sweep_again(self, reading: Reading, laid_out: LaidOutBatch, plan: SegmentPlan, wanted: WantedOutputs) -> None:
        """Reads everything before a request with it, for each request, and the finished text once; no padding."""
        read: list[Segment] = []
        for segment in plan.segments:
            read.append(segment)
            if segment.slots is None:
                continue
            if self.config.keep_request_token:
                self._place_request_token(reading, segment)
            words = take_columns(reading.embeds, torch.cat([part.columns for part in read], dim=1))
            if not self.config.keep_request_token:
                words = torch.cat(
                    [words, self._in_slot(self.ipn.request_token).to(words).expand(words.shape[0], 1, -1)], dim=1
                )
            valid = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
            hidden, _, _ = self._read(self._nothing_read(words), words, valid, 0)
            self._answer(reading, laid_out, segment, hidden[:, -1], wanted)
        if wanted.num_logits is None:
            return
        words = take_columns(reading.embeds, torch.cat([part.columns for part in read], dim=1))
        valid = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        widths = [part.columns.shape[1] for part in read]
        first = next((step for step, count in enumerate(wanted.num_logits) if count), len(widths))
        keep_cache = not torch.is_grad_enabled()
        if keep_cache and self._takes_cache:
            reading.cache = self._empty_cache()
        _, logits, hidden_states = self._read(
            reading, words, valid, sum(widths[first:]), wanted.hidden_states, keep_cache
        )
        reading.logits += [
            part[:, part.shape[1] - count :]
            for part, count in zip(logits.split(widths[first:], dim=1), wanted.num_logits[first:], strict=True)
        ]
        if hidden_states is not None:
            reading.hidden_states.append(hidden_states)

    def _sweep_groups(
        self, reading: Reading, laid_out: LaidOutBatch, plan: SegmentPlan, wanted: WantedOutputs
    ) -> None:
        """Reads rows whose segments are of equal lengths together and others apart, so that none sees padding."""
        lengths = [reading.mask.sum(dim=1), *(segment.valid.sum(dim=1) for segment in plan.segments)]
        asking = [segment.requesting.long() for segment in plan.segments]
        shapes = torch.stack([*lengths, *asking], dim=1).tolist()
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, shape in enumerate(shapes):
            rows_of.setdefault(tuple(shape), []).append(row)
        groups = [torch.tensor(rows, device=reading.mask.device) for rows in rows_of.values()]
        parts = [self._sweep_group(rows, reading, laid_out, plan, wanted) for rows in groups]
        reading.embeds = torch.cat([part.embeds for part in parts])[torch.cat(groups).argsort()]
        for rows, part in zip(groups, parts, strict=True):
            reading.perceptions += [{**found, "rows": rows[found["rows"]]} for found in part.perceptions]
        if wanted.num_logits is None:
            return
        reading.cache = None
        if all(part.cache is not None for part in parts):
            reading.cache = join_rows([part.cache for part in parts], groups)
        width = max(part.mask.shape[1] for part in parts)
        padded = [nn.functional.pad(part.mask, (width - part.mask.shape[1], 0)) for part in parts]
        reading.mask = torch.cat(padded)[torch.cat(groups).argsort()]
        for step, segment in enumerate(plan.segments):
            count = wanted.num_logits[step]
            if count:
                logits = _scattered(segment.valid, groups, [part.logits[step] for part in parts])
                reading.logits.append(logits[:, logits.shape[1] - count :])
            if wanted.hidden_states:
                layers = zip(*(part.hidden_states[step] for part in parts), strict=True)
                reading.hidden_states.append(tuple(_scattered(segment.valid, groups, list(layer)) for layer in layers))

    def _sweep_group(
        self, rows: torch.Tensor, whole: Reading, laid_out: LaidOutBatch, plan: SegmentPlan, wanted: WantedOutputs
    ) -> Reading:
        """Rows of a batch read as a batch of their own, with logits and hidden states for each segment of the plan."""
        segments = []
        for segment in plan.segments:
            columns = segment.columns[rows][segment.valid[rows]].view(len(rows), -1)
            asking = segment.requesting[rows]
            slots = segment.slots[rows] if bool(asking.any()) else None
            segments.append(Segment(columns, torch.ones_like(columns, dtype=torch.bool), asking, slots))
        # A segment in which these rows have no part is not read.
        taken = [step for step, part in enumerate(segments) if part.columns.shape[1] or part.slots is not None]
        num_logits = None
        if wanted.num_logits is not None:
            num_logits = [segments[step].columns.shape[1] if wanted.num_logits[step] else 0 for step in taken]
        place = torch.full((len(whole.mask),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        embeds = whole.embeds[rows]
        part_laid_out = LaidOutBatch(
            embeds,
            laid_out.attention_mask[rows],
            laid_out.start,
            laid_out.features,
            laid_out.static_tokens,
            place[laid_out.image_rows],
            laid_out.image_columns,
        )
        length = int(whole.mask[rows[0]].sum())
        cache = whole.cache
        if cache is not None:
            cache = select_rows(cache, rows, length) if length else self._empty_cache()
        mask = torch.ones(len(rows), length, dtype=torch.bool, device=rows.device)
        part = Reading(cache, mask, embeds, [], [], [], whole.apply_head)
        own = WantedOutputs(num_logits, wanted.hidden_states, wanted.weights)
        self._sweep_rows(part, part_laid_out, SegmentPlan([segments[step] for step in taken], contiguous=True), own)
        if num_logits is not None:
            with_logits = [step for step, count in zip(taken, num_logits, strict=True) if count]
            part.logits = _by_step(part.logits, with_logits, len(segments))
            if wanted.hidden_states:
                widths = [segment.columns.shape[1] for segment in segments]
                layers = zip(*part.hidden_states, strict=True)
                split = zip(*(torch.cat(layer, dim=1).split(widths, dim=1) for layer in layers), strict=True)
                part.hidden_states = list(split)
        return part

    def _answer(
        self, reading: Reading, laid_out: LaidOutBatch, segment: Segment, requests: torch.Tensor, wanted: WantedOutputs
    ) -> None:
        """Looks requests `[B, d_h]` up in the images before them, and fills their dynamic slots."""
        rows = segment.requesting.nonzero().flatten()
        reading.embeds, perception = self._look_up(
            laid_out, reading.embeds, rows, segment.slots[rows], requests[rows], wanted.weights
        )
        reading.perceptions.append(perception)

    def _place_request_token(self, reading: Reading, segment: Segment) -> None:
        """Puts the request token into `<img-q>`, the last slot of the segment."""
        places = segment.columns.gather(1, last_place(segment.valid))[segment.requesting]
        asking_rows = segment.requesting.nonzero()
        token = self._in_slot(self.ipn.request_token).to(reading.embeds)
        reading.embeds = reading.embeds.index_put((asking_rows, places), token)

    # --- one segment -------------------------------------------------------------------------------------------

    def _read_words(
        self, reading: Reading, embeds: torch.Tensor, segment: Segment, num_logits: int, output_hidden_states: bool
    ) -> torch.Tensor:
        """Reads a segment, leaves padding on the left of every row, and returns last hidden states `[B, W, d_h]`."""
        hidden, logits, hidden_states = self._read(reading, embeds, segment.valid, num_logits, output_hidden_states)
        self._collect(reading, logits, hidden_states)
        if not segment.right_aligned:
            reading.mask = roll_padding_left(reading.cache, reading.mask)
        return hidden

    def _read_request_aside(
        self, reading: Reading, embeds: torch.Tensor, segment: Segment, num_logits: int, output_hidden_states: bool
    ) -> torch.Tensor:
        """Reads a segment, and the request token behind a copy of the cache. Returns requests `[B, d_h]`."""
        if embeds.shape[1]:
            self._read_words(reading, embeds, segment, num_logits, output_hidden_states)
        aside = self._nothing_read(embeds, map_cache(reading.cache, torch.clone))
        aside.mask = reading.mask
        # Twice, of which the second changes nothing: the kernels that recurrent layers read a single token with pass
        # no gradient on.
        request = self._in_slot(self.ipn.request_token).to(embeds).expand(embeds.shape[0], 2, -1)
        hidden, _, _ = self._read(aside, request, segment.requesting[:, None].expand(-1, 2), 0)
        return hidden[:, 0]

    def _read_kept_request(
        self, reading: Reading, embeds: torch.Tensor, segment: Segment, num_logits: int, output_hidden_states: bool
    ) -> torch.Tensor:
        """Reads a segment whose last slot is the request token, which stays. Returns requests `[B, d_h]`."""
        hidden = self._read_words(reading, embeds, segment, num_logits, output_hidden_states)
        return take_columns(hidden, last_place(segment.valid))[:, 0]

    def _read_request(
        self, reading: Reading, embeds: torch.Tensor, segment: Segment, num_logits: int, output_hidden_states: bool
    ) -> torch.Tensor:
        """Reads a segment and the request token behind it, and drops the latter. Returns requests `[B, d_h]`."""
        request = self._in_slot(self.ipn.request_token).to(embeds).expand(embeds.shape[0], 1, -1)
        asking = segment.requesting[:, None]
        if torch.is_grad_enabled() and not embeds.requires_grad:
            # Read apart, a prefix that nothing trains through leaves no graph behind.
            self._read_words(reading, embeds, segment, num_logits, output_hidden_states)
            hidden, _, _ = self._read(reading, request, asking, 0)
            reading.cache.crop(-1)
            reading.mask = reading.mask[:, :-1]
            return hidden[:, 0]
        width, lengths = embeds.shape[1], segment.valid.sum(dim=1, keepdim=True)
        embeds, valid = torch.cat([embeds, request], dim=1), torch.cat([segment.valid, asking], dim=1)
        place = torch.full_like(lengths, width)
        if not segment.right_aligned:
            place, position = lengths, torch.arange(width + 1, device=embeds.device)
            order = torch.where(position == place, width, position - (position > place).long())
            embeds, valid = take_columns(embeds, order), valid.gather(1, order)
        hidden, logits, hidden_states = self._read(
            reading, embeds, valid, num_logits + 1 if num_logits else 0, output_hidden_states
        )
        if hidden_states is not None:
            hidden_states = tuple(states[..., :width, :] for states in hidden_states)
        self._collect(reading, None if logits is None else logits[:, :-1], hidden_states)
        if segment.right_aligned:
            reading.cache.crop(-1)
            reading.mask = reading.mask[:, :-1]
        else:
            first = reading.mask.shape[1] - (width + 1)
            reading.mask = reading.mask.scatter(1, first + place, False)
            reading.mask = roll_padding_left(reading.cache, reading.mask)
        return hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))[:, 0]

    @staticmethod
    def _collect(reading: Reading, logits: torch.Tensor | None, hidden_states) -> None:
        if logits is not None:
            reading.logits.append(logits)
        if hidden_states is not None:
            reading.hidden_states.append(hidden_states)


def _alike(states: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether every position's states differ by rounding alone."""
    apart = (states.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return bool((apart < torch.finfo(states.dtype).eps ** 0.5).all())


def _layer_names(cache: Cache) -> str:
    return ", ".join(dict.fromkeys(type(layer).__name__ for layer in cache.layers))


def _by_step(values: list, steps: list[int], num_steps: int) -> list:
    """`values` at their `steps`, `None` elsewhere."""
    found = dict(zip(steps, values, strict=True))
    return [found.get(step) for step in range(num_steps)]


def _scattered(valid: torch.Tensor, groups: list[torch.Tensor], parts: list[torch.Tensor | None]) -> torch.Tensor:
    """States of groups of rows, `[b, w, D]` each, in the valid places of bool `[B, W]`; zeros elsewhere."""
    known = next(part for part in parts if part is not None)
    states = known.new_zeros(*valid.shape, known.shape[-1])
    for rows, part in zip(groups, parts, strict=True):
        if part is not None:
            at, columns = valid[rows].nonzero().T
            states = states.index_put((rows[at], columns), part.flatten(0, 1))
    return states


def join_hidden_states(
    parts: list[tuple[torch.Tensor, ...]], order: torch.Tensor | None
) -> tuple[torch.Tensor, ...] | None:
    """
    Hidden states of segments as those of the batch.

    Args:
        parts: for each segment every layer's `[.., B, W, D]`; some models keep several states of a layer.
        order (int `[B, S]`, *optional*): for each column its place in the segments laid end to end; without it they
            are in order.

    Returns:
        every layer's `[.., B, S, D]`; `None` where there are none.
    """
    if not parts:
        return None
    layers = (torch.cat(layer, dim=-2) for layer in zip(*parts, strict=True))
    return tuple(layers) if order is None else tuple(take_columns(states, order) for states in layers)


def note_columns(reading: Reading, attention_mask: torch.Tensor) -> None:
    """Notes on a cache that its positions count words, and whether its columns are no longer the batch's own."""
    if reading.cache is not None:
        reading.cache.is_of_images = True
        reading.cache.has_moved_columns = not torch.equal(reading.mask, attention_mask.bool())


def check_columns(cache: Cache | None, attention_mask: torch.Tensor | None = None) -> None:
    """Refuses to go on from a cache with moved columns, unless padding lies on the left as it does in there."""
    if not getattr(cache, "has_moved_columns", False):
        return
    if attention_mask is None or not padded_left_only(attention_mask[:, : cache_length(cache)]):
        raise ValueError(
            "past_key_values holds rows of unlike lengths, which were moved so that padding lies on their left: its "
            "columns are no longer those of input_ids. Go on row by row, or leave past_key_values out and pass the "
            "whole conversations with all of their images."
        )


__all__ = ["SegmentReadingMixin"]
