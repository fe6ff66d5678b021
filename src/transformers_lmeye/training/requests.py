"""A start for stage 2: requests that can be told apart."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..modeling.interactive_perception import InteractivePerceptionNetwork
from ..modeling.modeling_lmeye import LMEyeForConditionalGeneration


def collect_requests(
    model: LMEyeForConditionalGeneration,
    collator: Callable[[list[Any]], dict[str, Any]],
    dataset: Iterable[Any],
    num_samples: int,
    batch_size: int = 32,
) -> torch.Tensor:
    """The requests `[R, d_h]` that `model` asks in the first `num_samples` samples; those without images ask none."""
    requests = []
    for samples in _batched(islice(dataset, num_samples), batch_size):
        batch = collator(samples)
        batch.pop("bad_samples", None)
        if "pixel_values" in batch or "image_features" in batch:
            perception = model.perceive(**{name: value.to(model.device) for name, value in batch.items()})
            requests += [] if perception.requests is None else [perception.requests]
    return torch.cat(requests) if requests else torch.empty(0)


@torch.no_grad()
def standardize_requests(ipn: InteractivePerceptionNetwork, requests: torch.Tensor) -> None:
    """
    Starts the request projection so that it sees what differs between requests, with unit variance.

    Nearly all of a hidden state is the same whatever is asked, so that a fresh projection hands the interaction one
    and the same vector, and stage 2 starts on a plateau. This folds mean and standard deviation of some requests into
    the projection: an affine map before it, so no parameter is added and nothing changes afterwards.

    Args:
        ipn: the network, before stage 2; changed in place.
        requests (`[R, d_h]`): what `perceive` gives for R prompts of the training data; a few hundred.

    Raises:
        ValueError: fewer than two requests, or a network without requests.
    """
    if ipn.config.interaction == "none":
        raise ValueError('A network with interaction="none" has no requests to standardize.')
    if len(requests) < 2:
        raise ValueError(f"Standardizing needs the requests of at least two prompts, not {len(requests)}.")
    requests = requests.float().to(ipn.image_token.device)
    projection = ipn.request_projection
    if isinstance(projection, nn.Sequential):  # cross_attention: layer norm with an affine map, then linear
        norm = projection[0]
        requests = nn.functional.layer_norm(requests, norm.normalized_shape, eps=norm.eps)
        deviation = requests.std(0).clamp(min=1e-6)
        norm.weight.copy_(1 / deviation)
        norm.bias.copy_(-requests.mean(0) / deviation)
    else:  # clip_text: the same map, folded into the linear layer
        deviation = requests.std(0).clamp(min=1e-6)
        projection.weight.div_(deviation)
        projection.bias.sub_(projection.weight @ requests.mean(0))


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


__all__ = ["collect_requests", "standardize_requests"]
