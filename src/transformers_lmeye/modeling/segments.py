"""One left-to-right sweep over a batch: what is read when, and the cache that is kept.

Everything before a request is the same in the request pass and in the answer pass, so it is read once. A row with `T`
requests is cut into `T + 1` segments; each of the first `T` ends with the request token, which is dropped from the
cache once its hidden state is known, unless it has a slot of its own and stays. Rows may differ in the number and the
columns of their requests: a segment is padded on the right, and the cache is rolled before the next one so that
padding lies on the left of every row. Padding inside a row would be wrong for models that count columns (ALiBi,
sliding windows) whatever the position ids.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)


@dataclass
class Segment:
    """Columns of the batch that are read in one go.

    Args:
        columns (int `[B, W]`): the column of `input_ids` each position reads; any column where not valid.
        valid (bool `[B, W]`): `False` at padding.
        requesting (bool `[B]`): the rows that ask a request at the end of this segment.
        slots (int `[B, k]`): the columns of the dynamic slots the request fills; meaningless in rows not requesting.
            `None` where no row asks.
    """

    columns: torch.Tensor
    valid: torch.Tensor
    requesting: torch.Tensor
    slots: torch.Tensor | None = None

    @property
    def right_aligned(self) -> bool:
        """Whether padding lies on the left only, so that nothing has to be rolled afterwards."""
        return padded_left_only(self.valid)


@dataclass
class SegmentPlan:
    """Segments in reading order; `contiguous` if laid end to end they are the columns of the batch, in order."""

    segments: list[Segment]
    contiguous: bool


def plan_segments(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    dynamic_token_id: int,
    num_dynamic_tokens: int,
    start: int = 0,
    request_token_id: int | None = None,
    split_first: bool = False,
) -> SegmentPlan:
    """
    Cuts a batch before the first dynamic slot of every request; or, where requests have slots of their own, behind
    each of these.

    Args:
        input_ids (int `[B, S]`), attention_mask (`[B, S]`, 1 at words and slots, 0 at padding).
        dynamic_token_id (`int`): id of `<img-d>`.
        num_dynamic_tokens (`int`): slots one request fills.
        start (`int`): columns before this one are in the cache already.
        request_token_id (`int`, *optional*): id of `<img-q>`, where the request stays in the sequence.
        split_first (`bool`): whether the first `<img-q>` becomes a segment of its own, so that what lies before it can
            be read apart.

    Raises:
        ValueError: a row's dynamic slots are no multiple of `num_dynamic_tokens`; or an `<img-q>` is not followed by
            that many.
    """
    device = input_ids.device
    ids, mask = input_ids[:, start:].cpu(), attention_mask[:, start:].cpu().bool()
    num_rows, length = ids.shape
    slots = group_slots(ids, mask, dynamic_token_id, num_dynamic_tokens, request_token_id)
    if request_token_id is None:
        asked = [row[:, 0].tolist() for row in slots]
    else:
        asked = [
            ((row == request_token_id) & row_mask).nonzero().flatten().add(1).tolist()
            for row, row_mask in zip(ids, mask, strict=True)
        ]
    num_requests = [len(row) for row in slots]
    most = max(num_requests)
    cuts = [[0, *row, length] for row in asked]

    if all(cut == cuts[0] for cut in cuts):
        bounds = list(pairwise(cuts[0]))
        valid = [mask[:, begin:end] for begin, end in bounds]
        # Rows that agree are cut into plain column ranges, as long as no padding ends up inside a row.
        if most == 0:
            plain = start == 0 or _padded_right_only(valid[0])
        else:
            nothing_between = bool(valid[0].all()) if start else padded_left_only(valid[0])
            plain = nothing_between and all(map(torch.all, valid[1:-1])) and _padded_right_only(valid[-1])
        if plain:
            parts = [
                (begin, end, torch.stack([row[step] for row in slots]) + start if step < most else None)
                for step, (begin, end) in enumerate(bounds)
            ]
            if split_first and most and parts[0][1] > 1:
                begin, end, owned = parts[0]
                parts[:1] = [(begin, end - 1, None), (end - 1, end, owned)]
            segments = []
            for begin, end, owned in parts:
                columns = torch.arange(start + begin, start + end).expand(num_rows, -1)
                requesting = torch.full((num_rows,), owned is not None)
                segments.append(_segment(columns, mask[:, begin:end], requesting, owned, device))
            return SegmentPlan(segments, contiguous=True)

    # Rows are aligned at their last request, so that the usual batch of single questions has two segments.
    columns_of = [
        [row_mask[begin:end].nonzero().flatten() + begin for begin, end in pairwise(cut)]
        for row_mask, cut in zip(mask, cuts, strict=True)
    ]
    empty = torch.empty(0, dtype=torch.long)
    parts: list[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]] = []
    for step in range(most + 1):
        offsets = [step - most + num_requests[row] for row in range(num_rows)]
        read = [columns_of[row][offset] if offset >= 0 else empty for row, offset in enumerate(offsets)]
        requesting = torch.tensor([offset >= 0 and step < most for offset in offsets])
        owned = None
        if step < most:
            owned = torch.zeros(num_rows, num_dynamic_tokens, dtype=torch.long)
            for row in requesting.nonzero().flatten().tolist():
                owned[row] = slots[row][offsets[row]] + start
        parts.append((read, requesting, owned))
    if split_first and most:
        read, requesting, owned = parts[0]
        before = [part[:-1] if asks else part for part, asks in zip(read, requesting.tolist(), strict=True)]
        at = [part[-1:] if asks else empty for part, asks in zip(read, requesting.tolist(), strict=True)]
        parts[:1] = [(before, torch.zeros_like(requesting), None), (at, requesting, owned)]
    segments = []
    for step, (read, requesting, owned) in enumerate(parts):
        width = max(1, max(map(len, read)))
        columns = torch.zeros(num_rows, width, dtype=torch.long)
        valid = torch.zeros(num_rows, width, dtype=torch.bool)
        for row, part in enumerate(read):
            # Nothing lies before the first segment, so there padding goes left and no row has to be rolled.
            place = slice(width - len(part), width) if step == 0 and start == 0 else slice(0, len(part))
            columns[row, place] = part + start
            valid[row, place] = True
        segments.append(_segment(columns, valid, requesting, owned, device))
    return SegmentPlan(segments, contiguous=False)


def group_slots(
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    dynamic_token_id: int,
    num_dynamic_tokens: int,
    request_token_id: int | None = None,
) -> list[torch.Tensor]:
    """
    The dynamic slots of every request: a request owns the next `num_dynamic_tokens` slots, adjacent or not.

    Args:
        input_ids (int `[B, S]`), mask (bool `[B, S]`).
        dynamic_token_id, num_dynamic_tokens, request_token_id (`int`): as in [`plan_segments`].

    Returns:
        for each row, columns `[requests, num_dynamic_tokens]`.

    Raises:
        ValueError: as [`plan_segments`].
    """
    slots = []
    for row, (row_ids, row_mask) in enumerate(zip(input_ids, mask, strict=True)):
        owned = ((row_ids == dynamic_token_id) & row_mask).nonzero().flatten()
        if len(owned) % num_dynamic_tokens:
            raise ValueError(
                f"Sample {row} has {len(owned)} dynamic slots, which is no multiple of "
                f"num_dynamic_tokens={num_dynamic_tokens}: every request owns {num_dynamic_tokens} of them. Let the "
                "processor place the slots, or write `<img-d>` once per request."
            )
        owned = owned.view(-1, num_dynamic_tokens)
        if request_token_id is not None:
            asked = ((row_ids == request_token_id) & row_mask).nonzero().flatten()
            follow = len(asked) == len(owned) and bool(
                (asked < owned[:, 0]).all() and (asked[1:] > owned[:-1, -1]).all()
            )
            if not follow:
                raise ValueError(
                    f"Sample {row} has {len(asked)} `<img-q>` slots and {owned.numel()} `<img-d>` slots: each "
                    f"`<img-q>` is followed by the {num_dynamic_tokens} `<img-d>` that its request fills. Let the "
                    "processor place the slots."
                )
        slots.append(owned)
    return slots


def column_order(plan: SegmentPlan, length: int) -> torch.Tensor:
    """For each column of the batch, its place in the segments laid end to end; padding points at a word. `[B, S]`."""
    columns = torch.cat([segment.columns for segment in plan.segments], dim=1)
    valid = torch.cat([segment.valid for segment in plan.segments], dim=1)
    order = valid.long().argmax(dim=1, keepdim=True).repeat(1, length)
    start = int(columns[valid].min())
    rows, places = valid.nonzero().T
    order[rows, columns[rows, places] - start] = places
    return order


def _segment(columns, valid, requesting, slots, device) -> Segment:
    return Segment(
        columns.to(device), valid.to(device), requesting.to(device), None if slots is None else slots.to(device)
    )


def padded_left_only(valid: torch.Tensor) -> bool:
    """Whether no padding follows a word in any row of bool `[B, W]`."""
    return bool((valid[:, 1:] >= valid[:, :-1]).all())


def _padded_right_only(valid: torch.Tensor) -> bool:
    """Whether no word follows padding in any row of bool `[B, W]`."""
    return bool((valid[:, 1:] <= valid[:, :-1]).all())


class ReadingCache(DynamicCache):
    """
    The cache of models that keep more than keys and values: recurrent and convolution states, index keys.

    Keys are kept whole where the model itself would keep a window, so that any number of columns can be dropped or
    moved; masks cut the window out. While gradients are recorded an update leaves earlier states as they were.

    Args:
        config ([`PreTrainedConfig`]): of the language model.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            if type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
                self.layers[index] = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[index] = DynamicLayer()

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs):
        _renew(self.layers[layer_idx].conv_states, state_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs):
        _renew(self.layers[layer_idx].recurrent_states, state_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)


