"""Generating behind prompts with images: what the decoding loop holds, and what it does not know of."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, QuantizedCache, StaticCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from .lockstep import is_split, kept_in_step, several_processes
from .outputs import LMEyeCausalLMOutputWithPast
from .reading import Reading, check_columns, join_hidden_states, last_place, note_columns, take_columns
from .segments import cache_length, column_order, counts_columns, is_foreign, is_recurrent, repeat_rows
from .towers import ImageFeatures


@dataclass
class PerceivedPrompt:
    """A prompt that has been read, as `generate` hands it to the decoding loop, which knows its words alone.

    Args:
        num_words (`int`): columns of the ids the loop holds: the prompt without its slots.
        attention_mask (`[rows, columns]` or `None`): of the cache's columns; `None` without padding.
        position_ids (int `[rows, columns]`): of the cache's columns.
        outputs ([`LMEyeCausalLMOutputWithPast`]): logits for the first new token, and the cache.
        embeds (`[rows, columns, d_L]`, *optional*): the prompt, where nothing but the prompt can be kept of it.
    """

    num_words: int
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    outputs: LMEyeCausalLMOutputWithPast
    embeds: torch.Tensor | None = None


class PerceivedGenerationMixin:
    """How [`LMEyeForConditionalGeneration`] generates; stands before `GenerationMixin`, whose loop it uses."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: ImageFeatures | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.LongTensor | ModelOutput:
        """
        Generates as [`~GenerationMixin.generate`] does, with every strategy, streamer and processor it has.

        The prompt is read once per sample - vision tower, prefix, requests and the words behind them - whatever the
        number of beams or returned sequences; its cache is then expanded, and copied into the kind asked for. The
        decoding loop holds the prompt's words without its slots, so that no logits processor, stopping criterion,
        assistant or prompt lookup ever sees a slot. An encoder-decoder's prompt is encoded once per sample, and the
        loop is its own.

        Args:
            inputs or input_ids (int `[batch, seq]`): words and slots. With `past_key_values` of an earlier turn, the
                whole conversation, as for any other model.
            generation_config, kwargs: as in [`~GenerationMixin.generate`].
            pixel_values, image_features, pixel_attention_mask, spatial_shapes: as in `forward`.

        Returns:
            int `[batch, seq + new]`: prompt, slots included, and new tokens (new tokens alone from an
            encoder-decoder); or the mixin's output holding them.

        Raises:
            ValueError: images and `<img>` slots differ in number; a request stands before any image;
                `output_attentions` of a causal model's prompt with images; `max_length` leaves no room; a kind of
                cache that the prompt's cannot be copied into.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if several_processes() and is_split(self):
            kwargs = {"synced_gpus": True, **kwargs}  # processes go on until all have ended
        with kept_in_step(self):
            if pixel_values is not None and image_features is None:
                image_features = self.get_image_features(
                    pixel_values, pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes
                )
        if self.config.is_encoder_decoder:
            kwargs.pop("input_ids", None)
            return self._generate_encoder_decoder(input_ids, image_features, generation_config, kwargs)
        if input_ids is None or not (image_features is not None or bool(self._is_slot(input_ids).any())):
            if not self._supports_default_dynamic_cache():
                settings, kwargs = complete_settings(self.generation_config, generation_config, kwargs)
                return self.language_model.generate(inputs, generation_config=settings, **kwargs)
            with kept_in_step(self):
                pass  # other processes read prompts with images
            return super().generate(inputs, generation_config=generation_config, **kwargs)
        kwargs.pop("input_ids", None)
        kwargs.pop("labels", None)
        setting = _settings_reader(kwargs, generation_config, self.generation_config)
        if setting("output_attentions"):
            raise ValueError(
                "output_attentions is not available for a prompt with images: it is read in segments, which attend "
                "over caches of different lengths. `perceive` returns where each request looked."
            )
        input_ids = input_ids.to(self.device)
        pad_token_id, eos_token_ids = setting("pad_token_id"), _as_list(setting("eos_token_id"))
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is None and pad_token_id is not None and pad_token_id not in eos_token_ids:
            attention_mask = (input_ids != pad_token_id).long()
        if pad_token_id is None:
            pad_token_id = eos_token_ids[0] if eos_token_ids else 0
        if attention_mask is not None and len(input_ids) > 1 and not (bool(attention_mask.all()) or self.joins_rows):
            return self._generate_rows_apart(
                input_ids, attention_mask, image_features, generation_config, pad_token_id, kwargs
            )
        prompt_cache, given_cache = None, kwargs.pop("past_key_values", None)
        if cache_length(given_cache) > 0:
            prompt_cache, given_cache = given_cache, None
        with kept_in_step(self):
            outputs, reading = self._read_prompt(
                input_ids,
                attention_mask,
                image_features,
                prompt_cache,
                bool(setting("output_hidden_states")),
            )

        words, words_mask = self._words_of(input_ids, attention_mask, pad_token_id)
        expand = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        outputs, mask = _repeat_rows(outputs, expand), reading.mask.repeat_interleave(expand, dim=0)
        changes = self._settings_for_words(setting, input_ids.shape[1], input_ids.shape[1] - words.shape[1])
        num_columns = mask.shape[1] + (setting("max_new_tokens") or setting("max_length") or 20)
        cache = self._cache_of_kind(outputs.past_key_values, given_cache, setting, num_columns)
        outputs.past_key_values = cache
        prompt = PerceivedPrompt(
            num_words=words.shape[1],
            attention_mask=None if bool(mask.all()) else mask.long(),
            position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0) + self._position_of_first_word,
            outputs=outputs,
            embeds=None if reading.cache is not None else reading.embeds.repeat_interleave(expand, dim=0),
        )
        changes["use_cache"] = cache is not None
        kwargs = {name: value for name, value in kwargs.items() if name not in changes}
        if generation_config is None:
            kwargs.update({name: value for name, value in changes.items() if value is not None})
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**changes)
        if cache is not None and counts_columns(cache):
            # The loop asks a cache for its length; one that cannot tell comes with the prompt's outputs.
            kwargs["past_key_values"] = cache
        result = super().generate(
            words,
            generation_config=generation_config,
            attention_mask=words_mask,
            prompt=prompt,
            **kwargs,
        )
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        prompts = input_ids.repeat_interleave(sequences.shape[0] // input_ids.shape[0], dim=0)
        sequences = torch.cat([prompts, sequences[:, words.shape[1] :]], dim=1)
        if isinstance(result, torch.Tensor):
            return sequences
        result.sequences = sequences
        return result

    def _read_prompt(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_features: ImageFeatures | None,
        past_key_values: Cache | None,
        output_hidden_states: bool,
    ) -> tuple[LMEyeCausalLMOutputWithPast, Reading]:
        """One sweep over the prompts: logits `[B, 1, vocab]` behind each row's last word, and what has been read."""
        check_columns(past_key_values)
        start = cache_length(past_key_values)
        if start >= input_ids.shape[1]:
            raise ValueError(
                f"past_key_values holds {start} columns, input_ids only {input_ids.shape[1]}: pass the whole "
                "conversation, earlier turns included, and at least one new token."
            )
        laid_out = self._embed(input_ids, attention_mask, image_features, start)
        plan = self._plan(input_ids, laid_out)
        last = plan.segments[-1]
        num_logits = [0] * len(plan.segments)
        num_logits[-1] = 1 if last.right_aligned else last.columns.shape[1]
        reading = self._sweep(laid_out, plan, past_key_values, num_logits, output_hidden_states)
        note_columns(reading, laid_out.attention_mask)
        logits = reading.logits[-1]
        if not last.right_aligned:
            logits = take_columns(logits, last_place(last.valid))
        order = None if plan.contiguous else column_order(plan, input_ids.shape[1] - start)
        hidden_states = join_hidden_states(reading.hidden_states, order)
        outputs = LMEyeCausalLMOutputWithPast(
            logits=logits, past_key_values=reading.cache, hidden_states=hidden_states
        )
        return outputs, reading

    def _generate_rows_apart(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_features: ImageFeatures | None,
        generation_config: GenerationConfig | None,
        pad_token_id: int,
        kwargs: dict[str, Any],
    ) -> torch.LongTensor:
        """Generates for one row after the other, where the language model cannot tell padding from words."""
        if several_processes() and is_split(self):
            raise ValueError(
                f"{type(self.language_model).__name__} reads rows of unlike lengths one at a time, which processes "
                "that share its parameters cannot do in step: pass one row a call, the same number of calls in each."
            )
        image_rows, _ = self._place_images(input_ids, image_features, 0)
        sequences = []
        for row, valid in enumerate(attention_mask.bool()):
            features = image_features[image_rows == row] if bool((image_rows == row).any()) else None
            ids = input_ids[row : row + 1, valid]
            found = self.generate(
                ids,
                generation_config=generation_config,
                image_features=features,
                attention_mask=torch.ones_like(ids),
                **kwargs,
            )
            if not isinstance(found, torch.Tensor):
                raise ValueError(
                    f"{type(self.language_model).__name__} reads rows of unlike lengths one at a time, whose outputs "
                    "do not fit into one: leave return_dict_in_generate out, or pass rows of equal length."
                )
            prompt = input_ids[row].expand(len(found), -1)
            sequences.append(torch.cat([prompt, found[:, ids.shape[1] :]], dim=1))
        longest = max(part.shape[1] for part in sequences)
        return torch.cat(
            [nn.functional.pad(part, (0, longest - part.shape[1]), value=pad_token_id) for part in sequences]
        )

    def _words_of(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token_id: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts without their slots, padded on the left, and their mask."""
        is_word = ~self._is_slot(input_ids)
        if attention_mask is not None:
            is_word &= attention_mask.bool()
        width = max(1, int(is_word.sum(dim=1).max()))
        order = is_word.long().argsort(dim=1, stable=True)[:, input_ids.shape[1] - width :]
        mask = is_word.gather(1, order)
        return input_ids.gather(1, order).masked_fill(~mask, pad_token_id), mask.long()

    @staticmethod
    def _settings_for_words(setting: Callable[[str], Any], num_columns: int, num_hidden: int) -> dict[str, Any]:
        """Generation settings in terms of the words alone, `num_hidden` columns fewer than the prompt has."""
        changes: dict[str, Any] = {"use_cache": True, "cache_implementation": None, "prefill_chunk_size": None}
        if setting("max_new_tokens") is None and setting("max_length") is not None:
            if setting("max_length") <= num_columns:
                raise ValueError(
                    f"The prompt has {num_columns} tokens, max_length is {setting('max_length')}: nothing could be "
                    "generated. Raise max_length or, better, set max_new_tokens."
                )
            changes["max_length"] = setting("max_length") - num_hidden
        if setting("min_new_tokens") is None and setting("min_length"):
            changes["min_length"] = max(setting("min_length") - num_hidden, 0)
        return changes

    def _cache_of_kind(
        self, cache: Cache | None, given_cache: Cache | None, setting: Callable[[str], Any], num_columns: int
    ) -> Cache | None:
        """The prompt's cache, copied into the empty cache that was given or into one of the kind asked for."""
        kind, text_config = setting("cache_implementation"), self.config.get_text_config(decoder=True)
        if cache is None or is_recurrent(cache) or is_foreign(cache):
            if kind not in (None, "dynamic", "hybrid"):
                raise ValueError(
                    f"{type(self.language_model).__name__} keeps a state of its own kind, which cannot be copied into "
                    f'a cache of kind "{kind}": leave cache_implementation out.'
                )
            return cache
        if given_cache is None:
            if kind in (None, "dynamic", "hybrid"):
                return cache
            if kind in ("static", "offloaded_static"):
                offloading = kind == "offloaded_static"
                given_cache = StaticCache(config=text_config, max_cache_len=num_columns, offloading=offloading)
            elif kind == "offloaded":
                given_cache = DynamicCache(config=text_config, offloading=True)
            elif kind == "quantized":
                options = {"config": text_config, **(setting("cache_config") or {})}
                given_cache = QuantizedCache(backend=options.pop("backend", "quanto"), **options)
            else:
                raise ValueError(
                    f'cache_implementation="{kind}" is not known for a prompt with images: use "dynamic", "static", '
                    '"offloaded", "offloaded_static" or "quantized", or pass an empty cache as past_key_values.'
                )
        for index, layer in enumerate(cache.layers):
            given_cache.update(layer.keys, layer.values, index)
        return given_cache

    def _supports_default_dynamic_cache(self) -> bool:
        return self._takes_cache and self._cache_name == "past_key_values"

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        prompt: PerceivedPrompt | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """
        Prepares one step as the language model does for itself.

        With a `prompt` that has been read, `input_ids`, `attention_mask` and `position_ids` are those of its words;
        they are translated into the cache's columns, which hold the slots as well.
        """
        inputs: dict[str, Any] = {}
        if prompt is not None:
            inputs["prompt_outputs"] = prompt.outputs if is_first_iteration else None
            new_ids = input_ids[:, prompt.num_words :]
            num_columns = prompt.position_ids.shape[1] + new_ids.shape[1]
            if prompt.embeds is not None:
                if new_ids.shape[1]:
                    words = self._with_layer_inputs(self.get_input_embeddings()(new_ids), new_ids).to(prompt.embeds)
                    inputs.update(inputs_embeds=torch.cat([prompt.embeds, words], dim=1), use_cache=False)
                return inputs
            # Recurrent states alone do not tell how much they have read: every step reads the newest word.
            counted = past_key_values is not None and counts_columns(past_key_values)
            next_sequence_length = num_columns - cache_length(past_key_values) if counted else min(new_ids.shape[1], 1)
            if next_sequence_length <= 0:
                if not is_first_iteration:  # the prompt has ended, and marks time until those of other processes have
                    inputs.update(input_ids=input_ids[:, -1:], use_cache=False)
                return inputs
            attention_mask = prompt.attention_mask
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, attention_mask.new_ones(new_ids.shape)], dim=1)
            steps = torch.arange(1, new_ids.shape[1] + 1, device=new_ids.device)
            kwargs["position_ids"] = torch.cat([prompt.position_ids, prompt.position_ids[:, -1:] + steps], dim=1)
            is_first_iteration = False
        prepared = self.language_model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{self._cache_name: past_key_values},
            **kwargs,
        )
        if self._cache_name in prepared:
            prepared["past_key_values"] = prepared.pop(self._cache_name)
        return {**inputs, **prepared}

    def _get_candidate_generator(self, *args, model_kwargs: dict[str, Any], **kwargs):
        # An assistant drafts from the words alone; the prompt's cache and columns are none of its business.
        if "prompt" in model_kwargs:
            words = {name: value for name, value in model_kwargs.items() if name not in ("prompt", "position_ids")}
            model_kwargs = words
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)


