"""What each kind of bad picture and bad record gets, read map-style and streaming: see `bad_records.py`."""

import datasets
import pytest
from bad_records import Case, outcome, print_outcomes, write_bad_records

from transformers_lmeye.data import BadSample, ConversationReader, PairReader, SampleDataset, SampleStream, load_rows
from transformers_lmeye.data.samples import UNREADABLE_SAMPLE_KINDS


READERS = {"pairs.jsonl": PairReader, "conversations.jsonl": ConversationReader}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "bad"


def _like(got, expected) -> bool:
    """Colours to within what JPEG does to them."""
    if isinstance(got, str) or isinstance(expected, str):
        return got == expected
    return all(abs(a - b) <= 4 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("file", READERS)
def test_each_gets_what_it_must(folder, file, streaming):
    cases = write_bad_records(folder)[file]
    expected = [(case.name, outcome) for case in cases for outcome in case.expected]
    reader = READERS[file](image_folder=folder)
    rows = load_rows(folder / file, streaming=streaming)
    if streaming:
        samples = list(SampleStream(rows, reader, num_passes=1))
    else:
        data = SampleDataset(rows, reader, skip_bad_samples=True)
        samples = [data[index] for index in range(len(data))]
    assert len(samples) == len(expected)
    got = [(name, outcome(sample)) for (name, _), sample in zip(expected, samples, strict=True)]
    assert [(a, b) for a, b in zip(got, expected, strict=True) if not _like(a[1], b[1])] == []
    broken = {case.name for case in cases if isinstance(case.line, bytes)}
    for (name, _), sample in zip(expected, samples, strict=True):
        if isinstance(sample, BadSample):
            assert sample.kind in UNREADABLE_SAMPLE_KINDS
            assert sample.reason.startswith(f"Sample {sample.id}")
            assert name in broken or f"(id {name})" in sample.id


def test_there_are_thirty_kinds_and_more(folder):
    cases: list[Case] = [case for cases in write_bad_records(folder).values() for case in cases]
    assert len({case.name for case in cases}) == len(cases)
    refused = [case for case in cases if any(isinstance(e, str) and e != "words" for e in case.expected)]
    assert len(refused) >= 30
    lines = []
    print_outcomes(folder, lines.append)
    assert len(lines) == 1 + sum(len(case.expected) for case in cases)