def _renew(states: dict[int, torch.Tensor | None], index: int) -> None:
    """Puts a copy in the place of a state about to be overwritten, which the backward pass may need."""
    if torch.is_grad_enabled() and states[index] is not None:
        states[index] = states[index].clone()


def empty_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache from which single columns can be dropped; recurrent states apart, which must be copied before."""
    cache = ReadingCache(config)
    return DynamicCache() if all(type(layer) in (DynamicLayer, DummyLayer) for layer in cache.layers) else cache


def is_recurrent(cache: Cache) -> bool:
    """Whether a cache holds states that columns cannot be dropped from."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def is_foreign(cache: Cache) -> bool:
    """Whether a cache has layers of another making - windows, fixed places, packed numbers, a model's own - whose
    columns can be added to, but neither dropped nor moved."""
    known = (DynamicLayer, DynamicIndexedLayer, DummyLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)
    return not all(type(layer) in known for layer in cache.layers)


def counts_columns(cache: Cache) -> bool:
    """Whether a cache tells how many columns are in it, which recurrent states alone do not."""
    return not is_recurrent(cache) or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def cache_length(cache: Cache | None) -> int:
    """
    Columns in a cache.

    Raises:
        ValueError: it holds recurrent states alone, which do not tell.
    """
    if cache is None:
        return 0
    if counts_columns(cache):
        return int(cache.get_seq_length())
    if any(any(layer.has_previous_state.values()) for layer in cache.layers if hasattr(layer, "has_previous_state")):
        raise ValueError(
            "A cache of recurrent states alone does not tell what has been read: leave past_key_values out and pass "
            "the whole conversation with all of its images."
        )
    return 0


