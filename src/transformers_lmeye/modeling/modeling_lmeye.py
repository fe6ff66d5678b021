"""LMEye around any language model of Transformers and a vision tower (arXiv 2305.03701).

The way of one picture: vision tower -> static token in the `<img>` slot -> the language model reads image and question
up to the request token -> its last hidden state there is the request -> the Interactive Perception Network looks it up
in the image -> dynamic tokens in the `<img-d>` slots -> answer. See `segments.py` for what a causal model reads when,
`encoder_decoder.py` for the others, `generation.py` for the decoding loop.
"""

import inspect
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils import can_return_tuple, logging

from .backbones import LMEyeCheckpointMixin, language_model_widths
from .configuration_lmeye import LMEyeConfig
from .encoder_decoder import EncoderDecoderMixin
from .generation import PerceivedGenerationMixin
from .interactive_perception import InteractivePerceptionNetwork
from .lockstep import Call, Lockstep, in_step, kept_in_step
from .outputs import LMEyeCausalLMOutputWithPast, LMEyePerception, LMEyeSeq2SeqLMOutput
from .reading import (
    LaidOutBatch,
    SegmentReadingMixin,
    accepted_arguments,
    check_columns,
    join_hidden_states,
    note_columns,
    take_columns,
)
from .segments import SegmentPlan, cache_length, column_order, plan_segments
from .towers import (
    ImageFeatures,
    QFormer,
    build_vision_tower,
    patch_grid,
    read_images,
    uses_patches,
    vision_widths,
)


logger = logging.get_logger(__name__)


class LMEyePreTrainedModel(PreTrainedModel):
    config: LMEyeConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = "past_key_values"
    # Half-precision backbones are read, never updated; the trained part keeps float32 weights.
    _keep_in_fp32_modules_strict = ("ipn", "qformer")

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, InteractivePerceptionNetwork):
            module.init_weights()
        else:
            super()._init_weights(module)


