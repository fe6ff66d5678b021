"""Data sets of samples for the training loop: map-style, streaming, and with words alone mixed in."""

import random
from collections.abc import Iterator
from fractions import Fraction
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from datasets.distributed import split_dataset_by_node

from .rows import ROW_SOURCE, column_names_of
from .samples import BadSample, Reader


_BLOCK = 1024  # rows whose samples are counted together
_ROWS_AT_ONCE = 16  # of a stream: pictures of that many rows are in memory before the shuffle buffer


class SampleDataset(torch.utils.data.Dataset):
    """The samples of rows that can be asked for by number.

    Memory does not grow with the data: rows stay on disk, and where rows stand for several samples one byte or two
    each say for how many.

    Args:
        rows: as `load_rows` gives them.
        reader: makes samples of them, a `PairReader` or `ConversationReader`.
        skip_bad_samples: an item that cannot be read is a `BadSample` rather than an error.
        row_name: what ids call a row, to tell it from another data set's.

    Items are what the reader gives, their id `"row 7"`, or `"row 7 (id x)"` where rows have an id.

    Raises:
        ValueError: a column is missing; or, when an item is read, `UnreadableSample`.
    """

    def __init__(self, rows: datasets.Dataset, reader: Reader, skip_bad_samples: bool = False, row_name: str = "row"):
        reader.check_columns(rows.column_names)
        self.rows = rows
        self.reader = reader
        self.skip_bad_samples = skip_bad_samples
        self.row_name = row_name
        has_images = reader.image_column in rows.column_names
        self._texts = rows.remove_columns(reader.image_column) if has_images else rows
        self._counts = _count_samples(rows, reader)  # [rows], or None where every row is one sample
        if self._counts is not None:
            blocks = np.add.reduceat(self._counts, np.arange(0, len(self._counts), _BLOCK), dtype=np.int64)
            self._block_ends = np.cumsum(blocks)  # [blocks]

    def __len__(self) -> int:
        return len(self.rows) if self._counts is None else int(self._block_ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any] | BadSample:
        number, place = self._locate(index)
        row = self.rows[number]
        name = f"{self.row_name} {number}" + _own_id(row)
        return _read(self.reader, row, place, name, self.skip_bad_samples)

    def texts(self, index: int) -> list[str]:
        """The texts of a sample, its pictures neither read nor opened; none of a sample that has no readable text."""
        number, place = self._locate(index)
        return self.reader.texts(self._texts[number], place)

    def _locate(self, index: int) -> tuple[int, int]:
        """Row and place in its row of a sample."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no sample {index}: there are {len(self)}.")
        index = int(index) % len(self)
        if self._counts is None:
            return index, 0
        block = int(np.searchsorted(self._block_ends, index, side="right"))
        place = index - (int(self._block_ends[block - 1]) if block else 0)
        ends = np.cumsum(self._counts[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.int64)
        row = int(np.searchsorted(ends, place, side="right"))
        return block * _BLOCK + row, place - (int(ends[row - 1]) if row else 0)


class _Stream(torch.utils.data.IterableDataset):
    """Samples of which each data loader worker of each process reads its part.

    A subclass says what `part(index, num_parts, num_skipped)` is: the parts of one pass share no row and miss none.
    """

    def __init__(self):
        self._assignment = {"rank": 0, "num_ranks": 1, "batch_size": 1, "start_batch": 0}

    def assign(self, rank: int, num_ranks: int, batch_size: int, start_batch: int = 0) -> None:
        """Says which part of the stream this process reads, before its data loader starts.

        Args:
            rank, num_ranks: this process among those that read together.
            batch_size: samples of one batch of the data loader.
            start_batch: how many batches the run has had from the data loader already: reading goes on behind them,
                exactly as it would have, pictures of what is skipped unopened. The number of processes and workers and
                the batch size must be what they were.
        """
        if not 0 <= rank < num_ranks or batch_size < 1 or start_batch < 0:
            raise ValueError(
                f"rank={rank} of num_ranks={num_ranks}, batch_size={batch_size}, start_batch={start_batch}: ranks "
                "count from 0, batches have one sample or more."
            )
        self._assignment = {
            "rank": rank,
            "num_ranks": num_ranks,
            "batch_size": batch_size,
            "start_batch": start_batch,
        }

    def __iter__(self) -> Iterator[dict[str, Any] | BadSample]:
        rank, num_ranks, batch_size, start_batch = self._assignment.values()
        worker = torch.utils.data.get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The data loader takes batch i from worker i % num_workers, and begins with worker 0 again after resuming.
        number = (number + start_batch) % num_workers
        batches_had = len(range(number, start_batch, num_workers))
        return self.part(rank * num_workers + number, num_ranks * num_workers, batches_had * batch_size)

    def part(self, index: int, num_parts: int, num_skipped: int = 0) -> Iterator[dict[str, Any] | BadSample]:
        """The samples of one part of `num_parts`, in order, the first `num_skipped` left out and not opened."""
        raise NotImplementedError


class SampleStream(_Stream):
    """The samples of rows that are read one after another, from data of any size.

    Each data loader worker of each process (see `assign`) reads its own part: its own shards where they can be shared
    out evenly, else every so many-th row of shards that it shares with as few others as will do. Every row is read
    exactly once in a pass. With a shuffle buffer each pass has a new order: of the shards, and of the samples within
    the buffer. The order depends on the seed, the number of the pass and of the part, and on nothing else.

    Args:
        rows: as `load_rows(..., streaming=True)` gives them.
        reader: makes samples of them.
        shuffle_buffer: how many samples, pictures unopened, lie in the buffer they are drawn from; 0 leaves the order
            of the rows alone. Each worker has its own buffer: 1,000 pictures of 100 KB are 100 MB.
        seed: of the order.
        skip_bad_samples: a sample that cannot be read is a `BadSample`, in its place, rather than an error.
        num_passes: how often the rows are read; `None`, for ever.
        row_name: what ids call a row whose file does not say where it stands.

    Items are what the reader gives. Their id is where the row stands in its file, `"pairs.jsonl, line 7"`, where
    `load_rows` knows it, else its place in the part, and the row's own id.

    Raises:
        ValueError: a column is missing; a part of an endless stream holds no row; or `UnreadableSample`.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        reader: Reader,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        skip_bad_samples: bool = True,
        num_passes: int | None = None,
        row_name: str = "row",
    ):
        super().__init__()
        reader.check_columns(column_names_of(rows))
        self.rows = rows
        self.reader = reader
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.skip_bad_samples = skip_bad_samples
        self.num_passes = num_passes
        self.row_name = row_name

    def part(self, index: int, num_parts: int, num_skipped: int = 0) -> Iterator[dict[str, Any] | BadSample]:
        for number in count() if self.num_passes is None else range(self.num_passes):
            num_samples = 0
            for row, place, name in self._pass(number, index, num_parts):
                num_samples += 1
                if num_samples > num_skipped:
                    yield _read(self.reader, row, place, name, self.skip_bad_samples)
            num_skipped = max(num_skipped - num_samples, 0)
            if not num_samples and self.num_passes is None:
                raise ValueError(
                    f"Part {index} of {num_parts} of the data holds no row: use fewer processes or workers."
                )

    def _pass(self, number: int, index: int, num_parts: int) -> Iterator[tuple[dict[str, Any], int, str]]:
        """Row, place and name of one part's samples of one pass, in the order they are given."""
        samples = (
            (row, place, name)
            for row, name in self._rows(number, index, num_parts)
            for place in range(self.reader.num_samples(row))
        )
        if not self.shuffle_buffer:
            return samples
        return _shuffled(samples, self.shuffle_buffer, random.Random(f"{self.seed} {number} {index} {num_parts}"))

    def _rows(self, number: int, index: int, num_parts: int) -> Iterator[tuple[dict[str, Any], str]]:
        readers = _parts_per_share(self.rows.num_shards, num_parts)
        rows = split_dataset_by_node(self.rows, index // readers, num_parts // readers, "shards")
        if self.shuffle_buffer:
            # The epoch orders the shards, for every part of a pass alike, or rows were lost and read twice. It is set
            # on the new object: that of self.rows lies in memory that all workers share.
            rows.set_epoch(random.Random(f"{self.seed} {number}").randrange(1, 2**31))
        # By batches: iterating rows alone, `datasets` would split them among the data loader's workers once more.
        batches = rows.iter(_ROWS_AT_ONCE)
        read = (
            dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)
        )
        for place, row in enumerate(islice(read, index % readers, None, readers)):
            name = row.pop(ROW_SOURCE, None) or f"{self.row_name} {place} of part {index} of {num_parts}"
            yield row, name + _own_id(row)


