"""Promise 3: a batched sample gives the ids it gives alone, whatever its neighbours and their order."""

import itertools

import pytest
import tiny
import torch


PROMPTS = ["2 img 6 req 2", "7", "img 3 req 1 3 2 req 1 3 1 img 2 req 1", "1 img 1 img 2 req~ 1"]
STRATEGIES = {"greedy": {}, "beams": {"num_beams": 3}}


def generate(model, rows, padding, **options):
    """New ids of rows (ids, pictures), cut behind the first eos."""
    inputs = tiny.batch([(ids, ids) for ids, _ in rows], padding)
    images = [part for _, part in rows if part is not None]
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=torch.cat(images) if images else None,
        max_new_tokens=8,
        **options,
    )
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: ids.index(2) + 1] if 2 in ids else ids for ids in new]


def samples(model):
    counts = [layout.split().count("img") for layout in PROMPTS]
    parts = tiny.pixels(sum(counts)).split(counts)
    return [
        (tiny.row(model.config, layout, seed=index)[0], part if len(part) else None)
        for index, (layout, part) in enumerate(zip(PROMPTS, parts, strict=True))
    ]


@pytest.mark.parametrize("padding", ["left", "ragged"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_batch_equals_alone(build, family, strategy, padding):
    model = build(family, "cross_attention" if strategy == "greedy" else "clip_text")
    rows = samples(model)
    alone = [generate(model, [row], "left", **STRATEGIES[strategy])[0] for row in rows]
    assert len({tuple(ids) for ids in alone}) > 1, "rows that all say the same would hide a mix-up"
    assert generate(model, rows, padding, **STRATEGIES[strategy]) == alone


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_order_does_not_matter(build, strategy):
    model = build("mpt", "cross_attention")
    rows = samples(model)
    alone = [generate(model, [row], "left", **STRATEGIES[strategy])[0] for row in rows]
    assert len({tuple(ids) for ids in alone}) == len(rows)
    for order in list(itertools.permutations(range(len(rows))))[1::5]:
        got = generate(model, [rows[i] for i in order], "left", **STRATEGIES[strategy])
        assert got == [alone[i] for i in order], order


def test_order_of_pictures_matters(build):
    """Swapping two samples' pictures swaps what is seen: the promise above is not kept by ignoring them."""
    model = build("llama", "cross_attention")
    ids, _ = tiny.row(model.config, "img 3 req 2")
    first, second = tiny.pixels(2).split(1)
    a, b = generate(model, [(ids, first), (ids, second)], "left")
    assert a != b
    assert generate(model, [(ids, second), (ids, first)], "left") == [b, a]
