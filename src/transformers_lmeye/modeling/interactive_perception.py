"""The Interactive Perception Network: everything LMEye trains (arXiv 2305.03701, section 3).

Shapes: `N` images, `R` requests, `I` images a request sees at most, `P` patches, `k` dynamic tokens, `d_L` width of
the language model's input embeddings, `d_h` width of its last hidden state, `d_p` CLIP's projection width, `d_t` width
of the CLIP text encoder, `d_v` width of the vision tower, `d_q` width of the Q-Former, `d_i` width of the
cross-attention stack.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .configuration_lmeye import LMEyeConfig
from .towers import ImageFeatures, build_text_encoder, patch_grid


def grid_places(num_patches: int, spatial_shapes: torch.Tensor | None = None) -> torch.Tensor:
    """
    Row and column of each patch of a sequence, int `[P, 2]`; or `[..., P, 2]` for pictures with `spatial_shapes`
    (int `[..., 2]`) of their own.
    """
    if spatial_shapes is None:
        columns = torch.tensor(patch_grid(num_patches)[1])
        places = torch.arange(num_patches)
    else:
        columns = spatial_shapes[..., 1:]
        places = torch.arange(num_patches, device=spatial_shapes.device)
    return torch.stack([places // columns, places % columns], dim=-1)


def sinusoidal_positions(places: torch.Tensor, width: int) -> torch.Tensor:
    """Two-dimensional sinusoidal codes of places int `[..., P, 2]`, of unit amplitude: `[..., P, width]`, float32.

    Half of the width codes the row and half the column, in wavelengths from 2 pi to 200 pi patches.
    """
    frequencies = torch.logspace(0, -2, width // 4, device=places.device)
    angles = places[..., None] * frequencies  # [..., P, 2, width / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def pool_features(
    features: torch.Tensor, num_tokens: int | tuple[int, int], spatial_shapes: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Averages features over equal areas of their grid.

    Args:
        features (`[N, P, d]` or `[N, rows, columns, d]`): patches row by row, a square where their number is one.
        num_tokens (`int`, or rows and columns): how many are left. Without rows and columns a square number of them is
            a square of areas and any other a row; of features in one row all are a row.
        spatial_shapes (int `[N, 2]`, *optional*): each picture's rows and columns; what lies behind them is padding.

    Returns:
        `[N, num_tokens, d]`
    """
    if spatial_shapes is not None:
        pooled = [
            pool_features(picture[None, : rows * columns].view(1, rows, columns, -1), num_tokens)
            for picture, (rows, columns) in zip(features, spatial_shapes.tolist(), strict=True)
        ]
        return torch.cat(pooled)
    if features.dim() == 3:
        features = features.unflatten(1, patch_grid(features.shape[1]))
    areas = patch_grid(num_tokens) if isinstance(num_tokens, int) else num_tokens
    if features.shape[1] == 1:
        areas = (1, math.prod(areas))
    return nn.functional.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), areas).flatten(2).transpose(1, 2)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for its weights: `[B, heads, Q or K, d]` -> `[B, Q, heads, d]`, `[B, heads, Q, K]`."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


def attention_implementation(config: LMEyeConfig, states: torch.Tensor, return_weights: bool) -> str:
    """
    Which of transformers' attention functions the stack runs: the one asked for, with two exceptions.

    Only the eager one gives weights; and flash attention takes half precision alone, so that an IPN in float32 outside
    of autocast runs `sdpa`.
    """
    asked = config._attn_implementation or "sdpa"
    if return_weights:
        return "eager"
    in_float32 = states.dtype == torch.float32 and not torch.is_autocast_enabled(states.device.type)
    if in_float32 and is_flash_attention_requested(requested_attention_implementation=asked):
        return "sdpa"
    return asked


