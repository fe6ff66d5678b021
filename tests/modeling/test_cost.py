"""Promise 5: prefix read once, request pass once per sample whatever the beams, vision tower once."""

import pytest
import tiny
import torch


class Meter:
    """Rows and columns of each run of the language model's first layer; pictures of each run of the vision tower."""

    def __init__(self, model):
        self.reads: list[tuple[int, int]] = []
        self.pictures: list[int] = []
        layers = next(m for m in model.language_model.modules() if isinstance(m, torch.nn.ModuleList))
        layers[0].register_forward_pre_hook(self._layer, with_kwargs=True)
        model.vision_tower.register_forward_pre_hook(self._tower, with_kwargs=True)

    def _layer(self, module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        self.reads.append(tuple(states.shape[:2]))

    def _tower(self, module, args, kwargs):
        self.pictures.append(len(args[0] if args else kwargs["pixel_values"]))


def inputs_of(model, layouts, padding="left"):
    rows = [tiny.row(model.config, layout, index) for index, layout in enumerate(layouts)]
    inputs = tiny.batch(rows, padding)
    return inputs, tiny.pixels(sum(layout.split().count("img") for layout in layouts))


PREFIX, BEHIND, K, NEW = (
    8,
    2,
    5,
    6,
)  # "2 img 5 req 2": eight columns before the request, k dynamic tokens and two words after
PROMPT = "2 img 5 req 2"


@pytest.mark.parametrize("options", [{}, {"num_beams": 5}, {"do_sample": True, "num_return_sequences": 4}], ids=str)
@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generate(build, family, interaction, options):
    model = build(family, interaction)
    inputs, pictures = inputs_of(model, [PROMPT] * 3)
    del inputs["labels"]
    meter = Meter(model)
    model.generate(**inputs, pixel_values=pictures, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    assert meter.pictures == [3]
    first, second, *steps = meter.reads
    assert first == (3, PREFIX + 1), "prefix and request token, once per sample"
    assert second[1] == K + BEHIND, "dynamic tokens and what follows"
    expanded = 3 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    assert second[0] in (3, expanded)
    assert steps == [(expanded, 1)] * (NEW - 1)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_reads_each_column_once(build, grad):
    model = build("llama", "cross_attention")
    model.freeze_for_stage("instruct")
    layout = "img 3 req 1 =3 2 req 1 =3 1 img 2 req 1 =2"
    inputs, pictures = inputs_of(model, [layout] * 2)
    meter = Meter(model)
    with torch.set_grad_enabled(grad):
        model(**inputs, pixel_values=pictures)
    assert meter.pictures == [4]
    assert {rows for rows, _ in meter.reads} == {2}
    assert sum(columns for _, columns in meter.reads) == inputs["input_ids"].shape[1] + 3, (
        "every column, and 3 request tokens"
    )


def test_prefix_leaves_no_graph(build):
    """In stage 2 nothing before the first request trains, so nothing of it is kept for the backward pass."""
    model = build("llama", "cross_attention").train()

    def saved(words: int, stage: str) -> int:
        model.freeze_for_stage(stage)
        inputs, pictures = inputs_of(model, [f"1 img {words} req 1 =4"])
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            model(**inputs, pixel_values=pictures)
        return sum(kept)

    growth = saved(60, "instruct") - saved(20, "instruct")
    reference = saved(60, "pretrain") - saved(20, "pretrain")
    assert 0 < growth < 0.4 * reference  # the prefix's keys and values, which later columns attend to


def test_features_beforehand_spare_the_tower(build):
    model = build("llama", "cross_attention")
    inputs, pictures = inputs_of(model, [PROMPT])
    features = model.get_image_features(pictures)
    meter = Meter(model)
    labels = inputs.pop("labels")
    model(**inputs, labels=labels, image_features=features)
    model.generate(**inputs, image_features=features, max_new_tokens=2)
    assert meter.pictures == []


def test_text_alone_costs_nothing_more(build):
    model = build()
    inputs, _ = inputs_of(model, ["9", "7"])
    del inputs["labels"]
    meter = Meter(model)
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert meter.pictures == [] and meter.reads == [(2, 9), (2, 1), (2, 1)]