def roll_padding_left(cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
    """
    Moves every row's padding to the left, in each layer of the cache, and drops columns that are padding in all rows.

    Args:
        cache (`DynamicCache`): keys and values of `[B, heads, C, width]` per layer; changed in place, functionally
            (no tensor is written to), so that gradients pass.
        mask (bool `[B, C]`): the columns that hold words or slots.

    Returns:
        the mask of the rolled cache, bool `[B, C']`.
    """
    order = mask.long().argsort(dim=1, stable=True)  # padding first, each part in its old order
    kept = max(1, int(mask.sum(dim=1).max()))
    order = order[:, mask.shape[1] - kept :]

    def rolled(states: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        shape = [1] * states.dim()
        shape[rows], shape[columns] = order.shape
        sizes = [-1 if dim in (rows, columns) else size for dim, size in enumerate(states.shape)]
        return states.gather(columns, order.view(shape).expand(sizes))

    for layer in cache.layers:
        _change_columns(layer, rolled)
    return mask.gather(1, order)


def _change_columns(layer, function: Callable[[torch.Tensor, int, int], torch.Tensor]) -> None:
    """Replaces every tensor of a layer that has columns by `function(tensor, dimension of rows, of columns)`."""
    for name, rows, columns in (
        ("keys", 0, 2),
        ("values", 0, 2),
        ("indexer_keys", 0, 1),
        ("indexer_position_ids", 1, 2),
    ):
        states = getattr(layer, name, None)
        if states is not None and states.dim() > columns:  # an untouched layer holds `None` or nothing
            setattr(layer, name, function(states, rows, columns))


def map_cache(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A cache of its own with `function` of every tensor in it; everything but tensors is taken as it is."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_cache(part, function) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_cache(part, function) for part in value)
    if isinstance(value, (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)):
        twin = copy.copy(value)
        vars(twin).update({name: map_cache(part, function) for name, part in vars(value).items()})
        return twin
    return value


def cache_tensors(cache: Cache | None) -> list[torch.Tensor]:
    """Every tensor of a cache, for functions that take and return a cache as tensors."""
    tensors: list[torch.Tensor] = []
    map_cache(cache, lambda tensor: tensors.append(tensor) or tensor)
    return tensors


def cache_from_tensors(cache: Cache | None, tensors: Iterable[torch.Tensor]) -> Cache | None:
    """A cache like `cache`, with these tensors in the order of [`cache_tensors`]."""
    tensors = iter(tensors)
    return map_cache(cache, lambda tensor: next(tensors))


def select_rows(cache: Cache, rows: torch.Tensor, length: int) -> Cache:
    """A cache of these rows alone, without the padding on their left: `length` columns."""
    chosen = map_cache(cache, lambda tensor: tensor)
    chosen.reorder_cache(rows)
    for layer in chosen.layers:
        if getattr(layer, "cumulative_length", 0):
            layer.cumulative_length = length
        _change_columns(layer, lambda states, _, columns: states[(slice(None),) * columns + (slice(-length, None),)])
    return chosen


def _pad_columns_left(layers: Sequence[Any]) -> None:
    """Gives one layer of several caches the columns of the longest, in place."""
    widths: list[int] = []

    def measure(states: torch.Tensor, _: int, columns: int) -> torch.Tensor:
        widths.append(states.shape[columns])
        return states

    def pad(states: torch.Tensor, _: int, columns: int) -> torch.Tensor:
        missing = max(widths) - states.shape[columns]
        return nn.functional.pad(states, (0, 0) * (states.dim() - 1 - columns) + (missing, 0))

    for change in (measure, pad):
        for layer in layers:
            _change_columns(layer, change)
    for layer in layers:
        if getattr(layer, "cumulative_length", 0):
            layer.cumulative_length = max(other.cumulative_length for other in layers)


def join_rows(caches: list[Cache], rows: list[torch.Tensor]) -> Cache:
    """
    One cache of groups of rows that were read apart: columns are padded on the left, states are stacked.

    Args:
        caches: of the groups; all of one model.
        rows (list of int `[b]`): the places their rows take.
    """
    caches = [map_cache(cache, lambda tensor: tensor) for cache in caches]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        _pad_columns_left(layers)
    order = torch.cat(rows).argsort()
    positions = [[getattr(layer, "indexer_position_ids", None) for layer in cache.layers] for cache in caches]
    joined = []
    for parts in zip(*map(cache_tensors, caches), strict=True):
        # All but one kind have their rows first; scalars have none.
        dim = int(any(parts[0] is layer for layer in positions[0]))
        whole = torch.cat(parts, dim).index_select(dim, order.to(parts[0].device)) if parts[0].dim() else parts[0]
        joined.append(whole)
    return cache_from_tensors(caches[0], joined)


def repeat_rows(cache: Cache, repeats: int) -> None:
    """Each row of a cache `repeats` times, in place."""
    num_rows = next(tensor.shape[0] for tensor in cache_tensors(cache) if tensor.dim() > 1)
    cache.reorder_cache(torch.arange(num_rows).repeat_interleave(repeats))


__all__ = ["ReadingCache", "Segment", "SegmentPlan", "group_slots", "plan_segments", "roll_padding_left"]
