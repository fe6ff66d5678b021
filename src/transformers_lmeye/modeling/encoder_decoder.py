"""Reading with an encoder-decoder: whole encoder passes, since a bidirectional encoder has no prefix to keep.

The request is the encoder's output at `<img-q>`, which stays in the sequence. While it is asked, the dynamic slots
hold their learned vector alone; then they are filled, and the encoder reads everything again. Several rounds of
requests take one encoder pass each, and the last pass is the one the decoder attends to. What is saved against the
plain two passes is the vision side, and every pass under beams and returned sequences.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput, ModelOutput, Seq2SeqLMOutput

from .generation import complete_settings
from .lockstep import Call, is_split, kept_in_step, several_processes
from .outputs import LMEyeSeq2SeqLMOutput
from .reading import take_columns
from .segments import group_slots
from .towers import ImageFeatures


@dataclass
class EncoderOutput(BaseModelOutput):
    """What decoders look for in their encoder's output; those of mixtures of experts want its routers' as well."""

    router_logits: torch.Tensor | None = None
    router_probs: torch.Tensor | None = None


@dataclass
class Encoding:
    """A batch the encoder has read, dynamic tokens inside; columns are those of `input_ids`."""

    outputs: BaseModelOutput
    attention_mask: torch.Tensor  # [B, S]
    static_tokens: torch.Tensor | None
    perceptions: list[dict[str, torch.Tensor]]  # one for each round


class EncoderDecoderMixin:
    """How [`LMEyeForConditionalGeneration`] reads and answers with an encoder-decoder."""

    def _run_encoder(self, embeds: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """
        One pass over `embeds` [B, S, d_L].

        Padding is moved behind each row's words and back again: encoders with learned positions count columns.
        """
        is_padding = ~attention_mask.bool()
        if bool((is_padding[:, 1:] >= is_padding[:, :-1]).all()):
            return self._call_encoder(embeds, attention_mask, **kwargs)
        order = is_padding.long().argsort(dim=1, stable=True)
        back = order.argsort(dim=1)
        outputs = self._call_encoder(take_columns(embeds, order), attention_mask.gather(1, order), **kwargs)
        hidden_states, attentions = outputs.get("hidden_states"), outputs.get("attentions")
        return EncoderOutput(
            last_hidden_state=take_columns(outputs.last_hidden_state, back),
            hidden_states=hidden_states and tuple(take_columns(states, back) for states in hidden_states),
            attentions=attentions and tuple(_take_both(weights, back) for weights in attentions),
        )

    def _call_encoder(self, embeds: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        encoder = self.language_model.get_encoder()
        embeds = self._wait_to_read(Call.ENCODE, embeds)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and not kwargs:

            def function(embeds: torch.Tensor) -> torch.Tensor:
                return encoder(None, inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state

            return EncoderOutput(last_hidden_state=self._gradient_checkpointing_func(function, embeds))
        return encoder(None, inputs_embeds=embeds, attention_mask=attention_mask, return_dict=True, **kwargs)

    def _encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_features: ImageFeatures | None,
        return_weights: bool = False,
        perceive_only: bool = False,
        **kwargs: Any,
    ) -> Encoding:
        """Asks the requests, round by round, and encodes what came back with the rest."""
        config = self.config
        laid_out = self._embed(input_ids, attention_mask, image_features)
        embeds, mask = laid_out.embeds, laid_out.attention_mask
        perceptions: list[dict[str, torch.Tensor]] = []
        if config.interaction != "none":
            ids, visible = input_ids.cpu(), mask.cpu().bool()
            slots = group_slots(
                ids, visible, config.dynamic_token_id, config.num_dynamic_tokens, config.request_token_id
            )
            for token_id, vector in (
                (config.request_token_id, self.ipn.request_token),
                (config.dynamic_token_id, self.ipn.dynamic_token),
            ):
                rows, columns = ((input_ids == token_id) & mask.bool()).nonzero().T
                embeds = embeds.index_put((rows, columns), vector.to(embeds))
            asked = [
                ((row == config.request_token_id) & shown).nonzero().flatten()
                for row, shown in zip(ids, visible, strict=True)
            ]
            for step in range(min(config.num_request_rounds, max(map(len, asked)))):
                # A question's rounds follow one another in its row.
                chosen = [
                    (row, int(columns[index]), slots[row][index])
                    for row, columns in enumerate(asked)
                    for index in range(step, len(columns), config.num_request_rounds)
                ]
                rows = torch.tensor([row for row, _, _ in chosen], device=embeds.device)
                columns = torch.tensor([column for _, column, _ in chosen], device=embeds.device)
                owned = torch.stack([group for _, _, group in chosen]).to(embeds.device)
                requests = self._run_encoder(embeds, mask).last_hidden_state[rows, columns]
                embeds, perception = self._look_up(laid_out, embeds, rows, owned, requests, return_weights)
                perceptions.append(perception)
        outputs = None if perceive_only else self._run_encoder(embeds, mask, **kwargs)
        return Encoding(outputs, mask, laid_out.static_tokens, perceptions)

    def _forward_encoder_decoder(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        image_features: ImageFeatures | None,
        inputs_embeds: torch.Tensor | None,
        encoder_outputs: ModelOutput | tuple | None,
        labels: torch.LongTensor | None,
        loss_kwargs: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> LMEyeSeq2SeqLMOutput:
        """One pass of the decoder over an encoding, which is made first where it is not given."""
        static_tokens = None
        if labels is not None:
            labels = labels.masked_fill(self._is_slot(labels), -100).contiguous()
        shows = {name: True for name in ("output_attentions", "output_hidden_states") if kwargs.get(name)}
        # In lockstep, words alone are read as other processes read words and images.
        in_lockstep = self.lockstep is not None and inputs_embeds is None
        if encoder_outputs is None and (
            in_lockstep or image_features is not None or self._holds_slots(input_ids, None)
        ):
            if inputs_embeds is not None:
                raise ValueError("Images are shown in `<img>` slots of input_ids; inputs_embeds has none.")
            encoding = self._encode(input_ids, attention_mask, image_features, **shows)
            encoder_outputs, attention_mask = encoding.outputs, encoding.attention_mask
            static_tokens = encoding.static_tokens
        if encoder_outputs is not None:
            if not isinstance(encoder_outputs, ModelOutput):
                encoder_outputs = EncoderOutput(*encoder_outputs)
            inputs = {"encoder_outputs": encoder_outputs}
        else:
            inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        # The language model makes decoder_input_ids of the labels in its own way.
        outputs = self._decode(attention_mask=attention_mask, labels=labels, **inputs, **kwargs)
        loss = None
        if labels is not None:
            logits = outputs["logits"].float().flatten(0, 1)
            num_items_in_batch = loss_kwargs["num_items_in_batch"]
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = nn.functional.cross_entropy(
                logits, labels.to(logits.device).flatten(), ignore_index=-100, reduction=reduction
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        known = {field.name for field in fields(Seq2SeqLMOutput)}
        found = {name: value for name, value in outputs.items() if name in known}
        return LMEyeSeq2SeqLMOutput(**{**found, "loss": loss, "image_hidden_states": static_tokens})

    def _decode(self, encoder_outputs: ModelOutput | None = None, **inputs: Any) -> ModelOutput:
        """The language model's forward; checkpointed as a whole in training."""
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if self.lockstep is not None and encoder_outputs is not None:
            hidden = self._wait_to_read(Call.DECODE, encoder_outputs.last_hidden_state)
            encoder_outputs = EncoderOutput(**{**encoder_outputs, "last_hidden_state": hidden})
        if encoder_outputs is None or not checkpointed or encoder_outputs.get("hidden_states"):
            if encoder_outputs is not None:
                inputs["encoder_outputs"] = encoder_outputs
            return self.language_model(return_dict=True, **inputs)
        inputs["use_cache"] = False

        def function(last_hidden_state: torch.Tensor) -> torch.Tensor:
            encoder_outputs = EncoderOutput(last_hidden_state=last_hidden_state)
            return self.language_model(encoder_outputs=encoder_outputs, return_dict=True, **inputs).logits

        hidden = encoder_outputs.last_hidden_state
        logits = self._gradient_checkpointing_func(function, hidden)
        return Seq2SeqLMOutput(logits=logits, encoder_last_hidden_state=hidden)

    def _generate_encoder_decoder(
        self,
        input_ids: torch.LongTensor | None,
        image_features: ImageFeatures | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> torch.LongTensor | ModelOutput:
        """Encodes the prompts, requests included, once per sample; the decoding loop is the language model's own."""
        kwargs.pop("labels", None)
        generation_config, kwargs = complete_settings(self.generation_config, generation_config, kwargs)
        has_slots = image_features is not None or (input_ids is not None and bool(self._is_slot(input_ids).any()))
        if several_processes() and is_split(self.language_model):
            has_slots = input_ids is not None  # words alone are read as other processes read words and images
        if "encoder_outputs" in kwargs or not has_slots:
            return self.language_model.generate(input_ids, generation_config=generation_config, **kwargs)
        attention_mask = kwargs.pop("attention_mask", None)
        pad_token_id = generation_config.pad_token_id
        if attention_mask is None and pad_token_id is not None:
            attention_mask = (input_ids != pad_token_id).long()
        shows = {
            name: True for name in ("output_attentions", "output_hidden_states") if getattr(generation_config, name)
        }
        with kept_in_step(self):
            encoding = self._encode(input_ids, attention_mask, image_features, **shows)
        words, _ = self._words_of(input_ids, attention_mask, pad_token_id or 0)  # what logits processors know of it
        return self.language_model.generate(
            words,
            generation_config=generation_config,
            encoder_outputs=encoding.outputs,
            attention_mask=encoding.attention_mask,
            **kwargs,
        )


def _take_both(weights: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns `[B, S]` of attention `[B, heads, S, S]`, in both of its directions."""
    index = columns[:, None, :, None].expand_as(weights)
    return weights.gather(2, index).gather(3, index.transpose(2, 3))


__all__ = ["EncoderDecoderMixin"]
