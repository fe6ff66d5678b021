"""Data sets of samples: which samples come, in what order, once each; resuming; words alone mixed in."""

import itertools
import json
import pickle
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from transformers_lmeye.data import (
    BadSample,
    ConversationReader,
    PairReader,
    SampleDataset,
    SampleStream,
    UnreadableSample,
    load_rows,
    mix_texts,
)


# Two cores or twenty: order and number of samples are what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Opener:
    """In place of `open_image`: gives the value, and remembers how often it was asked."""

    def __init__(self):
        self.opened = []

    def __call__(self, value):
        self.opened.append(value)
        if "bad" in str(value):
            raise ValueError("the picture is bad")
        return value


def _shards(folder: Path, sizes: list[int], lists: bool = False) -> str:
    """JSON lines files of that many rows each, ids counting through them; with `lists`, 1 to 3 captions a row."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        lines = []
        for _ in range(size):
            caption = [f"{number}.{i}" for i in range(number % 3 + 1)] if lists else f"{number}"
            lines.append(json.dumps({"id": number, "image": f"{number}.png", "caption": caption}))
            number += 1
        (folder / f"{shard:03}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "*.jsonl")


def _captions(samples) -> list[str]:
    return [sample["caption"] for sample in samples]


def _stream(path: str, opener: Opener | None = None, **options) -> SampleStream:
    reader = PairReader(open_image=opener or Opener())
    return SampleStream(load_rows(path, streaming=True), reader, **options)


def _loader(stream, rank=0, num_ranks=1, batch_size=4, start_batch=0, num_workers=0) -> DataLoader:
    stream.assign(rank, num_ranks, batch_size, start_batch)
    return DataLoader(stream, batch_size=batch_size, num_workers=num_workers, collate_fn=_captions)


# Shards that divide among the parts, that do not, fewer than parts, and many more.
LAYOUTS = {"even": [7, 9, 5, 8, 6, 7], "uneven": [7, 9, 5, 8, 6], "one": [37], "many": [2] * 50}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shuffle_buffer", [0, 11])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 6])
def test_parts_of_every_pass_hold_each_sample_once(tmp_path, layout, shuffle_buffer, num_parts):
    path = _shards(tmp_path / "rows", LAYOUTS[layout], lists=True)
    stream = _stream(path, shuffle_buffer=shuffle_buffer, seed=3, num_passes=2)
    expected = [f"{n}.{i}" for n in range(sum(LAYOUTS[layout])) for i in range(n % 3 + 1)]
    parts = [_captions(stream.part(index, num_parts)) for index in range(num_parts)]
    assert Counter(itertools.chain(*parts)) == Counter(expected * 2)
    first = _stream(path, shuffle_buffer=shuffle_buffer, seed=3, num_passes=1)
    once = [_captions(first.part(index, num_parts)) for index in range(num_parts)]
    assert sorted(itertools.chain(*once)) == sorted(expected)
    assert [part[: len(begun)] for part, begun in zip(parts, once, strict=True)] == once
    if num_parts == 1:
        assert (parts[0] == expected * 2) == (not shuffle_buffer)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_workers_of_all_ranks_read_each_sample_once(tmp_path, num_workers, num_ranks):
    path = _shards(tmp_path / "rows", LAYOUTS["even"], lists=True)
    seen = []
    for rank in range(num_ranks):
        stream = _stream(path, shuffle_buffer=5, num_passes=1)
        batches = list(_loader(stream, rank, num_ranks, num_workers=num_workers))
        assert all(len(batch) <= 4 for batch in batches)
        seen += itertools.chain(*batches)
    assert sorted(seen) == sorted(f"{n}.{i}" for n in range(42) for i in range(n % 3 + 1))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (1, 2), (2, 3)])
def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path, num_workers, rank, num_ranks):
    """At every batch of two passes and a bit, over an endless, shuffled stream."""
    path = _shards(tmp_path / "rows", LAYOUTS["uneven"], lists=True)
    num_batches = 2 * 70 // (4 * num_ranks) + 4
    options = {"shuffle_buffer": 9, "seed": 1}
    loader = _loader(_stream(path, **options), rank, num_ranks, num_workers=num_workers)
    whole = list(itertools.islice(loader, num_batches))
    starts = (1, num_batches // 2, num_batches - 1) if num_workers else range(1, num_batches)
    for start in starts:
        resumed = _loader(_stream(path, **options), rank, num_ranks, start_batch=start, num_workers=num_workers)
        assert list(itertools.islice(resumed, num_batches - start)) == whole[start:], start


def test_what_is_skipped_is_not_opened(tmp_path):
    path = _shards(tmp_path / "rows", [20])
    opener = Opener()
    stream = _stream(path, opener, shuffle_buffer=5)
    stream.assign(0, 1, 4, start_batch=6)  # behind the first pass and one batch of the second
    samples = list(itertools.islice(stream, 2))
    assert opener.opened == [sample["image"] for sample in samples]


def test_bad_samples_keep_their_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"image": f"{'bad' if n in (2, 5, 6) else ''}{n}.png", "caption": f"{n}"} for n in range(9)]
    lines = [json.dumps(row) for row in rows]
    lines[7] = '{"image": "7.png", "capt'
    path.write_text("\n".join(lines))
    stream = _stream(str(path), num_passes=1)
    samples = list(stream)
    bad = {n for n, sample in enumerate(samples) if isinstance(sample, BadSample)}
    assert bad == {2, 5, 6, 7}
    assert [sample["caption"] for n, sample in enumerate(samples) if n not in bad] == ["0", "1", "3", "4", "8"]
    assert samples[2] == BadSample("rows.jsonl, line 3", "unusable", "Sample rows.jsonl, line 3: the picture is bad")
    assert samples[7].kind == "broken record" and "rows.jsonl, line 8: it is no JSON" in samples[7].reason
    data = SampleDataset(load_rows(path), PairReader(open_image=Opener()), skip_bad_samples=True)
    assert [(sample.kind if isinstance(sample, BadSample) else sample["caption"]) for sample in data] == [
        (sample.kind if isinstance(sample, BadSample) else sample["caption"]) for sample in samples
    ]
    assert data[2].id == "row 2"
    strict = SampleDataset(load_rows(path), PairReader(open_image=Opener()))
    with pytest.raises(UnreadableSample, match="Sample row 2: the picture is bad"):
        strict[2]
    with pytest.raises(UnreadableSample, match=r"Sample rows.jsonl, line 3: the picture is bad"):
        list(_stream(str(path), skip_bad_samples=False))


def test_every_pass_and_seed_has_its_own_order(tmp_path):
    path = _shards(tmp_path / "rows", [10, 10, 10])
    passes = {}
    for seed in (0, 1):
        captions = _captions(_stream(path, shuffle_buffer=4, seed=seed, num_passes=2))
        passes[seed, 0], passes[seed, 1] = captions[:30], captions[30:]
        assert captions == _captions(_stream(path, shuffle_buffer=4, seed=seed, num_passes=2))
    assert all(sorted(order, key=int) == [f"{n}" for n in range(30)] for order in passes.values())
    assert len({tuple(order) for order in passes.values()}) == 4
    # Shards come in another order, too: with a buffer of 4 the first samples are those of the first shard.
    orders = [_captions(_stream(path, shuffle_buffer=1, seed=seed, num_passes=1)) for seed in range(8)]
    assert len({order[0] for order in orders}) == 3
    assert all(
        [int(n) // 10 for n in order] == sorted([int(n) // 10 for n in order], key=[int(n) // 10 for n in order].index)
        for order in orders
    )


@pytest.mark.parametrize(("num_shards", "num_parts", "shards_read"), [(6, 3, 2), (6, 4, 3), (5, 4, 5), (16, 4, 4)])
def test_a_part_reads_as_few_shards_as_will_do(tmp_path, num_shards, num_parts, shards_read):
    """Were it all of them where they do not divide evenly, 64 workers would read the data 64 times."""
    stream = _stream(_shards(tmp_path / "rows", [10] * num_shards), num_passes=1)
    parts = [_captions(stream.part(index, num_parts)) for index in range(num_parts)]
    assert sorted(itertools.chain(*parts), key=int) == [f"{n}" for n in range(10 * num_shards)]
    assert [len({int(caption) // 10 for caption in part}) for part in parts] == [shards_read] * num_parts


def test_the_buffer_mixes_far(tmp_path):
    """Samples of a row with several captions leave the buffer apart from each other."""
    path = _shards(tmp_path / "rows", [300])
    order = [int(caption) for caption in _captions(_stream(path, shuffle_buffer=100, num_passes=1))]
    moved = np.abs(np.array(order) - np.arange(300))
    assert moved.mean() > 30
    assert max(order[:50]) < 150  # nothing can come before it was read


def test_a_part_without_rows_is_refused_not_waited_for(tmp_path):
    stream = _stream(_shards(tmp_path / "rows", [2]))
    with pytest.raises(ValueError, match=r"Part 2 of 3 of the data holds no row: use fewer processes or workers"):
        next(stream.part(2, 3))
    with pytest.raises(ValueError, match="ranks count from 0"):
        stream.assign(2, 2, 4)


def test_streams_of_what_the_datasets_library_reads(tmp_path):
    """Parquet, Arrow on disk: columns known beforehand, no file and line, whole tables at once."""
    rows = datasets.Dataset.from_dict(
        {"image": [f"{n}.png" for n in range(40)], "caption": [f"{n}" for n in range(40)]}
    )
    (tmp_path / "shards").mkdir()
    for shard in range(4):
        rows.shard(4, shard, contiguous=True).to_parquet(tmp_path / "shards" / f"{shard}.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for path in (str(tmp_path / "shards" / "*.parquet"), str(tmp_path / "saved")):
        stream = _stream(path, num_passes=1)
        assert _captions(stream) == [f"{n}" for n in range(40)]
        assert next(iter(stream))["id"] == "row 0 of part 0 of 1"
        shuffled = _stream(path, shuffle_buffer=7, num_passes=1)
        for num_parts in (2, 3):
            parts = [_captions(shuffled.part(index, num_parts)) for index in range(num_parts)]
            assert sorted(itertools.chain(*parts), key=int) == [f"{n}" for n in range(40)]
        batches = list(_loader(_stream(path, shuffle_buffer=7, num_passes=1), num_workers=2))
        assert sorted(itertools.chain(*batches), key=int) == [f"{n}" for n in range(40)]


def test_workers_do_not_share_the_order_of_shards(tmp_path):
    """Each worker sets the order of its pass while the others are in other passes."""
    path = _shards(tmp_path / "rows", [1, 1, 1, 40])  # parts whose passes differ much in length
    stream = _stream(path, shuffle_buffer=2, seed=5)
    seen = list(itertools.islice(_loader(stream, batch_size=1, num_workers=2), 120))
    parts = [list(itertools.islice(_stream(path, shuffle_buffer=2, seed=5).part(n, 2), 60)) for n in range(2)]
    assert seen[0::2] == [[sample["caption"]] for sample in parts[0]]
    assert seen[1::2] == [[sample["caption"]] for sample in parts[1]]


@pytest.mark.parametrize("kind", ["lists", "mixed", "single"])
def test_samples_of_lists_are_found_by_number(tmp_path, kind):
    """Against lists unrolled by hand, over more rows than one block of counts."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(0, 4, 2500)
    sizes[1030] = 300  # more than a byte counts
    captions = [[f"{n}.{i}" for i in range(size)] for n, size in enumerate(sizes)]
    if kind == "mixed":
        captions = [texts[0] if len(texts) == 1 else texts for texts in captions]
    elif kind == "single":
        captions = [f"{n}" for n in range(2500)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"image": "a", "caption": c}) for c in captions))
    expected = [
        (n, c) for n, texts in enumerate(captions) for c in ((texts or [None]) if isinstance(texts, list) else [texts])
    ]
    data = SampleDataset(load_rows(path), PairReader(open_image=Opener()), skip_bad_samples=True)
    assert len(data) == len(expected)
    assert (data._counts is None) == (kind == "single")
    for index in [*range(0, len(data), 37), len(data) - 1, -1, 1023, 1024, 1025]:
        row, caption = expected[index]
        sample = data[index]
        if caption is None:
            assert (sample.id, sample.kind, data.texts(index)) == (f"row {row}", "no text", [])
        else:
            assert (sample["id"], sample["caption"], data.texts(index)) == (f"row {row}", caption, [caption])
    for index in (len(data), -len(data) - 1):
        with pytest.raises(IndexError, match="There is no sample"):
            data[index]
    if kind != "single":
        first = SampleDataset(load_rows(path), PairReader(lists="first", open_image=Opener()))
        assert len(first) == 2500


