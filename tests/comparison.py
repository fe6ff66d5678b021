"""Helpers of tests that compare a model with the plain computation in `reference.py`."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor


def rows_of(
    config: Any, layouts: list[str], seed: int = 0
) -> tuple[list[tuple[list[int], list[int], Tensor | None]], Tensor]:
    """(ids, labels, pictures) of each layout, without requests where the variant has none; and all pictures."""
    if config.interaction == "none":
        layouts = [" ".join(part for part in layout.split() if not part.startswith("req")) for layout in layouts]
    counts = [layout.split().count("img") for layout in layouts]
    pictures = tiny.pixels(sum(counts))
    rows = []
    for index, (layout, part) in enumerate(zip(layouts, pictures.split(counts), strict=True)):
        ids, labels = tiny.row(config, layout, seed + index)
        rows.append((ids, labels, part if len(part) else None))
    return rows, pictures


def inputs_of(rows: list[tuple[list[int], list[int], Tensor | None]], padding: str) -> dict[str, Tensor]:
    """The rows as one batch, labels inside."""
    return tiny.batch([(ids, labels) for ids, labels, _ in rows], padding)


def assert_same(
    got: Tensor, expected: Tensor, what: str = "", tolerance: float = 1e-5, smallest_scale: float = 1.0
) -> None:
    """Equal to `tolerance` times the largest expected value, which counts as `smallest_scale` at least."""
    got, expected = got.detach(), expected.detach()
    scale = max(smallest_scale, float(expected.abs().max()))
    assert got.shape == expected.shape, f"{what}: {list(got.shape)} is not {list(expected.shape)}"
    worst = float((got - expected).abs().max())
    assert worst <= tolerance * scale, f"{what}: {worst:.1e} apart at scale {scale:.1e}"


def assert_same_gradient(got: Tensor, expected: Tensor, what: str) -> None:
    """Gradients are small, and compared at their own scale."""
    assert_same(got, expected, what, tolerance=1e-4, smallest_scale=1e-3)


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The IPN's own parameters by name, CLIP's text encoder apart."""
    frozen = "interaction." if model.config.interaction == "clip_text" else "-"
    return {name: value for name, value in model.ipn.named_parameters() if not name.startswith(frozen)}


def assert_gradients(model: Any, plain: Any, rows: list, padding: str, images: dict[str, Any]) -> None:
    """Loss and every gradient are the plain ones: all parameters at once, then those of either stage."""
    trained = trained_parameters(model)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    loss = plain.loss(rows)
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    inputs = inputs_of(rows, padding)
    got = model(**inputs, **images).loss
    assert_same(got, loss, "loss")
    for name, ours in zip(trained, torch.autograd.grad(got, list(trained.values())), strict=True):
        assert float(expected[name].abs().max()) > 0, f"{name} has no part in the loss: any gradient would pass"
        assert_same_gradient(ours, expected[name], name)
    # In stage 2 nothing before the first request has a gradient, and a causal model reads it another way.
    for stage in ("pretrain",) if model.config.interaction == "none" else ("pretrain", "instruct"):
        model.freeze_for_stage(stage)
        chosen = [name for name, parameter in trained.items() if parameter.requires_grad]
        loss = model(**inputs, **images).loss
        got = torch.autograd.grad(loss, [trained[name] for name in chosen])
        for name, ours in zip(chosen, got, strict=True):
            assert_same_gradient(ours, expected[name], f"{name} in stage {stage}")


class Meter:
    """Counts what runs: rows and columns of each run of a language model's (or its encoder's) first layer, pictures of
    each run of the vision tower and of the Q-Former, requests of each run of the IPN."""

    def __init__(self, model: Any, first_layer: torch.nn.Module | None = None):
        self.reads: list[tuple[int, int]] = []
        self.pictures: list[int] = []
        self.queried: list[int] = []
        self.requests: list[int] = []
        if first_layer is None:
            first_layer = first_layer_of(model.language_model)
        first_layer.register_forward_pre_hook(self._layer, with_kwargs=True)
        model.vision_tower.register_forward_pre_hook(self._tower, with_kwargs=True)
        model.ipn.register_forward_pre_hook(lambda module, args: self.requests.append(len(args[0])))
        if model.qformer is not None:
            model.qformer.register_forward_pre_hook(lambda module, args: self.queried.append(len(args[0])))

    def _layer(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        self.reads.append(tuple(states.shape[:2]))

    def _tower(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.pictures.append(len(args[0] if args else kwargs["pixel_values"]))


def first_layer_of(model: torch.nn.Module) -> torch.nn.Module:
    """The first of a transformer's layers."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]


def saved_numbers(run) -> int:
    """How many numbers autograd keeps for the backward pass of `run()`."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        run()
    return sum(kept)