class Attention(nn.Module):
    """Multi-head attention of `queries` [B, Q, d_i] over `context` [B, K, d_i], through transformers' interface."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: LMEyeConfig):
        super().__init__()
        self.config = config
        hidden_size, self.num_heads = config.interaction_hidden_size, config.interaction_num_heads
        self.scaling = (hidden_size // self.num_heads) ** -0.5
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, queries: torch.Tensor, context: torch.Tensor, implementation: str, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.query(queries), self.key(context), self.value(context))
        )  # [B, heads, Q or K, d_i / heads]
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        attended, weights = function(
            self, query, key, value, attention_mask=mask, scaling=self.scaling, dropout=0.0, is_causal=False
        )
        return self.output(attended.flatten(-2)), weights


class InteractionBlock(nn.Module):
    """Self-attention over the request vectors, cross-attention to the image, feed-forward; each normalised before."""

    def __init__(self, config: LMEyeConfig):
        super().__init__()
        width = config.interaction_hidden_size
        self.self_attention_norm = nn.LayerNorm(width)
        self.self_attention = Attention(config)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, config.interaction_intermediate_size),
            nn.GELU(),
            nn.Linear(config.interaction_intermediate_size, width),
        )

    def forward(
        self, requests: torch.Tensor, context: torch.Tensor, implementation: str, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = self.self_attention_norm(requests)
        requests = requests + self.self_attention(normed, normed, implementation)[0]
        attended, weights = self.cross_attention(self.cross_attention_norm(requests), context, implementation, mask)
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
        self.config = config
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
        implementation = attention_implementation(self.config, states, return_weights)
        if context_mask is None or implementation in ("eager", "sdpa"):
            mask = None if context_mask is None else context_mask[:, None, None, :]
        else:
            mask = create_bidirectional_mask(self.config, states, context_mask, encoder_hidden_states=context)
        attentions = []
        for block in self.blocks:
            states, weights = block(states, context, implementation, mask)
            attentions.append(weights)
        return self.norm(states), tuple(attentions) if return_weights else None


class PatchProjection(nn.Module):
    """Patch tokens `[..., P, d_v]`, normalised, mapped to `[..., P, d_i]` and given position codes of unit scale."""

    def __init__(self, feature_width: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_width)
        self.linear = nn.Linear(feature_width, hidden_size)

    def forward(self, features: torch.Tensor, spatial_shapes: torch.Tensor | None = None) -> torch.Tensor:
        projected = self.linear(self.norm(features))
        places = grid_places(features.shape[-2], spatial_shapes).to(projected.device)
        return projected + sinusoidal_positions(places, projected.shape[-1]).to(projected.dtype)


class Resampler(nn.Module):
    """Static perception by learned queries over the patches: the same for every question."""

    def __init__(self, config: LMEyeConfig, feature_width: int, output_width: int):
        super().__init__()
        self.patch_projection = PatchProjection(feature_width, config.interaction_hidden_size)
        self.stack = CrossAttentionStack(config, config.num_static_tokens)
        self.output = nn.Linear(config.interaction_hidden_size, output_width)

    def forward(self, features: ImageFeatures) -> torch.Tensor:
        context = self.patch_projection(features.patches, features.spatial_shapes)
        return self.output(self.stack(None, context, features.patch_mask)[0])  # [N, num_static_tokens, d_L]


class PatchMapping(nn.Linear):
    """Static perception by every patch, mapped by one matrix (LLaVA); or by averages over equal areas of them."""

    def __init__(self, config: LMEyeConfig, feature_width: int, output_width: int):
        super().__init__(feature_width, output_width)
        self.num_tokens = config.num_static_tokens

    def forward(self, features: ImageFeatures) -> torch.Tensor:
        patches = features.patches
        if patches.shape[1] < self.num_tokens:
            raise ValueError(
                f"num_static_tokens={self.num_tokens} is more than the {patches.shape[1]} patches that "
                'visual_mapping="patch" maps: give at most that many.'
            )
        if patches.shape[1] > self.num_tokens or features.patch_mask is not None:
            rows = max(n for n in range(1, math.isqrt(self.num_tokens) + 1) if self.num_tokens % n == 0)
            patches = pool_features(patches, (rows, self.num_tokens // rows), features.spatial_shapes)
        return super().forward(patches)  # [N, num_static_tokens, d_L]


class InteractivePerceptionNetwork(nn.Module):
    """Static perception, request and interaction, and the way back into the language model's embedding space.

    Args:
        config ([`LMEyeConfig`]): the variant and its sizes.
        image_width (`int`): d_p, the global image feature's width.
        patch_width (`int`): d_v, the patch tokens' width.
        input_width (`int`): d_L, the language model's input embeddings' width.
        request_width (`int`): d_h, its last hidden state's width.
        clip_text_model (*optional*): a loaded text encoder; built from the configuration where absent. Frozen.
    """

    def __init__(
        self,
        config: LMEyeConfig,
        image_width: int,
        patch_width: int,
        input_width: int,
        request_width: int,
        clip_text_model: PreTrainedModel | None = None,
    ):
        super().__init__()
        self.config = config
        query_width = None if config.qformer_config is None else config.qformer_config.hidden_size
        if config.visual_mapping == "linear":
            self.visual_mapping = nn.Linear(image_width, config.num_static_tokens * input_width)
        elif config.visual_mapping == "qformer":
            self.visual_mapping = nn.Linear(query_width, input_width)
        elif config.visual_mapping == "patch":
            self.visual_mapping = PatchMapping(config, patch_width, input_width)
        else:
            self.visual_mapping = Resampler(config, patch_width, input_width)
        self.image_token = nn.Parameter(torch.empty(config.num_static_tokens, input_width))
        if config.interaction == "none":
            return
        self.request_token = nn.Parameter(torch.empty(input_width))
        if config.keep_request_token:
            self.dynamic_token = nn.Parameter(torch.empty(input_width))
        source = config.fine_grained_source
        feature_width = {"global": image_width, "patch": patch_width, "qformer": query_width}[source]
        if config.interaction == "clip_text":
            if clip_text_model is None:
                clip_text_model = build_text_encoder(config)
            text_width, projection_width = (
                config.clip_text_config.hidden_size,
                config.clip_text_config.projection_dim,
            )
            self.request_projection = nn.Linear(request_width, config.num_request_vectors * text_width)
            tokens_per_feature = config.num_fine_grained_tokens if source == "global" else 1
            self.fine_grained_projection = nn.Linear(feature_width, tokens_per_feature * text_width)
            self.fine_grained_dropout = nn.Dropout(config.fine_grained_dropout)
            self.interaction = clip_text_model.requires_grad_(False).eval()
            tokens_per_output = config.num_dynamic_tokens if config.dynamic_readout == "eos" else 1
            self.dynamic_projection = nn.Linear(projection_width, tokens_per_output * input_width)
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
        if self.config.keep_request_token:
            init.normal_(self.dynamic_token, std=std)
        init.normal_(self.dynamic_projection.weight, std=std / math.sqrt(self.dynamic_projection.in_features))
        if self.config.interaction == "clip_text":
            # CLIP's own token embeddings have about this scale; its positions are added to bos and eos alone.
            for linear in (self.request_projection, self.fine_grained_projection):
                init.normal_(linear.weight, std=0.02)

    def static_tokens(self, features: ImageFeatures) -> torch.Tensor:
        """e_img = t_img + W_a h_I + b_a for each image (or each Q-Former output or patch): `[N, num_static_tokens,
        d_L]`."""
        features = features.to(self.dtype)
        if self.config.visual_mapping in ("patch", "resampler"):
            mapped = self.visual_mapping(features)
        elif self.config.visual_mapping == "qformer":
            mapped = self.visual_mapping(features.queries)
        else:
            mapped = self.visual_mapping(features.pooled).unflatten(-1, self.image_token.shape)
        return self.image_token + mapped

    @property
    def blank_dynamic_token(self) -> torch.Tensor:
        """What a dynamic slot holds besides what a request brings, `[d_L]`: e_req, or a vector of its own."""
        return self.dynamic_token if self.config.keep_request_token else self.request_token

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
            dynamic tokens `[R, k, d_L]`; and, if asked for, the request vectors' attention averaged over heads, `[R,
            layers, request vectors, I, P]`, where the interaction attends to more than the global feature, else
            `None`.
        """
        requests = requests.to(self.dtype)
        if not self.config.use_request:
            requests = torch.zeros_like(requests)
        visible = images >= 0
        seen = features.to(self.dtype)[images.clamp(min=0)]
        vectors = self.request_projection(requests).unflatten(-1, (self.config.num_request_vectors, -1))
        read = self._read_with_clip_text if self.config.interaction == "clip_text" else self._read_with_stack
        states, attentions = read(vectors, seen, visible, return_weights)
        return self.blank_dynamic_token + self.dynamic_projection(states).unflatten(
            -1, (-1, self.blank_dynamic_token.shape[-1])
        ).flatten(1, 2), attentions

    def _read_with_stack(
        self, vectors: torch.Tensor, seen: ImageFeatures, visible: torch.Tensor, return_weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The trained stack: the last k of the vectors `[R, k, d_i]`, and attention `[R, layers, m, I, P]`."""
        if self.config.fine_grained_source == "patch":
            context = self.fine_grained_projection(seen.patches, seen.spatial_shapes)  # [R, I, P, d_i]
        else:
            source = seen.queries if self.config.fine_grained_source == "qformer" else seen.pooled.unsqueeze(-2)
            one_row = torch.tensor([1, source.shape[-2]], device=source.device)
            context = self.fine_grained_projection(source, one_row)
        shown = self._shown(context, seen, visible).flatten(1)
        states, attentions = self.interaction(
            vectors, context.flatten(1, 2), None if bool(shown.all()) else shown, return_weights
        )
        if attentions is not None:
            attentions = torch.stack(attentions, dim=1).mean(dim=2).unflatten(-1, context.shape[1:3])
        return states[:, -self.config.num_dynamic_tokens :], attentions

    def _shown(self, context: torch.Tensor, seen: ImageFeatures, visible: torch.Tensor) -> torch.Tensor:
        """Which of the features `[R, I, P, d]` belong to a picture: bool `[R, I, P]`."""
        shown = visible[:, :, None].expand(context.shape[:3])
        averaged = self.config.interaction == "clip_text" and self.config.num_fine_grained_tokens is not None
        if self.config.fine_grained_source == "patch" and not averaged and seen.patch_mask is not None:
            shown = shown & seen.patch_mask
        return shown

    def _read_with_clip_text(
        self, vectors: torch.Tensor, seen: ImageFeatures, visible: torch.Tensor, return_weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The frozen CLIP text transformer over [bos, soft tokens of each image, request vectors, eos].

        Rows that see fewer images than others are grouped by their number: the causal transformer sees no padding.

        Returns:
            the projected outputs that are read, `[R, 1 or k, d_p]`, and attention `[R, layers, m, I, P]`.
        """
        soft = self._soft_tokens(seen)  # [R, I, F, d_t]
        shown = self._shown(soft, seen, visible)
        flat, keep = soft.flatten(1, 2), shown.flatten(1)
        num_outputs = 1 if self.config.dynamic_readout == "eos" else self.config.num_dynamic_tokens
        outputs = flat.new_empty(flat.shape[0], num_outputs, self.dynamic_projection.in_features)
        has_grid = self.config.fine_grained_source != "global"
        return_weights = return_weights and has_grid
        maps = None
        counts = keep.sum(dim=1)
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero().squeeze(-1)
            self._check_positions(count, int(visible[rows[0]].sum()))
            order = (~keep[rows]).long().argsort(dim=1, stable=True)[:, :count]
            tokens = flat[rows].gather(1, order[..., None].expand(-1, -1, flat.shape[-1]))
            projected, attentions = self.interaction.read_soft_tokens(
                torch.cat([tokens, vectors[rows]], dim=1), output_attentions=return_weights
            )
            outputs = outputs.index_put((rows,), projected[:, -num_outputs:])
            if return_weights:
                weights = torch.stack(attentions, dim=1).mean(dim=2)  # [rows, layers, n + 2, n + 2]
                weights = weights[:, :, 1 + count : -1, 1 : 1 + count]  # request vectors over soft tokens
                if maps is None:
                    maps = weights.new_zeros(keep.shape[0], *weights.shape[1:3], keep.shape[1])
                places = order[:, None, None].expand(weights.shape)
                maps[rows] = maps[rows].scatter(-1, places, weights)
        return outputs, None if maps is None else maps.unflatten(-1, soft.shape[1:3])

    def _check_positions(self, num_soft_tokens: int, num_images: int) -> None:
        needed = num_soft_tokens + self.config.num_request_vectors + 2
        available = self.config.clip_text_config.max_position_embeddings
        if needed > available:
            raise ValueError(
                f"A request that sees {num_images} image{'s' * (num_images > 1)} of {num_soft_tokens // num_images} "
                f"soft tokens needs {needed} positions of the CLIP text encoder, which has {available}: show fewer "
                'images in one row, lower num_fine_grained_tokens, or use interaction="cross_attention".'
            )

    def _soft_tokens(self, seen: ImageFeatures) -> torch.Tensor:
        """h_f of each image: `[R, I, F, d_t]`, F soft tokens each."""
        if self.config.fine_grained_source == "global":
            soft = self.fine_grained_projection(seen.pooled).unflatten(-1, (self.config.num_fine_grained_tokens, -1))
            return self.fine_grained_dropout(soft)
        from_patches = self.config.fine_grained_source == "patch"
        features = seen.patches if from_patches else seen.queries  # [R, I, P, d]
        if self.config.num_fine_grained_tokens is not None:
            shapes = seen.spatial_shapes.flatten(0, 1) if from_patches and seen.spatial_shapes is not None else None
            flat = features.flatten(0, 1) if from_patches else features.flatten(0, 1).unsqueeze(1)  # queries: one row
            pooled = pool_features(flat, self.config.num_fine_grained_tokens, shapes)
            features = pooled.unflatten(0, features.shape[:2])
        return self.fine_grained_dropout(self.fine_grained_projection(features))


__all__ = ["ImageFeatures", "InteractivePerceptionNetwork"]