class MixedDataset(torch.utils.data.Dataset):
    """A map-style data set with samples of words alone among its own; see `mix_texts`."""

    def __init__(self, data: SampleDataset, texts: SampleDataset, text_rate: float):
        if not len(texts):
            raise ValueError("The data set of texts is empty.")
        self.data = data
        self.text_data = texts
        self._rate = _Rate(text_rate)
        self._length = self._rate.length(len(data))
        self._first_text = 0

    def set_epoch(self, epoch: int) -> None:
        """Each pass goes on with the texts where the one before ended. The Trainer's data loader calls this."""
        self._first_text = epoch * (self._length - len(self.data))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any] | BadSample:
        data, place = self._locate(index)
        return data[place]

    def texts(self, index: int) -> list[str]:
        """As `SampleDataset.texts`."""
        data, place = self._locate(index)
        return data.texts(place)

    def _locate(self, index: int) -> tuple[SampleDataset, int]:
        if not -self._length <= index < self._length:
            raise IndexError(f"There is no sample {index}: there are {self._length}.")
        index = int(index) % self._length
        num_texts = self._rate.texts_among(index)
        if self._rate.is_text(index):
            return self.text_data, (self._first_text + num_texts) % len(self.text_data)
        return self.data, index - num_texts


class MixedStream(_Stream):
    """A stream with samples of words alone among its own; see `mix_texts`."""

    def __init__(self, data: SampleStream, texts: SampleStream, text_rate: float):
        super().__init__()
        if texts.num_passes is not None:
            raise ValueError("The stream of texts must repeat for ever: make it with num_passes=None.")
        self.data = data
        self.text_data = texts
        self._rate = _Rate(text_rate)

    def part(self, index: int, num_parts: int, num_skipped: int = 0) -> Iterator[dict[str, Any] | BadSample]:
        num_texts = self._rate.texts_among(num_skipped)
        texts = self.text_data.part(index, num_parts, num_texts)
        data = self.data.part(index, num_parts, num_skipped - num_texts)
        for position in count(num_skipped):
            if self._rate.is_text(position):
                yield next(texts)
                continue
            try:
                sample = next(data)
            except StopIteration:
                return
            yield sample