def complete_settings(
    defaults: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """A call's generation settings, filled up from the model's own, and what of `kwargs` is for the model."""
    settings = GenerationConfig() if given is None else copy.deepcopy(given)
    settings.update(**defaults.to_dict(), defaults_only=True, allow_custom_entries=True)
    return settings, settings.update(**kwargs)


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, Sequence) else [ids]


def _settings_reader(kwargs: dict[str, Any], *configs: GenerationConfig | None) -> Callable[[str], Any]:
    """A function giving a generation setting by name: the call's own, else the first configuration's that has it."""

    def setting(name: str) -> Any:
        values = [kwargs.get(name), *(getattr(config, name, None) for config in configs if config is not None)]
        return next((value for value in values if value is not None), None)

    return setting


def _repeat_rows(outputs: LMEyeCausalLMOutputWithPast, repeats: int) -> LMEyeCausalLMOutputWithPast:
    """Each row `repeats` times, in the cache (changed in place), logits and hidden states."""
    if repeats == 1:
        return outputs
    if outputs.past_key_values is not None:
        repeat_rows(outputs.past_key_values, repeats)
    outputs.logits = outputs.logits.repeat_interleave(repeats, dim=0)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(states.repeat_interleave(repeats, dim=0) for states in outputs.hidden_states)
    return outputs


__all__ = ["PerceivedGenerationMixin", "complete_settings"]
