"""Promise 8: every bad input has a message that names the sample and the remedy."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from transformers import CLIPVisionModelWithProjection, GPT2Config, PreTrainedModel

from transformers_lmeye import LMEyeConfig, LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.training.collators import ConversationCollator, PairCollator


class NoEmbeds(PreTrainedModel):
    """A language model that takes ids and nothing else."""

    config_class = GPT2Config

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.n_embd)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


def inputs(w: SimpleNamespace, *layouts: str, images: int) -> dict[str, torch.Tensor]:
    rows = tiny.batch([tiny.row(w.model.config, layout, i) for i, layout in enumerate(layouts)], "left")
    del rows["labels"]
    return {**rows, **({"pixel_values": tiny.pixels(images)} if images else {})}


def uneven(w: SimpleNamespace) -> dict[str, torch.Tensor]:
    """The second row lacks one of its dynamic slots."""
    batch = inputs(w, "img 3 req 2", "img 3 req 2", images=2)
    column = int((batch["input_ids"][1] == w.model.config.dynamic_token_id).nonzero()[0])
    batch["input_ids"][1, column] = tiny.FIRST_WORD
    return batch


def attach(w: SimpleNamespace, vision=None, language=None, **kwargs):
    return LMEyeForConditionalGeneration.from_vision_language_pretrained(
        str(vision or w.vision), str(language or w.language), **kwargs
    )


def vision_alone(w: SimpleNamespace) -> str:
    CLIPVisionModelWithProjection.from_pretrained(w.vision).save_pretrained(w.tmp / "tower")
    return w.tmp / "tower"


def wrong_backbone(w: SimpleNamespace):
    w.model.save_pretrained(w.tmp / "ipn", save_backbones=False)
    return LMEyeForConditionalGeneration.from_pretrained(
        w.tmp / "ipn", language_model_name_or_path=str(w.folders.language("llama", seed=1))
    )


def chat(answer: str) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "who?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


PICTURES = [tiny.picture(1), tiny.picture(2)]
# name: (what is done, error, fragments of its message: where it is, and what to do)
CASES: dict[str, tuple[Callable[[SimpleNamespace], object], type[Exception], list[str]]] = {
    # images and slots
    "processor: more images than slots": (
        lambda w: w.processor(images=[[PICTURES[0]], PICTURES], text=["who?", "<img> who? <img-d>"]),
        ValueError,
        ["Image features and image tokens do not match", "sample 1", "2 images", "1 `<img>`", "once per image"],
    ),
    "processor: fewer images than slots": (
        lambda w: w.processor(images=[[PICTURES[0]]], text=["<img> <img> who? <img-d>"]),
        ValueError,
        ["Image features and image tokens do not match", "sample 0", "1 image", "2 `<img>`"],
    ),
    "processor: images for fewer texts": (
        lambda w: w.processor(images=[[PICTURES[0]]], text=["who?", "what?"]),
        ValueError,
        ["1 lists of images for 2 texts", "per text"],
    ),
    "processor: a flat list that fits no text": (
        lambda w: w.processor(images=[*PICTURES, PICTURES[0]], text=["who?", "what?"]),
        ValueError,
        ["3 images for 2 texts", "list of images for each text"],
    ),
    "processor: no text": (lambda w: w.processor(images=PICTURES[0]), ValueError, ["Give a text"]),
    "model: more images than slots": (
        lambda w: w.model(**inputs(w, "img 3 req 2", "4", images=2)),
        ValueError,
        ["Image features and image tokens do not match", "2 images", "per sample: [1, 0]", "as many images"],
    ),
    "model: slots without images": (
        lambda w: w.model(**inputs(w, "img 3 req 2", images=0)),
        ValueError,
        ["Image features and image tokens do not match", "0 images", "per sample: [1]"],
    ),
    "generate: slots without images": (
        lambda w: w.model.generate(**inputs(w, "4", "img 3 req 2", images=0)),
        ValueError,
        ["Image features and image tokens do not match", "per sample: [0, 1]"],
    ),
    "generate: images without slots": (
        lambda w: w.model.generate(**inputs(w, "4", images=1)),
        ValueError,
        ["Image features and image tokens do not match", "1 image"],
    ),
    "perceive: no image": (lambda w: w.model.perceive(**inputs(w, "4", images=0)), ValueError, ["pixel_values"]),
    "model: images beside inputs_embeds": (
        lambda w: w.model(inputs_embeds=torch.zeros(1, 3, tiny.TEXT_WIDTH), pixel_values=tiny.pixels(1)),
        ValueError,
        ["input_ids"],
    ),
    # requests
    "model: a request before any image": (
        lambda w: w.model(**inputs(w, "img 3 req 2", "3 req 2 img 1 req 1", images=2)),
        ValueError,
        ["Sample 1", "no image stands before", "put `<img>` before"],
    ),
    "model: an incomplete request": (
        lambda w: w.model(**uneven(w)),
        ValueError,
        ["Sample 1", "4 dynamic slots", "num_dynamic_tokens=5", "once per request"],
    ),
    "generate: an incomplete request": (
        lambda w: w.model.generate(**uneven(w)),
        ValueError,
        ["Sample 1", "4 dynamic slots", "num_dynamic_tokens=5"],
    ),
    "processor: an incomplete request": (
        lambda w: w.processor(images=PICTURES, text=["who?", "<img> who? <img-d> <img-d> <img-d>"]),
        ValueError,
        ["Sample 1", "3 `<img-d>`", "num_dynamic_tokens=5", "once per request"],
    ),
    "processor: a request of a model without": (
        lambda w: LMEyeProcessor.from_vision_language_pretrained(str(w.vision), str(w.language), interaction="none")(
            images=PICTURES[0], text="<img> who? <img-d>"
        ),
        ValueError,
        ["Sample 0", 'interaction="none"', "leave it out"],
    ),
    "model: a request of a model without": (
        lambda w: attach(w, interaction="none")(**inputs(w, "img 3 req 2", images=1)),
        ValueError,
        ['interaction="none"', "leave `<img-d>` slots out"],
    ),
    "model: an <img-q> slot": (
        lambda w: w.model(input_ids=torch.tensor([[5, w.model.config.request_token_id]])),
        ValueError,
        ["<img-q>", "leave"],
    ),
    "model: more images than CLIP's text encoder has positions for": (
        lambda w: attach(w, interaction="clip_text")(**inputs(w, "img img img img img 3 req 2", images=5)),
        ValueError,
        ["5 images", "24", "fewer images", "cross_attention"],
    ),
    # images that are none
    "processor: a file that is not there": (
        lambda w: w.processor(images=[PICTURES[0], str(w.tmp / "absent.png")], text=["who?", "what?"]),
        ValueError,
        ["Sample 1, image 0", "absent.png", "a path or a URL"],
    ),
    "processor: a file that is no image": (
        lambda w: w.processor(images=[[PICTURES[0], str(w.broken)]], text="<img> <img> who? <img-d>"),
        ValueError,
        ["Sample 0, image 1", "give a PIL image"],
    ),
    "processor: a number": (
        lambda w: w.processor(images=[[PICTURES[0]], [3]], text=["who?", "what?"]),
        ValueError,
        ["Sample 1, image 0 is no image", "int", "give a PIL image"],
    ),
    "processor: a row of numbers": (
        lambda w: w.processor(images=[torch.zeros(5)], text="who?"),
        ValueError,
        ["Sample 0, image 0 is no image", "[5]", "give a PIL image"],
    ),
    # truncation
    "processor: truncation through a slot": (
        lambda w: w.processor(
            images=PICTURES, text=["who?", "what is the man doing?"], truncation=True, max_length=20
        ),
        ValueError,
        ["Sample 0", "max_length=20", "would cut a slot", "raise max_length"],
    ),
    # samples without a target
    "training: an empty caption": (
        lambda w: PairCollator(w.processor)([{"id": "coco-7", "image": PICTURES[0], "caption": " "}]),
        ValueError,
        ["Sample coco-7", "no target token", "caption is empty", "Leave the row out"],
    ),
    "training: a caption without room": (
        lambda w: PairCollator(w.processor, max_length=1)(
            [{"id": "coco-7", "image": PICTURES[0], "caption": "a cat"}]
        ),
        ValueError,
        ["Sample coco-7", "no target token", "max_length=1", "Raise max_length"],
    ),
    "training: a conversation without an answer": (
        lambda w: ConversationCollator(w.processor)([{"id": "llava-3", "messages": chat("a cat")[:1]}]),
        ValueError,
        ["Sample llava-3", "no target token"],
    ),
    # backbones
    "a language model without inputs_embeds": (
        lambda w: LMEyeForConditionalGeneration(
            LMEyeConfig(
                vision_config=w.model.config.vision_config,
                text_config=GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20).to_dict(),
                interaction="none",
            ),
            language_model=NoEmbeds(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)),
        ),
        ValueError,
        ["NoEmbeds", "inputs_embeds", "choose a language model"],
    ),
    "another backbone": (
        wrong_backbone,
        ValueError,
        ["language model at", "not the one this IPN was trained on", "fingerprint", "language_model_name_or_path="],
    ),
    "a vision model that sees nothing": (
        lambda w: attach(w, vision=w.language),
        ValueError,
        ["llama", "no vision tower", "such as CLIP"],
    ),
    "clip_text without CLIP's text encoder": (
        lambda w: attach(w, vision=vision_alone(w), interaction="clip_text"),
        ValueError,
        ['interaction="clip_text"', "text encoder", "clip_text_model_name_or_path", "cross_attention"],
    ),
    # stages, sizes
    "an unknown stage": (lambda w: w.model.freeze_for_stage("third"), ValueError, ["third", "pretrain", "instruct"]),
    "a stage with nothing to train": (
        lambda w: attach(w, interaction="none").freeze_for_stage("instruct"),
        ValueError,
        ["nothing to train", "instruct", "pretrain"],
    ),
    "resizing the table": (
        lambda w: w.model.resize_token_embeddings(120),
        ValueError,
        ["never resizes", "outside the table"],
    ),
    "fewer request vectors than dynamic tokens": (
        lambda w: attach(w, interaction="cross_attention", num_request_vectors=2),
        Exception,
        ["num_request_vectors=2", "num_dynamic_tokens=5"],
    ),
    "heads that do not divide the width": (
        lambda w: attach(w, interaction="cross_attention", interaction_hidden_size=28, interaction_num_heads=3),
        Exception,
        ["interaction_hidden_size=28", "interaction_num_heads=3"],
    ),
    "more patches than CLIP's text encoder has positions for": (
        lambda w: attach(w, interaction="clip_text", fine_grained_source="patch")(
            **inputs(w, "img img 3 req 2", images=2)
        ),
        ValueError,
        ["24", "num_fine_grained_tokens", "cross_attention"],
    ),
    "an unknown interaction": (lambda w: attach(w, interaction="telepathy"), Exception, ["interaction", "telepathy"]),
    # chats
    "a cache longer than the conversation": (
        lambda w: w.model.generate(
            **inputs(w, "img 3 req 2", images=1),
            past_key_values=w.model(**inputs(w, "img 9 req 2", images=1), use_cache=True).past_key_values,
        ),
        ValueError,
        ["past_key_values", "whole conversation"],
    ),
    "attention of a sequence with images": (
        lambda w: w.model.generate(
            **inputs(w, "img 3 req 2", images=1), output_attentions=True, return_dict_in_generate=True
        ),
        ValueError,
        ["output_attentions", "perceive"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(build, folders, tmp_path, case):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    vision, language = folders.vision(), folders.language()
    world = SimpleNamespace(
        model=build("llama", "cross_attention"),
        processor=LMEyeProcessor.from_vision_language_pretrained(str(vision), str(language)),
        folders=folders,
        vision=vision,
        language=language,
        tmp=tmp_path,
        broken=broken,
    )
    action, error, fragments = CASES[case]
    with pytest.raises(error) as raised:
        action(world)
    message = str(raised.value)
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in: {message}"
