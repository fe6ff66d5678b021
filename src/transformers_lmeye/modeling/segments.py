"""One left-to-right sweep over a batch: what is read when, and the cache that is kept.

Everything before a request is the same in the request pass and in the answer pass, so it is read once. A row with `T`
requests is cut into `T + 1` segments; each of the first `T` ends with the request token, which is dropped from the
cache once its hidden state is known. Rows may differ in the number and the columns of their requests: a segment is
padded on the right, and the cache is rolled before the next one so that padding lies on the left of every row.
Padding inside a row would be wrong for models that count columns (ALiBi, sliding windows) whatever the position ids.
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
) -> SegmentPlan:
    """
    Cuts a batch before the first dynamic slot of every request.

    Args:
        input_ids (int `[B, S]`), attention_mask (`[B, S]`, 1 at words and slots, 0 at padding).
        dynamic_token_id (`int`): id of `<img-d>`.
        num_dynamic_tokens (`int`): slots one request fills.
        start (`int`): columns before this one are in the cache already.

    Raises:
        ValueError: a row's dynamic slots are no multiple of `num_dynamic_tokens`.
    """
    device = input_ids.device
    ids, mask = input_ids[:, start:].cpu(), attention_mask[:, start:].cpu().bool()
    num_rows, length = ids.shape
    is_slot = (ids == dynamic_token_id) & mask
    counts = is_slot.sum(dim=1)
    uneven = (counts % num_dynamic_tokens).nonzero().flatten().tolist()
    if uneven:
        raise ValueError(
            f"Sample {uneven[0]} has {int(counts[uneven[0]])} dynamic slots, which is no multiple of "
            f"num_dynamic_tokens={num_dynamic_tokens}: every request owns {num_dynamic_tokens} of them. Let the "
            "processor place the slots, or write `<img-d>` once per request."
        )
    num_requests = counts // num_dynamic_tokens
    most = int(num_requests.max())
    slots = [row.nonzero().flatten().view(-1, num_dynamic_tokens) for row in is_slot]
    cuts = [[0, *row[:, 0].tolist(), length] for row in slots]

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
            segments = []
            for step, (begin, end) in enumerate(bounds):
                columns = torch.arange(start + begin, start + end).expand(num_rows, -1)
                requesting = torch.full((num_rows,), step < most)
                owned = torch.stack([row[step] for row in slots]) + start if step < most else None
                segments.append(_segment(columns, valid[step], requesting, owned, device))
            return SegmentPlan(segments, contiguous=True)

    # Rows are aligned at their last request, so that the usual batch of single questions has two segments.
    columns_of = [
        [row_mask[begin:end].nonzero().flatten() + begin for begin, end in pairwise(cut)]
        for row_mask, cut in zip(mask, cuts, strict=True)
    ]
    segments = []
    for step in range(most + 1):
        offsets = [step - most + int(num_requests[row]) for row in range(num_rows)]
        empty = torch.empty(0, dtype=torch.long)
        read = [columns_of[row][offset] if offset >= 0 else empty for row, offset in enumerate(offsets)]
        width = max(1, max(map(len, read)))
        columns = torch.zeros(num_rows, width, dtype=torch.long)
        valid = torch.zeros(num_rows, width, dtype=torch.bool)
        requesting = torch.tensor([offset >= 0 and step < most for offset in offsets])
        owned = torch.zeros(num_rows, num_dynamic_tokens, dtype=torch.long)
        for row, part in enumerate(read):
            # Nothing lies before the first segment, so there padding goes left and no row has to be rolled.
            place = slice(width - len(part), width) if step == 0 and start == 0 else slice(0, len(part))
            columns[row, place] = part + start
            valid[row, place] = True
            if requesting[row]:
                owned[row] = slots[row][offsets[row]] + start
        segments.append(_segment(columns, valid, requesting, owned if step < most else None, device))
    return SegmentPlan(segments, contiguous=False)


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


__all__ = ["Segment", "SegmentPlan", "plan_segments", "roll_padding_left"]
