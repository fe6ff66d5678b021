"""From pictures and words to the inputs of LMEye, slots included."""

import copy
import json
import re
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput, is_valid_image, load_image
from transformers.utils import is_torchvision_available

from .answers import encode_conversation
from .chat_templates import build_chat_template
from .open_clip_image_processing import is_open_clip, open_clip_image_processor


IMAGE_TOKEN, REQUEST_TOKEN, DYNAMIC_TOKEN = "<img>", "<img-q>", "<img-d>"
SLOT_TOKENS = (IMAGE_TOKEN, REQUEST_TOKEN, DYNAMIC_TOKEN)
FILLER_TOKEN = "<|lmeye_filler_{}|>"


def add_slot_tokens(tokenizer, first_slot_id: int) -> None:
    """
    Adds `<img>`, `<img-q>` and `<img-d>` to a tokenizer, in place, from `first_slot_id` on; fillers take the ids
    between.

    Raises:
        ValueError: the tokenizer cannot give the slots these ids.
    """
    num_fillers = first_slot_id - len(tokenizer)
    contents = [FILLER_TOKEN.format(index) for index in range(num_fillers)] + list(SLOT_TOKENS)
    tokens = [AddedToken(text, special=True, normalized=False, lstrip=False, rstrip=False) for text in contents]
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(SLOT_TOKENS))
    if ids != [first_slot_id + offset for offset in range(len(SLOT_TOKENS))]:
        raise ValueError(
            f"The tokenizer gives the slots ids {ids}, the model expects {first_slot_id} and the next two: its "
            "vocabulary has holes, or knows a slot's name already."
        )


def without_slot_tokens(tokenizer):
    """A copy of a tokenizer to which slots' names are words like any other (`<img>` is HTML)."""
    words = copy.deepcopy(tokenizer)
    state = json.loads(words.backend_tokenizer.to_str())
    pattern = re.escape(FILLER_TOKEN).replace(r"\{\}", r"\d+")
    state["added_tokens"] = [
        token
        for token in state["added_tokens"]
        if token["content"] not in SLOT_TOKENS and not re.fullmatch(pattern, token["content"])
    ]
    state["truncation"] = state["padding"] = None
    words._tokenizer = Tokenizer.from_str(json.dumps(state))
    return words


