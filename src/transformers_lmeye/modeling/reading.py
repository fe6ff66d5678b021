"""Reading a batch with a language model: segment by segment over one cache, each request on the way."""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from .interactive_perception import ImageFeatures
from .segments import Segment, SegmentPlan, cache_from_tensors, cache_tensors, roll_padding_left


@dataclass
class LaidOutBatch:
    """A batch in the making: embeddings of all columns, and which images each row holds where."""

    embeds: torch.Tensor  # [B, S, d_L]
    attention_mask: torch.Tensor  # [B, S]
    plan: SegmentPlan
    start: int  # columns that are in the cache already
    features: ImageFeatures | None
    static_tokens: torch.Tensor | None
    image_rows: torch.Tensor  # [N], the row of each image
    image_columns: torch.Tensor  # [N], the column of each image's first slot


@dataclass
class Reading:
    """What a sweep over a [`LaidOutBatch`] has gathered so far."""

    cache: DynamicCache
    mask: torch.Tensor  # bool [B, C], the cache's columns that hold words or slots
    logits: list[torch.Tensor]
    hidden_states: list[tuple[torch.Tensor, ...]]
    perceptions: list[dict[str, torch.Tensor]]


def accepted_arguments(language_model: PreTrainedModel) -> frozenset[str]:
    """Which of the arguments that not every language model has this one takes."""
    parameters = inspect.signature(language_model.forward).parameters
    names = ("position_ids", "past_key_values", "use_cache", "logits_to_keep")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return frozenset(name for name in names if takes_any or name in parameters)


