"""Text encoders that read vectors in place of words, for the `clip_text` interaction."""

import math

import torch


class SoftTokenReadingMixin:
    """What CLIP's text encoder and open_clip's have in common: the sequence that the paper's interaction reads."""

    def read_soft_tokens(
        self, soft_tokens: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """
        The causal transformer over [bos, soft tokens, eos], as a text of that length would be read.

        Args:
            soft_tokens (`[R, n, d_t]`): in place of word embeddings; they get no position embedding. bos has position
                0, eos position n + 1.
            output_attentions (`bool`): whether to return each layer's attention.

        Returns:
            every position after the final norm and the text projection, `[R, n + 2, d_p]`; each layer's attention
            `[R, heads, n + 2, n + 2]` if asked for, else `None`.

        Raises:
            ValueError: n + 2 is more than the encoder's positions.
        """
        length = soft_tokens.shape[1] + 2
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"{length - 2} soft tokens with bos and eos need {length} positions of the CLIP text encoder, which "
                f"has {self.config.max_position_embeddings}: show fewer images in one row, pool their features with a "
                'smaller num_fine_grained_tokens, or use interaction="cross_attention".'
            )
        ends = self._embed_ends(torch.tensor([0, length - 1], device=soft_tokens.device))
        ends = ends.expand(soft_tokens.shape[0], -1, -1)
        return self._read_states(torch.cat([ends[:, :1], soft_tokens, ends[:, 1:]], dim=1), output_attentions)

    def _embed_ends(self, positions: torch.Tensor) -> torch.Tensor:
        """bos and eos at two positions, int `[2]`: `[2, d_t]`."""
        raise NotImplementedError

    def _read_states(
        self, states: torch.Tensor, output_attentions: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """The transformer over `[R, S, d_t]`, final norm and text projection included; see `read_soft_tokens`."""
        raise NotImplementedError


def causal_attention_weights(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal attention `[R, heads, S, S]` of queries and keys, both `[R, heads, S, d]`."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)


__all__ = ["SoftTokenReadingMixin", "causal_attention_weights"]