class LMEyeForConditionalGeneration(
    PerceivedGenerationMixin,
    SegmentReadingMixin,
    EncoderDecoderMixin,
    LMEyeCheckpointMixin,
    LMEyePreTrainedModel,
    GenerationMixin,
):
    """
    A frozen language model, a frozen vision tower, and the Interactive Perception Network between them.

    Args:
        config ([`LMEyeConfig`]): the variant, its sizes and the backbones' configurations.
        vision_tower, language_model, clip_text_model, qformer (*optional*): loaded backbones; built from the
            configuration, with random weights, where absent. See
            [`~LMEyeForConditionalGeneration.from_vision_language_pretrained`].
    """

    def __init__(
        self,
        config: LMEyeConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        clip_text_model: PreTrainedModel | None = None,
        qformer: QFormer | None = None,
    ):
        super().__init__(config)
        if vision_tower is None:
            vision_tower = build_vision_tower(config)
        if qformer is None and config.qformer_config is not None:
            qformer = QFormer(config.qformer_config, config.num_query_tokens)
        if language_model is None:
            auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            language_model = auto_class.from_config(config.text_config)
        if "inputs_embeds" not in inspect.signature(language_model.forward).parameters:
            raise ValueError(
                f"{type(language_model).__name__} takes no `inputs_embeds`, so no image can be shown to it: choose a "
                "language model whose forward accepts them."
            )
        self.vision_tower = vision_tower
        self.qformer = qformer
        self.language_model = language_model
        self._accepted = accepted_arguments(language_model)
        # What the decoding loop asks of the model that it runs.
        self._is_stateful = language_model._is_stateful
        self._can_compile_fullgraph = language_model._can_compile_fullgraph
        image_width, patch_width = vision_widths(config.vision_config, config.vision_feature_layer)
        input_width, request_width = language_model_widths(language_model)
        self.ipn = InteractivePerceptionNetwork(
            config,
            image_width=image_width,
            patch_width=patch_width,
            input_width=input_width,
            request_width=request_width,
            clip_text_model=clip_text_model,
        )
        self.gradient_checkpointing = False
        self.lockstep: Lockstep | None = None  # what a pass agrees on with processes that share the parameters
        self.freeze_backbones()
        self.generation_config = GenerationConfig.from_dict(language_model.generation_config.to_dict())
        self.post_init()
        # TRL's trainers put a forward of their own on the model, which scores labels that the model's never sees.
        self.register_forward_pre_hook(_mask_slots, with_kwargs=True)
        # Backbones name layers of parts that are not here; accelerate looks for each of them.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}
        self.train(False)

    # --- parts -------------------------------------------------------------------------------------------------

    def backbones(self) -> list[nn.Module]:
        """The frozen parts: vision tower, language model, Q-Former and CLIP's text encoder, the latter two if used."""
        frozen = [self.vision_tower, self.language_model]
        if self.qformer is not None:
            frozen.append(self.qformer)
        if self.config.interaction == "clip_text":
            frozen.append(self.ipn.interaction)
        return frozen

    def freeze_backbones(self) -> None:
        """Takes the backbones out of training for good; the IPN is left as it is."""
        for backbone in self.backbones():
            backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> "LMEyeForConditionalGeneration":
        """Sets the IPN's mode. The backbones stay in eval mode: frozen means without dropout, too."""
        super().train(mode)
        for backbone in self.backbones():
            backbone.eval()
        return self

    def freeze_for_stage(self, stage: Literal["pretrain", "instruct"]) -> int:
        """
        Chooses what one of the paper's two stages trains, and logs it with counts.

        Args:
            stage: `"pretrain"` (multimodal pretraining): the static mapping, W_a, b_a and t_img. `"instruct"`
                (multimodal instruction following): the rest of the IPN, stage-1 parameters frozen.

        Returns:
            `int`: the number of parameters that train.

        Raises:
            ValueError: the stage has nothing to train, or is unknown.
        """
        if stage not in ("pretrain", "instruct"):
            raise ValueError(f'stage must be "pretrain" or "instruct", not {stage!r}.')
        self.requires_grad_(False)
        frozen_prefix = "interaction." if self.config.interaction == "clip_text" else None
        counts: dict[str, int] = {}
        for name, parameter in self.ipn.named_parameters():
            static = name.startswith(("visual_mapping.", "image_token"))
            if static != (stage == "pretrain") or (frozen_prefix and name.startswith(frozen_prefix)):
                continue
            parameter.requires_grad_(True)
            part = name.split(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
        if not counts:
            raise ValueError(
                f'interaction="{self.config.interaction}" has nothing to train in stage "{stage}": its only '
                'parameters are those of stage "pretrain".'
            )
        for module in self.language_model.modules():
            if getattr(module, "support_avx512bf16_for_cpu", False):
                # bitsandbytes repacks 4-bit weights that it first meets in eval mode without gradients, for a kernel
                # that no gradient passes, and says nothing.
                module.support_avx512bf16_for_cpu = False
        total = sum(counts.values())
        parts = ", ".join(f"ipn.{part} {count:,}" for part, count in counts.items())
        everything = sum(parameter.numel() for parameter in self.parameters())
        logger.info(f"Stage {stage}: training {total:,} of {everything:,} parameters: {parts}")
        return total

    @property
    def base_model(self) -> "LMEyeWithoutHead":
        """The model as trainers see it that apply the language model's head themselves, as TRL's do."""
        return LMEyeWithoutHead(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def enable_input_require_grads(self) -> None:
        """Does nothing: gradients start at the IPN's own parameters, and segments are checkpointed without reentry."""

    def disable_input_require_grads(self) -> None:
        """Does nothing, likewise."""

    def _activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            logger.warning_once(
                "use_reentrant=True is ignored: caches pass between checkpointed segments, and reentry would lose "
                "gradients into a segment whose inputs need none."
            )
        super()._activation_checkpointing_enable({**options, "use_reentrant": False}, *args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            "LMEye never resizes the language model's embedding table: slot vectors live in the IPN, and slot ids lie "
            "outside the table."
        )

    # --- images ------------------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: torch.Tensor, **vision_inputs: torch.Tensor | None) -> ImageFeatures:
        """
        Runs the vision tower, and the Q-Former where there is one.

        Args:
            pixel_values (`[N, channels, height, width]`): as the processor makes them.
            vision_inputs: what else the processor returned for the vision tower, such as SigLIP2's
                `pixel_attention_mask` and `spatial_shapes`.

        Returns:
            [`ImageFeatures`]: to be passed as `image_features` in place of `pixel_values`, as often as wanted.
        """
        if self.lockstep is not None:
            self.lockstep.wait(Call.SEE, shown={"pixel_values": pixel_values, **vision_inputs})
        return read_images(
            self.vision_tower,
            self.qformer,
            pixel_values,
            self.config.vision_feature_layer,
            uses_patches(self.config),
            **vision_inputs,
        )

    def _is_slot(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids >= min(self.config.image_token_id, self.config.request_token_id, self.config.dynamic_token_id)

    def _embed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_features: ImageFeatures | None,
        start: int = 0,
    ) -> LaidOutBatch:
        """Embeds words and static information; `<img-q>` and `<img-d>` are filled as they are read."""
        if not self.config.keep_request_token and (input_ids == self.config.request_token_id).any():
            raise ValueError(
                "`<img-q>` is a slot of models with keep_request_token=True. Here the first `<img-d>` of a group is "
                "the request slot as well: leave `<img-q>` out."
            )
        if self.config.interaction == "none" and (input_ids == self.config.dynamic_token_id).any():
            raise ValueError('A model with interaction="none" has no requests: leave `<img-d>` slots out.')
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        elif attention_mask.shape[1] < input_ids.shape[1]:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, input_ids {input_ids.shape[1]}: with "
                "past_key_values, too, both cover the whole sequence."
            )
        image_rows, image_columns = self._place_images(input_ids, image_features, start)
        words = input_ids.masked_fill(self._is_slot(input_ids), 0)
        embeds = self._embed_words(words)
        static_tokens = None
        if image_features is not None:
            static_tokens = self._map_images(image_features.to(self.ipn.image_token.device))
            unread = image_columns >= start
            rows, columns = ((input_ids == self.config.image_token_id) & _from_column(input_ids, start)).nonzero().T
            embeds = embeds.index_put((rows, columns), static_tokens[unread].flatten(0, 1).to(embeds))
        embeds = self._with_layer_inputs(embeds, words)
        return LaidOutBatch(embeds, attention_mask, start, image_features, static_tokens, image_rows, image_columns)

    def _embed_words(self, words: torch.Tensor) -> torch.Tensor:
        if self.lockstep is not None:
            self.lockstep.wait(Call.EMBED)
        return self.get_input_embeddings()(words)

    def _map_images(self, features: ImageFeatures) -> torch.Tensor:
        if self.lockstep is not None:
            self.lockstep.wait(Call.MAP, torch.is_grad_enabled(), vars(features))
        return self.ipn.static_tokens(features)

    def _plan(self, input_ids: torch.Tensor, laid_out: LaidOutBatch) -> SegmentPlan:
        """The segments of a batch for a causal language model."""
        keeps = self.config.keep_request_token
        return plan_segments(
            input_ids,
            laid_out.attention_mask,
            self.config.dynamic_token_id,
            self.config.num_dynamic_tokens,
            laid_out.start,
            request_token_id=self.config.request_token_id if keeps else None,
            # Read apart, a prefix that nothing trains through leaves no graph behind.
            split_first=keeps
            and torch.is_grad_enabled()
            and not laid_out.embeds.requires_grad
            and self.way_of_reading == "crop",
        )

    def _place_images(
        self, input_ids: torch.Tensor, image_features: ImageFeatures | None, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and first column of every image. With a cache, images of columns read before may be given or not."""
        per_image = self.config.num_static_tokens
        is_image = input_ids == self.config.image_token_id
        num_images = 0 if image_features is None else len(image_features)
        if int(is_image.sum()) != num_images * per_image:
            is_image = is_image & _from_column(input_ids, start)
        slots = is_image.sum(dim=1).tolist()
        uneven = [row for row, count in enumerate(slots) if count % per_image]
        if sum(slots) != num_images * per_image or uneven:
            at = f"sample {uneven[0]} has {slots[uneven[0]]} of them; " if uneven else ""
            raise ValueError(
                f"Image features and image tokens do not match: {num_images} images, {per_image} `<img>` "
                f"slot{'s' * (per_image > 1)} each, but {sum(slots)} slots in input_ids ({at}per sample: {slots}). "
                "Give each sample as many images as its text has `<img>`, or leave the slots to the processor."
            )
        rows, columns = is_image.nonzero().T
        return rows[::per_image], columns[::per_image]

    def _images_before(self, laid_out: LaidOutBatch, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The images each request sees: all of its row that stand before it. Int `[R, I]`, -1 is padding."""
        seen = (laid_out.image_rows == rows[:, None]) & (laid_out.image_columns < columns[:, None])  # [R, N]
        blind = (~seen.any(dim=1)).nonzero().flatten().tolist()
        if blind:
            raise ValueError(
                f"Sample {int(rows[blind[0]])} asks a request where no image stands before it: put `<img>` before "
                "`<img-d>`, give the sample an image, or leave `<img-d>` out."
            )
        most = int(seen.sum(dim=1).max())
        order = seen.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        return order.masked_fill(~seen.gather(1, order), -1)

    def _look_up(
        self,
        laid_out: LaidOutBatch,
        embeds: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        requests: torch.Tensor,
        return_weights: bool,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """
        Looks requests up in the images before them, and fills their dynamic slots.

        Args:
            laid_out ([`LaidOutBatch`]): where the batch's images are.
            embeds (`[B, S, d_L]`): the batch so far.
            rows (int `[R]`), slots (int `[R, k]`): the row of each request, and the columns it fills.
            requests (`[R, d_h]`): what is asked.
            return_weights (`bool`): whether to return where the requests looked.

        Returns:
            the filled batch `[B, S, d_L]`, and what was perceived, by the names that `perceive` joins.
        """
        images = self._images_before(laid_out, rows, slots[:, 0])
        device = self.ipn.image_token.device
        tokens, attention = self._interact(
            requests.to(device), laid_out.features.to(device), images.to(device), return_weights
        )
        embeds = embeds.index_put((rows[:, None], slots), self._in_slot(tokens).to(embeds))
        return embeds, {
            "rows": rows,
            "columns": slots[:, 0],
            "requests": requests,
            "images": images,
            "tokens": tokens,
            "attention": attention,
        }

    def _interact(
        self, requests: torch.Tensor, features: ImageFeatures, images: torch.Tensor, return_weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The interaction; in lockstep once for each number of features that rows see, as its text encoder runs."""
        if self.lockstep is None:
            return self.ipn(requests, features, images, return_weights)
        shown = (images >= 0).sum(dim=1)
        if features.patch_mask is not None:
            shown = torch.arange(len(images), device=images.device)
        groups = [(shown == count).nonzero().flatten() for count in shown.unique()]
        parts = []
        for rows in groups:
            self.lockstep.wait(Call.LOOK_UP, torch.is_grad_enabled(), vars(features))
            parts.append(self.ipn(requests[rows], features, images[rows], return_weights))
        order = torch.cat(groups).argsort()
        tokens = torch.cat([part for part, _ in parts])[order]
        return tokens, torch.cat([part for _, part in parts])[order] if parts[0][1] is not None else None

    def make_dummy_call(self, call: Call, records: bool, shown: dict[str, torch.Tensor] | None) -> list[torch.Tensor]:
        """
        Calls a part of the model over a dummy of batch size 1.

        Args:
            call: which.
            records: whether gradients pass through it.
            shown: one picture as the vision tower is given it, or its features.

        Returns:
            what came out, to be reached by the backward pass.
        """
        token = self.ipn.image_token
        if call == Call.SEE:
            self.get_image_features(**shown)
            return []
        if call == Call.EMBED:
            self._embed_words(torch.zeros(1, 1, dtype=torch.long, device=token.device))
            return []
        if call == Call.MAP:
            return [self._map_images(ImageFeatures(**shown))]
        input_width, request_width = language_model_widths(self.language_model)
        if call == Call.LOOK_UP:
            requests = torch.zeros(1, request_width, device=token.device, dtype=token.dtype, requires_grad=records)
            image = torch.zeros(1, 1, dtype=torch.long, device=token.device)
            return [self._interact(requests, ImageFeatures(**shown), image, False)[0]]
        width = request_width if self.config.is_encoder_decoder and call == Call.DECODE else input_width
        dtype = self.language_model.dtype
        states = torch.zeros(1, 1, width, device=token.device, dtype=dtype, requires_grad=records)
        mask = torch.ones(1, 1, dtype=torch.long, device=token.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and records):
            if call == Call.ENCODE:
                return [self._call_encoder(states, mask).last_hidden_state]
            if self.config.is_encoder_decoder:
                outputs = self._decode(
                    BaseModelOutput(last_hidden_state=states), attention_mask=mask, decoder_input_ids=mask - 1
                )
                return [outputs.logits]
            hidden, logits, _ = self._read(self._nothing_read(states), self._in_slot(states), mask.bool(), 1)
            return [hidden, logits]

    # --- forward -----------------------------------------------------------------------------------------------

    @can_return_tuple
    @in_step
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_features: ImageFeatures | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        prompt_outputs: LMEyeCausalLMOutputWithPast | None = None,
        apply_head: bool = True,
        **kwargs,
    ) -> LMEyeCausalLMOutputWithPast | LMEyeSeq2SeqLMOutput:
        """
        Reads words and images, any number of requests included, and scores every position.

        Args:
            input_ids (int `[batch, seq]`): words and slots, as the processor makes them. With `past_key_values`, the
                new columns alone, or the whole sequence.
            pixel_values (`[num_images, channels, height, width]`): in the order of the `<img>` slots, row by row.
            attention_mask (`[batch, seq]`): 0 at padding, on either side.
            position_ids (int `[batch, seq]`): for words alone; with slots they follow from `attention_mask`.
            past_key_values (`DynamicCache`, *optional*): what was read before.
            inputs_embeds (`[batch, seq, d_L]`): in place of `input_ids`, handed to the language model as they are.
            labels (int `[batch, seq]`): targets, -100 where there is none. Slots are never targets.
            logits_to_keep (`int` or int tensor): only the last that many positions (0: all), or these columns.
            image_features ([`ImageFeatures`]): what `get_image_features` returned, in place of `pixel_values`.
            pixel_attention_mask (`[N, P]`), spatial_shapes (int `[N, 2]`): for vision towers that take them (SigLIP2).
            encoder_outputs: for encoder-decoders, what an earlier pass returned, in place of words and images.
            prompt_outputs: used by `generate`, for the prompt it has read.
            apply_head: `False` returns `last_hidden_state`, what the language model's head is given, in place of
                logits and loss.
            kwargs: for the language model, such as an encoder-decoder's `decoder_input_ids`. There `labels` are the
                decoder's own and need no shift; `past_key_values` is the decoder's; `position_ids` and
                `logits_to_keep` have no meaning.

        Raises:
            ValueError: images and `<img>` slots differ in number; a request stands before any image.
        """
        if prompt_outputs is not None and input_ids is None:
            return prompt_outputs
        loss_kwargs = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        kwargs.update(
            (name, value)
            for name, value in (
                ("output_attentions", output_attentions),
                ("output_hidden_states", output_hidden_states),
            )
            if value
        )
        if pixel_values is not None and image_features is None:
            image_features = self.get_image_features(
                pixel_values, pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes
            )
        if self.config.is_encoder_decoder:
            if not apply_head:
                raise ValueError(
                    "apply_head=False is for causal language models: the head of an encoder-decoder scores the "
                    "decoder's words, not those of input_ids. Trainers that apply the head themselves (TRL's) cannot "
                    "train one; LMEyeTrainer can."
                )
            for name, value in (("past_key_values", past_key_values), ("use_cache", use_cache)):
                if value is not None:
                    kwargs[name] = value
            return self._forward_encoder_decoder(
                input_ids, attention_mask, image_features, inputs_embeds, encoder_outputs, labels, loss_kwargs, kwargs
            )
        has_images = image_features is not None
        # In lockstep, words alone are read as other processes read words and images.
        in_segments = self.lockstep is not None and torch.is_grad_enabled() and past_key_values is None
        if inputs_embeds is not None or not (
            has_images or in_segments or self._holds_slots(input_ids, past_key_values)
        ):
            if has_images:
                raise ValueError("Images are shown in `<img>` slots of input_ids; inputs_embeds has none.")
            outputs = self._read_plain(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                use_cache,
                logits_to_keep,
                apply_head,
                kwargs,
            )
            if prompt_outputs is not None:
                outputs["logits"] = torch.cat([prompt_outputs.logits, outputs["logits"]], dim=1)
        else:
            outputs = self._read_with_images(
                input_ids, attention_mask, image_features, past_key_values, logits_to_keep, apply_head, kwargs
            )
            if use_cache is False:
                outputs["past_key_values"] = None
            if labels is not None:
                labels = labels.masked_fill(self._is_slot(input_ids[:, -labels.shape[1] :]), -100)
        loss = None
        if not apply_head:
            outputs["last_hidden_state"] = outputs.pop("logits")
        elif labels is not None:
            logits = outputs["logits"]
            loss = self.loss_function(
                logits=logits, labels=labels.to(logits.device), vocab_size=logits.shape[-1], **loss_kwargs
            )
        return LMEyeCausalLMOutputWithPast(loss=loss, **outputs)

    def _holds_slots(self, input_ids: torch.Tensor, past_key_values: Cache | None) -> bool:
        # A compiled decode step reads one generated token, and no slot can be generated.
        if torch.compiler.is_compiling() and input_ids.shape[1] == 1 and past_key_values is not None:
            return False
        return bool(self._is_slot(input_ids).any())

    def _read_plain(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: torch.Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | torch.Tensor,
        apply_head: bool,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Words alone: the language model as it is."""
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:  # static caches have masks made
            check_columns(past_key_values, attention_mask)
            if position_ids is None and getattr(past_key_values, "is_of_images", False):
                positions = attention_mask.long().cumsum(dim=1).clamp(min=1) - 1 + self._position_of_first_word
                position_ids = positions[:, cache_length(past_key_values) :]
        if self.lockstep is not None:
            if inputs_embeds is None and self._layer_inputs_table is not None:
                kwargs = {**kwargs, "per_layer_inputs": self._layer_inputs_table.get_per_layer_inputs(input_ids)}
            inputs_embeds = self._embed_words(input_ids) if inputs_embeds is None else inputs_embeds
            inputs_embeds = self._wait_to_read(Call.DECODE, inputs_embeds)
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        optional = {
            "position_ids": position_ids,
            self._cache_name: past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        for name, value in optional.items():
            if value is not None and name in self._accepted:
                inputs[name] = value
        with nullcontext() if apply_head else self._head_inputs(0) as head_inputs:
            outputs = self.language_model(attention_mask=attention_mask, return_dict=True, **inputs, **kwargs)
        return {
            "logits": outputs.logits if head_inputs is None else head_inputs[0],
            "past_key_values": outputs.get(self._cache_name),
            "hidden_states": outputs.get("hidden_states"),
            "attentions": outputs.get("attentions"),
        }

    def _read_with_images(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_features: ImageFeatures | None,
        past_key_values: Cache | None,
        logits_to_keep: int | torch.Tensor,
        apply_head: bool,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Words and images: one sweep over the segments."""
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions is not available for a sequence with images: it is read in segments, which attend "
                "over caches of different lengths. `perceive` returns where each request looked."
            )
        output_hidden_states = bool(kwargs.get("output_hidden_states"))
        check_columns(past_key_values)
        start = cache_length(past_key_values)
        if start and attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1] + start:
            past = input_ids.new_zeros(input_ids.shape[0], start)
            input_ids = torch.cat([past, input_ids], dim=1)
        laid_out = self._embed(input_ids, attention_mask, image_features, start)
        plan = self._plan(input_ids, laid_out)
        widths = [segment.columns.shape[1] for segment in plan.segments]
        keep_last = logits_to_keep if isinstance(logits_to_keep, int) and plan.contiguous else 0
        num_logits = _last_columns(widths, keep_last) if keep_last else widths
        reading = self._sweep(laid_out, plan, past_key_values, num_logits, output_hidden_states, apply_head=apply_head)
        note_columns(reading, laid_out.attention_mask)
        logits = torch.cat(reading.logits, dim=1)
        order = None if plan.contiguous else column_order(plan, input_ids.shape[1] - start)
        if order is not None:
            logits = take_columns(logits, order)
            if isinstance(logits_to_keep, int) and logits_to_keep:
                logits = logits[:, -logits_to_keep:]
        if not isinstance(logits_to_keep, int):
            logits = logits[:, logits_to_keep]
        return {
            "logits": logits,
            "past_key_values": reading.cache,
            "hidden_states": join_hidden_states(reading.hidden_states, order),
            "image_hidden_states": laid_out.static_tokens,
        }

    def perceive(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_features: ImageFeatures | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs,
    ) -> LMEyePerception:
        """
        What the model asks of the images, and what comes back, without generating.

        Args:
            input_ids, pixel_values, attention_mask, image_features, pixel_attention_mask, spatial_shapes: as in
                `forward`; other keys of the processor's output are ignored.

        Returns:
            [`LMEyePerception`]

        Raises:
            ValueError: there is no image.
        """
        if pixel_values is None and image_features is None:
            raise ValueError("There is nothing to perceive without an image: pass pixel_values or image_features.")
        with torch.no_grad(), kept_in_step(self):
            if image_features is None:
                image_features = self.get_image_features(
                    pixel_values, pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes
                )
            if self.config.is_encoder_decoder:
                encoding = self._encode(
                    input_ids, attention_mask, image_features, return_weights=True, perceive_only=True
                )
                static_tokens, found = encoding.static_tokens, encoding.perceptions
            else:
                laid_out = self._embed(input_ids, attention_mask, image_features)
                plan = self._plan(input_ids, laid_out)
                static_tokens = laid_out.static_tokens
                found = self._sweep(laid_out, plan, return_weights=True).perceptions
        perception = LMEyePerception(image_features=image_features, image_hidden_states=static_tokens)
        if not found:
            return perception
        most = max(part["images"].shape[1] for part in found)
        for part in found:
            missing = most - part["images"].shape[1]
            part["images"] = nn.functional.pad(part["images"], (0, missing), value=-1)
            if part["attention"] is not None:
                part["attention"] = nn.functional.pad(part["attention"], (0, 0, 0, missing))
        joined = {name: torch.cat([part[name] for part in found]) for name in found[0] if found[0][name] is not None}
        order = (joined["rows"] * input_ids.shape[1] + joined["columns"]).argsort()
        joined = {name: values[order.to(values.device)] for name, values in joined.items()}
        perception.requests, perception.dynamic_tokens = joined["requests"], joined["tokens"]
        perception.request_rows, perception.request_images = joined["rows"], joined["images"]
        if "attention" in joined:
            attention = joined["attention"]
            grid = (1, attention.shape[-1])
            if self.config.fine_grained_source == "patch":
                grid = _grid_of(attention.shape[-1], image_features)
            perception.attention_maps = attention.unflatten(-1, grid)
        return perception


def _mask_slots(
    model: LMEyeForConditionalGeneration, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Slots are never targets, whoever computes the loss."""
    labels = kwargs.get("labels")
    if labels is not None:
        kwargs = {**kwargs, "labels": labels.masked_fill(model._is_slot(labels), -100)}
    return args, kwargs


class LMEyeWithoutHead:
    """
    [`LMEyeForConditionalGeneration`] up to the language model's head, which reads words and images as the whole does.

    Args:
        model ([`LMEyeForConditionalGeneration`]): the whole.
    """

    def __init__(self, model: LMEyeForConditionalGeneration):
        self._model = model

    def __call__(self, *args, **kwargs) -> LMEyeCausalLMOutputWithPast:
        outputs = self._model.forward(*args, apply_head=False, **kwargs)
        states = outputs.last_hidden_state
        if torch.is_grad_enabled() and not states.requires_grad:
            # A batch of words alone reaches no trained parameter: its gradient is zero, not an error.
            trained = (parameter for parameter in self._model.parameters() if parameter.requires_grad)
            outputs.last_hidden_state = states + sum((0.0 * parameter.sum() for parameter in trained), 0.0)
        return outputs

    def __getattr__(self, name: str) -> Any:
        # A model asks its base for parts that it does not know itself, so these questions end here.
        if name in ("get_encoder", "set_encoder", "get_decoder", "set_decoder"):
            raise AttributeError(f"{type(self).__name__} has no {name}.")
        return getattr(self._model, name)


def _from_column(input_ids: torch.Tensor, start: int) -> torch.Tensor:
    """Bool `[1, S]`: the columns from `start` on."""
    return (torch.arange(input_ids.shape[1], device=input_ids.device) >= start)[None]


def _last_columns(widths: list[int], keep: int) -> list[int]:
    """Of segments that lie end to end, how many columns of each are among the last `keep`."""
    counts = []
    for width in reversed(widths):
        counts.append(min(width, keep))
        keep -= counts[-1]
    return counts[::-1]


def _grid_of(num_features: int, features: ImageFeatures) -> tuple[int, int]:
    """Rows and columns that attention over `num_features` is shown in."""
    shapes = features.spatial_shapes
    if shapes is None or num_features != features.patches.shape[1]:
        return patch_grid(num_features)
    rows, columns = shapes[0].tolist()
    same = bool((shapes == shapes[0]).all()) and rows * columns == num_features
    return (rows, columns) if same else (1, num_features)


__all__ = ["LMEyeForConditionalGeneration", "LMEyePreTrainedModel"]