def mix_texts(
    data: SampleDataset | SampleStream, texts: SampleDataset | SampleStream, text_rate: float
) -> MixedDataset | MixedStream:
    """Mixes samples of words alone into a data set, so that skill in language is kept in view.

    Sample j of what comes out is a text exactly where floor((j + 1) rate) > floor(j rate): the rate is met to one
    sample, nothing is drawn. Every sample of `data` comes once in a pass; texts come in their own order and start anew
    when there are no more. In a stream this holds for each part by itself.

    Args:
        data: the samples with pictures.
        texts: those without, of the same kind, map-style or stream.
        text_rate: share of texts in what comes out, at least 0 and below 1.

    Raises:
        ValueError: the rate is out of range, there are no texts, or a stream of texts ends.
    """
    if isinstance(data, SampleDataset) != isinstance(texts, SampleDataset):
        raise TypeError("A stream is mixed with a stream, a map-style data set with a map-style data set.")
    return (MixedDataset if isinstance(data, SampleDataset) else MixedStream)(data, texts, text_rate)


class _Rate:
    """Which positions of a mixture are texts. In whole numbers, so that every process agrees."""

    def __init__(self, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"text_rate={rate}: it is the share of texts, at least 0 and below 1.")
        self.numerator, self.denominator = Fraction(rate).limit_denominator(1_000_000).as_integer_ratio()

    def texts_among(self, positions: int) -> int:
        """How many of the first positions are texts."""
        return positions * self.numerator // self.denominator

    def is_text(self, position: int) -> bool:
        return self.texts_among(position + 1) > self.texts_among(position)

    def length(self, others: int) -> int:
        """The fewest positions of which `others` are no texts."""
        return (others - 1) * self.denominator // (self.denominator - self.numerator) + 1 if others else 0


def _read(
    reader: Reader, row: dict[str, Any], place: int, name: str, skip_bad_samples: bool
) -> dict[str, Any] | BadSample:
    try:
        return reader.read(row, place, name)
    except ValueError as error:
        if not skip_bad_samples:
            raise
        return BadSample.from_error(name, error)


def _own_id(row: dict[str, Any]) -> str:
    return "" if row.get("id") is None else f" (id {row['id']})"


def _count_samples(rows: datasets.Dataset, reader: Reader) -> np.ndarray | None:
    """How many samples each row stands for, unsigned, `[rows]`; `None` where it is one each. Nothing but the columns
    that decide it is read, a few thousand rows at a time."""
    columns = reader.counting_columns(rows.column_names)
    if not columns or all(isinstance(rows.features[column], datasets.Value) for column in columns):
        return None
    counted = rows.select_columns(columns)
    is_list = len(columns) == 1 and isinstance(rows.features[columns[0]], datasets.List | datasets.LargeList)
    blocks = []
    for batch in (counted.with_format("arrow") if is_list else counted).iter(8192):
        if is_list:
            lengths = pyarrow.compute.list_value_length(batch[columns[0]]).fill_null(1)
            counts = np.maximum(lengths.to_numpy(), 1)
        else:
            values = zip(*batch.values(), strict=True)
            counts = np.array([reader.num_samples(dict(zip(columns, row, strict=True))) for row in values])
        blocks.append(counts.astype(np.min_scalar_type(counts.max())))
    if not blocks or all(block.max() == 1 for block in blocks):
        return None
    return np.concatenate(blocks)


def _parts_per_share(num_shards: int, num_parts: int) -> int:
    """How many parts read the same whole shards, each of them every so many-th row: the fewest with which the shares
    are alike enough, as many shards each, or so many that one more hardly counts."""
    shares = (shares for shares in range(num_parts, 0, -1) if num_parts % shares == 0)
    return num_parts // next(n for n in shares if num_shards % n == 0 or num_shards >= 8 * n)


def _shuffled(items: Iterator[Any], size: int, generator: random.Random) -> Iterator[Any]:
    """Items drawn from a buffer that is always full until they end."""
    buffer = list(islice(items, size))
    for item in items:
        drawn = generator.randrange(size)
        buffer[drawn], item = item, buffer[drawn]
        yield item
    generator.shuffle(buffer)
    yield from buffer


__all__ = ["MixedDataset", "MixedStream", "SampleDataset", "SampleStream", "mix_texts"]