def take_columns(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns `[B, W]` of states `[B, S, D]`: `[B, W, D]`."""
    return states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))


def _last_place(valid: torch.Tensor) -> torch.Tensor:
    """The last valid place of every row of bool `[B, W]`, 0 where there is none: `[B, 1]`."""
    places = torch.arange(valid.shape[1], device=valid.device)
    return places.where(valid, 0).amax(dim=1, keepdim=True)


class SegmentReadingMixin:
    """How [`LMEyeForConditionalGeneration`] reads with a causal language model."""

    @property
    def _decoder(self) -> nn.Module:
        """The language model without its head; adapters are inside."""
        language_model = self.language_model
        if hasattr(language_model, "get_base_model"):
            language_model = language_model.get_base_model()
        return language_model.get_decoder()

    def _read(
        self,
        reading: Reading,
        embeds: torch.Tensor,
        valid: torch.Tensor,
        num_logits: int,
        output_hidden_states: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...] | None]:
        """
        Runs the language model over `embeds` [B, W, d_L] behind the cache, which grows by W columns.

        Returns:
            last hidden states `[B, W, d_h]`, logits of the last `num_logits` positions (`None` for 0), hidden states.
        """
        lengths = reading.mask.sum(dim=1, keepdim=True)
        positions = (lengths + valid.long().cumsum(dim=1) - 1).clamp(min=0)
        reading.mask = torch.cat([reading.mask, valid], dim=1)
        inputs = {"attention_mask": None if bool(reading.mask.all()) else reading.mask.long()}
        if "position_ids" in self._accepted:
            inputs["position_ids"] = positions
        head = {"logits_to_keep": num_logits} if "logits_to_keep" in self._accepted else {}

        def run(embeds: torch.Tensor, cache: DynamicCache):
            arguments = dict(inputs, inputs_embeds=embeds, past_key_values=cache, use_cache=True, return_dict=True)
            if output_hidden_states:
                arguments["output_hidden_states"] = True
            if not num_logits:
                outputs = self._decoder(**arguments)
                return outputs.last_hidden_state, None, outputs.hidden_states if output_hidden_states else None
            seen = []
            hook = self._decoder.register_forward_hook(lambda module, args, output: seen.append(output[0]))
            try:
                outputs = self.language_model(**arguments, **head)
            finally:
                hook.remove()
            return seen[0], outputs.logits[:, -num_logits:], outputs.hidden_states if output_hidden_states else None

        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and not output_hidden_states:
            return self._checkpointed(run, reading, embeds)
        return run(embeds, reading.cache)

    def _checkpointed(self, run, reading: Reading, embeds: torch.Tensor):
        """Keeps a segment's inputs in place of its activations; caches go in and out as tensors, so it can rerun."""

        def function(embeds: torch.Tensor, *tensors: torch.Tensor):
            cache = cache_from_tensors(tensors)
            hidden, logits, _ = run(embeds, cache)
            return (hidden, logits, *cache_tensors(cache))

        hidden, logits, *tensors = self._gradient_checkpointing_func(function, embeds, *cache_tensors(reading.cache))
        reading.cache = cache_from_tensors(tuple(tensors))
        return hidden, logits, None

    def _sweep(
        self,
        sequence: LaidOutBatch,
        past_key_values: DynamicCache | None = None,
        num_logits: list[int] | None = None,
        output_hidden_states: bool = False,
        return_weights: bool = False,
    ) -> Reading:
        """
        Reads a batch segment by segment: prefix, request, interaction, and on to the next.

        Args:
            sequence (`LaidOutBatch`): the batch; its dynamic slots are filled on the way.
            past_key_values (`DynamicCache`, *optional*): columns `[0, sequence.start)`, read before.
            num_logits (list of `int`, *optional*): for each segment, how many of its last columns need logits; without
                it the sweep stops at the last request.
        """
        embeds, plan, start = sequence.embeds, sequence.plan, sequence.start
        cache = past_key_values if past_key_values is not None else DynamicCache()
        reading = Reading(cache, sequence.attention_mask[:, :start].bool(), [], [], [])
        for step, segment in enumerate(plan.segments):
            wanted = num_logits[step] if num_logits is not None else 0
            if segment.slots is None:
                if num_logits is not None or segment is not plan.segments[-1]:
                    columns = take_columns(embeds, segment.columns)
                    self._read_words(reading, columns, segment, wanted, output_hidden_states)
                continue
            if self.config.keep_request_token:
                places = segment.columns.gather(1, _last_place(segment.valid))[segment.requesting]
                asking_rows = segment.requesting.nonzero()
                embeds = embeds.index_put((asking_rows, places), self.ipn.request_token.to(embeds))
                read_request = self._read_kept_request
            else:
                read_request = self._read_request
            columns = take_columns(embeds, segment.columns)
            requests = read_request(reading, columns, segment, wanted, output_hidden_states)
            rows = segment.requesting.nonzero().flatten()
            images = self._images_before(sequence, rows, segment.slots[rows, 0])
            device = self.ipn.image_token.device
            tokens, attention = self.ipn(
                requests[rows].to(device), sequence.features.to(device), images.to(device), return_weights
            )
            embeds = embeds.index_put((rows[:, None], segment.slots[rows]), tokens.to(embeds))
            reading.perceptions.append(
                {"rows": rows, "requests": requests[rows], "images": images, "tokens": tokens, "attention": attention}
            )
        return reading

    def _read_words(
        self, reading: Reading, embeds: torch.Tensor, segment: Segment, num_logits: int, output_hidden_states: bool
    ) -> torch.Tensor:
        """Reads a segment, leaves padding on the left of every row, and returns last hidden states `[B, W, d_h]`."""
        hidden, logits, hidden_states = self._read(reading, embeds, segment.valid, num_logits, output_hidden_states)
        self._collect(reading, logits, hidden_states)
        if not segment.right_aligned:
            reading.mask = roll_padding_left(reading.cache, reading.mask)
        return hidden

    def _read_kept_request(
        self, reading: Reading, embeds: torch.Tensor, segment: Segment, num_logits: int, output_hidden_states: bool
    ) -> torch.Tensor:
        """Reads a segment whose last slot is the request token, which stays. Returns requests `[B, d_h]`."""
        hidden = self._read_words(reading, embeds, segment, num_logits, output_hidden_states)
        return take_columns(hidden, _last_place(segment.valid))[:, 0]

    def _read_request(
        self, reading: Reading, embeds: torch.Tensor, segment: Segment, num_logits: int, output_hidden_states: bool
    ) -> torch.Tensor:
        """Reads a segment and the request token behind it, and drops the latter. Returns requests `[B, d_h]`."""
        request = self.ipn.request_token.to(embeds).expand(embeds.shape[0], 1, -1)
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
            hidden_states = tuple(states[:, :width] for states in hidden_states)
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


__all__ = ["SegmentReadingMixin"]
