"""The Interactive Perception Network: everything LMEye trains (arXiv 2305.03701, section 3).

Shapes: `N` images, `R` requests, `I` images a request sees at most, `P` patches, `k` dynamic tokens, `d_L` width of
the language model's input embeddings, `d_h` width of its last hidden state, `d_p` CLIP's projection width, `d_t` width
of the CLIP text encoder, `d_v` width of its vision tower, `d_i` width of the cross-attention stack.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask

from .configuration_lmeye import LMEyeConfig


@dataclass
class ImageFeatures:
    """What the frozen vision tower says of `N` images, computed once and used by both kinds of perception.

    Args:
        pooled (`torch.Tensor` of shape `[N, d_p]`): projected global image features, not normalised.
        patches (`torch.Tensor` of shape `[N, P, d_v]`, *optional*): patch tokens, where the configuration uses them.
    """

    pooled: torch.Tensor
    patches: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, index) -> "ImageFeatures":
        return ImageFeatures(self.pooled[index], None if self.patches is None else self.patches[index])

    def to(self, *args, **kwargs) -> "ImageFeatures":
        """Moves or casts both tensors as `torch.Tensor.to` does."""
        patches = None if self.patches is None else self.patches.to(*args, **kwargs)
        return ImageFeatures(self.pooled.to(*args, **kwargs), patches)


def patch_grid(num_patches: int) -> tuple[int, int]:
    """Rows and columns of a patch sequence: the square where there is one, else a single row."""
    side = math.isqrt(num_patches)
    return (side, side) if side * side == num_patches else (1, num_patches)


def sinusoidal_positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Two-dimensional sinusoidal position codes of unit amplitude, `[rows * columns, width]`, float32.

    Half of the width codes the row and half the column, in wavelengths from 2 pi to 200 pi patches.
    """
    frequencies = torch.logspace(0, -2, width // 4, device=device)
    angles = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    angles = angles.reshape(-1, 2, 1) * frequencies  # [rows * columns, 2, width / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def clip_text_ends(config: CLIPTextConfig) -> tuple[int, int]:
    """Ids of CLIP's bos and eos.

    Configurations that say `eos_token_id=2` (all of OpenAI's) do not mean it: there, as `CLIPTextModel` knows too, eos
    is the highest id of the vocabulary and bos the one before.
    """
    if config.eos_token_id == 2 or config.eos_token_id >= config.vocab_size:
        return config.vocab_size - 2, config.vocab_size - 1
    return config.bos_token_id, config.eos_token_id


class Attention(nn.Module):
    """Multi-head attention of `queries` [B, Q, d_i] over `context` [B, K, d_i]."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, queries: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None, return_weights=False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.query(queries), self.key(context), self.value(context))
        )  # [B, heads, Q or K, d_i / heads]
        weights = None
        if return_weights:
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            weights = scores.softmax(dim=-1)
            attended = weights @ value
        else:
            attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(attended.transpose(1, 2).flatten(-2)), weights


class InteractionBlock(nn.Module):
    """Self-attention over the request vectors, cross-attention to the image, feed-forward; each normalised before."""

    def __init__(self, config: LMEyeConfig):
        super().__init__()
        width = config.interaction_hidden_size
        self.self_attention_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, config.interaction_num_heads)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, config.interaction_num_heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, config.interaction_intermediate_size),
            nn.GELU(),
            nn.Linear(config.interaction_intermediate_size, width),
        )

    def forward(
        self, requests: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None, return_weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = self.self_attention_norm(requests)
        requests = requests + self.self_attention(normed, normed)[0]
        attended, weights = self.cross_attention(self.cross_attention_norm(requests), context, mask, return_weights)
        requests = requests + attended
        return requests + self.feed_forward(self.feed_forward_norm(requests)), weights


class CrossAttentionStack(nn.Module):
    """Request vectors that read image features (request-based visual information interaction, last revision).

    Args:
        config ([`LMEyeConfig`]): gives width, heads and number of blocks.
        num_vectors (`int`): request vectors, each with a learned offset of its own.
    """

    def __init__(self, config: LMEyeConfig, num_vectors: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_vectors, config.interaction_hidden_size))
        self.blocks = nn.ModuleList(InteractionBlock(config) for _ in range(config.interaction_num_layers))
        self.norm = nn.LayerNorm(config.interaction_hidden_size)

    def forward(
        self,
        requests: torch.Tensor | None,
        context: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """
        Args:
            requests (`[B, m, d_i]` or `None`): what is asked; `None` leaves the learned queries alone.
            context (`[B, K, d_i]`): image features.
            context_mask (bool `[B, K]`, *optional*): `False` at features that are padding.

        Returns:
            the vectors after the last block, `[B, m, d_i]`, and each block's attention `[B, heads, m, K]` if asked
            for.
        """
        states = self.queries.expand(context.shape[0], -1, -1)
        if requests is not None:
            states = states + requests
        mask = None if context_mask is None else context_mask[:, None, None, :]
        attentions = []
        for block in self.blocks:
            states, weights = block(states, context, mask, return_weights)
            attentions.append(weights)
        return self.norm(states), tuple(attentions) if return_weights else None


class PatchProjection(nn.Module):
    """Patch tokens `[..., P, d_v]`, normalised, mapped to `[..., P, d_i]` and given position codes of unit scale."""

    def __init__(self, feature_width: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_width)
        self.linear = nn.Linear(feature_width, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected = self.linear(self.norm(features))
        positions = sinusoidal_positions(*patch_grid(features.shape[-2]), projected.shape[-1], projected.device)
        return projected + positions.to(projected.dtype)


class Resampler(nn.Module):
    """Static perception by learned queries over the patches: the same for every question."""

    def __init__(self, config: LMEyeConfig, feature_width: int, output_width: int):
        super().__init__()
        self.patch_projection = PatchProjection(feature_width, config.interaction_hidden_size)
        self.stack = CrossAttentionStack(config, config.num_static_tokens)
        self.output = nn.Linear(config.interaction_hidden_size, output_width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.output(self.stack(None, self.patch_projection(patches))[0])  # [N, num_static_tokens, d_L]


class InteractivePerceptionNetwork(nn.Module):
    """Static perception, request and interaction, and the way back into the language model's embedding space.

    Args:
        config ([`LMEyeConfig`]): the variant and its sizes.
        image_width (`int`): d_p, the projected global image feature's width.
        patch_width (`int`): d_v, the patch tokens' width.
        input_width (`int`): d_L, the language model's input embeddings' width.
        request_width (`int`): d_h, its last hidden state's width.
        clip_text_model (`CLIPTextModelWithProjection`, *optional*): a loaded text encoder; built from the
            configuration where absent. Frozen.
    """

    def __init__(
        self,
        config: LMEyeConfig,
        image_width: int,
        patch_width: int,
        input_width: int,
        request_width: int,
        clip_text_model: CLIPTextModelWithProjection | None = None,
    ):
        super().__init__()
        self.config = config
        if config.visual_mapping == "linear":
            self.visual_mapping = nn.Linear(image_width, config.num_static_tokens * input_width)
        else:
            self.visual_mapping = Resampler(config, patch_width, input_width)
        self.image_token = nn.Parameter(torch.empty(config.num_static_tokens, input_width))
        if config.interaction == "none":
            return
        self.request_token = nn.Parameter(torch.empty(input_width))
        feature_width = image_width if config.fine_grained_source == "global" else patch_width
        if config.interaction == "clip_text":
            if clip_text_model is None:
                clip_text_model = CLIPTextModelWithProjection._from_config(config.clip_text_config)
            text_width = config.clip_text_config.hidden_size
            self.request_projection = nn.Linear(request_width, text_width)
            self.fine_grained_projection = nn.Linear(image_width, config.num_fine_grained_tokens * text_width)
            self.fine_grained_dropout = nn.Dropout(config.fine_grained_dropout)
            self.interaction = clip_text_model.requires_grad_(False).eval()
            projection_width = config.clip_text_config.projection_dim
            self.dynamic_projection = nn.Linear(projection_width, config.num_dynamic_tokens * input_width)
        else:
            width = config.interaction_hidden_size
            self.request_projection = nn.Sequential(
                nn.LayerNorm(request_width), nn.Linear(request_width, config.num_request_vectors * width)
            )
            self.fine_grained_projection = PatchProjection(feature_width, width)
            self.interaction = CrossAttentionStack(config, config.num_request_vectors)
            self.dynamic_projection = nn.Linear(width, input_width)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the trained parameters; features and requests are cast to it."""
        return self.image_token.dtype

    def init_weights(self) -> None:
        """Initialises the trained parameters so that new slot vectors have the scale of word embeddings."""
        for name, module in self.named_modules():
            if self.config.interaction == "clip_text" and name.startswith("interaction"):
                continue
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
                init.zeros_(module.bias)
            elif isinstance(module, CrossAttentionStack):
                init.normal_(module.queries, std=1.0)
        std = self.config.slot_init_std
        last_linear = self.visual_mapping.output if self.config.visual_mapping == "resampler" else self.visual_mapping
        init.normal_(last_linear.weight, std=std / math.sqrt(last_linear.in_features))
        init.normal_(self.image_token, std=std)
        if self.config.interaction == "none":
            return
        init.normal_(self.request_token, std=std)
        init.normal_(self.dynamic_projection.weight, std=std / math.sqrt(self.dynamic_projection.in_features))
        if self.config.interaction == "clip_text":
            # CLIP's own token embeddings have about this scale; its positions are added to bos and eos alone.
            for linear in (self.request_projection, self.fine_grained_projection):
                init.normal_(linear.weight, std=0.02)

    def static_tokens(self, features: ImageFeatures) -> torch.Tensor:
        """e_img = t_img + W_a h_I + b_a for each image: `[N, num_static_tokens, d_L]`."""
        features = features.to(self.dtype)
        if self.config.visual_mapping == "resampler":
            return self.image_token + self.visual_mapping(features.patches)
        return self.image_token + self.visual_mapping(features.pooled).unflatten(-1, self.image_token.shape)

    def forward(
        self,
        requests: torch.Tensor,
        features: ImageFeatures,
        images: torch.Tensor,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The interaction: what each request brings back.

        Args:
            requests (`[R, d_h]`): the language model's last hidden states at the request tokens.
            features ([`ImageFeatures`] of N images).
            images (int `[R, I]`): the images each request looks at, as indices into `features`; -1 is padding.
            return_weights (`bool`): whether to return where the requests looked.

        Returns:
            dynamic tokens `[R, k, d_L]`; and, for `cross_attention` if asked for, attention averaged over heads
            `[R, layers, request vectors, I, P]`, else `None`.
        """
        requests = requests.to(self.dtype)
        if not self.config.use_request:
            requests = torch.zeros_like(requests)
        visible = images >= 0
        seen = features.to(self.dtype)[images.clamp(min=0)]
        if self.config.interaction == "clip_text":
            return self._read_with_clip_text(requests, seen.pooled, visible), None
        source = seen.pooled.unsqueeze(-2) if self.config.fine_grained_source == "global" else seen.patches
        context = self.fine_grained_projection(source)  # [R, I, P, d_i]
        mask = None if bool(visible.all()) else visible[:, :, None].expand(context.shape[:3]).flatten(1)
        vectors = self.request_projection(requests).unflatten(-1, (self.config.num_request_vectors, -1))
        states, attentions = self.interaction(vectors, context.flatten(1, 2), mask, return_weights)
        tokens = self.request_token + self.dynamic_projection(states[:, -self.config.num_dynamic_tokens :])
        if attentions is not None:
            attentions = torch.stack(attentions, dim=1).mean(dim=2).unflatten(-1, context.shape[1:3])
        return tokens, attentions

    def _read_with_clip_text(
        self, requests: torch.Tensor, pooled: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """The frozen CLIP text transformer over [bos, h_f of each image, h_R, eos]; the output at eos, mapped back.

        Rows that see fewer images than others are grouped by their number: the causal transformer sees no padding.
        """
        tokens = requests.new_empty(requests.shape[0], self.config.num_dynamic_tokens, self.request_token.shape[-1])
        request_states = self.request_projection(requests)[:, None]  # [R, 1, d_t]
        image_states = self.fine_grained_projection(pooled).unflatten(-1, (self.config.num_fine_grained_tokens, -1))
        image_states = self.fine_grained_dropout(image_states)  # [R, I, 5, d_t]
        counts = visible.sum(dim=1)
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero().squeeze(-1)
            soft = torch.cat([image_states[rows, :count].flatten(1, 2), request_states[rows]], dim=1)
            projected = self.dynamic_projection(self._clip_text_output(soft))
            tokens = tokens.index_put(
                (rows,), self.request_token + projected.unflatten(-1, (self.config.num_dynamic_tokens, -1))
            )
        return tokens

    def _clip_text_output(self, soft_tokens: torch.Tensor) -> torch.Tensor:
        """CLIP's text embedding `[R, d_p]` of `soft_tokens` `[R, n, d_t]` between bos (position 0) and eos (n + 1)."""
        text_model, config = self.interaction.text_model, self.config.clip_text_config
        last = soft_tokens.shape[1] + 1
        if last >= config.max_position_embeddings:
            raise ValueError(
                f"A request that sees {(last - 2) // self.config.num_fine_grained_tokens} images needs {last + 1} "
                f"positions of the CLIP text encoder, which has {config.max_position_embeddings}: show fewer images "
                'in one row, or use interaction="cross_attention".'
            )
        ids = torch.tensor(clip_text_ends(config), device=soft_tokens.device)
        positions = torch.tensor([0, last], device=soft_tokens.device)
        ends = text_model.embeddings(input_ids=ids[None], position_ids=positions[None])
        ends = ends.expand(soft_tokens.shape[0], -1, -1)
        states = torch.cat([ends[:, :1], soft_tokens, ends[:, 1:]], dim=1)
        mask = create_causal_mask(
            config=text_model.config, inputs_embeds=states, attention_mask=None, past_key_values=None
        )
        states = text_model.encoder(inputs_embeds=states, attention_mask=mask, is_causal=True).last_hidden_state
        return self.interaction.text_projection(text_model.final_layer_norm(states[:, -1]))


__all__ = ["ImageFeatures", "InteractivePerceptionNetwork"]
