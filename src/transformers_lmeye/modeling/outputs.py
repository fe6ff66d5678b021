"""What [`LMEyeForConditionalGeneration`] returns."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput, Seq2SeqLMOutput

from .towers import ImageFeatures


@dataclass
class LMEyeCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`LMEyeForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `[]`): next-token loss over the target tokens, when labels were given.
        logits (`torch.Tensor` of shape `[batch, seq, vocab]`): for every position given (see `logits_to_keep`), of the
            language model's own width. Undefined at padding.
        past_key_values (`Cache`): keys and values of the final sequence.
        hidden_states (tuple of `[batch, seq, hidden]`): of the final sequence, dynamic tokens inside.
        attentions: the language model's, where no slot was read.
        image_hidden_states (`torch.Tensor` of shape `[num_images, num_static_tokens, d_L]`): static information.
        last_hidden_state (`torch.Tensor` of shape `[batch, seq, d_h]`): with `apply_head=False`, what the language
            model's head is given, in place of logits. Undefined at padding.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


@dataclass
class LMEyeSeq2SeqLMOutput(Seq2SeqLMOutput):
    """
    Output of [`LMEyeForConditionalGeneration`] around an encoder-decoder: that of the language model, and

    Args:
        image_hidden_states (`torch.Tensor` of shape `[num_images, num_static_tokens, d_L]`): static information.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class LMEyePerception(ModelOutput):
    """
    What the model asked of the images, and what came back; `R` requests, row by row, left to right.

    Args:
        image_features ([`ImageFeatures`]): the vision tower's features.
        image_hidden_states (`[num_images, num_static_tokens, d_L]`): static information.
        requests (`[R, d_h]`): the language model's last hidden state at each request token.
        request_rows (int `[R]`): the row of the batch each request belongs to.
        request_images (int `[R, I]`): the images each request looked at; -1 is padding.
        dynamic_tokens (`[R, k, d_L]`): dynamic information.
        attention_maps (`[R, layers, request vectors, I, grid rows, grid columns]`, *optional*): where each request
            looked, averaged over heads: on the grid of patches (or of what they were pooled to); in one row for the
            Q-Former's outputs and for pictures whose grids differ (`image_features.spatial_shapes` has them). `None`
            where the interaction sees nothing but the global feature through `clip_text`.
    """

    image_features: ImageFeatures | None = None
    image_hidden_states: torch.Tensor | None = None
    requests: torch.Tensor | None = None
    request_rows: torch.Tensor | None = None
    request_images: torch.Tensor | None = None
    dynamic_tokens: torch.Tensor | None = None
    attention_maps: torch.Tensor | None = None


__all__ = ["LMEyeCausalLMOutputWithPast", "LMEyePerception", "LMEyeSeq2SeqLMOutput"]
