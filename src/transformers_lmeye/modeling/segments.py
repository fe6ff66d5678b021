"""One left-to-right sweep over a batch: what is read when, and the cache that is kept.

Everything before a request is the same in the request pass and in the answer pass, so it is read once. A row with `T`
requests is cut into `T + 1` segments; each of the first `T` ends with the request token, which is dropped from the
cache once its hidden state is known, unless it has a slot of its own and stays. Rows may differ in the number and the
columns of their requests: a segment is padded on the right, and the cache is rolled before the next one so that
padding lies on the left of every row. Padding inside a row would be wrong for models that count columns (ALiBi,
sliding windows) whatever the position ids.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import DynamicCache


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
        return _padded_left_only(self.valid)


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
            nothing_between = bool(valid[0].all()) if start else _padded_left_only(valid[0])
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


def _segment(columns, valid, requesting, slots, device) -> Segment:
    return Segment(
        columns.to(device), valid.to(device), requesting.to(device), None if slots is None else slots.to(device)
    )


def _padded_left_only(valid: torch.Tensor) -> bool:
    """Whether no padding follows a word in any row of bool `[B, W]`."""
    return bool((valid[:, 1:] >= valid[:, :-1]).all())


def _padded_right_only(valid: torch.Tensor) -> bool:
    """Whether no word follows padding in any row of bool `[B, W]`."""
    return bool((valid[:, 1:] <= valid[:, :-1]).all())


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
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        index = order[:, None, :, None]
        layer.keys = layer.keys.gather(2, index.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(2, index.expand(-1, layer.values.shape[1], -1, layer.values.shape[3]))
    return mask.gather(1, order)


def cache_tensors(cache: DynamicCache) -> list[torch.Tensor]:
    """Keys and values of each layer in turn, for functions that take and return a cache as tensors."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def cache_from_tensors(tensors: tuple[torch.Tensor, ...]) -> DynamicCache:
    """The inverse of [`cache_tensors`]."""
    return DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True))) if tensors else DynamicCache()


__all__ = ["Segment", "SegmentPlan", "group_slots", "plan_segments", "roll_padding_left"]