class LMEyeProcessor(ProcessorMixin):
    r"""
    An image processor and a tokenizer that knows the slots.

    Texts without slots that come with images are questions: they are put into the chat template (the language model's
    own, or the released format `Image as evidence: <img>\n Question: {question} <img-d>\nAnswer:`, with
    `keep_request_token` `Human: <img>\n{question}\n <img-q> <img-d>\nAssistant:`). In texts that have slots, these are
    respected: `<img>` once per image, `<img-d>` (or `<img-q>`, or both) once per request, all multiplied to the number
    of tokens the model uses, with one space between them. Rows without an image are words and nothing else.

    Args:
        image_processor: the vision tower's.
        tokenizer: the language model's, with the slots added.
        chat_template (`str`): over messages with image and text parts.
        num_static_tokens (`int`): `<img>` slots per image.
        num_dynamic_tokens (`int`): `<img-d>` slots per request; 0 for a model without interaction.
        num_request_rounds (`int`): requests each question asks one after another.
        keep_request_token (`bool`): whether a request has a slot of its own, `<img-q>`.
        is_encoder_decoder (`bool`): whether the texts are an encoder's: rows with images then get the tokenizer's
            special tokens.
        add_bos (`bool`): whether rows with images start with the tokenizer's bos (the released models do without).
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        num_static_tokens: int = 1,
        num_dynamic_tokens: int = 5,
        num_request_rounds: int = 1,
        keep_request_token: bool = False,
        is_encoder_decoder: bool = False,
        add_bos: bool = False,
    ):
        self.num_static_tokens = num_static_tokens
        self.num_dynamic_tokens = num_dynamic_tokens
        self.num_request_rounds = num_request_rounds
        self.keep_request_token = keep_request_token
        self.is_encoder_decoder = is_encoder_decoder
        self.add_bos = add_bos
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.dynamic_token = IMAGE_TOKEN, DYNAMIC_TOKEN
        self.image_token_id, self.request_token_id, self.dynamic_token_id = tokenizer.convert_tokens_to_ids(
            list(SLOT_TOKENS)
        )
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                "The tokenizer does not know the slots: build the processor with from_vision_language_pretrained, or "
                "call add_slot_tokens first."
            )
        self._words_tokenizer, self._num_words = None, 0

    @property
    def words_tokenizer(self):
        """The tokenizer of rows without images, to which slots' names are words."""
        num_words = len(self.tokenizer) - len(SLOT_TOKENS)
        if self._words_tokenizer is None or self._num_words != num_words:
            self._words_tokenizer, self._num_words = without_slot_tokens(self.tokenizer), num_words
        self._words_tokenizer.truncation_side = self.tokenizer.truncation_side
        return self._words_tokenizer

    @property
    def slot_token_ids(self) -> tuple[int, int, int]:
        """Ids of `<img>`, `<img-q>` and `<img-d>`."""
        return self.image_token_id, self.request_token_id, self.dynamic_token_id

    @classmethod
    def from_vision_language_pretrained(
        cls,
        vision_model_name_or_path: str,
        language_model_name_or_path: str,
        interaction: str = "clip_text",
        visual_mapping: str = "linear",
        num_static_tokens: int | None = None,
        num_dynamic_tokens: int = 5,
        num_request_rounds: int = 1,
        keep_request_token: bool | None = None,
        add_bos: bool = False,
        padding_side: str | None = None,
        trust_remote_code: bool | None = None,
        vision_revision: str | None = None,
        language_revision: str | None = None,
        **hub_kwargs: Any,
    ) -> "LMEyeProcessor":
        """
        The processor of a new model; its arguments are those of the model's own factory.

        Args:
            vision_model_name_or_path, language_model_name_or_path (`str`): hub ids or folders, or what open_clip's
                models are named by.
            interaction (`str`): `"none"` leaves requests out.
            visual_mapping, num_static_tokens, num_dynamic_tokens, num_request_rounds, keep_request_token: as in
                [`LMEyeConfig`].
            add_bos (`bool`): whether rows with images start with the tokenizer's bos.
            padding_side (`str`, *optional*): by default `"left"`, for generation, and `"right"` for encoder-decoders;
                the training collators pad on the right.
            trust_remote_code, vision_revision, language_revision, hub_kwargs: for the hub.
        """
        if not is_torchvision_available():
            raise ImportError(
                "Without torchvision pictures would be resized by another library, and pixel values move by 0.015: "
                "install torchvision."
            )
        vision = dict(hub_kwargs, **({"revision": vision_revision} if vision_revision else {}))
        language = dict(hub_kwargs, trust_remote_code=trust_remote_code)
        if language_revision:
            language["revision"] = language_revision
        if is_open_clip(vision_model_name_or_path):
            image_processor = open_clip_image_processor(vision_model_name_or_path, **vision)
        else:
            image_processor = AutoImageProcessor.from_pretrained(vision_model_name_or_path, **vision)
        config = AutoConfig.from_pretrained(language_model_name_or_path, **language)
        # A BLIP-2 checkpoint holds its language model as a part.
        is_encoder_decoder = bool(getattr(config, "text_config", config).is_encoder_decoder)
        if padding_side is None:
            padding_side = "right" if is_encoder_decoder else "left"
        tokenizer = AutoTokenizer.from_pretrained(language_model_name_or_path, padding_side=padding_side, **language)
        add_slot_tokens(tokenizer, max(len(tokenizer), config.get_text_config().vocab_size))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if num_static_tokens is None:
            num_static_tokens = 1
            if visual_mapping == "qformer":
                num_static_tokens = AutoConfig.from_pretrained(vision_model_name_or_path, **vision).num_query_tokens
            elif visual_mapping == "patch":
                num_static_tokens = _num_patches(vision_model_name_or_path, **vision)
        if keep_request_token is None:
            keep_request_token = is_encoder_decoder
        has_requests = interaction != "none"
        return cls(
            image_processor,
            tokenizer,
            chat_template=build_chat_template(
                tokenizer.chat_template, has_requests, keep_request_token, is_encoder_decoder
            ),
            num_static_tokens=num_static_tokens,
            num_dynamic_tokens=num_dynamic_tokens if has_requests else 0,
            num_request_rounds=num_request_rounds,
            keep_request_token=keep_request_token,
            is_encoder_decoder=is_encoder_decoder,
            add_bos=add_bos,
        )

    @classmethod
    def from_blip2_pretrained(cls, blip2_model_name_or_path: str, **kwargs: Any) -> "LMEyeProcessor":
        """
        The processor of a model that [`LMEyeForConditionalGeneration.from_blip2_pretrained`] builds.

        Args:
            blip2_model_name_or_path (`str`): hub id or folder of a BLIP-2 checkpoint.
            kwargs: as in `from_vision_language_pretrained`.
        """
        options = {"visual_mapping": "qformer", **kwargs}
        if options.get("interaction", "clip_text") == "clip_text":
            options.setdefault("keep_request_token", True)
        return cls.from_vision_language_pretrained(blip2_model_name_or_path, blip2_model_name_or_path, **options)

    def __call__(
        self,
        images: ImageInput | list[list[ImageInput]] | None = None,
        text: str | list[str] | None = None,
        padding: bool | str = True,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool | None = None,
        return_tensors: str | None = None,
        image_features: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: an image (PIL, array, tensor, path or URL); a list of them, one per text or as many as the texts
                have `<img>`; or a list of lists, `[]` for rows without one.
            text (`str` or list): questions, or texts with slots.
            padding, max_length, padding_side, pad_to_multiple_of: as for tokenizers; a batch is padded to its longest.
            truncation (`bool`): whether to cut texts to `max_length`. A slot is never cut.
            add_special_tokens (`bool`, *optional*): default: bos alone if `add_bos` in rows with images of a causal
                model; else what the tokenizer does.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.
            image_features ([`ImageFeatures`]): what the model's `get_image_features` returned, in place of images.
            kwargs: for the image processor.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` `[batch, seq]`, `pixel_values`
            `[num_images, channels, height, width]` in the order of the `<img>` slots, and whatever else the vision
            tower takes; with `image_features` these in place of pixels.

        Raises:
            ValueError: images and `<img>` slots of a sample differ in number; dynamic slots are no multiple of
                `num_dynamic_tokens`; an image is no image; truncation would cut a slot. The message names the sample.
        """
        if text is None:
            raise ValueError("Give a text with the images: a question, or a text with `<img>` slots.")
        if images is not None and image_features is not None:
            raise ValueError("Give images or image_features, not both: the features stand for the images.")
        texts = [text] if isinstance(text, str) else list(text)
        batch_images = self._images_per_text(images, texts)
        if image_features is None:
            counts = [len(row_images) for row_images in batch_images]
        else:
            counts = self._split_images(len(image_features), texts)
        rows = [
            self._tokenize(index, row_text, num_images, add_special_tokens, bool(truncation), max_length)
            for index, (row_text, num_images) in enumerate(zip(texts, counts, strict=True))
        ]
        single = isinstance(text, str) and return_tensors is None
        data = self._pad(rows, padding, max_length, padding_side, pad_to_multiple_of)
        if single:
            data = {name: value[0] for name, value in data.items()}
        flat = [image for row_images in batch_images for image in row_images]
        if flat:
            kwargs = {name: value for name, value in kwargs.items() if value is not None and name not in _TEXT_KWARGS}
            data.update(self.image_processor(flat, return_tensors=return_tensors or "pt", **kwargs))
        batch = BatchFeature(data, tensor_type=return_tensors)
        if image_features is not None:
            batch["image_features"] = image_features
        return batch

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """
        As of every processor; besides, `return_assistant_tokens_mask` is exact whatever the template: no
        `{% generation %}` has to mark the answers, and every answer's end of turn is one of its tokens.

        With it rows are what a model is trained on: answers without blanks around them, with the special tokens that
        the model reads a prompt with (whatever `add_special_tokens`), and closed by the tokenizer's eos where the
        template has no end of turn. `truncation` with `max_length` cuts at the end, never a slot.

        Args:
            conversation: messages, or a list of conversations.
            chat_template (`str`, *optional*): in place of the processor's own.
            tokenize (`bool`): whether to return what the model takes, rather than text.
            return_dict (`bool`): whether to return all of it, rather than `input_ids` alone.
            return_assistant_tokens_mask (`bool`): with both, adds `assistant_masks` `[batch, seq]`: 1 at an
                assistant's tokens.
            processor_kwargs, kwargs: as of every processor.

        Raises:
            ValueError: as [`encode_conversation`], and where `truncation` would cut a slot; the message names the
                conversation's place in the batch.
        """
        if tokenize and not isinstance(conversation[0], (list, tuple)):
            conversation = [conversation]  # what is returned is a batch, as of every processor
        if not (tokenize and return_dict and return_assistant_tokens_mask):
            return super().apply_chat_template(
                conversation,
                chat_template,
                tokenize=tokenize,
                return_dict=return_dict,
                processor_kwargs=processor_kwargs,
                **kwargs,
            )
        if self.is_encoder_decoder:
            raise ValueError(
                "An encoder-decoder's answers are its decoder's labels, not tokens of the conversation: make batches "
                "with ConversationCollator."
            )
        if kwargs.pop("add_generation_prompt", False) or kwargs.pop("continue_final_message", False):
            raise ValueError(
                "return_assistant_tokens_mask is for finished conversations: leave add_generation_prompt and "
                "continue_final_message out."
            )
        limits = dict(processor_kwargs or {})
        max_length = limits.pop("max_length", None) if limits.pop("truncation", False) else None
        padding = [limits.pop(name, None) for name in ("padding_side", "pad_to_multiple_of")]
        batch = super().apply_chat_template(
            conversation, chat_template, tokenize=True, return_dict=True, processor_kwargs=limits, **kwargs
        )
        tensor_type = kwargs.pop("return_tensors", "auto")
        rows = []
        for index, messages in enumerate(conversation):
            try:
                rows.append(encode_conversation(self, messages, max_length, chat_template=chat_template, **kwargs))
            except ValueError as error:
                raise ValueError(f"Conversation {index}: {error}") from error
        padded = self._pad([ids for ids, _ in rows], limits.get("padding", True), None, *padding)
        masks = []
        for attended, (_, is_answer) in zip(padded["attention_mask"], rows, strict=True):
            marks = iter(is_answer)
            masks.append([int(next(marks)) if word else 0 for word in attended])
        padded["assistant_masks"] = masks
        return BatchFeature({**batch, **BatchFeature(padded, None if tensor_type == "auto" else tensor_type)})

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    # --- images ------------------------------------------------------------------------------------------------

    def _images_per_text(self, images, texts: list[str]) -> list[list[Any]]:
        if images is None:
            return [[] for _ in texts]
        if isinstance(images, str) or (is_valid_image(images) and not isinstance(images, (list, tuple))):
            images = [images]
        if not isinstance(images, (list, tuple)):
            raise ValueError(f"Sample 0, image 0 is no image but {_describe(images)}: {_IMAGE_REMEDY}")
        if any(isinstance(entry, (list, tuple)) for entry in images):
            nested = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]
        else:
            remaining = iter(images)
            nested = [[next(remaining) for _ in range(count)] for count in self._split_images(len(images), texts)]
        if len(nested) != len(texts):
            raise ValueError(
                f"{len(nested)} lists of images for {len(texts)} texts: give one list, maybe empty, per text."
            )
        return [
            [self._as_image(image, index, place) for place, image in enumerate(entry) if image is not None]
            for index, entry in enumerate(nested)
        ]

    def _split_images(self, num_images: int, texts: list[str]) -> list[int]:
        """How many of a plain list of images belong to each text."""
        if len(texts) == 1:
            return [num_images]
        counts = [self._count_images(text) for text in texts]
        if num_images == len(texts) and all(count in (0, 1) for count in counts):
            return [1] * num_images
        if sum(counts) == num_images:
            return counts
        raise ValueError(
            f"Image features and image tokens do not match: {num_images} images for {len(texts)} texts, whose `<img>` "
            f"slots number {counts}. Give one image per text, or a list of images for each text."
        )

    def _count_images(self, text: str) -> int:
        count = text.count(IMAGE_TOKEN)
        return count // self.num_static_tokens if count % self.num_static_tokens == 0 else count

    @staticmethod
    def _as_image(image, index: int, place: int):
        try:
            if isinstance(image, str):
                return load_image(image)
            if is_valid_image(image) and getattr(image, "ndim", 3) in (2, 3):
                return image
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"Sample {index}, image {place} cannot be read ({error}): {_IMAGE_REMEDY}") from error
        raise ValueError(f"Sample {index}, image {place} is no image but {_describe(image)}: {_IMAGE_REMEDY}")

    # --- text --------------------------------------------------------------------------------------------------

    def _tokenize(
        self,
        index: int,
        text: str,
        num_images: int,
        add_special_tokens: bool | None,
        truncation: bool,
        max_length: int | None,
    ) -> list[int]:
        """Ids of one sample."""
        if not num_images:
            special = True if add_special_tokens is None else add_special_tokens
            limits = {"truncation": True, "max_length": max_length} if truncation and max_length else {}
            ids = self.words_tokenizer(text, add_special_tokens=special, **limits)["input_ids"]
            self.words_tokenizer.backend_tokenizer.no_truncation()
            return list(ids)
        if not any(token in text for token in SLOT_TOKENS):
            content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
            text = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        text = self._multiply_slots(index, text, num_images)
        special = self.is_encoder_decoder if add_special_tokens is None else add_special_tokens
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if self.add_bos and not special and ids[:1] != [self.tokenizer.bos_token_id]:
            ids.insert(0, self.tokenizer.bos_token_id)
        if truncation and max_length is not None and len(ids) > max_length:
            step = -1 if self.tokenizer.truncation_side == "left" else 1
            ids = ids[::step]
            # Special tokens at the end that is cut stay there, as where the tokenizer itself cuts.
            closing = set(self.tokenizer.all_special_ids) - set(self.slot_token_ids) if special else set()
            end = len(ids)
            while end > 1 and ids[end - 1] in closing:
                end -= 1
            room = max_length - (len(ids) - end)
            if set(self.slot_token_ids) & set(ids[room:end]):
                raise ValueError(
                    f"Sample {index} is {len(ids)} tokens long, and truncation to max_length={max_length} would cut a "
                    "slot: raise max_length, or shorten its text."
                )
            ids = (ids[:room] + ids[end:])[::step]
        return ids

    def _multiply_slots(self, index: int, text: str, num_images: int) -> str:
        """Writes each slot as often as the model has tokens for it, and checks the numbers."""
        written = text.count(IMAGE_TOKEN)
        if written not in (num_images, num_images * self.num_static_tokens):
            raise ValueError(
                f"Image features and image tokens do not match: sample {index} has {num_images} images and {written} "
                f"`{IMAGE_TOKEN}` slots. Write `{IMAGE_TOKEN}` once per image, or leave the slots to the processor."
            )
        try:
            return self.multiply_slots(text, once=written == num_images)
        except ValueError as error:
            raise ValueError(f"Sample {index} has {error}") from error

    def multiply_slots(self, text: str, once: bool = True) -> str:
        """
        Writes each slot of a text as often as the model has tokens for it, with one space between.

        Args:
            text (`str`): with `<img>` once per image, and `<img-d>`, `<img-q>` or `<img-q> <img-d>` once per request.
                Requests that are written in full stay as they are.
            once (`bool`): `False` if `<img>` is written in full already.

        Raises:
            ValueError: requests are neither written once nor in full, or the model has none.
        """
        if once:
            text = text.replace(IMAGE_TOKEN, " ".join([IMAGE_TOKEN] * self.num_static_tokens))
        return _REQUEST.sub(self._multiply_request, text)

    def _multiply_request(self, found: re.Match) -> str:
        if not self.num_dynamic_tokens:
            raise ValueError(
                f'a `{DYNAMIC_TOKEN}` slot, and a model with interaction="none" has no requests: leave it out.'
            )
        slots = _SLOT.findall(found.group())
        asking = [REQUEST_TOKEN] if self.keep_request_token else []
        one = asking + [DYNAMIC_TOKEN] * self.num_dynamic_tokens
        if not self.keep_request_token and REQUEST_TOKEN in slots:
            raise ValueError(
                f"an `{REQUEST_TOKEN}` slot, which is for models with keep_request_token=True: write "
                f"`{DYNAMIC_TOKEN}` once per request."
            )
        if slots in ([DYNAMIC_TOKEN], asking, [*asking, DYNAMIC_TOKEN]):
            return " ".join(one * self.num_request_rounds)
        count, rest = divmod(len(slots), len(one))
        if rest or slots != one * count:
            raise ValueError(
                f"a run of {slots.count(DYNAMIC_TOKEN)} `{DYNAMIC_TOKEN}` slots that is no multiple of "
                f"`{' '.join(one)}` (num_dynamic_tokens={self.num_dynamic_tokens}): write "
                f"`{' '.join([*asking, DYNAMIC_TOKEN])}` once per request."
            )
        return found.group()

    def _pad(
        self,
        rows: list[list[int]],
        padding: bool | str,
        max_length: int | None,
        padding_side: str | None,
        pad_to_multiple_of: int | None,
    ) -> dict[str, list[list[int]]]:
        width = max(map(len, rows), default=0)
        if padding == "max_length" and max_length is not None:
            width = max(width, max_length)
        if pad_to_multiple_of:
            width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
        pad = padding not in (False, "do_not_pad")
        if pad and self.tokenizer.pad_token_id is None and any(len(row) < width for row in rows):
            raise ValueError("The tokenizer has no pad_token: set one, such as its eos_token, to batch texts.")
        left = (padding_side or self.tokenizer.padding_side) == "left"
        input_ids, attention_mask = [], []
        for row in rows:
            fill = width - len(row) if pad else 0
            blank, ones = [self.tokenizer.pad_token_id] * fill, [1] * len(row)
            input_ids.append(blank + row if left else row + blank)
            attention_mask.append([0] * fill + ones if left else ones + [0] * fill)
        return {"input_ids": input_ids, "attention_mask": attention_mask}


_SLOT = re.compile(f"{REQUEST_TOKEN}|{DYNAMIC_TOKEN}")
_REQUEST = re.compile(rf"(?:{_SLOT.pattern})(?:\s*(?:{_SLOT.pattern}))*")

# Arguments the library hands to every processor; they concern other modalities or the tokenizer.
_TEXT_KWARGS = ("videos", "audio", "return_token_type_ids", "return_mm_token_type_ids", "return_offsets_mapping")

_IMAGE_REMEDY = "give a PIL image, an array or tensor [channels, height, width], a path or a URL."


def _num_patches(vision_model_name_or_path: str, **hub_kwargs: Any) -> int:
    """Patch tokens that a vision tower makes of a picture of its own size."""
    sizes = (None, None)
    if not is_open_clip(vision_model_name_or_path):
        config = AutoConfig.from_pretrained(vision_model_name_or_path, **hub_kwargs)
        config = getattr(config, "vision_config", config)
        sizes = tuple(getattr(config, name, None) for name in ("image_size", "patch_size"))
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f'visual_mapping="patch" takes a slot for each patch, and {vision_model_name_or_path} does not say in its '
            "configuration how many it has: give num_static_tokens=model.config.num_static_tokens."
        )
    return (sizes[0] // sizes[1]) ** 2


def _describe(value: Any) -> str:
    shape = f" of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"{type(value).__name__}{shape} {str(value)[:40]!r}"


__all__ = ["LMEyeProcessor", "add_slot_tokens"]