def test_counts_follow_selected_and_shuffled_rows(tmp_path):
    rows = datasets.Dataset.from_dict({"image": ["a"] * 6, "caption": [[f"{n}"] * n for n in range(6)]})
    data = SampleDataset(rows.shuffle(seed=0).select([5, 1, 0]), PairReader(open_image=Opener()), True)
    order = [len(rows.shuffle(seed=0)[n]["caption"]) for n in (5, 1, 0)]
    assert len(data) == sum(max(n, 1) for n in order)


def test_answers_beside_messages_are_counted_row_by_row(tmp_path):
    """A row that has messages is one sample, whatever else it holds; one without stands for each of its answers."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "m"}]
    rows = [
        {"messages": messages, "question": None, "answer": ["x", "y"]},
        {"messages": None, "question": "q", "answer": ["a", "b"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = SampleDataset(load_rows(path), ConversationReader())
    stream = SampleStream(load_rows(path, streaming=True), ConversationReader(), num_passes=1)
    for samples in ([data[n] for n in range(len(data))], list(stream)):
        assert [sample["messages"][-1]["content"][0]["text"] for sample in samples] == ["m", "a", "b"]
    assert [data.texts(n) for n in range(3)] == [["q", "m"], ["q", "a"], ["q", "b"]]


def test_texts_leave_pictures_alone(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [b"no picture"], "caption": ["words"]})
    data = SampleDataset(rows, PairReader())
    assert data.texts(0) == ["words"]
    assert "image" not in data._texts.column_names


TEXTS = [{"caption": f"text {n}"} for n in range(5)]


def _text_data(tmp_path) -> SampleDataset:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in TEXTS))
    return SampleDataset(load_rows(path), PairReader(image_column=None))


def _text_stream(tmp_path, **options) -> SampleStream:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in TEXTS))
    return SampleStream(load_rows(path, streaming=True), PairReader(image_column=None), **options)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_texts_are_mixed_in_at_their_rate(tmp_path, rate):
    rows = load_rows(_shards(tmp_path / "rows", [37]))
    data = SampleDataset(rows, PairReader(open_image=Opener()))
    mixed = mix_texts(data, _text_data(tmp_path), rate)
    samples = [mixed[n] for n in range(len(mixed))]
    is_text = [sample["image"] is None for sample in samples]
    # Independently: in rising multiples of the rate, a text wherever the next whole number is reached.
    expected = [int((j + 1) * rate + 1e-9) > int(j * rate + 1e-9) for j in range(len(mixed))]
    assert is_text == expected
    assert _captions(s for s in samples if s["image"] is not None) == [f"{n}" for n in range(37)]
    assert _captions(s for s in samples if s["image"] is None) == [f"text {n % 5}" for n in range(sum(is_text))]
    assert abs(sum(is_text) - rate * len(mixed)) < 1
    assert [mixed.texts(n) for n in range(len(mixed))] == [[sample["caption"]] for sample in samples]
    mixed.set_epoch(1)
    again = [mixed[n] for n in range(len(mixed))]
    assert _captions(s for s in again if s["image"] is None) == [
        f"text {n % 5}" for n in range(sum(is_text), 2 * sum(is_text))
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_mixed_streams_resume_exactly(tmp_path, num_workers):
    path = _shards(tmp_path / "rows", [11, 8])

    def mixed():
        texts = _text_stream(tmp_path, shuffle_buffer=3, seed=2)
        return mix_texts(_stream(path, shuffle_buffer=6), texts, 0.3)

    whole = list(itertools.islice(_loader(mixed(), num_workers=num_workers), 24))
    for start in (1, 2, 3, 7, 13):
        resumed = _loader(mixed(), start_batch=start, num_workers=num_workers)
        assert list(itertools.islice(resumed, 24 - start)) == whole[start:]
    captions = list(itertools.chain(*whole[:: num_workers or 1]))  # of one part
    assert ["text" in caption for caption in captions] == [
        int((j + 1) * 0.3 + 1e-9) > int(j * 0.3 + 1e-9) for j in range(len(captions))
    ]


def test_a_mixed_stream_holds_each_sample_once(tmp_path):
    path = _shards(tmp_path / "rows", [11, 8, 6])
    seen = []
    for rank in range(2):
        mixed = mix_texts(_stream(path, shuffle_buffer=6, num_passes=1), _text_stream(tmp_path), 0.3)
        seen += itertools.chain(*_loader(mixed, rank, 2, num_workers=2))
    assert sorted((caption for caption in seen if "text" not in caption), key=int) == [f"{n}" for n in range(25)]


def test_what_cannot_be_mixed(tmp_path):
    path = _shards(tmp_path / "rows", [3])
    data = SampleDataset(load_rows(path), PairReader(open_image=Opener()))
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="share of texts, at least 0 and below 1"):
            mix_texts(data, _text_data(tmp_path), rate)
    with pytest.raises(TypeError, match="A stream is mixed with a stream"):
        mix_texts(data, _text_stream(tmp_path), 0.1)
    with pytest.raises(ValueError, match="num_passes=None"):
        mix_texts(_stream(path), _text_stream(tmp_path, num_passes=1), 0.1)


def test_real_pictures_reach_the_workers(tmp_path):
    """The default opening of pictures, in worker processes; nothing of the data set fails to be sent there."""
    for shade in range(6):
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"image": f"{n}.png", "caption": f"{n}"}) for n in range(6)))
    reader = PairReader(image_folder=tmp_path)
    for data in (
        SampleDataset(load_rows(path), reader),
        SampleStream(load_rows(path, streaming=True), reader, num_passes=1),
    ):
        loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=list)
        samples = list(itertools.chain(*loader))
        pickle.loads(pickle.dumps(data))  # as it is sent to workers where they are not forked
        assert sorted((s["image"].getpixel((0, 0))[0], s["caption"]) for s in samples) == [
            (n, f"{n}") for n in range(6)
        ]
    assert isinstance(data, torch.utils.data.IterableDataset)
